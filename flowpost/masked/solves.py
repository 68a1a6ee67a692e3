# ruff: noqa: ANN001, ANN201, ANN202, RET505 (Triton reads annotations as types, and compiles branches by their else)
"""The closed column solves of `COLUMNS` within Triton's kernels, once more: a test holds each to its family's file.

Of one row a program has the numbers as ``(COLUMNS,)`` and the image as a scalar, so that its columns lie on different
threads; of several as ``(ROWS, COLUMNS)`` and ``(ROWS, 1)``. After the last number are zeros; `which` are their places.
"""

# Where Triton is installed, its annotations are of what a kernel sees, and not of what is handed to it.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from flowpost.masked import maps
from flowpost.masked.fused import SOLVED
from flowpost.numerics import knots

_INVERSE_SHIFT, _SHIFT, _SPLINE = (tl.constexpr(SOLVED.index(name)) for name in ("inverse shift", "shift", "spline"))
_SHARE, _SLOPE, _STEEP, _AT_ONE = (tl.constexpr(each) for each in (knots.SHARE, knots.SLOPE, knots.STEEP, knots.SHIFT))


@triton.jit
def solve(y, numbers, which, first, second, KIND: tl.constexpr, BINS: tl.constexpr):
    """The preimage of y; `first` and `second` are the constants of a map that has them."""
    if KIND == _SPLINE:
        return _spline(y, numbers, which, second, BINS)
    else:
        p = _sum(numbers, which == 0)
        if KIND == _INVERSE_SHIFT:
            return y - p
        elif KIND == _SHIFT:
            return y + p
        else:
            x, _ = maps.preimage(y, p, _sum(numbers, which == 1), first, second, KIND)
            return x


@triton.jit
def _spline(image, numbers, which, bound, BINS: tl.constexpr):
    """In float64, as the family has it: in a narrow bin, float32 knots would lose most digits of the place in it."""
    raw, bound = numbers.to(tl.float64), tl.full([], bound, tl.float64)
    y = tl.minimum(tl.maximum(image.to(tl.float64), -bound), bound)
    of_heights = (which >= BINS) & (which < 2 * BINS)
    widths, heights = _sizes(raw, which < BINS, bound, BINS), _sizes(raw, of_heights, bound, BINS)
    tops = tl.cumsum(heights, len(raw.shape) - 1) - bound
    place = _total((of_heights & (y >= tops)).to(tl.int32))  # no bin's for y at the bound, which is outside
    at_place = which == BINS + place
    width, height = _sum(widths, which == place), _sum(heights, at_place)
    x1, y1 = _sum(widths, which <= place) - bound, _sum(tops, at_place)
    d0 = tl.where(place == 0, 1.0, _slope(_sum(raw, which == 2 * BINS - 1 + place)))
    d1 = tl.where(place == BINS - 1, 1.0, _slope(_sum(raw, which == 2 * BINS + place)))
    s, back = height / width, (y1 - y) / height
    rise = 1 - back
    g, low, high = d0 * back - d1 * rise, 2 * s * rise, 2 * s * back
    h = tl.abs(g) + tl.sqrt(g * g + low * high)
    x = x1 - width * tl.where(g >= 0, h / (low + h), high / (high + h))
    return tl.where(tl.abs(image) < bound, x.to(tl.float32), image)


@triton.jit
def _sizes(raw, here, bound, BINS: tl.constexpr):
    """The sizes of the bins whose raw shares are `here`, and zeros elsewhere."""
    known = tl.where(here, raw, -float("inf"))
    most = tl.max(known, 0) if len(raw.shape) == 1 else tl.max(known, 1, keep_dims=True)
    parts = tl.where(here, tl.exp(raw - most), 0.0)
    shares = parts / _total(parts)
    return tl.where(here, 2 * bound * (shares * (1 - _SHARE * BINS) + _SHARE), 0.0)


@triton.jit
def _slope(raw):
    """The slope at an inner knot."""
    return maps.softplus(maps.tanh(raw / _STEEP) * _STEEP + _AT_ONE) + _SLOPE


@triton.jit
def _sum(values, here):
    return _total(tl.where(here, values, 0.0))


@triton.jit
def _total(values):
    """Over a row."""
    if len(values.shape) == 1:
        return tl.sum(values, 0)
    else:
        return tl.sum(values, 1, keep_dims=True)
