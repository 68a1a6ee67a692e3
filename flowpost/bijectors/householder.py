"""The Householder flow: reflections, which turn a diagonal Gaussian into one with a full covariance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.reflections import reflect, reflect_all


def householder(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The mirror image ``z' = (I - 2 v v^T / |v|^2) z`` of z in the plane across v, ``log_det = 0``; its own inverse.

    Args:
        z: ``(*batch, dim)``.
        v: ``(*batch, dim)``, of any length; where it is zero, the first axis stands in.

    Returns:
        z' ``(*batch, dim)`` and log_det, zero.
    """
    return reflect(z, v), z.new_zeros(())


class Householder(Bijector):
    """Householder flow ``z' = (I - 2 v v^T / |v|^2) z``: z in a mirror across v, so no volume changes.

    Use several after an `Affine`, to turn a diagonal Gaussian into one with correlations by few numbers an example.

    Its own inverse, for every context. Only the direction of v matters, and where v is zero the first axis stands in.
    No context makes one reflection the identity: two equal ones in a row are. Forward and inverse cost O(dim); the
    log-det is 0.

    Args:
        dim: size of z.
        direction: v at the start, ``(dim,)``; drawn at random by default. Two steps of one direction, one after the
            other, start as the identity.

    Shapes:
        z ``(*batch, dim)``, context v ``(*batch, dim)``; none at dim 1, where ``z' = -z`` whatever v.

    Raises:
        TypeError: for a direction that is no tensor.
        ValueError: for a direction of another shape.

    Reference:
        Tomczak & Welling (2016), Improving Variational Auto-Encoders using Householder Flow.

    Example:
        >>> z, log_det = Householder(2)(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]))
        >>> z
        tensor([-1.,  2.])
    """

    def __init__(self, dim: int, direction: Tensor | None = None) -> None:
        size = dim if check_int("dim", dim, minimum=1) > 1 else 0
        if direction is None:
            direction = torch.randn(dim, device="cpu")  # zero would be a point without gradient
        elif not isinstance(direction, Tensor):
            raise TypeError(f"direction: expected a torch.Tensor, got {type(direction).__name__}")
        elif direction.shape != (dim,):
            raise ValueError(f"direction: expected shape ({dim},), got {tuple(direction.shape)}")
        super().__init__(dim, size, start=direction[:size])

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return householder(z, z.new_ones(1) if context is None else context)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return Householder._forward(self, z, context)  # not a subclass's

    def _fuses(self, *, shared: bool) -> Hashable | None:
        own = type(self)
        ours = own._forward is Householder._forward and own._inverse is Householder._inverse
        return Householder if ours and self.context_size and not shared else None

    def _forward_run(self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return reflect_all(z, cast(Tensor, context).unflatten(-1, (len(steps), self.dim))), z.new_zeros(())

    def _inverse_run(
        self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None, preimage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        vectors = cast(Tensor, context).unflatten(-1, (len(steps), self.dim))
        return reflect_all(z, vectors.flip(-2)), z.new_zeros(())
