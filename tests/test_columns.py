"""A map for one variable, as sweeps take it, beside the step's own: on numpy's arrays and on tensors."""

import functools

import numpy as np
import pytest
import torch

from flowpost import Affine, Bijector, DeepSigmoid, Inverse, Shift, Spline
from flowpost.bijectors.gate import Gate
from flowpost.functional import exp_scale
from flowpost.masked.run import COLUMNS

STEPS = {
    "affine": Affine,
    "affine by exp": functools.partial(Affine, scale=exp_scale),
    "inverse affine": lambda dim: Inverse(Affine(dim)),
    "gate": Gate,
    "gate with a gain": functools.partial(Gate, gain=1.3),
    "shift": Shift,
    "inverse shift": lambda dim: Inverse(Shift(dim)),
    "spline": functools.partial(Spline, bins=5, bound=2.0),
    "two bins": functools.partial(Spline, bins=2),
    "deep sigmoid": functools.partial(DeepSigmoid, units=5),
    "deep sigmoids": functools.partial(DeepSigmoid, units=3, layers=2),
    "one unit": functools.partial(DeepSigmoid, units=1),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize(("scale", "spread"), [(0.0, 1.0), (1.0, 3.0), (10.0, 30.0), (1e4, 1e4)])
def test_a_column_undoes_the_step(name: str, dtype: torch.dtype, eps: float, scale: float, spread: float) -> None:
    step: Bijector = STEPS[name](1)
    generator = torch.Generator().manual_seed(3)
    numbers = (scale * torch.randn(400, step.context_size, generator=generator)).to(dtype)
    z = (spread * torch.randn(400, 1, generator=generator)).to(dtype)
    expected, log_det = step.inverse(z, numbers)
    column = step.columns()[1]
    assert column is not None
    image, given = z.squeeze(-1), numbers.t().contiguous()
    by_torch = COLUMNS[column.name](image, column.constants)(image, given)
    with np.errstate(all="ignore"):
        by_numpy = COLUMNS[column.name](image.numpy(), column.constants)(image.numpy(), given.numpy())
    # As far apart as the step's slope makes of a rounding of z' and of its numbers.
    bound = eps * (1 + expected.abs() + log_det.unsqueeze(-1).exp() * (10 + z.abs()))
    for found in (by_torch, torch.from_numpy(by_numpy)):
        assert found.dtype == dtype
        assert ((found.unsqueeze(-1) - expected).abs() <= bound).all()
