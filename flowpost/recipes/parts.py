"""What several recipes are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.affine import Affine, Shift
from flowpost.bijectors.autoregressive import Masked
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.coupling import Coupling
from flowpost.bijectors.scale import Scaling
from flowpost.numerics.arguments import check_int, check_widths
from flowpost.numerics.scales import exp_scale


def exp_affine(dim: int) -> Affine:
    """An affine map whose scale is `exp_scale`."""
    return Affine(dim, exp_scale)


def around(dim: int, steps: Sequence[Bijector], *, centred: bool) -> Chain:
    """Between a diagonal Gaussian's scale and its mean, the steps; or after both.

    As the mean moves with x, steps after it have to move their offsets along, each by a linear layer of its own.
    """
    if not isinstance(centred, bool):
        raise TypeError(f"centred: expected True or False, got {centred!r}")
    if not centred:
        return Chain(Affine(dim), *steps)
    chain = Chain(Scaling(dim), *steps, Shift(dim))
    # No call reads it: what was saved when the mean came first has the same names and shapes, and is another map.
    chain.register_buffer("constant_centred", torch.ones(()))
    return chain


Step = TypeVar("Step", Masked, Coupling)
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "elu": F.elu, "tanh": torch.tanh}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The element-wise function of a name."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def marked(steps: list[Step], activation: str) -> list[Step]:
    """The steps, whose networks say in their state that they are not of elu.

    What was saved when those of this recipe were has the same names and shapes, and would be another map.
    """
    if activation != "elu":
        for step in steps:
            step.net.register_buffer(f"constant_{activation}", torch.ones(()))
    return steps


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
    widths = check_widths("hidden", hidden)
    return 1 / math.sqrt(widths[-1]) if widths else 1.0


def evened(rate: float | None, hidden: Sequence[int]) -> float:
    """The rate of spline networks' outputs: what is given, or ``32 / hidden[-1]``, at most 1.

    Adam moves each weight by as much a step, so a sum over n units n times as fast as one. With 32 units splines train
    best as they are; the rate makes wider networks as fast, and no faster.
    """
    if rate is not None:
        return rate
    widths = check_widths("hidden", hidden)
    return min(1.0, 32 / widths[-1]) if widths else 1.0


def steadied(rate: float | None, features: int, dim: int) -> float:
    """The rate of a triangular matrix's numbers: what is given, or ``256 / (features * dim)``, at most 1.

    Adam moves each weight by as much a step: a number by a sum over the features, and a row of the matrix by a sum over
    up to dim numbers. The rate makes many move together as far as 16 features and 16 variables do, and no farther.
    """
    if rate is not None:
        return rate
    features, dim = check_int("features", features, minimum=0), check_int("dim", dim, minimum=1)
    return min(1.0, 256 / (features * dim)) if features else 1.0
