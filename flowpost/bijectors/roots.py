"""Roots of increasing scalar functions: a bracketed search without gradient, then corrections that carry it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Residual = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From x to the value of an increasing function at x and its slope there, element by element."""


def bisect(residual: Residual, lower: Tensor, upper: Tensor) -> Tensor:
    """Halve the bracket until it is as wide as the rounding of its ends; carries no gradient.

    Args:
        residual: an increasing function with a root between `lower` and `upper`, element by element.
        lower: lower ends.
        upper: upper ends, of the same shape.

    Returns:
        The midpoints: 40 halvings in float32 and 70 in float64, a fixed number, so that nothing waits for a device.
    """
    halvings = 40 if lower.dtype == torch.float32 else 70
    with torch.no_grad():
        for _ in range(halvings):
            middle = 0.5 * (lower + upper)
            below = residual(middle)[0] < 0
            lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
        return 0.5 * (lower + upper)


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
