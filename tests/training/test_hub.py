"""Uploading the trained model, with the hub's upload replaced: there is no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command_line import Done

BIG = ["--length", "64", "--batch-size", "2", "--dtype", "fp32", "--steps", "1"]


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is uploaded; an error among it is raised instead."""
    given: list[Any] = []

    def upload(self: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if given:
            raise given.pop()
        given.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    def create(self: Any, name: str, exist_ok: bool) -> huggingface_hub.RepoUrl:
        assert exist_ok
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name if '/' in name else f'someone/{name}'}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return given


def test_the_model_s_folder_is_uploaded_as_it_is(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path, pushed: list[Any]
) -> None:
    args = ["train", model_folder, "--data", f"{text_file}#sw", "--out", tmp_path / "out", *BIG]
    done = cogsym(*args, "--push-to-hub", "my-model")
    assert done.returncode == 0, done.stderr
    assert "pushed to https://huggingface.co/someone/my-model" in done.stderr
    (uploaded,) = pushed
    assert uploaded == ("someone/my-model", sorted(path.name for path in (tmp_path / "out" / "model").iterdir()))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded[1])


@pytest.mark.parametrize(("error", "status"), [(OSError("no route\nto it"), 1), (KeyboardInterrupt(), 130)])
def test_an_upload_that_fails_leaves_the_model_and_says_how_to_push_it(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path, pushed: list[Any],
    error: BaseException, status: int,
) -> None:  # fmt: skip
    pushed.append(error)
    out = tmp_path / "out"
    args = ["train", model_folder, "--data", f"{text_file}#sw", "--out", out, *BIG, "--push-to-hub", "me/it"]
    done = cogsym(*args)
    why = "no route" if status == 1 else "it was interrupted"
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == (
        f"cogsym: The model is whole in {out / 'model'} and was not pushed to me/it ({why}); push it with "
        f"`hf upload me/it {out / 'model'}`."
    )
    written = (out / "model" / "model.safetensors").read_bytes()
    assert cogsym(*args, "--resume").returncode == 0  # which pushes it too
    assert pushed[0][0] == "me/it" and (out / "model" / "model.safetensors").read_bytes() == written


def test_a_push_that_could_not_be_is_refused_before_the_run(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, pushed: list[Any],
) -> None:  # fmt: skip
    args = ["train", model_folder, "--data", f"{text_file}#sw", "--out", tmp_path / "out", *BIG, "--push-to-hub"]
    assert "--push-to-hub is 'a/b/c', expected the name of a repository" in complaint(*args, "a/b/c")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    told = "--push-to-hub is me/it and there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN."
    assert complaint(*args, "me/it") == f"cogsym: {told}"
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    assert "HF_HUB_OFFLINE forbids the network; unset it." in complaint(*args, "me/it")
    assert not (tmp_path / "out").exists() and not pushed
