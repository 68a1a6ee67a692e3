"""log p(x) of a model of two latents, by the integral itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowpost.vae import VAE

LIMIT = 6.0  # the integral runs over [-6, 6]^2: N(0, I) leaves 4e-9 outside
POINTS = 400  # along each axis
CHUNK = 2000  # points decoded at once


@torch.no_grad()
def quadrature(vae: VAE, x: Tensor, points: int = POINTS) -> Tensor:
    """The log of the sum of p(x|z) p(z) over a grid, ``(B,)``, float64, for x ``(B, *event)``."""
    line = torch.linspace(-LIMIT, LIMIT, points, dtype=x.dtype, device=x.device)
    z = torch.cartesian_prod(line, line)
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for part in z.split(CHUNK):
        numbers = vae.decode(part.unsqueeze(1), math.prod(x.shape[1:]))  # (CHUNK, 1, numbers, elements)
        joint = vae.likelihood.log_prob(numbers, x.flatten(1)).double() + vae.log_prior(part).double().unsqueeze(-1)
        total = torch.logaddexp(total, joint.logsumexp(0))
    return total + 2 * math.log(2 * LIMIT / (points - 1))
