"""The unit lower-triangular linear map, which makes a diagonal Gaussian a full-covariance one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector, by_rows, check_int, columns

Ctx = Any  # of an autograd function: torch types it without what it stores


def unit_lower_triangular(z: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Volume-preserving linear map ``z' = L z``, L lower-triangular with unit diagonal, ``log_det = 0``.

    Args:
        z: ``(*batch, dim)``.
        entries: ``(*batch, dim (dim - 1) / 2)``, L below its diagonal, row by row.

    Returns:
        z' ``(*batch, dim)`` and log_det, zero.
    """
    with torch.autocast(z.device.type, enabled=False):
        return z + columns(by_rows, _strict_tril(entries, z.shape[-1]), z), z.new_zeros(())


class UnitLowerTriangular(Bijector):
    """Linear map ``z' = L z`` with L lower-triangular and a unit diagonal: correlation without a change of volume.

    Between the noise and an `Affine` it makes a full-covariance Gaussian, with ``loc`` the mean and ``diag(scale) L``
    the Cholesky factor. Invertible for every context; identity at the zero context. Forward costs O(dim^2) an example,
    of which assembling L is most; the log-det is 0; the inverse is a triangular solve.

    Args:
        dim: size of z.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, dim * (dim - 1) / 2)``: L below its diagonal, row by row.

    Reference:
        Kingma & Welling (2019), section 2.5.1, eq. 2.40 and algorithm 3.

    Example:
        >>> L = UnitLowerTriangular(2)
        >>> L(torch.tensor([1.0, 1.0]), torch.tensor([0.5]))[0]
        tensor([1.0000, 1.5000])
    """

    triangular = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim, check_int("dim", dim, minimum=1) * (dim - 1) // 2)

    def _entries(self, z: Tensor, context: Tensor | None) -> Tensor:
        return z.new_zeros(0) if context is None else context  # at dim 1 there is nothing below the diagonal

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return unit_lower_triangular(z, self._entries(z, context))

    def _inverse(self, z: Tensor, context: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix = _unit_tril(self._entries(z, context), self.dim)
        return columns(_solve, matrix, z), z.new_zeros(())

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix = _unit_tril(self._entries(loc, context), self.dim)
        with torch.autocast(loc.device.type, enabled=False):
            return columns(torch.matmul, matrix, loc), matrix if tril is None else matrix @ tril


def _unit_tril(entries: Tensor, dim: int) -> Tensor:
    return _strict_tril(entries, dim) + torch.eye(dim, dtype=entries.dtype, device=entries.device)


def _strict_tril(entries: Tensor, dim: int) -> Tensor:
    if torch.compiler.is_compiling():  # which differentiates the plain code, and takes no function with a jvp
        return _Unpack.forward(entries, dim)
    return cast(Tensor, _Unpack.apply(entries, dim))


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
        return _strict_tril(tangents[0], ctx.dim)


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
        return _strict_tril(grads[0], ctx.dim).mT

    @staticmethod
    def jvp(ctx: Ctx, *tangents: Tensor) -> Tensor:
        return cast(Tensor, _Pack.apply(tangents[0]))


def _solve(matrix: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(matrix, columns, upper=False, unitriangular=True)
