"""Lower-triangular matrices from a row of their entries; what is built on those of a unit diagonal shares."""

from __future__ import annotations

import functools
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.products import by_columns, by_rows
from flowpost.numerics.replayed import replays
from flowpost.numerics.watchers import full_precision, on_host, unwatched

Ctx = Any  # of an autograd function: torch types it without what it stores


def places(dim: int, diagonal: int = -1) -> Constant:
    """Where in a flattened ``(dim, dim)`` matrix lies what is below its diagonal, row by row; for a step to keep.

    With 0 for `diagonal`, the diagonal too.
    """
    return Constant(_places(dim, "cpu", diagonal))


def _places(dim: int, device: torch.device | str, diagonal: int = -1) -> Tensor:
    row, column = torch.tril_indices(dim, dim, diagonal, device=device)
    return row * dim + column


def multiply(z: Tensor, entries: Tensor, kept: Constant | None = None, rate: float = 1.0) -> Tensor:
    """``L z``, of z ``(*batch, dim)``; L has `rate` times the entries ``(*batch, dim (dim - 1) / 2)``, row by row."""
    with full_precision(z.device.type):
        if on_host(z) and unwatched(z) and _once(z, entries):
            return torch.add(z, cast(Tensor, _SumRows.apply(z, entries)), alpha=rate)
        return torch.add(z, by_columns(by_rows, strict_tril(entries, z.shape[-1], kept), z), alpha=rate)


def _once(z: Tensor, entries: Tensor) -> bool:
    """Whether there is one point for each example, and anything below the diagonal."""
    return entries.shape[-1] > 0 and 0 < z.shape[:-1].numel() <= entries.shape[:-1].numel()


def solve(z: Tensor, entries: Tensor, kept: Constant | None = None) -> Tensor:
    """The solution x of ``L x = z``."""
    return by_columns(_solve, strict_tril(entries, z.shape[-1], kept), z)


def _solve(matrix: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(matrix, columns, upper=False, unitriangular=True)


def push_gaussian(
    loc: Tensor, tril: Tensor | None, entries: Tensor, kept: Constant | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of L z for z of N(loc, tril tril^T); tril None is the identity."""
    dim = loc.shape[-1]
    matrix = written(torch.eye(dim, dtype=entries.dtype, device=entries.device), entries, kept)
    with full_precision(loc.device.type):
        return by_columns(torch.matmul, matrix, loc), matrix if tril is None else matrix @ tril


def strict_tril(entries: Tensor, dim: int, kept: Constant | None = None) -> Tensor:
    """L less its diagonal, ``(*batch, dim, dim)``.

    Written into zeros: the derivative is a read, where that of a read would be a scattered sum.

    Args:
        entries: ``(*batch, dim (dim - 1) / 2)``, row by row.
        dim: of the square.
        kept: ``places(dim)``, where a step keeps them; otherwise they are made anew.
    """
    return written(entries.new_zeros(dim, dim), entries, kept)


def written(square: Tensor, entries: Tensor, kept: Constant | None) -> Tensor:
    """Each example's entries in one and the same square ``(dim, dim)``, at the places that are kept, or below."""
    index = _places(len(square), entries.device) if kept is None else kept.on(entries)
    squares = square.flatten().expand(*entries.shape[:-1], -1)
    return squares.scatter(-1, index.expand(entries.shape), entries).unflatten(-1, square.shape)


@functools.cache
def _rows(dim: int) -> tuple[Tensor, np.ndarray]:
    """On the CPU: the column of each entry, and where each row after the first starts."""
    with torch.inference_mode(mode=False):
        columns = torch.tril_indices(dim, dim, -1, device="cpu")[1].contiguous()
    return columns, np.arange(1, dim) * np.arange(dim - 1) // 2


class _SumRows(torch.autograd.Function):
    """``(L - I) z`` on the CPU, from L's rows as they lie: for one point an example L costs more than the product."""

    @staticmethod
    def forward(ctx: Ctx, z: Tensor, entries: Tensor) -> Tensor:
        dim = z.shape[-1]
        columns, starts = _rows(dim)
        read = z.index_select(-1, columns)
        ctx.save_for_backward(z, entries, read)
        products = read * entries
        sums = products.new_zeros(*products.shape[:-1], dim)
        with np.errstate(all="ignore"):
            np.add.reduceat(products.numpy(), starts, axis=-1, out=sums.numpy()[..., 1:])
        return sums

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), dim = grads, grads[0].shape[-1]
        z, entries, read = ctx.saved_tensors
        z_grad = entries_grad = None
        if ctx.needs_input_grad[0]:
            z_grad = by_columns(by_rows, strict_tril(entries, dim).mT, grad).sum_to_size(z.shape)
        if ctx.needs_input_grad[1]:
            if replays(grad):
                row, column = torch.tril_indices(dim, dim, -1, device=z.device)
                product = grad.index_select(-1, row) * z.index_select(-1, column)
            else:  # the same: row i has i entries
                product = torch.from_numpy(np.repeat(grad.numpy(), np.arange(dim), axis=-1)).mul_(read)
            entries_grad = product.sum_to_size(entries.shape)
        return z_grad, entries_grad
