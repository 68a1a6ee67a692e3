# ruff: noqa: ANN001, ANN201, ANN202, RET505 (Triton reads annotations as types, and compiles branches by their else)
"""The column solves of `COLUMNS` within Triton's kernels, once more: a test holds each to its family's file.

Of one row a program has the numbers as ``(COLUMNS,)`` and the image as a scalar, so that its columns lie on different
threads; of several as ``(ROWS, COLUMNS)`` and ``(ROWS, 1)``. After the last number are zeros; `which` are their places.
"""

# Where Triton is installed, its annotations are of what a kernel sees, and not of what is handed to it.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from flowpost.masked.device import maps
from flowpost.masked.device.fused import IN_PARTS, SOLVED
from flowpost.numerics import knots

_INVERSE_SHIFT, _SHIFT, _SPLINE, _DEEP_SIGMOID = (
    tl.constexpr(SOLVED.index(name)) for name in ("inverse shift", "shift", *IN_PARTS)
)
_LOG_4 = tl.constexpr(math.log(4))
_HALVES, _STEPS = tl.constexpr(21), tl.constexpr(6)
_SHARE, _SLOPE, _STEEP, _AT_ONE = (tl.constexpr(each) for each in (knots.SHARE, knots.SLOPE, knots.STEEP, knots.SHIFT))


@triton.jit
def solve(y, numbers, which, first, second, KIND: tl.constexpr, PARTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The preimage of y; `first` and `second` are the constants of a map that has them, PARTS its bins or units."""
    if KIND == _SPLINE:
        return _spline(y, numbers, which, second, PARTS)
    elif KIND == _DEEP_SIGMOID:
        x = y.to(tl.float64)
        for layer in tl.static_range(OUTPUTS // (3 * PARTS) - 1, -1, -1):
            x = _mixture(x, numbers, which, 3 * layer * PARTS, PARTS)
        return x.to(tl.float32)
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
def _mixture(y, numbers, which, first, UNITS: tl.constexpr):
    """The root of a mixture of sigmoids, whose raw numbers begin at `first`, in float64: halves, then Newton's steps.

    Halving leaves a bracket as wide as the search of torch's operations does, and as many steps follow.
    """
    unit = which < UNITS
    rate = tl.exp((which.to(tl.float64) / (UNITS - 1 + (UNITS == 1)) - 0.5) * _LOG_4)
    a = tl.exp(4 * maps.tanh(_at(numbers, first + which) / 4))
    b = 6 * maps.tanh(rate * _at(numbers, first + UNITS + which) / 6)
    log_w = tl.where(unit, _at(numbers, first + 2 * UNITS + which), -float("inf"))
    log_w -= _most(log_w)
    log_w -= tl.log(_total(tl.exp(log_w)))
    ends = (y - b) / a
    low, high = -_most(tl.where(unit, -ends, -float("inf"))), _most(tl.where(unit, ends, -float("inf")))
    for _ in range(_HALVES):
        middle = 0.5 * (low + high)
        above = _residual(middle, y, a, b, log_w)[0] > 0
        low, high = tl.where(above, low, middle), tl.where(above, middle, high)
    x, width = 0.5 * (low + high), high - low
    for _ in range(_STEPS):
        value, slope = _residual(x, y, a, b, log_w)
        x = tl.minimum(tl.maximum(x - value / slope, low - width), high + width)
    given = _total(tl.where(unit, a + b + log_w, 0.0)) + y
    return tl.where(given == given, x, given)  # a bound drops what is nan


@triton.jit
def _residual(x, y, a, b, log_w):
    """The logit of a mixture of sigmoids less y, and its slope."""
    u = a * x + b
    line = -maps.softplus(-u)
    up, down = log_w + line, log_w + line - u
    most_up, most_down = _most(up), _most(down)
    up, down = tl.exp(up - most_up), tl.exp(down - most_down)
    sum_up, sum_down = _total(up), _total(down)
    slope = _total(a * (up / sum_up * tl.exp(line - u) + down / sum_down * tl.exp(line)))
    return most_up + tl.log(sum_up) - most_down - tl.log(sum_down) - y, slope


@triton.jit
def _at(values, places):
    """Of each row the values at places of it, in float64."""
    places = tl.minimum(places, values.shape[len(values.shape) - 1] - 1)
    return tl.gather(values, tl.broadcast_to(places, values.shape), len(values.shape) - 1).to(tl.float64)


@triton.jit
def _sizes(raw, here, bound, BINS: tl.constexpr):
    """The sizes of the bins whose raw shares are `here`, and zeros elsewhere."""
    known = tl.where(here, raw, -float("inf"))
    parts = tl.where(here, tl.exp(raw - _most(known)), 0.0)
    shares = parts / _total(parts)
    return tl.where(here, 2 * bound * (shares * (1 - _SHARE * BINS) + _SHARE), 0.0)


@triton.jit
def _slope(raw):
    """The slope at an inner knot."""
    return maps.softplus(maps.tanh(raw / _STEEP) * _STEEP + _AT_ONE) + _SLOPE


@triton.jit
def _most(values):
    """Of a row."""
    if len(values.shape) == 1:
        return tl.max(values, 0)
    else:
        return tl.max(values, 1, keep_dims=True)


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
