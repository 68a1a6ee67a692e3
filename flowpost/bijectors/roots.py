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
