"""Roots of increasing scalar functions: a search that carries no gradient, then corrections that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Residual = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From x to the value of an increasing function at x and its slope there, element by element."""


Array = Any
"""One of numpy's."""


def tanh_root(gain: Tensor, target: Tensor) -> Tensor:
    """The x with ``x + gain tanh(x) = target``, for ``gain > -1``; carries no gradient.

    Two steps of Halley's iteration and one of Newton's, from a start so near that no gain needs more: a fixed number,
    so that nothing waits for a device, and 40 operations in all.

    Args:
        gain: above -1, any shape.
        target: of a shape that broadcasts with it.

    Returns:
        The root to rounding for gains from -0.999 to 1e12, in float32 and float64.
    """
    with torch.no_grad():
        return _tanh_root(target.detach(), *_of_gain(gain.detach()))  # forward-mode derivatives mind no `no_grad`


def _of_gain(gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the search reads of a gain alone, the gain first."""
    many = 4 * gain
    return gain, 1 + gain, many, many.log()


def _tanh_root(target: Tensor, gain: Tensor, room: Tensor, many: Tensor, log_many: Tensor) -> Tensor:
    goal, one = target.abs(), target.new_ones(())  # the left side is odd: x has the target's sign
    x = _near_root(gain, room, many, log_many, goal)
    for order in (3, 3, 2):
        value = torch.tanh(x)
        slope = torch.addcmul(one, gain, torch.addcmul(one, value, value, value=-1))
        residual = torch.addcmul(x - goal, gain, value)
        if order == 2:
            x = torch.addcdiv(x, residual, slope, value=-1)
        else:  # less 1 / (slope / residual + value (1 - 1 / slope)), which is 0 at a root
            pull = torch.addcdiv(torch.addcdiv(value, value, slope, value=-1), slope, residual)
            x = torch.addcdiv(x, one, pull, value=-1)
    return torch.copysign(x, target)


def _near_root(gain: Tensor, room: Tensor, many: Tensor, log_many: Tensor, goal: Tensor) -> Tensor:
    """A start within 1e-9 of whose root two steps of Halley's iteration come, relative to the terms of the equation.

    `low` is below the root: ``goal / (1 + gain)``, less where the slope soon grows. ``goal - gain tanh(low)`` is then
    above it for a positive gain, and close to it for a negative one. Where gain and root are large,
    ``y = x + gain - goal`` has ``2 y e^(2 y) = 4 gain e^(2 (gain - goal))``, nearly, and a softplus is near the
    logarithm of that; ``e^(2 x) + 1 = 2 gain / y`` makes x of it to the precision of x, not of the gain. For a gain
    that is not positive there is no such y: it is nan, which `fmin` passes over.
    """
    low = goal / torch.add(room, goal.pow(2 / 3), alpha=0.6)
    double = F.softplus(torch.sub(log_many, goal - gain, alpha=2))
    far = -0.5 * torch.logit(double / many, 1e-30)
    return torch.fmin(torch.maximum(low, far), torch.addcmul(goal, gain, torch.tanh(low), value=-1))


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
    rounding = 4 * np.finfo(x.dtype).eps
    for _ in range(_MOST):
        value, slope = residual(x, rows)
        step = value / slope
        moved = x - step
        found[rows] = moved
        going = (np.abs(step) > np.maximum(near, rounding * np.abs(x))) & (np.abs(value) > noise)
        if not going.any():
            break
        above = value > 0
        low, high = np.where(above, low, x), np.where(above, x, high)
        halved = (moved < low) | (moved > high) | (np.abs(step) > 0.5 * last)
        x = np.where(halved, 0.5 * (low + high), moved)
        last = np.where(halved, 2 * (high - low), np.abs(step))
        if 2 * np.count_nonzero(going) <= len(x):
            rows = np.arange(len(found))[rows][going]
            x, low, high, last, near, noise = (each[going] for each in (x, low, high, last, near, noise))
    return found


def tanh_roots(gain: Tensor, target: Tensor) -> Tensor:
    """The y with ``y + gain tanh(y) = target``, `gain` upper triangular, its diagonal above -1; carries no gradient.

    The last row is an equation of its own, and each before it one more where those after it are known. Cost: M scalar
    roots, one after the other.

    Args:
        gain: ``(*batch, M, M)`` with axes that may be fewer or more than target's.
        target: ``(*batch, M)``.
    """
    # A compiler, which would unroll every row's search, sees an operator; an exported program has torch's own alone.
    run = _tanh_roots_operator if torch.compiler.is_dynamo_compiling() else _tanh_roots
    return run(gain.detach(), target.detach())


def _tanh_roots(gain: Tensor, target: Tensor) -> Tensor:
    roots, rest = [], target
    with torch.no_grad():
        diagonals = [each.unbind(-1) for each in _of_gain(gain.diagonal(dim1=-2, dim2=-1))]
        for i in reversed(range(target.shape[-1])):
            y = _tanh_root(rest[..., i], *[each[i] for each in diagonals])
            if i:
                rest = torch.addcmul(rest[..., :i], gain[..., :i, i], torch.tanh(y).unsqueeze(-1), value=-1)
            roots.append(y)
        return torch.stack(roots[::-1], -1)


_tanh_roots_operator: Callable[[Tensor, Tensor], Tensor] = torch.library.custom_op(
    "flowpost::tanh_roots", _tanh_roots, mutates_args=(), schema="(Tensor gain, Tensor target) -> Tensor"
)


@torch.library.register_fake("flowpost::tanh_roots")
def _shape_of_roots(gain: Tensor, target: Tensor) -> Tensor:
    return target.new_empty(torch.broadcast_shapes(gain.shape[:-1], target.shape))


def _tanh_roots_batched(
    _: object, axes: tuple[int | None, int | None], gain: Tensor, target: Tensor
) -> tuple[Tensor, int]:
    batch = max(gain.ndim - 1 - (axes[0] is not None), target.ndim - (axes[1] is not None))
    sizes = zip((gain, target), axes, (batch + 1, batch), strict=True)
    aligned = [x if axis is None else _outermost(x.movedim(axis, 0), ndim) for x, axis, ndim in sizes]
    return _tanh_roots_operator(*aligned), 0


torch.library.register_vmap("flowpost::tanh_roots", _tanh_roots_batched)


def _outermost(x: Tensor, ndim: int) -> Tensor:
    """The first axis of x before `ndim` others."""
    return x.reshape(x.shape[0], *[1] * (ndim + 1 - x.ndim), *x.shape[1:])


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
