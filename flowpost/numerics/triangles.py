"""Unit lower-triangular matrices from what is below their diagonal; what the families built on them share."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flowpost.numerics.products import by_columns, by_rows
from flowpost.numerics.watchers import full_precision, on_host, unwatched

Ctx = Any  # of an autograd function: torch types it without what it stores


def multiply(z: Tensor, entries: Tensor) -> Tensor:
    """``L z``, of z ``(*batch, dim)`` and the entries ``(*batch, dim (dim - 1) / 2)`` of L, row by row."""
    with full_precision(z.device.type):
        if on_host(z) and unwatched(z) and _once(z, entries):
            return z + cast(Tensor, _SumRows.apply(z, entries))
        return z + by_columns(by_rows, strict_tril(entries, z.shape[-1]), z)


def _once(z: Tensor, entries: Tensor) -> bool:
    """Whether there is one point for each example, and anything below the diagonal."""
    return entries.shape[-1] > 0 and 0 < z.shape[:-1].numel() <= entries.shape[:-1].numel()


def solve(z: Tensor, entries: Tensor) -> Tensor:
    """The solution x of ``L x = z``."""
    return by_columns(_solve, unit_tril(entries, z.shape[-1]), z)


def push_gaussian(loc: Tensor, tril: Tensor | None, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of L z for z of N(loc, tril tril^T); tril None is the identity."""
    matrix = unit_tril(entries, loc.shape[-1])
    with full_precision(loc.device.type):
        return by_columns(torch.matmul, matrix, loc), matrix if tril is None else matrix @ tril


def unit_tril(entries: Tensor, dim: int) -> Tensor:
    """L ``(*batch, dim, dim)``."""
    return strict_tril(entries, dim) + torch.eye(dim, dtype=entries.dtype, device=entries.device)


def strict_tril(entries: Tensor, dim: int) -> Tensor:
    """L less its diagonal."""
    if torch.compiler.is_compiling():  # which differentiates the plain code, and takes no function with a jvp
        return _Unpack.forward(entries, dim)
    return cast(Tensor, _Unpack.apply(entries, dim))


class _SumRows(torch.autograd.Function):
    """``(L - I) z`` on the CPU, from L's rows as they lie: for one point an example L costs more than the product."""

    @staticmethod
    def forward(ctx: Ctx, z: Tensor, entries: Tensor) -> Tensor:
        dim = z.shape[-1]
        read = z.index_select(-1, torch.tril_indices(dim, dim, -1)[1])
        ctx.save_for_backward(z, entries, read)
        products = read * entries
        sums = products.new_zeros(*products.shape[:-1], dim)
        starts = np.arange(1, dim) * np.arange(dim - 1) // 2
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
            if torch.is_grad_enabled():
                row, column = torch.tril_indices(dim, dim, -1)
                product = grad.index_select(-1, row) * z.index_select(-1, column)
            else:  # the same: row i has i entries
                product = torch.from_numpy(np.repeat(grad.numpy(), np.arange(dim), axis=-1)).mul_(read)
            entries_grad = product.sum_to_size(entries.shape)
        return z_grad, entries_grad


class _Unpack(torch.autograd.Function):
    """L ``(*batch, dim, dim)`` with zeros on and above its diagonal, from what is below it, row by row.

    Linear, and `_Pack` is its adjoint, so that both derivatives are a read by index; autograd's own derivative of a
    read is a scattered sum, twenty times as slow, though no number is ever read twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(entries: Tensor, dim: int) -> Tensor:
        row = torch.arange(dim, device=entries.device).unsqueeze(-1)
        column = row.mT
        index = torch.where(column < row, row * (row - 1) // 2 + column, entries.shape[-1])
        padded = torch.cat([entries, entries.new_zeros(1).expand(*entries.shape[:-1], 1)], -1)
        return padded.index_select(-1, index.flatten()).unflatten(-1, (dim, dim))

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple, output: Tensor) -> None:
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _Pack.apply(grads[0].mT)), None

    @staticmethod
    def jvp(ctx: Ctx, *tangents: Tensor) -> Tensor:
        return strict_tril(tangents[0], ctx.dim)


class _Pack(torch.autograd.Function):
    """What is below the diagonal of L, row by row, from L^T ``(*batch, dim, dim)``.

    A product with rows of noise has its gradient for L transposed: so it is read as it lies.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        dim = matrix.shape[-1]
        row, column = torch.tril_indices(dim, dim, -1, device=matrix.device)
        return matrix.flatten(-2).index_select(-1, column * dim + row)

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple, output: Tensor) -> None:
        ctx.dim = inputs[0].shape[-1]

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> Tensor:
        return strict_tril(grads[0], ctx.dim).mT

    @staticmethod
    def jvp(ctx: Ctx, *tangents: Tensor) -> Tensor:
        return cast(Tensor, _Pack.apply(tangents[0]))


def _solve(matrix: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(matrix, columns, upper=False, unitriangular=True)
