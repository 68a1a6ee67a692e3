"""A spline's pass and its way back, written out: of the slopes only those of a point's own bin are made.

Lengths are shares of the interval. The bin from (x, y), of width w and height h, has the mean slope ``s = h / w``, and
at its ends the slopes d and e. With ``t = (u - x) / w``, ``r = 1 - t``, ``f = s t + d r`` and ``g = s r + e t`` it is

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


class _Kept(NamedTuple):
    """What a pass has worked out, in the wide dtype."""

    free: Tensor
    """The shares above their floor, ``(N, 2, bins, dim)``: of widths, and of heights."""
    place: Tensor
    """Each point's bin, ``(N, 1, dim)``."""
    low: Tensor
    """x and y, ``(N, 2, dim)``."""
    size: Tensor
    """w and h, ``(N, 2, dim)``."""
    bent: Tensor
    """The bounded numbers of d and e, ``(N, 2, dim)``, over their bound."""
    ends: Tensor
    """d and e, ``(N, 2, dim)``."""
    t: Tensor
    """As all that follows ``(N, dim)``."""
    r: Tensor
    f: Tensor
    g: Tensor
    q: Tensor
    m: Tensor
    slope: Tensor


class Form(NamedTuple):
    """What a spline of sizes is."""

    bins: int
    bound: float

    def values(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, _Kept]:
        """z', the log-det in the wide dtype, and what `gradients` needs."""
        numbers = context.unflatten(-1, (3 * self.bins - 1, z.shape[-1]))
        shares, slopes = numbers.split([2 * self.bins, self.bins - 1], -2)
        free = torch.softmax(shares.to(wide_dtype(z)).unflatten(-2, (2, self.bins)), -2).mul_(1 - SHARE * self.bins)
        knots = F.pad(cumulated((free + SHARE)[..., :-1, :], -2), (0, 0, 1, 1))
        knots[..., -1, :].fill_(1)  # whatever the rounding of the sum
        u = (z.to(free.dtype).clamp(-self.bound, self.bound) + self.bound) / (2 * self.bound)
        place = (u.unsqueeze(-2) >= knots[:, 0, 1:-1]).sum(-2, keepdim=True)
        at_knots = torch.cat([place, place + 1], -2)
        low, high = knots.gather(-2, at_knots.unsqueeze(1).expand(-1, 2, -1, -1)).unbind(-2)
        size, (bent, ends) = high - low, self._ends(slopes, at_knots - 1, free.dtype)

        (width, height), (d, e) = size.unbind(-2), ends.unbind(-2)
        s, t, r = height / width, (u - low[:, 0]) / width, (high[:, 0] - u) / width
        f, g = torch.addcmul(s * t, d, r), torch.addcmul(s * r, e, t)
        risen = t * f
        q, m = torch.addcmul(risen, r, g), torch.addcmul(t * g, r, f)
        share = s / q
        slope = share * share * m
        image = torch.addcdiv(low[:, 1], height * risen, q) * (2 * self.bound) - self.bound
        inside = self._inside(z)
        log_det = (inside * slope.log()).sum(-1)  # a product: what is nan in a context shows outside too
        kept = _Kept(free, place, low, size, bent, ends, t, r, f, g, q, m, slope)
        return torch.where(inside, image.to(z.dtype), z), log_det, kept

    def gradients(
        self, z: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor, *, of_context: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients at z and at the context."""
        _, _, _, size, _, ends, t, r, f, g, q, m, slope = _Kept(*kept)
        (width, height), (d, e), inside = size.unbind(-2), ends.unbind(-2), self._inside(z)
        s, both = height / width, d + e
        at_log, at_image = grad_log_det.unsqueeze(-1) * inside, (2 * self.bound) * (grad.to(q.dtype) * inside)
        by_m, by_q = at_log / m, 2 * at_log / q
        at_t = 2 * by_m * (g - f) - by_q * torch.sub(both, s, alpha=2) * (r - t)
        at_u = torch.addcdiv(at_image * slope, at_t, width)
        at_z = torch.where(inside, (at_u / (2 * self.bound)).to(z.dtype), grad)
        if not of_context:
            return at_z, None

        product, by_rise = t * r, at_image * height / q
        t2, r2, rise, fall = t * t, r * r, t * f / q, r * g / q
        at_s = product * (2 * by_m + by_q * both / s + by_rise * (e * t2 - d * r2) / q)
        at_d = torch.addcmul(product * (by_rise * fall - by_q), by_m, r2)
        at_e = torch.addcmul(by_m * t2, product, by_rise * rise + by_q, value=-1)
        at_width, at_height = -(at_u * t + at_s * s / width), torch.addcmul(at_s / width, at_image, rise)
        pairs = ((-at_u, at_image), (at_width, at_height), (at_d, at_e))
        at_low, at_size, at_ends = (torch.stack(pair, -2) for pair in pairs)
        return at_z, self._at_numbers(_Kept(*kept), at_low, at_size, at_ends, grad.dtype)

    def _inside(self, z: Tensor) -> Tensor:
        return z.abs() < self.bound

    def _ends(self, slopes: Tensor, knots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The bounded numbers of a bin's two slopes, over their bound, and the slopes: at the spline's ends 0 and 1."""
        inner = knots.clamp(0, self.bins - 2)
        bent = torch.tanh(slopes.gather(-2, inner).to(dtype) * (inner == knots) / STEEP)
        return bent, STEEP * F.softplus(bent + SHIFT / STEEP, beta=STEEP, threshold=40) + SLOPE

    def _at_numbers(self, kept: _Kept, at_low: Tensor, at_size: Tensor, at_ends: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient at a context from those at (x, y), (w, h) and (d, e), each ``(N, 2, dim)``.

        Of the shares below a point's own bin each moves (x, y), its own (w, h), and those above neither; what all of
        them have in common a softmax takes away.
        """
        free, place, low, size, bent = kept[:5]
        of_all = at_low * torch.sub(low, place.to(low.dtype), alpha=SHARE) + at_size * (size - SHARE)
        of_all = of_all / (1 - SHARE * self.bins)
        below = torch.arange(self.bins, device=place.device).unsqueeze(-1) < place
        at_shares = torch.addcmul(-of_all.unsqueeze(-2), below.unsqueeze(1).to(low.dtype), at_low.unsqueeze(-2))
        own = place.unsqueeze(1).expand(-1, 2, -1, -1)
        at_shares = at_shares.scatter_(-2, own, (at_size - of_all).unsqueeze(-2)).mul_(free)

        curved = torch.sigmoid(STEEP * bent + SHIFT) * (1 - bent * bent)
        at_slopes = low.new_zeros(len(low), self.bins + 1, low.shape[-1])
        at_slopes.scatter_(-2, torch.cat([place, place + 1], -2), at_ends * curved)
        parts = [at_shares.flatten(1, 2), at_slopes[:, 1:-1]]
        return torch.cat([each.to(dtype) for each in parts], -2).flatten(-2)
