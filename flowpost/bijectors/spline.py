"""Rational-quadratic splines: monotone, with as many bends as bins, inverted by the root of a quadratic."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import wide_dtype

_SHARE = 1e-2
"""The least share of a bin."""
_SLOPE = 1e-3
"""The least slope at a knot."""
_STEEP = 100.0
"""The most slope at a knot, about: above it a rounding of z in float32 would be felt in log q."""
_SHIFT = math.log(math.expm1(1 - _SLOPE))
_MOST = 50
"""More bins would leave less than half of the interval to the context."""


def spline_parameters(widths: Tensor, heights: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make raw numbers the shares of the bins, at least 1e-2, and slopes from 1e-3 to about 100.

    With ``l = 100 tanh(raw / 100)`` the slopes are ``softplus(l + c) + 1e-3``, 1 at 0. Equal shares and slopes 1, the
    identity, are where all raw numbers are 0. Floors and bound are smooth. The floor of the shares is ten times the
    paper's code's, at which a bin can be so flat that its float32 images no longer tell log q.

    Args:
        widths: ``(*batch, bins, dim)``, at most 50 bins.
        heights: ``(*batch, bins, dim)``.
        slopes: ``(*batch, bins - 1, dim)``.

    Returns:
        widths and heights that add up to 1, and slopes, of the same shapes.
    """
    slopes = F.softplus(_STEEP * torch.tanh(slopes / _STEEP) + _SHIFT) + _SLOPE
    return _shares(widths), _shares(heights), slopes


def _shares(raw: Tensor) -> Tensor:
    return _SHARE + (1 - _SHARE * raw.shape[-2]) * torch.softmax(raw, dim=-2)


def rational_quadratic(
    z: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """Monotone rational-quadratic spline of ``[-bound, bound]`` onto itself, the identity outside.

    In the bin from (x0, y0) to (x1, y1) of mean slope s, with the slopes d0 and d1 at its ends, ``t = (z - x0) / (x1 -
    x0)`` and ``r = 1 - t``, it is ``z' = y0 + (y1 - y0) (s t^2 + d0 t r) / q``, ``q = s (t^2 + r^2) + (d0 + d1) t r``,
    of slope ``(s / q)^2 (d1 t^2 + 2 s t r + d0 r^2)``: sums of positive terms, so nothing cancels. The slope is
    continuous, also at ``+-bound``, where it is 1.

    The knots are found, and all is worked out, in the dtype of `widths`: in a narrow bin, float32 knots would lose
    most digits of t, and float32 maps want float64 parameters.

    Args:
        z: ``(*batch, dim)``.
        widths: of the bins in z, as shares of the interval, ``(*batch, bins, dim)``, positive with sum 1.
        heights: of the bins in z', likewise.
        slopes: at the inner knots, ``(*batch, bins - 1, dim)``, positive.
        bound: where the spline ends, positive.

    Returns:
        z' ``(*batch, dim)``, of z's dtype, and log_det ``(*batch)``, of the dtype of `widths`.
    """
    x, y = _knots(widths, bound), _knots(heights, bound)
    point, inside = _enter(z, x, bound)
    x0, x1, y0, y1, d0, d1 = _bin(point, x, x, y, slopes)
    t, r, s = (point - x0) / (x1 - x0), (x1 - point) / (x1 - x0), (y1 - y0) / (x1 - x0)
    image = y0 + (y1 - y0) * _rise(t, r, s, d0, d1)
    return torch.where(inside, image.to(z.dtype), z), _log_det(inside, t, r, s, d0, d1)


def rational_quadratic_inverse(
    z: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """Undo `rational_quadratic`: in a bin it is the root of a quadratic, in a form where nothing cancels.

    With ``e = (z' - y0) / (y1 - y0)``, ``g = d0 (1 - e) - d1 e`` and ``h = |g| + sqrt(g^2 + 4 s^2 e (1 - e))``, the
    paper's root ``2c / (-b - sqrt(b^2 - 4ac))`` is ``t = 2 s e / (h + 2 s e)`` where g is positive, and
    ``1 - t = 2 s (1 - e) / (h + 2 s (1 - e))`` where it is not.

    Args:
        z: the image z', ``(*batch, dim)``.
        widths: as in `rational_quadratic`.
        heights: as in `rational_quadratic`.
        slopes: as in `rational_quadratic`.
        bound: as in `rational_quadratic`.

    Returns:
        The preimage ``(*batch, dim)``, of z's dtype, and the log-det of the inverse ``(*batch)``.
    """
    x, y = _knots(widths, bound), _knots(heights, bound)
    point, inside = _enter(z, y, bound)
    x0, x1, y0, y1, d0, d1 = _bin(point, y, x, y, slopes)
    e, rest, s = (point - y0) / (y1 - y0), (y1 - point) / (y1 - y0), (y1 - y0) / (x1 - x0)
    g = d0 * rest - d1 * e
    first = g >= 0
    h = torch.where(first, g, -g) + torch.sqrt(g * g + 4 * s * s * e * rest)
    low, high = torch.where(first, 2 * s * e, h), torch.where(first, h, 2 * s * rest)
    t, r = low / (low + high), high / (low + high)
    image = x0 + (x1 - x0) * t
    return torch.where(inside, image.to(z.dtype), z), -_log_det(inside, t, r, s, d0, d1)


def _knots(shares: Tensor, bound: float) -> Tensor:
    """``(*batch, bins + 1, dim)``; the ends are exact, whatever the shares' rounding."""
    inner = bound * (2 * torch.cumsum(shares[..., :-1, :], dim=-2) - 1)
    end = torch.full_like(inner[..., :1, :], bound)
    return torch.cat([-end, inner, end], dim=-2)


def _enter(z: Tensor, knots: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Bring z to the knots' dtype, held at the ends where it is outside, so that what is unused has a gradient."""
    return z.to(knots.dtype).clamp(-bound, bound), z.abs() < bound


def _bin(point: Tensor, by: Tensor, x: Tensor, y: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    """Ends of each point's bin, found among the knots `by`: x0, x1, y0, y1, and the slopes d0, d1 there."""
    one = torch.ones_like(x[..., :1, :])
    d = torch.cat([one, slopes, one], dim=-2)
    bins = torch.stack([side for knots in (x, y, d) for side in (knots[..., :-1, :], knots[..., 1:, :])], dim=-3)
    place = (point.unsqueeze(-2) >= by[..., 1:-1, :]).sum(-2, keepdim=True).unsqueeze(-3)
    batch = torch.broadcast_shapes(bins.shape[:-3], place.shape[:-3])
    bins, place = bins.expand(*batch, *bins.shape[-3:]), place.expand(*batch, 6, *place.shape[-2:])
    return bins.gather(-2, place).squeeze(-2).unbind(-2)


def _rise(t: Tensor, r: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """``t (s t + d0 r) / q``, in that of three forms whose derivative, as autodiff takes it, cancels least."""
    q, first = _denominator(t, r, s, d0, d1), t < r
    near, end, other = torch.where(first, t, r), torch.where(first, d0, d1), torch.where(first, r, t)
    part = near * (s * near + end * other) / q
    excess = d0 + d1 - 2 * s
    flat = end * excess * t * r > s * (d0 + d1)  # both ends far steeper than the middle
    over = (d0 - d1) * (1 - s / q) / torch.where(flat, excess, 1)
    return torch.where(flat, 0.5 * (1 + s * (t - r) / q + over), torch.where(first, part, 1 - part))


def _denominator(t: Tensor, r: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    return s * (t * t + r * r) + (d0 + d1) * t * r


def _log_det(inside: Tensor, t: Tensor, r: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    share = s / _denominator(t, r, s, d0, d1)
    slope = share * share * (d1 * t * t + 2 * s * t * r + d0 * r * r)
    return (inside * slope.log()).sum(-1)  # a product: what is nan in a context shows outside too


class Spline(Bijector):
    """Element-wise rational-quadratic spline on ``[-bound, bound]``, the identity outside (linear tails).

    Use it inside `Coupling` or `Masked` for the most flexible posterior whose inverse is a closed form.

    The context gives the bins' widths and heights and the slopes at the inner knots, all made positive, so that the map
    increases for every context. Identity at the zero context. Forward, inverse and log-det cost O(bins * dim), with
    exact derivatives of any order inside the bins; the map is once continuously differentiable. The arithmetic is
    float64, whatever z's dtype.

    Args:
        dim: size of z.
        bins: how many, from 2 to 50.
        bound: where the spline ends and the identity begins.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, (3 * bins - 1) * dim)``: widths, heights, slopes, each for all
        variables, as ``(3 * bins - 1, dim)`` flattened.

    Raises:
        ValueError: for too few or too many bins, or a bound that is not positive and finite.

    Reference:
        Durkan, Bekasov, Murray & Papamakarios (2019), Neural Spline Flows, section 3.1 and appendix A.

    Example:
        >>> step = Spline(2, bins=4)
        >>> image, log_det = step(torch.randn(5, 2), torch.randn(5, step.context_size))
    """

    elementwise = True

    def __init__(self, dim: int, bins: int = 8, bound: float = 3.0) -> None:
        if check_int("bins", bins, minimum=2) > _MOST:
            raise ValueError(f"bins: expected an int from 2 to {_MOST}, got {bins}")
        super().__init__(dim, (3 * bins - 1) * check_int("dim", dim, minimum=1))
        if not 0 < bound < math.inf:
            raise ValueError(f"bound: expected a positive finite number, got {bound}")
        self.bins, self.bound = bins, float(bound)

    def extra_repr(self) -> str:
        """Sizes and bound, for the module's repr."""
        return f"{super().extra_repr()}, bins={self.bins}, bound={self.bound:.6g}"

    def _numbers(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        numbers = cast(Tensor, context).to(wide_dtype(z)).unflatten(-1, (3 * self.bins - 1, -1))
        widths, heights, slopes = numbers.split([self.bins, self.bins, self.bins - 1], dim=-2)
        return spline_parameters(widths, heights, slopes)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return rational_quadratic(z, *self._numbers(z, context), self.bound)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return rational_quadratic_inverse(z, *self._numbers(z, context), self.bound)
