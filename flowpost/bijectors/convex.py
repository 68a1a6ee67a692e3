"""The convex combination of unit lower-triangular linear maps."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.constants import Constant
from flowpost.numerics.rates import RatedNumbers
from flowpost.numerics.triangles import multiply, places, push_gaussian, solve


def convex_combination(
    z: Tensor, entries: Tensor, logits: Tensor, kept: Constant | None = None, rate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Volume-preserving linear map ``z' = (sum_k y_k L_k) z``, ``y = softmax(logits)``, ``log_det = 0``.

    Args:
        z: ``(*batch, dim)``.
        entries: ``(*batch, K, dim (dim - 1) / 2)``, every L_k below its unit diagonal, row by row.
        logits: ``(*batch, K)``.
        kept: ``numerics.triangles.places(dim)``, where a step keeps them; by default they are made anew.
        rate: a positive factor on the entries.

    Returns:
        z' ``(*batch, dim)`` and log_det, zero.
    """
    return multiply(z, _combine(entries, logits), kept, rate), z.new_zeros(())


def _combine(entries: Tensor, logits: Tensor) -> Tensor:
    """The combined matrix's entries; its diagonal is 1, since the weights add up to 1."""
    return (logits.softmax(-1).unsqueeze(-1) * entries).sum(-2)


class ConvexCombination(RatedNumbers, Bijector):
    """Linear map ``z' = (sum_k y_k L_k) z``: a convex combination of K lower-triangular maps with unit diagonals.

    Use it beside an `Affine`: the two are the convex combination linear IAF, a full-covariance Gaussian.

    The combination has a unit diagonal too, so the map is invertible for every context and keeps volumes. At the
    initial context every L_k is the identity, and so is the map. The weights there are drawn at random when the step is
    built: from equal weights the L_k would stay equal. The matrices are combined once for each example, at O(K dim^2),
    and a sample costs one product. The log-det is 0; the inverse is a triangular solve.

    Args:
        dim: size of z.
        combinations: K, how many matrices; with one it is `UnitLowerTriangular`, and reads no weights.
        rate: a positive factor on the matrices' numbers, as in `UnitLowerTriangular`.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, K * dim * (dim - 1) / 2 + K)``: every L_k below its diagonal, row by
        row, over `rate`; then the logits of the weights. None at dim 1, where there is nothing to combine.

    Reference:
        Tomczak & Welling (2017), Improving Variational Auto-Encoders using convex combination linear Inverse
        Autoregressive Flow.

    Example:
        >>> step = ConvexCombination(2, combinations=2)
        >>> step(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0, 0.0, 0.0]))[0]
        tensor([1., 3.])
    """

    triangular = True

    def __init__(self, dim: int, combinations: int, rate: float = 1.0) -> None:
        check_int("combinations", combinations, minimum=1)
        below = check_int("dim", dim, minimum=1) * (dim - 1) // 2
        weights = combinations if below and combinations > 1 else 0
        logits = torch.randn(weights, device="cpu")
        start = torch.cat([logits.new_zeros(combinations * below), logits])
        super().__init__(dim, len(start), start=start)
        self._set_number(rate)
        self.combinations = combinations
        self._places = places(dim)

    def extra_repr(self) -> str:
        """Sizes and K, for the module's repr."""
        return f"{super().extra_repr()}, combinations={self.combinations}"

    def _numbers(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:  # at dim 1
            return z.new_zeros(1, 0), z.new_zeros(1)
        count = self.combinations
        weights = count if count > 1 else 0
        entries, logits = context.split([context.shape[-1] - weights, weights], dim=-1)
        logits = logits if weights else context.new_zeros(1)
        return entries.unflatten(-1, (count, -1)), logits

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return convex_combination(z, *self._numbers(z, context), self._places, self.rate)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return solve(z, self._rated(_combine(*self._numbers(z, context))), self._places), z.new_zeros(())

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return push_gaussian(loc, tril, self._rated(_combine(*self._numbers(loc, context))), self._places)
