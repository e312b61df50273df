"""Floors: matrix products and copies that no method can do without, to be timed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogsym.models import Block

ROWS = COLUMNS = 2048  # of a product's outcome at a time, where there are many: they stay in cache


class Products:
    """Matrix products into memory that is there. Equal shapes share their operands."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.flops = 0
        self._dtype, self._device = dtype, device
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []
        self._operands: dict[tuple[int, int], Tensor] = {}

    def add_linear(self, rows: int, weight: tuple[int, int], *, input_gradient: bool, weight_gradient: bool) -> None:
        """A linear map of `rows` inputs by a weight [N, K]: forward, and the gradients that are wanted."""
        N, K = weight
        x, y, w = self._operand(rows, K), self._operand(rows, N), self._operand(N, K)
        self._add(x, w.t(), rows * N)
        if input_gradient:
            self._add(y, w, rows * K)
        if weight_gradient:
            self._add(y.t(), x, N * K)

    def add_many(self, rows: int, weight: tuple[int, int]) -> None:
        """A linear map of many rows, forward, in pieces whose outcome stays in cache."""
        N, K = weight
        columns = [COLUMNS] * (N // COLUMNS) + [N % COLUMNS] * (N % COLUMNS > 0) if N > 2 * COLUMNS else [N]
        for many in [ROWS] * (rows // ROWS) + [rows % ROWS] * (rows % ROWS > 0):
            for n in columns:
                self.add_linear(many, (n, K), input_gradient=False, weight_gradient=False)

    def add_block(
        self, block: Block, rows: int, *, input_gradient: bool, weight_gradient: bool = False, lowest: bool = False
    ) -> None:
        """A decoder block's linear maps; those of one input count as one. The `lowest` block that has a gradient needs
        none for the input of its first maps."""
        for product in block.products(rows):
            reads_stream = product.reads_input and (product.name == "qkv" or block.parallel)
            wanted = input_gradient and not (lowest and reads_stream)
            shape = (product.outputs, product.inputs)
            self.add_linear(rows, shape, input_gradient=wanted, weight_gradient=weight_gradient)

    def __call__(self) -> None:
        """Compute them."""
        for a, b, out in self._products:
            torch.mm(a, b, out=out)

    def _add(self, a: Tensor, b: Tensor, size: int) -> None:
        self._products.append((a, b, self._result(a.shape[0], b.shape[1])))
        self.flops += 2 * size * a.shape[1]

    def _operand(self, *shape: int) -> Tensor:
        key = (shape[0], shape[1])
        if key not in self._operands:
            self._operands[key] = torch.randn(shape, dtype=self._dtype, device=self._device)
        return self._operands[key]

    def _result(self, *shape: int) -> Tensor:
        key = (-shape[0], shape[1])  # apart from the operands
        if key not in self._operands:
            self._operands[key] = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._operands[key]


def frozen_layers(blocks: Sequence[Block], rows: int, dtype: torch.dtype, device: torch.device) -> Products:
    """Forward and input gradient of frozen layers."""
    products = Products(dtype, device)
    for block in blocks:
        products.add_block(block, rows, input_gradient=True)
    return products


def copy(size: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes `size` bytes in all."""
    source = torch.zeros(max(size // 2, 1), dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
