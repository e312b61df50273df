"""What `cogsym.explain` says of layers on our operations here: with the extension, without it, or with one forced."""

from __future__ import annotations

import torch

from cogsym.ops import route


def slower(*operations: str) -> list[str]:
    """Its reasons why operations are not computed by what is fastest on a CPU, for those that are not."""
    routes = {name: route(name, torch.device("cpu"), torch.float32) for name in operations}
    return [f"{name} on {to.backend}: {to.reason}" for name, to in routes.items() if to.reason]


ATTENTION = route("attention", torch.device("cpu"), torch.float32).backend
MLP = route("gated_activation", torch.device("cpu"), torch.float32).backend
SLOWER_ATTENTION, SLOWER_MLP = slower("attention", "rotary"), slower("gated_activation")
PATH = ATTENTION if ATTENTION == MLP else f"attention {ATTENTION}, MLP {MLP}"
SLOWER = [*SLOWER_ATTENTION, *SLOWER_MLP]
TOLD = f"{PATH} ({'; '.join(SLOWER)})" if SLOWER else PATH
