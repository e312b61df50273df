"""What the operations check of their tensors in the same words. A read of a shape takes as long as a call of these."""

from __future__ import annotations

from torch import Tensor


def check_rows(operation: str, name: str, x: Tensor) -> None:
    """Refuse a tensor that is not rows of floating-point numbers.

    Raises:
        ValueError: it has no dimension.
        TypeError: its dtype is an integer, bool or complex.
    """
    if not x.ndim:
        raise ValueError(f"{operation}: {name} has shape (), expected at least one dimension.")
    if not x.dtype.is_floating_point:
        check_floating(operation, name, x)


def check_floating(operation: str, name: str, x: Tensor) -> None:
    """Refuse an integer, bool or complex tensor.

    Raises:
        TypeError: it is one.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"{operation}: {name} has dtype {x.dtype}, expected floating point; convert it.")


def check_shape(operation: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor whose shape is not another's.

    Raises:
        ValueError: it is not.
    """
    if x.shape != other.shape:
        raise ValueError(
            f"{operation}: {name} has shape {tuple(x.shape)}, expected {tuple(other.shape)} to match {other_name}."
        )


def check_like(operation: str, other_name: str, other: Tensor, *named: tuple[str, Tensor | None]) -> None:
    """Refuse tensors, each with its name, whose shape or dtype is not another's.

    Raises:
        ValueError: a shape is not.
        TypeError: a dtype is not.
    """
    shape, dtype = other.shape, other.dtype
    for name, x in named:
        if x is None:
            continue
        if x.shape != shape:
            check_shape(operation, name, x, other_name, other)
        if x.dtype is not dtype:
            raise TypeError(f"{operation}: {name} has dtype {x.dtype}, expected {dtype} to match {other_name}.")
