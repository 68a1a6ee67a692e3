"""The one VAE that every posterior is compared in, small and symmetric, and what a picture asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from benchmarks.heads import Standardize, last_layer
from flowpost.posterior import FlowPosterior
from flowpost.recipes import RECIPES
from flowpost.vae import (
    VAE,
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
)
from flowpost.wrap import wrap

POSTERIORS = tuple(RECIPES)
GRID = 121  # points along each axis of a drawn posterior
ZOOMS = 4  # each looks for the true posterior's mass in a finer window


Networks = Callable[[torch.Size, int, int], tuple[nn.Module, nn.Module]]
"""From x's shape, z's size and the likelihood's numbers for each element of x to an encoder and a decoder."""


def build(
    data: Data,
    posterior: str,
    *,
    dim: int,
    width: int,
    dropout: float,
    options: dict[str, Any],
    encoder_width: int = 0,
    prior: str = "",
    prior_options: dict[str, object] | None = None,
    networks: Networks | None = None,
) -> VAE:
    """The VAE for a data set; encoder and decoder are drawn first, so that equal seeds give equal ones.

    Args:
        data: the data set; its pixels' values and shape decide the likelihood and the sizes.
        posterior: one of `POSTERIORS`.
        dim: size of z.
        width: of each hidden layer; the posterior's features are the encoder's last one.
        dropout: share of hidden units dropped in training.
        options: the recipe's options.
        encoder_width: of the encoder's hidden layers, where it is not `width`.
        prior: the recipe of a learned p(z); N(0, I) if there is none.
        prior_options: that recipe's options.
        networks: makes another encoder and decoder; of what such an encoder returns, `wrap` makes the posterior.

    Returns:
        The model, in training mode, on the CPU.
    """
    likelihood = likelihood_of(data)
    if networks is not None:
        encoder, decoder = networks(data.train.shape[1:], dim, likelihood.numbers)
        given = {**options, "features": getattr(encoder, "features", None)}
        encoder = wrap(encoder, dim, example=data.train[:2], flow=posterior, **given)
        return VAE(encoder, decoder, likelihood, prior=_prior(prior, dim, prior_options))
    features = encoder_width or width
    encoder, decoder = _encoder(data, features, dropout), _decoder(data, likelihood, dim, width, dropout)
    q = RECIPES[posterior](features, dim, **options)
    return VAE(encoder, q, decoder, likelihood, prior=_prior(prior, dim, prior_options))


def _prior(name: str, dim: int, options: dict[str, object] | None) -> FlowPosterior | None:
    return RECIPES[name](0, dim, **(options or {})) if name else None


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def codes(vae: VAE, x: Tensor, count: int = 1) -> Tensor:
    """Draws from q(z|x), ``(count, B, dim)``."""
    return vae.encode(x).sample((count,))


def mean_images(vae: VAE, z: Tensor, shape: torch.Size) -> Tensor:
    """E[x|z] of each z ``(N, dim)``, ``(N, *shape)``."""
    return vae.likelihood.mean(vae.decode(z, shape.numel())).view(-1, *shape)


def likelihood_of(data: Data) -> Likelihood:
    """The likelihood of a data set's pixels."""
    made: dict[str, Callable[[], Likelihood]] = {
        "bernoulli": Bernoulli,
        "binomial": lambda: Binomial(data.levels),
        "categorical": lambda: Categorical(data.levels + 1),
        "continuous-bernoulli": ContinuousBernoulli,
        "discretized-logistic": lambda: DiscretizedLogistic(data.levels + 1),
        "gaussian": lambda: Gaussian(data.scale),
    }
    return made[data.likelihood]()


def _encoder(data: Data, width: int, dropout: float) -> nn.Module:
    return nn.Sequential(Standardize(data), *_layers(data.train[0].numel(), width, dropout))


def _decoder(data: Data, likelihood: Likelihood, dim: int, width: int, dropout: float) -> nn.Module:
    return nn.Sequential(*_layers(dim, width, dropout), last_layer(data, likelihood, width))


def _layers(inputs: int, width: int, dropout: float) -> list[nn.Module]:
    block = [nn.Linear(inputs, width), nn.ELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ELU()]
    return [*block, nn.Dropout(dropout)]


class PosteriorGrid(NamedTuple):
    """True and fitted posterior of one image, on the same grid of a two-dimensional z."""

    box: tuple[float, float, float, float]
    """Left, right, bottom, top."""
    log_true: Tensor
    """log p(z|x), ``(GRID, GRID)``, first axis along the first unit of z."""
    log_fitted: Tensor
    """log q(z|x), of the same shape."""
    kl: float
    """KL(q(z|x) || p(z|x)) by quadrature, in nats."""


def posterior_grid(vae: VAE, x: Tensor) -> PosteriorGrid:
    """p(z|x) of the model's decoder, normalized by quadrature, and q(z|x), for one image ``(1, *event)``."""
    low, high = _window(vae, x)
    z = _grid(low, high)
    joint = _log_joint(vae, x, z).double()
    area = float((high - low).prod()) / (GRID - 1) ** 2
    log_true = joint - joint.logsumexp(0) - math.log(area)
    log_fitted = vae.encode(x).log_prob(z).double().nan_to_num(nan=-math.inf)
    share = log_fitted.exp() * area
    kl = torch.where(share > 0, share * (log_fitted - log_true), 0.0).sum().item()
    box = (low[0].item(), high[0].item(), low[1].item(), high[1].item())
    return PosteriorGrid(box, log_true.view(GRID, GRID), log_fitted.view(GRID, GRID), kl)


def _window(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of a box that holds the true posterior's mass, found by zooming in, and that of q(z|x)."""
    low, high = torch.full((2,), -6.0, device=x.device), torch.full((2,), 6.0, device=x.device)
    for _ in range(ZOOMS):
        z = _grid(low, high)
        joint = _log_joint(vae, x, z)
        inside = z[joint > joint.max() - 7]
        cell = (high - low) / (GRID - 1)
        low, high = inside.amin(0) - 3 * cell, inside.amax(0) + 3 * cell
    fitted = codes(vae, x, 2000).squeeze(1)
    low, high = torch.minimum(low, fitted.quantile(0.002, 0)), torch.maximum(high, fitted.quantile(0.998, 0))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _grid(low: Tensor, high: Tensor) -> Tensor:
    """Points ``(GRID^2, 2)`` of the box, the second unit running fastest."""
    unit = torch.linspace(0, 1, GRID, device=low.device)
    return torch.cartesian_prod(unit, unit) * (high - low) + low


def _log_joint(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """The log p(x, z) of one image and every z ``(N, 2)``, ``(N,)``."""
    parts = [vae.likelihood.log_prob(vae.decode(part, x.numel()), x.flatten(1)) for part in z.split(500)]
    return torch.cat(parts) + vae.log_prior(z)
