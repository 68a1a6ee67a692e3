"""Each latent by itself: the marginals of Gaussian posteriors, and their mixtures over examples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowpost.distribution import FlowDistribution


def gaussian_marginals(q: FlowDistribution) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent of a Gaussian q(z|x), each ``(*batch, dim)``, float64.

    Raises:
        TypeError: if q is not Gaussian: a flow's marginals have no closed form.
    """
    loc, tril = q.gaussian()
    return loc.double(), tril.double().norm(dim=-1)


def log_product_of_marginals(z: Tensor, loc: Tensor, scale: Tensor, numbers: int = 100_000) -> Tensor:
    """The ``sum_j log q(z_j)`` of the mixture ``q(z) = 1/N sum_n q(z|x_n)``, whose ``q(z|x_n)`` are Gaussian.

    A latent's marginal is the mixture of its own N Gaussians, whatever the correlations in each of them.

    Args:
        z: ``(*batch, dim)``, float64.
        loc: means ``(N, dim)``, float64.
        scale: standard deviations ``(N, dim)``, float64.
        numbers: how many log-densities are held at once, of ``N`` for each number in z.

    Returns:
        ``(*batch)``.

    Example:
        >>> z, loc, scale = torch.zeros(5, 2).double(), torch.zeros(3, 2).double(), torch.ones(3, 2).double()
        >>> log_product_of_marginals(z, loc, scale)[0].exp() * 2 * math.pi
        tensor(1.0000, dtype=torch.float64)
    """
    size, total = max(1, numbers // max(1, z.numel())), torch.full_like(z, -math.inf)
    for m, s in zip(loc.split(size), scale.split(size), strict=True):
        log_q = -0.5 * ((z.unsqueeze(-2) - m) / s).square() - s.log()  # (*batch, size, dim)
        total = torch.logaddexp(total, log_q.logsumexp(-2))
    return total.sum(-1) - z.shape[-1] * (math.log(len(loc)) + 0.5 * math.log(2 * math.pi))
