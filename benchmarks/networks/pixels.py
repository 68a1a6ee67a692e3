"""What a preset's networks do with pixels: how the encoder reads them, and where the decoder's logits start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from benchmarks.errors import ConfigError


class Grey(nn.Module):
    """Pixels between 0 and 1, less their mean over the training part where that is asked for."""

    mean: Tensor

    def __init__(self, data: Data, *, centre: bool) -> None:
        super().__init__()
        middle = 0.5 if data.likelihood == "categorical" else 0.0  # of a level, as published for Frey faces
        self.middle, self.levels = middle, data.levels + 2 * middle
        mean = (data.train.mean(0) + middle) / self.levels
        self.register_buffer("mean", mean if centre else torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return (x + self.middle) / self.levels - self.mean


class Features(nn.Sequential):
    """An encoder that says how wide its features are: they are never taken for loc and log_var side by side."""

    def __init__(self, grey: Grey, layers: nn.Module, example: Tensor) -> None:
        super().__init__(grey, layers)
        with torch.no_grad():
            self.features = self(example).shape[-1]


def start_at_mean(decoder: nn.Module, data: Data) -> None:
    """Set the last bias to the logits of the pixels' means, so that training starts at the mean image.

    Raises:
        ConfigError: the decoder does not end in a logit for each pixel.
    """
    last = [*decoder.modules()][-1]
    logits = torch.logit(data.train.flatten(1).mean(0) / data.levels, eps=1e-3)
    if not isinstance(last, nn.Linear) or last.bias.shape != logits.shape:
        raise ConfigError("decoder: expected a last layer with one logit for each pixel for start = 'mean', got none")
    with torch.no_grad():
        last.bias.copy_(logits)
