"""What several recipes are made of."""

from __future__ import annotations

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
