import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from cogsym.errors import CogsymError
from cogsym.kernels import common


def row_starts(rows: common.Rows, index: int) -> list[int]:
    """Where every row starts, as the kernels reckon it."""
    outer, inner = rows.strides(index)
    return [n // rows.inner * outer + n % rows.inner * inner for n in range(rows.count)]


def expected_starts(tensor: Tensor) -> list[int]:
    offsets = torch.zeros(tensor.shape[:-1], dtype=torch.int64)
    for dim in range(tensor.dim() - 1):
        steps = torch.arange(tensor.shape[dim]) * tensor.stride(dim)
        offsets += steps.view([-1 if d == dim else 1 for d in range(tensor.dim() - 1)])
    return offsets.flatten().tolist()


LAYOUTS = {
    "contiguous": (lambda: torch.empty(2, 5, 4, 3), False),
    "one row": (lambda: torch.empty(1, 3), False),
    "one dimension": (lambda: torch.empty(3), False),
    "half of a fused product": (lambda: torch.empty(2, 5, 4, 6)[..., :3], False),
    "heads of a fused projection": (lambda: torch.empty(2, 5, 9, 3)[:, :, 2:6], False),
    "one head of a fused projection": (lambda: torch.empty(2, 5, 9, 3)[:, :, :1], False),
    "every second position": (lambda: torch.empty(2, 10, 4, 3)[:, ::2], False),
    "every second of the first positions": (lambda: torch.empty(2, 10, 4, 3)[:, :7:2], True),
    "one position": (lambda: torch.empty(2, 10, 4, 3)[:, 4:5], False),
    "one position, fused": (lambda: torch.empty(2, 10, 9, 3)[:, 4:5, :4], False),
    "broadcast": (lambda: torch.empty(1, 1, 1, 3).expand(2, 5, 4, 3), False),
    "heads before positions": (lambda: torch.empty(2, 4, 5, 3).transpose(1, 2), True),
    "last dimension strided": (lambda: torch.empty(2, 5, 4, 6)[..., ::2], True),
    "last dimension first": (lambda: torch.empty(3, 2, 5, 4).permute(1, 2, 3, 0), True),
    "a column": (lambda: torch.empty(2, 5, 4, 6)[..., 2:3], False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_found_and_copied_only_where_they_must_be(name: str) -> None:
    make, copied = LAYOUTS[name]
    tensor = make()
    rows = common.Rows(tensor)
    assert rows.count == tensor.shape[:-1].numel()
    assert (rows.tensors[0].data_ptr() != tensor.data_ptr()) is copied
    assert row_starts(rows, 0) == expected_starts(rows.tensors[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_several_tensors_agree_on_one_way_of_counting(name: str) -> None:
    tensor = LAYOUTS[name][0]()
    partner = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., : tensor.shape[-1]]
    rows = common.Rows(partner, tensor, tensor.contiguous())
    assert rows.tensors[0].data_ptr() == partner.data_ptr()
    for index, laid in enumerate(rows.tensors):
        assert row_starts(rows, index) == expected_starts(laid)


@pytest.mark.skipif(common.INTERPRETED, reason="TRITON_INTERPRET is set, and the interpreter does take CPU tensors")
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(CogsymError, match="TRITON_INTERPRET=1"):
        common.on_device(torch.empty(1))
