"""The trained model on the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cogsym.errors import RunStopped, SettingError


def check_hub(name: str | None) -> None:
    """Refuse, before a run, a name that the model could not be uploaded to at its end.

    Raises:
        SettingError: it is no name of a repository, there is no token, or no network is to be asked.
    """
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise SettingError(
            "push_to_hub", f"is {name!r}, expected the name of a repository, such as my-name/my-model."
        ) from None
    if huggingface_hub.is_offline_mode():
        raise SettingError("push_to_hub", f"is {name} and HF_HUB_OFFLINE forbids the network; unset it.")
    if not huggingface_hub.get_token():
        raise SettingError(
            "push_to_hub",
            f"is {name} and there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN.",
        )


def push(model: Path, name: str) -> str:
    """Upload a model's folder as it is, into a repository that is made where there is none.

    Args:
        model: the folder.
        name: of the repository.

    Returns:
        The model's address.

    Raises:
        RunStopped: it was not uploaded, whole; the folder is as it was.
    """
    api = huggingface_hub.HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=model, commit_message="Trained with cogsym")
    except (Exception, KeyboardInterrupt) as error:  # whatever a network does
        why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else str(error).strip().partition("\n")[0]
        raise RunStopped(
            f"The model is whole in {model} and was not pushed to {name} ({why or type(error).__name__}); push it with "
            f"`{shlex.join(['hf', 'upload', name, str(model)])}`.",
            130 if isinstance(error, KeyboardInterrupt) else 1,
        ) from error
    return str(repository)
