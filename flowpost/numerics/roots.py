"""Roots of increasing scalar functions: a search that carries no gradient, then corrections that do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flowpost.numerics.arrays import Array

Residual = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From x to the value of an increasing function at x and its slope there, element by element."""

_POINTS, _ROUNDS, _STEPS = 5, 8, 6
"""Of `increasing_root`: at how many points at once the function is read, how many times, and steps from there on."""


def increasing_root(
    residual: Residual, low: Tensor, high: Tensor, value: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The root of an increasing function between two ends; carries no gradient.

    The function is read at 5 points of the bracket at once, and the part in which it changes sign is the next bracket:
    8 times, to 1/6 of the width each. From the middle of the last run 6 steps of Newton's iteration, held within a
    bracket's width of it.

    Args:
        residual: the increasing function, of points with one more axis before the others.
        low: where its value is not above 0.
        high: where its value is not below 0, of the same shape.
        value: the function without its slope, where that costs less.

    Returns:
        The root to rounding, or near enough for `correct` to take it there. A fixed number of operations, so that
        nothing waits for a device: 5 steps were enough for the slowest of half a million deep sigmoids.
    """
    with torch.no_grad():
        width, size = high - low, 1.0
        inner = torch.arange(1, _POINTS + 1, dtype=low.dtype, device=low.device).view(-1, *[1] * low.ndim)
        for _ in range(_ROUNDS):
            size /= _POINTS + 1
            points = torch.addcmul(low, inner, width, value=size)
            values = residual(points)[0] if value is None else value(points)
            low = torch.addcmul(low, (values <= 0).sum(0, dtype=low.dtype), width, value=size)
        x = torch.add(low, width, alpha=0.5 * size)
        # A width beyond the ends: the root may be at one of them, which is rounded.
        ends = torch.sub(low, width, alpha=size), torch.add(low, width, alpha=2 * size)
        for _ in range(_STEPS):
            x = torch.addcdiv(x, *residual(x), value=-1).clamp(*ends)
        return x


_MOST = 200
"""Of `increasing_root_by_array`: more steps than halving and Newton's iteration in turns ever need."""


def increasing_root_by_array(
    residual: Callable[[Array, Array], tuple[Array, Array]],
    start: Array,
    low: Array,
    high: Array,
    near: Array,
    noise: Array,
) -> Array:
    """As `increasing_root`, of numpy's arrays, which may be read: it goes on with those roots alone that need it.

    Newton's iteration from a start; where a step leaves the bracket, or is not half as long as the last one, the
    bracket is halved instead. A root is there when a step is so short that the next would be lost in rounding.

    Args:
        residual: the value and the slope of the increasing function at points ``(n,)``, of the rows that are given by
            an index.
        start: ``(N,)``.
        low: where the function's value is not above 0, ``(N,)``.
        high: where its value is not below 0, ``(N,)``.
        near: a step as short as this, or as the rounding of x, is the last, ``(N,)``.
        noise: so is one from a point whose value is of the size of its rounding, this, ``(N,)``.

    Returns:
        The roots ``(N,)``; nan where the function is.
    """
    found, rows, x, last = start.copy(), slice(None), start, 2 * (high - low)
    rounding, going = 4 * np.finfo(x.dtype).eps, np.ones(len(x), dtype=bool)
    for _ in range(_MOST):
        value, slope = residual(x, rows)
        step = value / slope
        moved = x - step
        # A root that is there stays, to the last bit: how long the others take is not its affair.
        found[rows] = np.where(going, moved, found[rows])
        going &= (np.abs(step) > np.maximum(near, rounding * np.abs(x))) & (np.abs(value) > noise)
        if not going.any():
            break
        above = value > 0
        low, high = np.where(above, low, x), np.where(above, x, high)
        halved = (moved < low) | (moved > high) | (np.abs(step) > 0.5 * last)
        x = np.where(halved, 0.5 * (low + high), moved)
        last = np.where(halved, 2 * (high - low), np.abs(step))
        if 2 * np.count_nonzero(going) <= len(x):
            rows = np.arange(len(found))[rows][going]
            x, low, high, last, near, noise, going = (each[going] for each in (x, low, high, last, near, noise, going))
    return found


def correct(residual: Residual, root: Tensor) -> Tensor:
    """Two differentiable Newton steps from a root that carries no gradient.

    The first attaches the implicit gradient, ``-d residual / slope``; the second makes second derivatives exact too.

    Args:
        residual: the increasing function, its parameters in the graph.
        root: its root, detached.

    Returns:
        The root with exact first and second derivatives in whatever the residual depends on.
    """
    for _ in range(2):
        value, slope = residual(root)
        root = root - value / slope
    return root
