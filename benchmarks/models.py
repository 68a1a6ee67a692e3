"""The one VAE that every posterior is compared in: a small encoder and its mirror image for each shape of image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical, Likelihood

POSTERIORS = tuple(RECIPES)
PIXEL_FEATURES = 4  # numbers a pixel that a categorical decoder's softmax reads


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
    likelihood = _likelihood(data)
    encoder, decoder = _encoder(data, width, dropout), _decoder(data, likelihood, dim, width, dropout)
    return VAE(encoder, RECIPES[posterior](width, dim, **options), decoder, likelihood)


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def _likelihood(data: Data) -> Likelihood:
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

    A full layer to every level of every pixel would be most of the model's parameters.
    """

    def __init__(self, width: int, data: Data, levels: int) -> None:
        super().__init__()
        self.shape = tuple(data.train.shape[1:])
        self.features = nn.Linear(width, PIXEL_FEATURES * math.prod(self.shape))
        self.levels = nn.Conv2d(PIXEL_FEATURES, levels, kernel_size=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits of every level."""
        features = nn.functional.elu(self.features(hidden)).view(-1, PIXEL_FEATURES, *self.shape)
        return self.levels(features)
