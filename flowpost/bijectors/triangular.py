"""The unit lower-triangular linear map, which makes a diagonal Gaussian a full-covariance one."""

from __future__ import annotations

from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.constants import Constant
from flowpost.numerics.rates import RatedNumbers
from flowpost.numerics.triangles import multiply, places, push_gaussian, solve


def unit_lower_triangular(
    z: Tensor, entries: Tensor, kept: Constant | None = None, rate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Volume-preserving linear map ``z' = L z``, L lower-triangular with unit diagonal, ``log_det = 0``.

    Args:
        z: ``(*batch, dim)``.
        entries: ``(*batch, dim (dim - 1) / 2)``, L below its diagonal, row by row.
        kept: ``numerics.triangles.places(dim)``, where a step keeps them; by default they are made anew.
        rate: a positive factor on the entries.

    Returns:
        z' ``(*batch, dim)`` and log_det, zero.
    """
    return multiply(z, entries, kept, rate), z.new_zeros(())


class UnitLowerTriangular(RatedNumbers, Bijector):
    """Linear map ``z' = L z`` with L lower-triangular and a unit diagonal: correlation without a change of volume.

    Use it between the noise and an `Affine`: the two make a full-covariance Gaussian, with ``loc`` the mean and
    ``diag(scale) L`` the Cholesky factor.

    Invertible for every context; identity at the zero context. Forward costs O(dim^2) an example,
    of which assembling L is most; the log-det is 0; the inverse is a triangular solve.

    Args:
        dim: size of z.
        rate: a positive factor on the context's numbers. Adam moves each of them as far in a step, and
            a row of L adds up to dim of them: a small rate lets many variables train as steadily as few. A state
            of another rate makes the step one of that rate; one from before there were rates is refused.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, dim * (dim - 1) / 2)``: L below its diagonal, row by row, over `rate`.

    Raises:
        ValueError: if the rate is not positive and finite.

    Reference:
        Kingma & Welling (2019), An Introduction to Variational Autoencoders, section 2.5.1, eq. 2.46 to 2.55.

    Example:
        >>> L = UnitLowerTriangular(2)
        >>> L(torch.tensor([1.0, 1.0]), torch.tensor([0.5]))[0]
        tensor([1.0000, 1.5000])
    """

    triangular = True

    def __init__(self, dim: int, rate: float = 1.0) -> None:
        super().__init__(dim, check_int("dim", dim, minimum=1) * (dim - 1) // 2)
        self._set_number(rate)
        self._places = places(dim)

    def _entries(self, z: Tensor, context: Tensor | None) -> Tensor:
        return z.new_zeros(0) if context is None else context  # at dim 1 there is nothing below the diagonal

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return unit_lower_triangular(z, self._entries(z, context), self._places, self.rate)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return solve(z, self._rated(self._entries(z, context)), self._places), z.new_zeros(())

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return push_gaussian(loc, tril, self._rated(self._entries(loc, context)), self._places)
