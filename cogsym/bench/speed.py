"""How fast are matrix products here? A look of a fraction of a second, by which a quick run is sized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cogsym.bench import floor, method
from cogsym.bench.case import dtype_name

ROWS, WEIGHT = 256, (1536, 576)  # of SmolLM2-135M's largest product


@dataclass(frozen=True)
class Speed:
    """What this machine multiplies.

    Attributes:
        rates: FLOP/s of products, by precision; the fastest first.
    """

    rates: dict[torch.dtype, float]

    @property
    def dtype(self) -> torch.dtype:
        """The precision that a user here would choose: the fastest."""
        return next(iter(self.rates))

    @property
    def rate(self) -> float:
        """FLOP/s of products in that precision."""
        return self.rates[self.dtype]

    def __str__(self) -> str:
        both = " and ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype_name(dtype)}" for dtype, rate in self.rates.items())
        return f"Products run at {both} here."


def measured(device: torch.device) -> Speed:
    """The speed of products in bfloat16 and in float32, each timed for a twentieth of a second."""
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        products = floor.Products(dtype, device)
        products.add_linear(ROWS, WEIGHT, input_gradient=True, weight_gradient=False)
        products()
        rates[dtype] = products.flops / method.seconds_a_call(products, device)
    return Speed(dict(sorted(rates.items(), key=lambda item: -item[1])))
