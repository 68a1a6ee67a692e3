"""Mixtures of two normals: ``log(theta N_1 + (1 - theta) N_2)`` over 1,000 observations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.posteriors.densities import beta, normal, softplus, squares
from benchmarks.posteriors.model import Arrays, Model, Tensors
from flowpost.variational.parameters import ordered


def _moments(data: Arrays) -> Arrays:
    """The observations about their mean: 1, y and y^2 as rows, and the sum of squares."""
    mean = data["y"].mean()
    y = data["y"] - mean
    return {"powers": torch.stack([torch.from_numpy(y**power) for power in range(3)]).numpy(), "mean": mean}


def two_normals(p: Tensors, data: Tensors) -> Tensor:
    """Means, scales and the first component's weight.

    The log ratio of the components is quadratic in y, so it is one product; what is left is a sum of a single function:
    ``log(e^a + e^b) = a + softplus(b - a)``.
    """
    mu, sigma, theta = p["mu"] - data["mean"], p["sigma"], p["theta"]
    prior = normal(p["mu"], 0.0, 2.0).sum(-1) + normal(sigma, 0.0, 2.0).sum(-1) + beta(theta, 5.0, 5.0)
    precision = sigma.square().reciprocal()
    weights = torch.stack([theta.log(), torch.log1p(-theta)], -1)
    constant = weights - sigma.log() - 0.5 * mu.square() * precision
    coefficients = torch.stack([constant, mu * precision, -0.5 * precision], -1)  # (S, 2, 3), of 1, y and y^2
    ratio = (coefficients[:, 1] - coefficients[:, 0]) @ data["powers"]
    count = data["powers"].shape[-1]
    spread = data["powers"][2].sum() + count * mu[:, 0].square()  # the observations' mean is 0
    first = squares(spread, sigma[:, 0], count) + count * theta.log()
    return prior + first + softplus(ratio).sum(-1)


SCALES = {"sigma": ((2,), constraints.positive), "theta": constraints.interval(0.0, 1.0)}
MODELS = {
    "low_dim_gauss_mix-low_dim_gauss_mix": Model({"mu": ((2,), ordered), **SCALES}, _moments, two_normals),
    "low_dim_gauss_mix_collapse-low_dim_gauss_mix_collapse": Model({"mu": (2,), **SCALES}, _moments, two_normals),
}
