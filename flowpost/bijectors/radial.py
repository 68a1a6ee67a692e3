"""The radial flow: a stretch or squeeze around a point."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.ridge import bounded_gain
from flowpost.numerics.scales import softplus_scale


def _length(offset: Tensor) -> Tensor:
    """The norm, whose gradient at 0 is 0."""
    square = (offset * offset).sum(-1, keepdim=True)
    none = square < torch.finfo(square.dtype).tiny
    return torch.where(none, 0, torch.where(none, 1, square).sqrt())


def _gain(ratio: Tensor, room: Tensor, radius: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``m t``, ``1 + m t`` and the log-det, from the radius in units of alpha, for which ``t = 1 / (1 + radius)``.

    Where m is near -1 what is left of 1 is a sum of positive terms: ``1 + m t = (1 + m) t + (1 - t)``.
    """
    near = 1 / (1 + radius)
    far = radius * near  # 1 - t
    low = ratio < -0.5
    move = ratio * near
    gain = torch.where(low, room * near + far, 1 + move)
    around = torch.where(low, gain.log(), torch.log1p(move.clamp_min(-0.5)))
    bend = move * near
    slope = torch.where(low, torch.log(room * near * near + far * (1 + near)), torch.log1p(bend.clamp_min(-0.5)))
    return move, gain, ((dim - 1) * around + slope).squeeze(-1)


def radial(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Radial map ``z' = z + b h (z - z0)``, ``h = 1 / (a + r)``, ``r = |z - z0|``.

    ``log_det = (dim - 1) log(1 + b h) + log(1 + b h + b h' r)``. The numbers are made valid here:
    ``a = softplus(alpha + c) + 1e-3`` and ``b = a m(beta)`` with ``m >= 1e-3 - 1`` and m(0) = 0, so that ``b > -a``,
    which makes the map invertible, and ``beta = 0`` is the identity (Rezende & Mohamed 2015, eq. 14 and A.2).

    Args:
        z: ``(*batch, dim)``.
        center: z0, ``(*batch, dim)``.
        alpha: ``(*batch, 1)``, unconstrained.
        beta: ``(*batch, 1)``, unconstrained.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``.
    """
    offset, (ratio, room) = z - center, bounded_gain(beta)[1:]
    move, gain, log_det = _gain(ratio, room, _length(offset) / softplus_scale(alpha), z.shape[-1])
    return torch.where(ratio.abs() < 0.5, z + move * offset, center + gain * offset), log_det


def radial_inverse(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `radial`: along a ray it is one quadratic equation, ``r (r + a + b) = r' (r + a)``.

    Args:
        z: the image z', ``(*batch, dim)``.
        center: z0, ``(*batch, dim)``.
        alpha: ``(*batch, 1)``, unconstrained.
        beta: ``(*batch, 1)``, unconstrained.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``.
    """
    offset, (ratio, room) = z - center, bounded_gain(beta)[1:]
    image = _length(offset) / softplus_scale(alpha)
    half = 0.5 * (room - image)
    root = torch.sqrt(half * half + image)
    up = half > 0  # of the two forms of the positive root, the one that adds
    radius = torch.where(up, image / (root + half.clamp_min(0)), root - half.clamp_max(0))
    move, gain, log_det = _gain(ratio, room, radius, z.shape[-1])
    back = torch.where(ratio.abs() < 0.5, z - move / gain * offset, center + offset / gain)
    return back, -log_det


class Radial(Bijector):
    """Radial flow ``z' = z + b h (z - z0)``, ``h = 1 / (a + |z - z0|)``: it stretches or squeezes z around a point z0.

    Use several after an `Affine` where the posterior is more peaked, or flatter, around a point than a Gaussian; they
    bend little in many dimensions, where most points lie far from z0.

    Invertible for every context: ``a > 0`` and ``b > -a`` are made so, with floors that keep the log-det finite.
    Identity where ``beta = 0``, around any point z0, which is drawn at random when the step is built. Forward, inverse
    and log-det cost O(dim): the inverse is the stable root of a quadratic in the radius. The log-det has a kink at z0,
    where its gradient is 0.

    Args:
        dim: size of z.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, dim + 2)``: z0, alpha and beta.

    Reference:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, eq. 14 and A.2.

    Example:
        >>> step = Radial(2)
        >>> z = torch.randn(5, 2)
        >>> image, log_det = step(z, torch.randn(5, 4))
    """

    def __init__(self, dim: int) -> None:
        # Around one and the same point, K steps would be clones.
        center = torch.randn(check_int("dim", dim, minimum=1), device="cpu")
        super().__init__(dim, dim + 2, start=torch.cat([center, center.new_zeros(2)]))

    def _numbers(self, context: Tensor | None) -> tuple[Tensor, ...]:
        return cast(Tensor, context).split([self.dim, 1, 1], dim=-1)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return radial(z, *self._numbers(context))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return radial_inverse(z, *self._numbers(context))
