"""The rational quadratic of one bin: what `Spline` works out of a point's place in it and of the slopes at its ends.

In all of it s is the bin's mean slope, t and r = 1 - t the shares of its width on both sides of the point, `product`
their product, `squares` ``(*batch, 2, dim)`` their squares, and d ``(*batch, 2, dim)`` the slopes at the upper and at
the lower end. `share` is s / q.
"""

from __future__ import annotations

import torch
from torch import Tensor


def denominator(product: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``d0 + d1 - 2 s`` and ``q = s + (d0 + d1 - 2 s) t r``, at least ``s / 2``: what cancels is at most half."""
    excess = torch.sub(d.sum(-2), s, alpha=2)
    return excess, s + excess * product


def rise(squares: Tensor, product: Tensor, s: Tensor, d: Tensor, excess: Tensor, q: Tensor, share: Tensor) -> Tensor:
    """``t (s t + d0 r) / q``, in that of four forms whose derivative, as autodiff takes it, cancels least.

    From the nearer knot, at v, with the slope d there, it is ``(s v^2 + d t r) / q``. Where the middle is far flatter
    than the ends, that is ``c + s (v^2 - c) / q`` with ``c = d / (d0 + d1 - 2 s)``.
    """
    (t2, r2), (d1, d0) = squares.unbind(-2), d.unbind(-2)
    first, flat = t2 < r2, share < 0.25
    near, end = torch.where(first, t2, r2), torch.where(first, d0, d1)
    moved = flat * end
    c = moved / torch.where(flat, excess, s)
    part = torch.addcdiv(c, torch.addcmul((end - moved) * product, s, near - c), q)
    return torch.where(first, part, 1 - part)


def parts_of(ways: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """Give t and r, ``(*batch, 2, dim)``, for `ways` e and ``e - 1``."""
    minus_g, ends = (d * ways).sum(-2), 2 * s.unsqueeze(-2) * ways
    low, high = ends.unbind(-2)
    up, g = minus_g <= 0, -minus_g
    h = torch.where(up, g, minus_g) + torch.sqrt(torch.addcmul(g * g, low, high, value=-1))
    both = torch.stack([torch.where(up, low, h), torch.where(up, h, -high)], -2)
    return both / both.sum(-2, keepdim=True)


def slope_of(squares: Tensor, product: Tensor, s: Tensor, d: Tensor, share: Tensor) -> Tensor:
    """``(s / q)^2 (d1 t^2 + 2 s t r + d0 r^2)``."""
    return share * share * torch.addcmul((d * squares).sum(-2), s, product, value=2)
