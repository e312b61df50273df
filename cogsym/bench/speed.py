"""How fast are matrix products here? A look of a fraction of a second, by which a quick run is sized."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from cogsym.bench import floor, method
from cogsym.bench.case import dtype_name
from cogsym.bench.method import Variant
from cogsym.ops.products import native

ROWS, WEIGHT = 256, (1536, 576)  # of SmolLM2-135M's largest product
ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """What this machine multiplies.

    Attributes:
        dtype: the precision that a user here would choose, as `--dtype auto` does.
        rates: FLOP/s of products, by precision.
    """

    dtype: torch.dtype
    rates: dict[torch.dtype, float]

    @property
    def rate(self) -> float:
        """FLOP/s of products in the precision that is chosen."""
        return self.rates[self.dtype]

    def __str__(self) -> str:
        both = " and ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype_name(dtype)}" for dtype, rate in self.rates.items())
        return f"Products run at {both} here."


def measured(device: torch.device) -> Speed:
    """The speed of products in bfloat16 and in float32: by turns, so that what else the machine does falls on both."""
    variants, flops = {}, 0
    for dtype in (torch.bfloat16, torch.float32):
        products = floor.Products(dtype, device)
        products.add_linear(ROWS, WEIGHT, input_gradient=True, weight_gradient=False)
        variants[str(dtype)], flops = Variant(products), products.flops
    method.first_calls(variants, device)
    rounds = method.interleaved(variants, device, rounds=ROUNDS, seconds=0.02, warm_up=False)
    seconds = {dtype: statistics.median(rounds[str(dtype)]["seconds"]) for dtype in (torch.bfloat16, torch.float32)}
    dtype = torch.bfloat16 if device.type == "cuda" or native(torch.bfloat16) else torch.float32
    return Speed(dtype, {dtype: flops / t for dtype, t in seconds.items()})
