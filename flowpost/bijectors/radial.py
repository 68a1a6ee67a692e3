"""The radial flow: a stretch or squeeze around a point."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.ridge import bounded_gain
from flowpost.numerics.scales import softplus_scale


def _length(offset: Tensor) -> Tensor:
    """The norm, whose gradient at 0 is 0; never quite 0 itself."""
    square = (offset * offset).sum(-1, keepdim=True)
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


class _Numbers(NamedTuple):
    """What K steps read, each ``(*batch, K, ...)``."""

    center: Tensor
    ratio: Tensor
    """m, which is b / a."""
    room: Tensor
    """``1 + m``."""
    width: Tensor
    """a."""
    low: Tensor
    """Where m is near -1: there what is left of 1 is a sum of positive terms, ``1 + m t = (1 + m) t + (1 - t)``."""
    mild: Tensor
    """Where m is near 0: there z moves little on the way back, and is moved."""

    def steps(self) -> list[_Numbers]:
        """Those of each."""
        return [_Numbers(*each) for each in zip(*(part.unbind(-2) for part in self), strict=True)]


def _numbers(center: Tensor, alpha: Tensor, beta: Tensor) -> _Numbers:
    ratio, room = bounded_gain(beta)[1:]
    return _Numbers(center, ratio, room, softplus_scale(alpha), ratio < -0.5, ratio.abs() < 0.5)


def _log_det(numbers: _Numbers, radii: list[Tensor], dim: int) -> Tensor:
    """Of K steps, from the radii in units of a."""
    radius = torch.stack(radii, -2)
    near = 1 / (1 + radius)  # t
    far, move = radius * near, numbers.ratio * near
    gain, bend = numbers.room * near, move * near
    around = torch.where(numbers.low, torch.log(gain + far), torch.log1p(move.clamp_min(-0.75)))
    flat = torch.log(gain * near + far * (1 + near))
    slope = torch.where(numbers.low, flat, torch.log1p(bend.clamp_min(-0.75)))
    return ((dim - 1) * around + slope).sum((-2, -1), dtype=wide_dtype(radius))


def radial_chain(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """K radial maps in sequence, equal to K calls of `radial`; but for z itself, all is worked out at once.

    Cost: O(K dim).

    Args:
        z: ``(*batch, dim)``.
        center: ``(*batch, K, dim)``.
        alpha: ``(*batch, K, 1)``.
        beta: ``(*batch, K, 1)``.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``, summed in float64.
    """
    numbers, radii = _numbers(center, alpha, beta), []
    for step in numbers.steps():
        offset = z - step.center
        radii.append(_length(offset) / step.width)
        near = 1 / (1 + radii[-1])
        left = (radii[-1] + step.room) * near
        moved = z + step.ratio * near * offset
        z = torch.where(step.low, step.center + left * offset, moved)
    return z, _log_det(numbers, radii, z.shape[-1])


def radial_chain_inverse(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `radial_chain`, by one quadratic equation a map. Cost: O(K dim).

    Args:
        z: the image z', ``(*batch, dim)``.
        center: ``(*batch, K, dim)``.
        alpha: ``(*batch, K, 1)``.
        beta: ``(*batch, K, 1)``.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``, summed in float64.
    """
    numbers, radii = _numbers(center, alpha, beta), []
    for step in reversed(numbers.steps()):
        offset = z - step.center
        image = _length(offset) / step.width
        half = 0.5 * (step.room - image)
        root = torch.sqrt(half * half + image)
        # Of the two forms of the positive root, the one that adds.
        radius = torch.where(half > 0, image / (root + half.clamp_min(0)), root - half)
        near = 1 / (1 + radius)
        move = step.ratio * near
        gain = torch.where(step.low, (radius + step.room) * near, 1 + move)
        moved = z - move / gain * offset
        z = torch.where(step.mild, moved, step.center + offset / gain)
        radii.insert(0, radius)
    return z, -_log_det(numbers, radii, z.shape[-1])


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
    image, log_det = radial_chain(z, *(part.unsqueeze(-2) for part in (center, alpha, beta)))
    return image, log_det.to(z.dtype)


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
    back, log_det = radial_chain_inverse(z, *(part.unsqueeze(-2) for part in (center, alpha, beta)))
    return back, log_det.to(z.dtype)


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

    def _fuses(self, *, shared: bool) -> Hashable | None:
        own = type(self)
        ours = own._forward is Radial._forward and own._inverse is Radial._inverse and own._numbers is Radial._numbers
        return Radial if ours and not shared else None

    def _forward_run(self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return radial_chain(z, *self._numbers(cast(Tensor, context).unflatten(-1, (len(steps), self.context_size))))

    def _inverse_run(
        self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None, preimage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        numbers = self._numbers(cast(Tensor, context).unflatten(-1, (len(steps), self.context_size)))
        return radial_chain_inverse(z, *numbers)
