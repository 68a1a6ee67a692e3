"""Rational-quadratic splines: monotone, with as many bends as bins, inverted by the root of a quadratic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors import _by_hand
from flowpost.bijectors._spline_pass import Form, Inverse
from flowpost.bijectors.base import Bijector
from flowpost.masked.run import COLUMNS, Column, Solve
from flowpost.numerics.arguments import check_int, check_positive
from flowpost.numerics.arrays import Array, cumulated, like, module_of, take, wide
from flowpost.numerics.constants import Constant
from flowpost.numerics.knots import SHARE, SHIFT, SLOPE, STEEP, find_bin, knot_frame, knot_table
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.rational import denominator, parts_of, rise, slope_of

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
    return _shares(widths), _shares(heights), _slopes(slopes)


def _shares(raw: Tensor) -> Tensor:
    return SHARE + (1 - SHARE * raw.shape[-2]) * torch.softmax(raw, dim=-2)


def _slopes(raw: Tensor) -> Tensor:
    return STEEP * _above_floor(raw) + SLOPE


def _above_floor(raw: Tensor) -> Tensor:
    """The slopes less their floor, in units of the steepest."""
    return F.softplus(torch.tanh(raw / STEEP) + SHIFT / STEEP, beta=STEEP, threshold=40)


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
    return _map(z, *_of_shares(widths, heights, slopes, bound), bound)


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
    return _unmap(z, *_of_shares(widths, heights, slopes, bound), bound)


def _of_shares(widths: Tensor, heights: Tensor, slopes: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The knots, and the index of `knot_frame`."""
    frame, units, sides = knot_frame(widths.shape[-2], bound, dtype=widths.dtype, device=widths.device)
    return knot_table(torch.stack([widths, heights], -3), slopes, frame, units), sides


def _map(z: Tensor, knots: Tensor, sides: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    point, inside = _enter(z, knots, bound)
    x, y, d = find_bin(point, knots, sides, by=0)
    (x0, x1), (y0, y1) = x.unbind(-2), y.unbind(-2)
    width, height = x1 - x0, y1 - y0
    ways = (point.unsqueeze(-2) - x) / width.unsqueeze(-2)
    t, back = ways.unbind(-2)  # which is -r
    squares, product, s = ways * ways, -(t * back), height / width
    excess, q = denominator(product, s, d)
    share = s / q
    image = y0 + height * rise(squares, product, s, d, excess, q, share)
    return torch.where(inside, image.to(z.dtype), z), _log_det(inside, slope_of(squares, product, s, d, share))


def _unmap(z: Tensor, knots: Tensor, sides: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    point, inside = _enter(z, knots, bound)
    x, y, d = find_bin(point, knots, sides, by=1)
    (x0, x1), (y0, y1) = x.unbind(-2), y.unbind(-2)
    width, height = x1 - x0, y1 - y0
    s, ways = height / width, (point.unsqueeze(-2) - y) / height.unsqueeze(-2)
    parts = parts_of(ways, s, d)
    t, r = parts.unbind(-2)
    product, image = t * r, x0 + width * t
    share = s / denominator(product, s, d)[1]
    return torch.where(inside, image.to(z.dtype), z), -_log_det(inside, slope_of(parts * parts, product, s, d, share))


def _enter(z: Tensor, knots: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Bring z to the knots' dtype, held at the ends where it is outside, so that what is unused has a gradient."""
    return z.to(knots.dtype).clamp(-bound, bound), z.abs() < bound


def _log_det(inside: Tensor, slope: Tensor) -> Tensor:
    return (inside * slope.log()).sum(-1)  # a product: what is nan in a context shows outside too


def _column(example: Array, constants: Sequence[float]) -> Solve:
    """`rational_quadratic_inverse` of `spline_parameters`, for one variable."""
    xp, bins, bound = module_of(example), int(constants[0]), constants[1]

    def solve(image: Array, numbers: Array) -> Array:
        shares, inner, y = wide(numbers[: 2 * bins]), numbers[2 * bins :], wide(image).clip(-bound, bound)
        shares = shares.reshape(2, bins, -1)
        shares = xp.exp(shares - xp.amax(shares, 1)[:, None])
        sizes = 2 * bound * (SHARE + (1 - SHARE * bins) * (shares / shares.sum(1)[:, None]))
        tops = cumulated(sizes, 1) - bound
        place = (y >= tops[1, :-1]).sum(0)[None]
        (width, height), (x1, y1) = (take(each, place[None], 1)[:, 0] for each in (sizes, tops))
        knots = xp.concatenate([place - 1, place])
        raw = wide(take(inner, knots.clip(0, bins - 2), 0))
        at_knots = xp.log1p(xp.exp(STEEP * xp.tanh(raw / STEEP) + SHIFT)) + SLOPE
        d0, d1 = xp.where((knots < 0) | (knots > bins - 2), 1.0, at_knots)
        s, back = height / width, (y1 - y) / height
        rise = 1 - back
        g, low, high = d0 * back - d1 * rise, 2 * s * rise, 2 * s * back
        h = abs(g) + xp.sqrt(g * g + low * high)
        x = x1 - width * xp.where(g >= 0, h / (low + h), high / (high + h))
        return xp.where(abs(image) < bound, like(x, image), image)

    return solve


COLUMNS["spline"] = _column


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
        TypeError: for a bound that is no number, as a tensor.
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
        self.bins, self.bound = bins, bound

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Another `bound` takes the knots along, which lie between its ends."""
        if name == "bound":
            value = check_positive("bound", value)
            self._frame, self._units, self._sides = (
                Constant(part, wide=True) for part in knot_frame(self.bins, value, SLOPE, STEEP)
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Sizes and bound, for the module's repr."""
        return f"{super().extra_repr()}, bins={self.bins}, bound={self.bound:.6g}"

    def columns(self) -> tuple[Column | None, Column | None]:
        """The inverse's, unless a subclass may have a map of its own."""
        return None, Column("spline", (self.bins, self.bound)) if type(self) is Spline else None

    def _knots(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        numbers = cast(Tensor, context).to(wide_dtype(z)).unflatten(-1, (3 * self.bins - 1, -1))
        shares, slopes = numbers.split([2 * self.bins, self.bins - 1], dim=-2)
        shares, slopes = _shares(shares.unflatten(-2, (2, self.bins))), _above_floor(slopes)
        knots = knot_table(shares, slopes, self._frame.on(numbers), self._units.on(numbers))
        return knots, self._sides.on(numbers)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        hand = Form(self.bins, self.bound) if type(self) is Spline else None  # a subclass may have knots of its own
        return _by_hand.forward(hand, self._plain_forward, z, cast(Tensor, context))

    def _plain_forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return _map(z, *self._knots(z, context), self.bound)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        hand = Inverse(Form(self.bins, self.bound)) if type(self) is Spline else None
        return _by_hand.forward(hand, self._plain_inverse, z, cast(Tensor, context))

    def _plain_inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return _unmap(z, *self._knots(z, context), self.bound)
