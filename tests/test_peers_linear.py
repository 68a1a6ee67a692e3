"""The same map in public implementations, with the same z' and log-det in float64: LU, ActNorm.

How, and what of a library's numbers is converted, is in `peers`.
"""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from peers import POINTS, Case, Peer, Twin, check, close, draw, grid, images, pushed
from torch import Tensor
from torch.distributions.transforms import SigmoidTransform, SoftplusTransform, TanhTransform, Transform

from flowpost import ActNorm, Bijector, LULinear, Sigmoid, Softplus, Tanh


def lu_twin(dim: int, scale: float) -> Twin:
    """nflows has U's entries row by row; the diagonal's floor is the same, its 0 another."""
    step = LULinear(dim)
    context = draw(step.context_size, scale=scale)
    half = dim * (dim - 1) // 2
    lower, above, raw, shift = context.split([half, half, dim, dim])
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    row, column = torch.tril_indices(dim, dim, -1)
    matrix[column, row] = above
    upper = matrix[tuple(torch.triu_indices(dim, dim, 1))]
    diagonal = raw + math.log(math.expm1(1 - 1e-3))
    return Twin(step, context, {"lower": lower, "upper": upper, "diagonal": diagonal, "shift": shift})


def act_norm_twin(dim: int, scale: float) -> Twin:
    step = pushed(ActNorm(dim), scale)
    log_scale = 20 * torch.tanh(step.log_scale.detach() / 20)
    return Twin(step, None, {"log_scale": log_scale, "shift": -step.center.detach() * log_scale.exp()})


CASES = {
    "lu in nflows": Case("nflows lu", lu_twin, least=2),
    "act norm in nflows": Case("nflows act norm", act_norm_twin, invertible=True),
}


@grid(CASES)
def test_a_public_implementation_makes_the_same_map(peer: Peer, case: Case, dim: int, scale: float) -> None:
    check(peer, case, dim, scale)


@pytest.mark.parametrize(
    ("step", "transform"),
    [(Sigmoid(3), SigmoidTransform()), (Softplus(3), SoftplusTransform()), (Tanh(3), TanhTransform())],
    ids=["sigmoid", "softplus", "tanh"],
)
def test_the_fixed_maps_are_torch_s(step: Bijector, transform: Transform) -> None:
    """Within +-6, where torch's have their digits."""
    z = draw(POINTS, 3, scale=2.0).clamp(-6, 6)
    image, log_det = images(step, z, None)
    close((cast(Tensor, transform(z)), transform.log_abs_det_jacobian(z, image).sum(-1)), (image, log_det), 1e-10)
    close((cast(Tensor, transform.inv(image)), -log_det), images(step.inverse, image, None), 1e-9)
