"""What several recipes are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowpost.bijectors.affine import Affine
from flowpost.numerics.arguments import check_int
from flowpost.numerics.scales import exp_scale


def exp_affine(dim: int) -> Affine:
    """An affine map whose scale is `exp_scale`."""
    return Affine(dim, exp_scale)


def orders(dim: int, steps: int) -> list[Sequence[int] | None]:
    """An order for each step: the variables as they come and reversed, in turn."""
    both = [None, range(check_int("dim", dim, minimum=1))[::-1]]
    return [both[index % 2] for index in range(check_int("steps", steps, minimum=1))]


def slowed(rate: float | None, hidden: Sequence[int]) -> float:
    """The rate of the networks' outputs: what is given, or ``1 / sqrt(hidden[-1])``.

    Without it, Adam moves the scales of 320 units' steps so fast that q(z|x) has shrunk to a point before its mean
    follows x, and stays in whatever mode it fell into.
    """
    if rate is not None:
        return rate
    return 1 / math.sqrt([*hidden][-1]) if len(hidden) else 1.0
