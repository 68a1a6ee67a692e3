"""Roots of increasing scalar functions: a search that carries no gradient, then corrections that do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Residual = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From x to the value of an increasing function at x and its slope there, element by element."""


def tanh_root(gain: Tensor, target: Tensor) -> Tensor:
    """The x with ``x + gain tanh(x) = target``, for ``gain > -1``; carries no gradient.

    The left side is odd, so x has the target's sign, and ``|x|`` lies between ``|target| - gain`` and ``|target|``.
    There the left side is concave for a positive gain and convex for a negative one, so Newton's iteration from the end
    on the flat side runs to the root without ever passing it: the bracket needs no keeping.

    Args:
        gain: above -1, any shape.
        target: of a shape that broadcasts with it.

    Returns:
        The root to rounding for gains from -0.999 to 1e12, after 20 steps in float32 and 32 in float64: a fixed number,
        so that nothing waits for a device.
    """
    with torch.no_grad():
        goal = target.abs()
        x = torch.where(gain < 0, goal - gain, torch.maximum(goal - gain, goal / (1 + gain)))
        for _ in range(20 if goal.dtype == torch.float32 else 32):
            value = torch.tanh(x)
            x = x - (x + gain * value - goal) / (1 + gain * (1 - value * value))
        return torch.copysign(x, target)


def increasing_root(residual: Residual, low: Tensor, high: Tensor, steps: int = 40) -> Tensor:
    """The root of an increasing function between two ends; carries no gradient.

    Newton's iteration inside a bracket that every value narrows. Where Newton's step leaves the bracket, or is more
    than half of the step before, the bracket is halved instead: so it shrinks at least half as fast as in a bisection,
    and near the root quadratically. Rounding may send the last steps astray; the point of least ``|value|`` is kept.

    Args:
        residual: the increasing function.
        low: where its value is not above 0.
        high: where its value is not below 0, of the same shape.
        steps: evaluations, a fixed number, so that nothing waits for a device: 24 were enough for the slowest of half
            a million deep sigmoids, and 40 halve a bracket to 1e-12 of its width.

    Returns:
        The root to rounding, or near enough for `correct` to take it there.
    """
    with torch.no_grad():
        x = 0.5 * (low + high)
        best, least, last = x, torch.full_like(x, torch.finfo(x.dtype).max), high - low
        for _ in range(steps):
            value, slope = residual(x)
            better = value.abs() < least
            best, least = torch.where(better, x, best), torch.where(better, value.abs(), least)
            low, high = torch.where(value < 0, x, low), torch.where(value < 0, high, x)
            newton = x - value / slope
            sound = (newton >= low) & (newton <= high) & ((newton - x).abs() <= 0.5 * last)
            following = torch.where(sound, newton, 0.5 * (low + high))
            # After a halving any step within the bracket may follow, or a root at one of its ends would be bisected to.
            x, last = following, torch.where(sound, (following - x).abs(), 2 * (high - low))
        return best


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
    for i in reversed(range(target.shape[-1])):
        y = tanh_root(gain[..., i, i], rest[..., i])
        rest = rest[..., :i] - gain[..., :i, i] * torch.tanh(y).unsqueeze(-1)
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
