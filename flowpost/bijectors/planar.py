"""The planar flow: one tanh ridge a step."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector, check_int
from flowpost.bijectors.roots import correct, tanh_root

_EPS = 1e-3
_K = -math.expm1(-(1 - _EPS))  # 1 - e^-(1 - eps)


def _invertible(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``u_hat``, ``w.u_hat = m(w.u)`` and ``1 + m >= eps``, with m(0) = 0, so that u = 0 is exactly the identity."""
    a = (w * u).sum(-1, keepdim=True)
    positive = a > 0
    # Each branch sees only its own half line: the other would overflow and poison the gradient through `where`.
    above, below = torch.where(positive, a, 0), torch.where(positive, 0, a)
    gain, value = torch.log1p((1 - _K) * torch.expm1(-above)), torch.log1p(_K * torch.expm1(below))
    wu = torch.where(positive, a + gain, value)
    room = torch.where(
        positive, 1 + a + gain, _EPS + torch.log1p(_K / (1 - _K) * torch.exp(below))
    )  # 1 + m, uncancelled
    along = w / (w * w).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    u_hat = u + torch.where(positive, gain, value - below) * along
    # Far below zero u_hat is a small difference of large numbers: what rounding left along w is put right.
    return u_hat + ((wu - (w * u_hat).sum(-1, keepdim=True)) * along).detach(), wu, room


def _ridge(x: Tensor) -> tuple[Tensor, Tensor]:
    """``tanh(x)`` and its slope, the slope to full relative precision also where tanh has rounded to 1."""
    return torch.tanh(x), 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)


def _log_slope(wu: Tensor, room: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """``log(1 + m slope)``: where m is near -1, as ``log((1 + m) slope + value^2)``, a sum of positive terms."""
    return torch.where(wu > -0.5, torch.log1p(wu * slope), torch.log(room * slope + value * value)).squeeze(-1)


def planar(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Planar map ``z' = z + u_hat tanh(w.z + b)``, ``log_det = log(1 + w.u_hat tanh'(w.z + b))``.

    ``u_hat`` moves u along w so that ``w.u_hat = m(w.u) > -1``, which makes the map invertible (Rezende & Mohamed 2015,
    A.1, shifted so that u = 0 is the identity and floored so that the log-det is finite).

    Args:
        z: ``(*batch, dim)``.
        u: ``(*batch, dim)``.
        w: ``(*batch, dim)``.
        b: ``(*batch, 1)``.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``.
    """
    u_hat, wu, room = _invertible(u, w)
    value, slope = _ridge((w * z).sum(-1, keepdim=True) + b)
    return z + u_hat * value, _log_slope(wu, room, value, slope)


def planar_inverse(z: Tensor, u: Tensor, w: Tensor, b: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Undo `planar`: along w it is one increasing scalar equation, ``x + w.u_hat tanh(x) = w.z' + b``.

    Args:
        z: the image z', ``(*batch, dim)``.
        u: ``(*batch, dim)``.
        w: ``(*batch, dim)``.
        b: ``(*batch, 1)``.
        known: the preimage, where it is known: no search is run.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``, first and second derivatives exact.
    """
    u_hat, wu, room = _invertible(u, w)
    target = (w * z).sum(-1, keepdim=True) + b

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = _ridge(x)
        return x - target + wu * value, 1 + wu * slope

    if known is None:
        root = tanh_root(wu, target)
    else:
        root = ((w * known).sum(-1, keepdim=True) + b).detach()
    value, slope = _ridge(correct(residual, root))
    return z - u_hat * value, -_log_slope(wu, room, value, slope)


class Planar(Bijector):
    """Planar flow ``z' = z + u_hat tanh(w.z + b)``: it stretches or squeezes z along u_hat, across one hyperplane.

    Invertible for every context: u is moved to u_hat, for which ``w.u_hat > -1``. Identity where u = 0, for any
    direction w, which is drawn at random when the step is built. Forward and log-det cost O(dim); the inverse is one
    scalar root a point, by a monotone Newton iteration, with exact first and second derivatives.

    Args:
        dim: size of z.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, 2 * dim + 1)``: u, w and b.

    Reference:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, eq. 10 to 12 and A.1.

    Example:
        >>> step = Planar(2)
        >>> z = torch.randn(5, 2)
        >>> image, log_det = step(z, torch.randn(5, 5))
    """

    start: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * check_int("dim", dim, minimum=1) + 1)
        start = torch.cat([torch.zeros(dim), torch.randn(dim) / math.sqrt(dim), torch.zeros(1)])
        self.register_buffer("start", start, persistent=False)

    def initial_context(self) -> Tensor:
        """No stretch, ``u = 0``, across a random direction w; w = 0 would be a point without gradient."""
        return self.start.clone()

    def _numbers(self, context: Tensor | None) -> tuple[Tensor, ...]:
        return cast(Tensor, context).split([self.dim, self.dim, 1], dim=-1)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return planar(z, *self._numbers(context))

    def _inverse(self, z: Tensor, context: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        u, w, b = self._numbers(context)
        return planar_inverse(z, u, w, b, known)
