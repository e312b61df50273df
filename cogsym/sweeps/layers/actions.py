"""What may be done to a decoder layer: one table, which every other part of a sweep reads.

Another package adds an action with `register_action`, or with an entry point of the group "cogsym.actions" (see
`cogsym.registry`), such as the MLPs of a base checkpoint under the model's own attention:

    register_action("revert_mlp", Action("p", attention="model", mlp="base", label="with the base's MLP"))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cogsym.errors import CogsymError
from cogsym.registry import Registry

Weights = Literal["model", "base"]

KEEP = "keep"  # what is done to a layer that nothing is said of
SKIP = "skip"  # what sets of configurations do to their layers unless told


@dataclass(frozen=True)
class Action:
    """What is done to a layer.

    Attributes:
        letter: its one character in codes of configurations.
        attention: whose weights the attention half has, the "model"'s or those of the "base" checkpoint; None is
            nobody's: what it adds to the residual stream is gone.
        mlp: the same of the MLP half.
        label: what became of the layers, for the axes of pictures, such as "ablated".
    """

    letter: str
    attention: Weights | None
    mlp: Weights | None
    label: str

    @property
    def whole(self) -> bool:
        """Both halves are treated alike, so that a layer that is computed as one can take it."""
        return self.attention == self.mlp

    @property
    def needs_base(self) -> bool:
        """A half has the weights of the base checkpoint."""
        return "base" in (self.attention, self.mlp)


_letters: dict[str, str] = {}  # whose each is


def _check(name: str, action: Action) -> None:
    letter = action.letter
    if len(letter) != 1 or letter.isspace() or not letter.isprintable():
        raise CogsymError(f"The action {name} has the letter {letter!r}, expected one character that can be seen.")
    if letter in _letters:
        raise CogsymError(f"The action {name} has the letter {letter!r} of {_letters[letter]}; give it another one.")
    _letters[letter] = name


ACTIONS = Registry[Action]("action", "cogsym.actions", _check)


def register_action(name: str, action: Action) -> None:
    """Make an action known under a name, with which configurations, files of them and `--action` name it.

    Raises:
        CogsymError: the name or the letter is another action's.
    """
    ACTIONS.register(name, action)


register_action(KEEP, Action(".", "model", "model", "kept"))
register_action(SKIP, Action("s", None, None, "ablated"))
register_action("skip_attention", Action("a", None, "model", "without attention"))
register_action("skip_mlp", Action("m", "model", None, "without MLP"))
register_action("revert", Action("r", "base", "base", "reverted to the base"))
