"""Load a model and its tokenizer from a folder or the hub: safetensors only, no remote code, nothing left at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cogsym.errors import CogsymError


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A decoder language model from a local folder or a hub id.

    Args:
        name: a folder that `save_pretrained` wrote, or the id of a model on the hub.
        dtype: of the weights; None takes the checkpoint's own.

    Raises:
        CogsymError: no such folder, no safetensors in it, a damaged file, weights that are missing or do not fit.
    """
    folder = check_model_folder(name)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder or name,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CogsymError(f"The model {str(name)!r} does not load: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers fills these in at random and only warns.
        raise CogsymError(
            f"The model {str(name)!r} lacks {len(missing)} of its weights, such as {missing[0]}; "
            "expected a complete checkpoint of a causal language model."
        )
    return model


def load_config(name: str | Path) -> Any:
    """The model's configuration, without its weights.

    Raises:
        CogsymError: there is none, or it is not understood.
    """
    folder = check_model_folder(name)
    try:
        return AutoConfig.from_pretrained(folder or name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CogsymError(f"The model {str(name)!r} is not understood: {_first_line(error)}") from error


def load_tokenizer(name: str | Path) -> Any:
    """The fast tokenizer that belongs to a model.

    Raises:
        CogsymError: there is none.
    """
    folder = check_model_folder(name)
    try:
        return AutoTokenizer.from_pretrained(folder or name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CogsymError(
            f"The tokenizer of {str(name)!r} does not load ({_first_line(error)}); expected tokenizer.json and "
            "tokenizer_config.json beside the model."
        ) from error


def check_model_folder(name: str | Path) -> Path | None:
    """The local folder that `name` means, its files looked over; None for a hub id.

    Raises:
        CogsymError: `name` looks like a path and no folder is there, or the folder is no model in safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1 or folder.exists():
            raise CogsymError(f"There is no model folder {str(name)!r}; give a folder that save_pretrained wrote.")
        return None
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CogsymError(
            f"The folder {str(name)!r} holds adapters without their model; save the model with the adapters merged "
            "(merge_and_unload), or give the peft model itself in Python."
        )
    if not (folder / "config.json").is_file():
        raise CogsymError(f"The folder {str(name)!r} holds no config.json; give a folder that save_pretrained wrote.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CogsymError(
            f"The folder {str(name)!r} holds no .safetensors file and cogsym unpickles nothing; "
            "load the model where you trust it and save it again with save_pretrained."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise CogsymError(f"{file} is damaged ({_first_line(error)}); fetch or write it again.") from error
    return folder


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__
