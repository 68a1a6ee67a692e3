"""Weights of the KL as pure functions of the training step: a warm-up is no state, so a resumed run needs none."""

from __future__ import annotations

import math


def constant(step: int, weight: float = 1.0) -> float:
    """The same weight at every step: 1 for the ELBO, another for a beta-VAE (Higgins et al. 2017).

    Args:
        step: counted from 0.
        weight: not negative.

    Returns:
        The weight.

    Raises:
        ValueError: for a negative step or weight.

    Example:
        >>> constant(1000, weight=4.0)
        4.0
    """
    _check(step, weight=weight)
    return float(weight)


def linear(step: int, steps: int, *, start: float = 0.0, end: float = 1.0) -> float:
    """A straight line from `start` at step 0 to `end` at step `steps`, and `end` from there on (Bowman et al. 2016).

    Args:
        step: counted from 0.
        steps: length of the warm-up; 0 for none.
        start: weight at step 0.
        end: weight after the warm-up.

    Returns:
        The weight.

    Raises:
        ValueError: for a negative step, length or weight.

    Example:
        >>> [linear(step, 4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    _check(step, start=start, end=end)
    if steps < 0:
        raise ValueError(f"steps: expected an int >= 0, got {steps}")
    return float(end if step >= steps else start + (end - start) * step / steps)


def cyclical(step: int, period: int, *, rise: float = 0.5, start: float = 0.0, end: float = 1.0) -> float:
    """A warm-up that begins anew every `period` steps: a line over the share `rise` of it, then `end` (Fu et al. 2019).

    Args:
        step: counted from 0.
        period: length of a cycle, at least 1.
        rise: share of a cycle in which the weight rises, in (0, 1].
        start: weight at the start of each cycle.
        end: weight after the rise.

    Returns:
        The weight.

    Raises:
        ValueError: for a negative step or weight, a period below 1, or a `rise` outside (0, 1].

    Reference:
        Fu et al. (2019), Cyclical Annealing Schedule, eq. 6, 7, with M cycles of `period` steps and R = `rise`.

    Example:
        >>> [cyclical(step, 8) for step in (0, 2, 4, 7, 8, 10)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """
    _check(step, start=start, end=end)
    if period < 1:
        raise ValueError(f"period: expected an int >= 1, got {period}")
    if not 0 < rise <= 1:
        raise ValueError(f"rise: expected a share in (0, 1], got {rise}")
    share = (step % period) / period
    return float(end if share >= rise else start + (end - start) * share / rise)


def _check(step: int, **weights: float) -> None:
    if step < 0:
        raise ValueError(f"step: expected an int >= 0, got {step}")
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {weight}")
