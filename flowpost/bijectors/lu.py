"""The linear map by its LU factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int, check_order
from flowpost.numerics.constants import Constant, Ordered
from flowpost.numerics.products import by_columns, by_rows
from flowpost.numerics.scales import softplus_scale
from flowpost.numerics.triangles import multiply, places, solve, strict_tril
from flowpost.numerics.watchers import full_precision


class _LU(NamedTuple):
    """A square matrix by its factors L, of unit diagonal, and U, of positive diagonal."""

    below: Tensor
    """L below its diagonal, row by row, ``(*batch, dim (dim - 1) / 2)``."""
    above: Tensor
    """U above its diagonal, column by column, ``(*batch, dim (dim - 1) / 2)``."""
    diagonal: Tensor
    """Of U, ``(*batch, dim)``, positive."""


def lu_linear(
    z: Tensor, below: Tensor, above: Tensor, diagonal: Tensor, kept: Constant | None = None
) -> tuple[Tensor, Tensor]:
    """Linear map ``z' = L U z``, ``log_det = sum(log diagonal)``.

    Args:
        z: ``(*batch, dim)``.
        below: ``(*batch, dim (dim - 1) / 2)``, L below its unit diagonal, row by row.
        above: ``(*batch, dim (dim - 1) / 2)``, U above its diagonal, column by column.
        diagonal: ``(*batch, dim)``, positive.
        kept: ``numerics.triangles.places(dim)``, where a step keeps them; by default they are made anew.

    Returns:
        z' ``(*batch, dim)`` and log_det, of the diagonal's batch shape.
    """
    with full_precision(z.device.type):
        upper = diagonal * z + by_columns(by_rows, strict_tril(above, z.shape[-1], kept).mT, z)
    return multiply(upper, below, kept), diagonal.log().sum(-1)


def lu_linear_inverse(
    z: Tensor, below: Tensor, above: Tensor, diagonal: Tensor, kept: Constant | None = None
) -> tuple[Tensor, Tensor]:
    """Undo `lu_linear`, by two triangular solves.

    Args:
        z: the image z', ``(*batch, dim)``.
        below: as in `lu_linear`.
        above: as in `lu_linear`.
        diagonal: as in `lu_linear`.
        kept: as in `lu_linear`.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse.
    """
    upper = strict_tril(above, z.shape[-1], kept).mT + torch.diag_embed(diagonal)
    return by_columns(_solve_upper, upper, solve(z, below, kept)), -diagonal.log().sum(-1)


def _solve_upper(matrix: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(matrix, columns, upper=True)


class LULinear(Ordered, Bijector):
    """Linear map ``z' = P L U z + shift``: any mixing of the variables, at the price of two triangular products.

    Use it between other steps, in place of a permutation: it learns which variables the next step mixes.

    P is a fixed permutation, L lower-triangular with a unit diagonal, U upper-triangular with a positive one, floored,
    so that the map is invertible for every context. At the zero context it is P alone, the identity where there is no
    `order`. Forward costs O(dim^2), the log-det O(dim); the inverse is two triangular solves.

    Args:
        dim: size of z.
        order: P, as in `Permute`: every int from 0 to dim - 1 once; by default the variables stay where they are.
            Saved with the weights.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, dim^2 + dim)``: L below its diagonal, row by row, U above its diagonal,
        column by column, the raw numbers of U's diagonal, and the shift.

    Raises:
        ValueError: if `order` is no permutation.

    Reference:
        Kingma & Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, section 3.2.

    Example:
        >>> LULinear(3, order=[2, 0, 1])(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(12))[0]
        tensor([3.0000, 1.0000, 2.0000])
    """

    _saved = ("order", "back")

    def __init__(self, dim: int, order: Sequence[int] | None = None) -> None:
        super().__init__(dim, check_int("dim", dim, minimum=1) * (dim + 1))
        self._places = places(dim)
        self._set_order(None if order is None else check_order(order, dim))

    def _numbers(self, context: Tensor | None) -> tuple[_LU, Tensor]:
        half = self.dim * (self.dim - 1) // 2
        below, above, raw, shift = cast(Tensor, context).split([half, half, self.dim, self.dim], dim=-1)
        # Where the scale is its floor already: a solve's gradient there may overflow, and times a slope of 0 is nan.
        return _LU(below, above, softplus_scale(raw.clamp_min(-80))), shift

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix, shift = self._numbers(context)
        image, log_det = lu_linear(z, *matrix, self._places)
        return (image if self._order is None else self._order.take(image)) + shift, log_det

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix, shift = self._numbers(context)
        image = z - shift
        return lu_linear_inverse(image if self._order is None else self._order.put(image), *matrix, self._places)
