"""The one VAE that every posterior is compared in, small and symmetric, and what a picture asks of it."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical, Likelihood

POSTERIORS = tuple(RECIPES)
PIXEL_FEATURES = 4  # numbers a pixel that a categorical decoder's softmax reads
GRID = 121  # points along each axis of a drawn posterior
ZOOMS = 4  # each looks for the true posterior's mass in a finer window


def build(data: Data, posterior: str, *, dim: int, width: int, dropout: float, options: dict[str, object]) -> VAE:
    """The VAE for a data set; encoder and decoder are drawn first, so that equal seeds give equal ones.

    Args:
        data: the data set; its pixels' values and shape decide the likelihood and the sizes.
        posterior: one of `POSTERIORS`.
        dim: size of z.
        width: of each hidden layer; the posterior's features are the encoder's last one.
        dropout: share of hidden units dropped in training.
        options: the recipe's options.

    Returns:
        The model, in training mode, on the CPU.
    """
    likelihood = likelihood_of(data)
    encoder, decoder = _encoder(data, width, dropout), _decoder(data, likelihood, dim, width, dropout)
    return VAE(encoder, RECIPES[posterior](width, dim, **options), decoder, likelihood)


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
    if data.likelihood == "categorical":
        return Categorical(data.levels + 1)
    return Bernoulli() if data.likelihood == "bernoulli" else Binomial(data.levels)


def _encoder(data: Data, width: int, dropout: float) -> nn.Module:
    return nn.Sequential(Standardize(data), *_layers(data.train[0].numel(), width, dropout))


def _decoder(data: Data, likelihood: Likelihood, dim: int, width: int, dropout: float) -> nn.Module:
    layers = _layers(dim, width, dropout)
    last = PixelSoftmax(width, data, likelihood.numbers) if likelihood.numbers > 1 else PixelLogit(width, data)
    return nn.Sequential(*layers, last)


def _layers(inputs: int, width: int, dropout: float) -> list[nn.Module]:
    block = [nn.Linear(inputs, width), nn.ELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ELU()]
    return [*block, nn.Dropout(dropout)]


class Standardize(nn.Module):
    """From the pixels' values to a vector of about unit variance: ``(B, *event) -> (B, elements)``."""

    mean: Tensor
    scale: Tensor

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.register_buffer("mean", data.train.flatten(1).mean(0))
        self.register_buffer("scale", _spread(data))

    def forward(self, x: Tensor) -> Tensor:
        """The standardized vector."""
        return (x.flatten(1) - self.mean) / self.scale


def _spread(data: Data) -> Tensor:
    """One number for all pixels: a scale of its own would blow up the pixels that are nearly always blank."""
    mean = data.train.mean(0)
    variance = (mean * (1 - mean)).mean() if data.dynamic else (data.train - mean).square().mean()
    return variance.sqrt()


class PixelLogit(nn.Linear):
    """One logit a pixel; the bias starts at the logit of the pixel's mean, so training starts at the mean image."""

    def __init__(self, width: int, data: Data) -> None:
        mean = data.train.flatten(1).mean(0) / data.levels
        super().__init__(width, mean.numel())
        with torch.no_grad():
            self.bias.copy_(torch.logit(mean, eps=1e-3))


class PixelSoftmax(nn.Module):
    """A few features a pixel, then one linear map for all pixels to the levels: ``(B, width) -> (B, levels, *event)``.

    A full layer to every level of every pixel would be most of the model's parameters. The bias starts at the log of
    the levels' frequencies, so training starts at the histogram of all pixels.
    """

    def __init__(self, width: int, data: Data, levels: int) -> None:
        super().__init__()
        self.shape = tuple(data.train.shape[1:])
        self.features = nn.Linear(width, PIXEL_FEATURES * math.prod(self.shape))
        self.levels = nn.Conv2d(PIXEL_FEATURES, levels, kernel_size=1)
        counts = torch.bincount(data.train.long().flatten(), minlength=levels) + 1
        with torch.no_grad():
            cast(Tensor, self.levels.bias).copy_(torch.log(counts / counts.sum()))

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits of every level."""
        features = nn.functional.elu(self.features(hidden)).view(-1, PIXEL_FEATURES, *self.shape)
        return self.levels(features)


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
    log_fitted = vae.posterior.log_prob(z, vae.encoder(x)).double().nan_to_num(nan=-math.inf)
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
