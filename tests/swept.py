"""A sweep of one variable, whose numbers a network without layers gives: a kernel's column solve, and nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowpost import Affine, Bijector, DeepSigmoid, Inverse, Shift, Spline
from flowpost.bijectors.gate import Gate
from flowpost.functional import exp_scale
from flowpost.masked.device import fused
from flowpost.masked.run import COLUMNS

STEPS: dict[str, Callable[[], Bijector]] = {
    "gate": lambda: Gate(1, gain=1.2),
    "exp": lambda: Affine(1, exp_scale),
    "inverse softplus": lambda: Inverse(Affine(1)),
    "shift": lambda: Shift(1),
    "inverse shift": lambda: Inverse(Shift(1)),
    "spline": lambda: Spline(1),
    "spline of two bins": lambda: Spline(1, bins=2, bound=0.7),
    "deep sigmoid": lambda: DeepSigmoid(1),
    "deep sigmoids": lambda: DeepSigmoid(1, units=3, layers=2),
    "one unit": lambda: DeepSigmoid(1, units=1),
    "spline of many bins": lambda: Spline(1, bins=50, bound=30.0),
}
ROWS = 18
"""A tile of 16, and a second one of which most rows are not there."""


def drawn(step: Bijector, scale: float) -> tuple[Tensor, Tensor]:
    """Images inside a spline's bound, at it and outside, and numbers, of a size each."""
    z = 2 * torch.randn(ROWS)
    z[:6] = torch.tensor([3.0, -3.0, 0.7, 1e3, -1e30, 0.0])
    return z, scale * torch.randn(ROWS, step.context_size)


def by_sweep(step: Bijector, z: Tensor, numbers: Tensor) -> Tensor:
    """The preimages ``(N,)`` by the operator, which runs the kernel where there is one."""
    column = step.columns()[1]
    assert column is not None
    weight = torch.ones(step.context_size, 1, device=z.device)  # of the variable itself, which nobody may read
    return fused.sweep(z.unsqueeze(-1), numbers, [weight], [], None, [0], "relu", column).squeeze(-1)


def by_formula(step: Bijector, z: Tensor, numbers: Tensor) -> Tensor:
    """The same by the closed form in the family's file."""
    column = step.columns()[1]
    assert column is not None
    return COLUMNS[column.name](z, column.constants)(z, numbers.t())
