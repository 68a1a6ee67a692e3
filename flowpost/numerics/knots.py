"""The knots between the bins of an interval, in one table: made, and read for each point, by few operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.sums import cumulated

SHARE = 1e-2
"""The least share of a bin."""
SLOPE = 1e-3
"""The least slope at a knot."""
STEEP = 100.0
"""The most slope at a knot, about: above it a rounding of z in float32 would be felt in log q."""
SHIFT = math.log(math.expm1(1 - SLOPE))
"""Where the slope that is 1 comes from."""


def knot_frame(
    bins: int,
    bound: float,
    floor: float = 0.0,
    unit: float = 1.0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """What all tables of knots have in common, ``(3, bins + 1, 1)``, units of the rest, ``(3, 1, 1)``, and an index.

    The slopes at inner knots are given to the table less a floor, and in a unit. The index has, ``(3, 2, 1)``, of a
    bin's two knots the one to read first: in x and y the lower, of slopes the upper. All is filled in on the device:
    numbers from the host would have to be waited for.
    """
    frame = torch.full((3, bins + 1, 1), -bound, dtype=dtype, device=device)
    frame[:2, -1].fill_(bound)
    frame[2].fill_(floor)[::bins].fill_(1.0)
    units = torch.full((3, 1, 1), 2 * bound, dtype=dtype, device=device)
    units[2].fill_(unit)
    sides = torch.zeros(3, 2, 1, dtype=torch.int64, device=device)
    sides[:2, 1].fill_(1)
    sides[2, 0].fill_(1)
    return frame, units, sides


def knot_table(shares: Tensor, slopes: Tensor, frame: Tensor, units: Tensor) -> Tensor:
    """x, y and slopes at all knots, ``(*batch, 3, bins + 1, dim)``; the ends are exact, whatever the shares' rounding.

    Of the shares of x and of y, ``(*batch, 2, bins, dim)``, the slopes at the inner knots, and what `knot_frame` gives.
    """
    inner = torch.cat([cumulated(shares[..., :-1, :], -2), slopes.unsqueeze(-3)], dim=-3)
    return torch.addcmul(frame, F.pad(inner, (0, 0, 1, 1)), units)


def find_bin(point: Tensor, knots: Tensor, sides: Tensor, *, by: int) -> tuple[Tensor, ...]:
    """x0 and x1, y0 and y1, d1 and d0 of each point's bin, ``(*batch, 2, dim)``; found in x, or with `by` 1 in y."""
    place = (point.unsqueeze(-2) >= knots[..., by, 1:-1, :]).sum(-2, keepdim=True).unsqueeze(-3) + sides
    batch = torch.broadcast_shapes(knots.shape[:-3], place.shape[:-3])
    knots, place = (each.expand(*batch, *each.shape[-3:]) for each in (knots, place))
    return knots.gather(-2, place).unbind(-3)
