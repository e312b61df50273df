"""Forwards of ours on modules of a model: put on an instance, never on a class, and taken off again."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

RECORD = "_cogsym"  # the attribute of a prepared model that says what was done to it
_ATTACHED = (
    "_cogsym_forward"  # the attribute of a module that our forward reads; without it, it does nothing of its own
)


def attach(module: nn.Module, forward: Any, record: Any) -> None:
    """Give a module a forward of ours in the place of its class's; one that another library has put there stays.

    Args:
        module: its class stays as it is.
        forward: a function of the module and the arguments. What another library puts around it may outlive `detach`,
            so where `attachment` finds nothing it must do what the class's forward does.
        record: what it needs to know.
    """
    module.__dict__[_ATTACHED] = record
    if "forward" not in vars(module):
        # A partial, as a bound method does not survive pickling while its module is still being rebuilt.
        module.__dict__["forward"] = partial(forward, module)


def detach(module: nn.Module, forward: Any) -> Any:
    """Take off what `attach` gave, and nothing else; the record."""
    if getattr(vars(module).get("forward"), "func", None) is forward:
        del module.__dict__["forward"]
    return vars(module).pop(_ATTACHED, None)


def attachment(module: nn.Module) -> Any:
    """The record that `attach` gave, or None."""
    return vars(module).get(_ATTACHED)


def foreign_forward(module: nn.Module) -> bool:
    """Whether the module has a forward that is neither its class's nor ours."""
    forward = vars(module).get("forward")
    return forward is not None and (attachment(module) is None or getattr(forward, "args", None) != (module,))


def attached(module: nn.Module, forward: Any) -> bool:
    """Whether the module's forward is this one, also inside what accelerate's hooks have put around it."""
    return any(getattr(vars(module).get(name), "func", None) is forward for name in ("forward", "_old_forward"))
