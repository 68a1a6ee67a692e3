"""The unit lower-triangular linear map, which makes a diagonal Gaussian a full-covariance one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.base import Bijector, check_int


def unit_lower_triangular(z: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Volume-preserving linear map ``z' = L z``, L lower-triangular with unit diagonal, ``log_det = 0``.

    Args:
        z: ``(*batch, dim)``.
        entries: ``(*batch, dim (dim - 1) / 2)``, L below its diagonal, row by row.

    Returns:
        z' ``(*batch, dim)`` and log_det, zero.
    """
    with torch.autocast(z.device.type, enabled=False):
        return _columns(torch.matmul, _unit_tril(entries, z.shape[-1]), z), z.new_zeros(())


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
        return _columns(_solve, matrix, z), z.new_zeros(())

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix = _unit_tril(self._entries(loc, context), self.dim)
        with torch.autocast(loc.device.type, enabled=False):
            return _columns(torch.matmul, matrix, loc), matrix if tril is None else matrix @ tril


def _unit_tril(entries: Tensor, dim: int) -> Tensor:
    # A gather from (entries, 0, 1): no in-place write for vmap or a compiler to stumble on.
    row = torch.arange(dim, device=entries.device).unsqueeze(-1)
    column = row.mT
    index = torch.where(column < row, row * (row - 1) // 2 + column, entries.shape[-1] + (row == column).long())
    padded = F.pad(F.pad(entries, (0, 1)), (0, 1), value=1.0)
    return padded[..., index]


def _solve(matrix: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(matrix, columns, upper=False, unitriangular=True)


def _columns(multiply: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, z: Tensor) -> Tensor:
    """``multiply(matrix, z)`` with the leading axes of z that the matrix lacks as columns, so it is never expanded."""
    extra = z.ndim + 1 - matrix.ndim
    if extra <= 0:
        return multiply(matrix, z.unsqueeze(-1)).squeeze(-1)
    samples, event = z.shape[:extra], z.shape[extra:]
    columns = z.reshape(math.prod(samples), *event).movedim(0, -1)
    image = multiply(matrix, columns).movedim(-1, 0)
    return image.reshape(*samples, *image.shape[1:])
