"""Hooks on a module, which fire only where the module itself is called."""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers leaves hooks on attention modules once any output was captured; they act only when asked to.
_CAPTURE_MODULE = "transformers.utils.output_capturing"


def hook_on(module: nn.Module) -> bool:
    """Whether something waits on the module."""
    waiting = [hooks for hooks in map(vars(module).__getitem__, HOOKS) if hooks]
    return any(getattr(hook, "__module__", None) != _CAPTURE_MODULE for hooks in waiting for hook in hooks.values())
