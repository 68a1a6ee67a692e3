"""Squares of numbers of which the two triangles mean different matrices, and the products of rows with either."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.products import whole_is_faster


def halves(dim: int, size: float) -> Constant:
    """Squares that are `size` above the diagonal, and below it, and 0 elsewhere; for a step to keep."""
    whole = torch.full((dim, dim), size, device="cpu")
    return Constant(torch.stack([whole.triu(1), whole.tril(-1)]))


def apart(square: Tensor, kept: Constant) -> tuple[Tensor, Tensor, Tensor]:
    """What of a square ``(*batch, M, M)`` is above its diagonal, its diagonal ``(*batch, M)``, and what is below.

    By products with the `halves` that are kept, so times their size but for the diagonal: on a CPU they take a third
    of the time of ``triu``.
    """
    above, below = kept.on(square)
    return square * above, square.diagonal(dim1=-2, dim2=-1), square * below


_AT_ONCE = 2**18
"""Numbers of the squares of so many examples: two arrays of them stay in a core's second cache."""
Outer = tuple[Tensor, Tensor]
"""Rows ``(N, M)`` and columns ``(N, M)`` of outer products."""


def _portions(dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few examples of all tensors ``(N, ...)`` at a time: on a CPU as many as its cache has room for."""
    count = len(tensors[0])
    size = count if whole_is_faster(tensors[0]) else max(1, _AT_ONCE // dim**2)
    if size >= count:
        return iter([tensors])
    return zip(*(each.split(size) for each in tensors), strict=True)


def bounded(numbers: Tensor, reach: float, dim: int) -> Tensor:
    """``tanh(numbers / reach)`` of rows ``(N, size)`` with a square each, in memory of their own; not recorded."""
    found = torch.empty_like(numbers, memory_format=torch.contiguous_format)
    for part, out in _portions(dim, numbers, found):
        torch.div(part, reach, out=out).tanh_()
    return found


def times(rows: Tensor, squares: Tensor, mask: Tensor, *, transposed: bool = False) -> Tensor:
    """``row @ (square * mask)`` of each example, or where `transposed` ``row @ (square * mask)^T``; not recorded.

    Args:
        rows: ``(N, M)``.
        squares: ``(N, M, M)``.
        mask: ``(M, M)``.
        transposed: which of the two.
    """
    found = []
    for row, square in _portions(len(mask), rows.unsqueeze(-2), squares):
        masked = square * mask
        found.append(torch.bmm(row, masked.mT if transposed else masked))
    return (torch.cat(found) if len(found) > 1 else found[0]).squeeze(-2)


def pull(above: Outer, diagonal: Tensor, below: Outer, squares: Tensor, kept: Constant, out: Tensor) -> None:
    """Write the gradient at the numbers of squares ``tanh(numbers)``, as it is above, on and below the diagonal.

    Args:
        above: of ``square * mask``, for the first of the `halves` that are kept.
        diagonal: ``(N, M)``.
        below: as `above`, for the second.
        squares: ``(N, M, M)``.
        kept: the `halves`.
        out: ``(N, M, M)``, for the gradient.
    """
    over, under = kept.on(squares)
    for row, column, row_below, column_below, middle, square, place in _portions(
        len(over), *above, *below, diagonal, squares, out
    ):
        whole = (row.unsqueeze(-1) * column.unsqueeze(-2)).mul_(over)
        whole.addcmul_(row_below.unsqueeze(-1) * column_below.unsqueeze(-2), under)
        whole.diagonal(dim1=-2, dim2=-1).copy_(middle)
        torch.ops.aten.tanh_backward.grad_input(whole, square, grad_input=place)
