"""What a run leaves in its folder once it has trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cogsym.errors import RunStopped
from cogsym.records import reason, replacing
from cogsym.training.run_folder import RunFolder


def save(network: Any, tokenizer: Any, history: Sequence[dict[str, float]], card: str, folder: RunFolder) -> None:
    """Write the model, with its tokenizer and card, and the curves.

    Raises:
        RunStopped: they were not written; the last checkpoint is as it was.
    """
    from cogsym.training.curves import plot_curves  # matplotlib, which `from cogsym import train` does not wait for

    write(folder, folder.model, network, tokenizer, card=card)
    folder.check_held()
    with _intact(folder.picture):
        plot_curves(history, folder.picture)


def write(folder: RunFolder, path: Path, *parts: Any, card: str | None = None) -> None:
    """Write what has a `save_pretrained` into a new folder, with a card, and put it in its place once it is whole.

    Raises:
        RunStopped: it was not written.
    """
    folder.check_held()
    with _intact(path), replacing(path, folder.check_held) as new:
        for part in parts:
            part.save_pretrained(new)
        if card is not None:
            (new / "README.md").write_text(card, "utf-8")
        folder.check_replaced(path, new)


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise RunStopped(
            f"{path} was not written ({why}); the last checkpoint is intact, free some space and run again with "
            "--resume."
        ) from error
