"""A spline's pass and its inverse with their ways back, written out: only the slopes of a point's own bin are made.

Places are counted from the interval's lower end. The bin from (x, y), of width w and height h, has the mean slope
``s = h / w`` and at its ends the slopes d and e. With ``t = (u - x) / w``, ``r = 1 - t``, ``f = s t + d r`` and
``g = s r + e t`` it is

    y + h R,  R = t f / q,  q = t f + r g,  of slope  (s / q)^2 m,  m = t g + r f.

In t, R has the slope over s. With t held it has ``t r (e t^2 - d r^2) / q^2`` in s, ``t r (1 - R) / q`` in d and
``-t r R / q`` in e.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.knots import SHARE, SHIFT, SLOPE, STEEP
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.sums import cumulated


class _Bin(NamedTuple):
    """Where a point is, all numbers in the wide dtype: what a pass and an inverse find alike."""

    free: Tensor
    """Widths, and heights, above their floor, ``(N, 2, bins, dim)``."""
    place: Tensor
    """The number of the bin, ``(N, 1, dim)``."""
    low: Tensor
    """x and y, ``(N, 2, dim)``."""
    high: Tensor
    """And those of the bin's other end."""
    bent: Tensor
    """The bounded numbers of d and e, ``(N, 2, dim)``, over their bound."""
    ends: Tensor
    """d and e, ``(N, 2, dim)``."""


class _Kept(NamedTuple):
    """What the way back needs, all numbers in the wide dtype."""

    free: Tensor
    """As the next four, of a `_Bin`."""
    place: Tensor
    low: Tensor
    bent: Tensor
    ends: Tensor
    size: Tensor
    """w and h, ``(N, 2, dim)``."""
    t: Tensor
    """As all that follows ``(N, dim)``."""
    r: Tensor
    q: Tensor
    slope: Tensor
    inside: Tensor
    """Where the spline is not the identity."""


class _Sums(NamedTuple):
    """Of positive terms, each ``(N, dim)``."""

    f: Tensor
    g: Tensor
    risen: Tensor
    """``t f``"""
    m: Tensor


class Form(NamedTuple):
    """What a spline of sizes is."""

    bins: int
    bound: float

    @property
    def floor(self) -> float:
        """The least width or height of a bin."""
        return 2 * self.bound * SHARE

    def position(self, z: Tensor) -> Tensor:
        """Where points are, in the wide dtype; of those outside, the nearer end."""
        return z.to(wide_dtype(z)).clamp(-self.bound, self.bound) + self.bound

    def find(self, u: Tensor, context: Tensor, *, by: int) -> _Bin:
        """The bins of points, found in x, or with `by` 1 in y."""
        numbers = context.to(u.dtype).unflatten(-1, (3 * self.bins - 1, u.shape[-1]))
        shares, slopes = numbers.split([2 * self.bins, self.bins - 1], -2)
        free = torch.softmax(shares.unflatten(-2, (2, self.bins)), -2).mul_(2 * self.bound - self.bins * self.floor)
        knots = F.pad(cumulated((free + self.floor)[..., :-1, :], -2), (0, 0, 1, 1))
        knots[..., -1, :].fill_(2 * self.bound)  # whatever the rounding of the sum
        place = (u.unsqueeze(-2) >= knots[:, by, 1:-1]).sum(-2, keepdim=True)
        at_knots = torch.cat([place, place + 1], -2)
        low, high = knots.gather(-2, at_knots.unsqueeze(1).expand(-1, 2, -1, -1)).unbind(-2)
        raw = F.pad(slopes, (0, 0, 1, 1)).gather(-2, at_knots)  # 0, of which the slope 1 is made, at the ends of all
        bent = torch.tanh(raw / STEEP)
        ends = STEEP * F.softplus(bent + SHIFT / STEEP, beta=STEEP, threshold=40) + SLOPE
        return _Bin(free, place, low, high, bent, ends)

    def values(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """z', the log-det in the wide dtype, and what `gradients` needs."""
        u = self.position(z)
        found = self.find(u, context, by=0)
        size = found.high - found.low
        width, height = size.unbind(1)
        s, t, r = height / width, (u - found.low[:, 0]) / width, (found.high[:, 0] - u) / width
        sums = _sums(found.ends, s, t, r)
        q = torch.addcmul(sums.risen, r, sums.g)
        share = s / q
        slope = share * share * sums.m
        image, inside = torch.addcdiv(found.low[:, 1], height * sums.risen, q) - self.bound, z.abs() < self.bound
        kept = [*_keep(found, size, t, r, q, slope, inside), *sums]
        return torch.where(inside, image.to(z.dtype), z), _log_det(inside, slope), kept

    def gradients(
        self, z: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor, *, of_context: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients at z and at the context."""
        count = len(_Kept._fields)
        own, sums = _Kept(*kept[:count]), _Sums(*kept[count:])
        at_log, at_image = grad_log_det.unsqueeze(-1) * own.inside, _of_image(own, grad)
        at_u = torch.addcmul(_of_log(own, sums, at_log), at_image, own.slope)
        at_z = torch.where(own.inside, at_u.to(z.dtype), grad)
        return at_z, _of_numbers(self, own, sums, at_u, at_image, at_log).to(z.dtype) if of_context else None


class Inverse(NamedTuple):
    """The inverse of a spline.

    With ``p = (v - y) / h``, ``1 - p`` beside it, ``a = d (1 - p) - e p`` and ``b = sqrt(a^2 + 4 s^2 p (1 - p))``,
    t is ``2 s p / (a + b + 2 s p)``, or where a is negative r is ``2 s (1 - p) / (b - a + 2 s (1 - p))``; the slope is
    ``s b / q``. At the preimage x of y the pass gives ``dx/dy = 1 / slope``, and where a number moves y by c at x, it
    moves x by ``-c / slope``.
    """

    form: Form

    def values(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, _Kept]:
        """The preimage, the log-det of the inverse, and what `gradients` needs."""
        v = self.form.position(z)
        found = self.form.find(v, context, by=1)
        size = found.high - found.low
        (width, height), (d, e) = size.unbind(1), found.ends.unbind(1)
        s, up, down = height / width, (v - found.low[:, 1]) / height, (found.high[:, 1] - v) / height
        double = 2 * s
        rising, falling, a = double * up, double * down, torch.addcmul(d * down, e, up, value=-1)
        b = torch.sqrt(torch.addcmul(a * a, rising, falling))
        far, first = a.abs() + b, a >= 0
        t, r = torch.where(first, rising, far), torch.where(first, far, falling)
        whole = t + r
        t, r = t / whole, r / whole
        q = torch.addcmul(s, d + e - double, t * r)
        slope, inside = s * b / q, z.abs() < self.form.bound
        preimage = torch.addcmul(found.low[:, 0], width, t) - self.form.bound
        kept = _keep(found, size, t, r, q, slope, inside)
        return torch.where(inside, preimage.to(z.dtype), z), -_log_det(inside, slope), kept

    def gradients(
        self, z: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor, *, of_context: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients at z and at the context."""
        form, own = self.form, _Kept(*kept)
        sums = _sums(own.ends, own.size[:, 1] / own.size[:, 0], own.t, own.r)
        at_log, at_u = -grad_log_det.unsqueeze(-1) * own.inside, _of_image(own, grad)
        at_v = (at_u + _of_log(own, sums, at_log)) / own.slope
        at_z = torch.where(own.inside, at_v.to(z.dtype), grad)
        return at_z, _of_numbers(form, own, sums, -at_u, -at_v, at_log).to(z.dtype) if of_context else None


def _keep(found: _Bin, size: Tensor, t: Tensor, r: Tensor, q: Tensor, slope: Tensor, inside: Tensor) -> _Kept:
    return _Kept(found.free, found.place, found.low, found.bent, found.ends, size, t, r, q, slope, inside)


def _sums(ends: Tensor, s: Tensor, t: Tensor, r: Tensor) -> _Sums:
    d, e = ends.unbind(1)
    f, g = torch.addcmul(s * t, d, r), torch.addcmul(s * r, e, t)
    return _Sums(f, g, t * f, torch.addcmul(t * g, r, f))


def _log_det(inside: Tensor, slope: Tensor) -> Tensor:
    return (inside * slope.log()).sum(-1)  # a product: what is nan in a context shows outside too


def _of_image(kept: _Kept, grad: Tensor) -> Tensor:
    """The gradient at what comes out of the bins; outside nothing does, be it infinite."""
    return torch.where(kept.inside, grad.to(kept.q.dtype), 0.0)


def _of_log(kept: _Kept, sums: _Sums, at_log: Tensor) -> Tensor:
    """The gradient at u of the log of the slope, the bin held fixed."""
    (width, height), (d, e) = kept.size.unbind(1), kept.ends.unbind(1)
    by_m, by_q = at_log / sums.m, at_log / kept.q
    turning = torch.sub(d + e, height / width, alpha=2) * (kept.r - kept.t)
    return 2 * torch.addcmul(by_m * (sums.g - sums.f), by_q, turning, value=-1) / width


def _of_numbers(form: Form, kept: _Kept, sums: _Sums, at_u: Tensor, at_image: Tensor, at_log: Tensor) -> Tensor:
    """The gradient at a context, u held fixed, from those at u, at the image and at the log of the slope."""
    free, place, low, bent, ends, size, t, r, q = kept[:9]
    (width, height), (d, e) = size.unbind(1), ends.unbind(1)
    s, product, t2, r2 = height / width, t * r, t * t, r * r
    by_m, by_q, by_rise = at_log / sums.m, 2 * at_log / q, at_image * height / q
    rise, fall = sums.risen / q, r * sums.g / q
    at_s = product * (2 * by_m + by_q * (d + e) / s + by_rise * (e * t2 - d * r2) / q)
    at_d = torch.addcmul(product * (by_rise * fall - by_q), by_m, r2)
    at_e = torch.addcmul(by_m * t2, product, by_rise * rise + by_q, value=-1)
    at_width, at_height = -(at_u * t + at_s * s / width), torch.addcmul(at_s / width, at_image, rise)
    pairs = ((-at_u, at_image), (at_width, at_height), (at_d, at_e))
    at_low, at_size, at_ends = (torch.stack(pair, 1) for pair in pairs)

    # Of the shares below a point's own bin each moves (x, y), its own (w, h), and those above neither; what all of them
    # have in common a softmax takes away.
    of_all = at_low * torch.sub(low, place.to(low.dtype), alpha=form.floor) + at_size * (size - form.floor)
    of_all = of_all / (2 * form.bound - form.bins * form.floor)
    below = torch.arange(form.bins, device=place.device).unsqueeze(-1) < place
    at_shares = torch.addcmul(-of_all.unsqueeze(-2), below.unsqueeze(1).to(low.dtype), at_low.unsqueeze(-2))
    own = place.unsqueeze(1).expand(-1, 2, -1, -1)
    at_shares = at_shares.scatter_(-2, own, (at_size - of_all).unsqueeze(-2)).mul_(free)

    curved = torch.sigmoid(STEEP * bent + SHIFT) * (1 - bent * bent)
    at_slopes = low.new_zeros(len(low), form.bins + 1, low.shape[-1])
    at_slopes.scatter_(-2, torch.cat([place, place + 1], -2), at_ends * curved)
    return torch.cat([at_shares.flatten(1, 2), at_slopes[:, 1:-1]], -2).flatten(-2)
