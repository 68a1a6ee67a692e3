"""What a data set's values decide of the networks: how they are standardized, and how a decoder ends."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from flowpost.vae import Likelihood

PIXEL_FEATURES = 4  # numbers a pixel that a categorical decoder's softmax reads
LOGISTIC = math.sqrt(3) / math.pi  # scale of a logistic distribution of deviation 1


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
    """One number for all pixels: a scale of its own would blow up the pixels that are nearly always blank.

    Real numbers have one each, since columns of a table have units of their own.
    """
    if data.likelihood == "gaussian":
        each, train = deviation(data), data.train.flatten(1)
        constant = (train == train[0]).all(0)  # such an element may still vary in the other parts
        return torch.where(constant, each.max(), each)
    mean = data.train.mean(0)
    variance = (mean * (1 - mean)).mean() if data.dynamic else (data.train - mean).square().mean()
    return variance.sqrt()


def deviation(data: Data) -> Tensor:
    """The standard deviation of each element ``(elements,)``; of levels it is half of one at least."""
    each = data.train.flatten(1).std(0)
    return each.clamp(min=0.5 if data.likelihood == "discretized-logistic" else 1e-6 * each.max())


def last_layer(data: Data, likelihood: Likelihood, width: int) -> nn.Module:
    """What a decoder ends in: from ``(B, width)`` to the numbers that the likelihood reads."""
    if data.likelihood == "categorical":
        return PixelSoftmax(width, data, likelihood.numbers)
    if data.likelihood in ("gaussian", "discretized-logistic"):
        return PixelLocation(width, data, likelihood.numbers)
    return PixelLogit(width, data)


class PixelLogit(nn.Linear):
    """One logit a pixel; the bias starts at the logit of the pixel's mean, so training starts at the mean image."""

    def __init__(self, width: int, data: Data) -> None:
        mean = data.train.flatten(1).mean(0) / data.levels
        super().__init__(width, mean.numel())
        with torch.no_grad():
            self.bias.copy_(torch.logit(mean, eps=1e-3))


class PixelSoftmax(nn.Module):
    """A few features a pixel, then one linear map for all pixels to the levels: ``(B, width) -> (B, levels, *event)``.

    A full layer to every level of every pixel would be most of the model's parameters. An x that is no grey image is
    taken as one column of pixels. The bias starts at the log of
    the levels' frequencies, so training starts at the histogram of all pixels.
    """

    def __init__(self, width: int, data: Data, levels: int) -> None:
        super().__init__()
        shape = tuple(data.train.shape[1:])
        self.shape = shape if len(shape) == 2 else (math.prod(shape), 1)
        self.features = nn.Linear(width, PIXEL_FEATURES * math.prod(self.shape))
        self.levels = nn.Conv2d(PIXEL_FEATURES, levels, kernel_size=1)
        counts = torch.bincount(data.train.long().flatten(), minlength=levels) + 1
        with torch.no_grad():
            cast(Tensor, self.levels.bias).copy_(torch.log(counts / counts.sum()))

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits of every level."""
        features = nn.functional.elu(self.features(hidden)).view(-1, PIXEL_FEATURES, *self.shape)
        return self.levels(features)


class PixelLocation(nn.Module):
    """A location a pixel, and the logarithm of its scale where it is learned: ``(B, width) -> (B, numbers, elements)``.

    Both start at the mean and the deviation of the training data. A location is told in deviations: a step of the
    optimizer is as large for an element in thousands as for one in thousandths.
    """

    start: Tensor
    unit: Tensor

    def __init__(self, width: int, data: Data, numbers: int) -> None:
        super().__init__()
        mean, scale = data.train.flatten(1).mean(0), deviation(data)
        if data.likelihood == "discretized-logistic":  # its levels run from -1 to 1
            mean, scale = 2 * mean / data.levels - 1, 2 * scale / data.levels * LOGISTIC
        self.register_buffer("start", torch.stack([mean, scale.log()])[:numbers])
        self.register_buffer("unit", torch.stack([scale, torch.ones_like(scale)])[:numbers])
        self.linear = nn.Linear(width, self.start.numel())

    def forward(self, hidden: Tensor) -> Tensor:
        """The numbers of the likelihood."""
        return self.start + self.unit * self.linear(hidden).unflatten(1, self.start.shape)
