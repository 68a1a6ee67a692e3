"""Element-wise scales: by numbers of the context, and constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from torch import Tensor

from flowpost.bijectors.base import Bijector, Line
from flowpost.numerics.arguments import check_int, check_positive
from flowpost.numerics.scales import scale_and_log, softplus_scale


class Scaling(Bijector):
    """Element-wise scale ``z' = scale * z`` by numbers of the context, ``log_det = sum(log scale)``.

    Use it before the steps of an amortized posterior, and a `Shift` after them: they then bend noise around 0, and need
    not follow the mean as it moves with x. `Scale` is the constant one.

    The context is raw, and ``scale`` makes it positive, so that the map is invertible for every context. Identity at
    zeros. Forward, inverse and log-det cost O(dim).

    Args:
        dim: size of z.
        scale: as in `Affine`.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, dim)``.

    Reference:
        Dinh et al. (2015), NICE: Non-linear Independent Components Estimation, section 3.3, of a learned constant.

    Example:
        >>> z, log_det = Scaling(2)(torch.ones(3, 2), torch.zeros(3, 2))
        >>> z[0]
        tensor([1.0000, 1.0000])
    """

    triangular = True
    elementwise = True

    def __init__(self, dim: int, scale: Callable[[Tensor], Tensor] = softplus_scale) -> None:
        super().__init__(dim, check_int("dim", dim, minimum=1))
        self.scale = scale

    def extra_repr(self) -> str:
        """Size and the scale's function, for the module's repr."""
        return f"{super().extra_repr()}, scale={getattr(self.scale, '__name__', repr(self.scale))}"

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, log = scale_and_log(self.scale, cast(Tensor, context))
        return scale * z, log.sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, log = scale_and_log(self.scale, cast(Tensor, context))
        return z / scale, -log.sum(-1)

    def _line(self, context: Tensor | None) -> Line:
        return 0.0, self.scale(cast(Tensor, context))


class Scale(Bijector):
    """A constant scale ``z' = factor * z`` of all variables, ``log_det = dim * log(factor)``; it reads no context.

    Use it to undo a known scale, or to widen the base Gaussian. Cost: O(dim).

    Args:
        dim: size of z.
        factor: a positive number.

    Raises:
        TypeError: if the factor is no number, as a tensor, which nothing would train: `Learned(Scaling(dim))` is.
        ValueError: if it is not positive and finite.

    Example:
        >>> Scale(2, 3.0)(torch.ones(2))[0]
        tensor([3., 3.])
    """

    triangular = True
    elementwise = True

    def __init__(self, dim: int, factor: float) -> None:
        super().__init__(dim)
        self.factor = check_positive("factor", factor)

    def extra_repr(self) -> str:
        """Size and factor, for the module's repr."""
        return f"{super().extra_repr()}, factor={self.factor:.6g}"

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z * self.factor, z.new_full((), self.dim * math.log(self.factor))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z / self.factor, z.new_full((), -self.dim * math.log(self.factor))

    def _line(self, context: Tensor | None) -> Line:
        return 0.0, self.factor
