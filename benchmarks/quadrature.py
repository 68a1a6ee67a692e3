"""log p(x) of a model of two latents, by the integral itself."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from flowpost.vae import VAE

LIMIT = 6.0  # the integral runs over [-6, 6]^2: N(0, I) leaves 4e-9 outside
POINTS, MOST = 400, 800  # along each axis, and where p(z|x) is narrower than that
APART = 0.5  # nats between the sums over a quarter of the points each: then the sum over all is off by 0.01 at most
CHUNK = 2000  # points decoded at once


@torch.no_grad()
def quadrature(vae: VAE, x: Tensor, points: int = POINTS) -> Tensor:
    """The log of the sum of p(x|z) p(z) over a grid, ``(B,)``, float64, for x ``(B, *event)``.

    Where p(z|x) is too narrow for the grid it has twice as many points along each axis, up to `MOST`; then it is nan.
    """
    line = torch.linspace(-LIMIT, LIMIT, points, dtype=x.dtype, device=x.device)
    grids = [torch.cartesian_prod(line[i::2], line[j::2]) for i, j in product((0, 1), repeat=2)]
    sums = torch.stack([_log_sum(vae, x, z) for z in grids])
    found = sums.logsumexp(0) + 2 * math.log(2 * LIMIT / (points - 1))
    narrow = sums.amax(0) - sums.amin(0) > APART
    if bool(narrow.any()):
        found[narrow] = quadrature(vae, x[narrow], 2 * points) if 2 * points <= MOST else math.nan
    return found


def _log_sum(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """The log of the sum of p(x|z) p(z) over points z ``(N, 2)``, ``(B,)``."""
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for part in z.split(CHUNK):
        numbers = vae.decode(part.unsqueeze(1), math.prod(x.shape[1:]))  # (CHUNK, 1, numbers, elements)
        joint = vae.likelihood.log_prob(numbers, x.flatten(1)).double() + vae.log_prior(part).double().unsqueeze(-1)
        total = torch.logaddexp(total, joint.logsumexp(0))
    return total
