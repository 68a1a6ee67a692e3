"""Residual convolutions with weight normalization, the networks of Kingma et al. (2016), appendix C.1, for MNIST.

The paper gives the maps, the strides, the fully connected layer and the activation. What it leaves open (where the
activation stands, how the decoder grows) is as in the public re-implementation by the authors of neural autoregressive
flows; the initialization that depends on data is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

MAPS = (16, 32, 32)
HALVINGS = len(MAPS)


class Residual(nn.Module):
    """``skip(x) + conv(elu(conv(x)))``, with 3 x 3 convolutions; the skip is a 1 x 1 convolution where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else weight_norm(nn.Conv2d(inputs, outputs, 1, stride))
        first, second = nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.inner = nn.Sequential(weight_norm(first), nn.ELU(), weight_norm(second))

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return self.skip(x) + self.inner(x)


def encoder(shape: Sequence[int], *, features: int = 450) -> nn.Module:
    """From ``(B, H, W)`` to ``(B, features)``: three halvings, a block of the same size between each two."""
    a, b, c = MAPS
    blocks = [Residual(1, a, 2), Residual(a, a), Residual(a, b, 2), Residual(b, b), Residual(b, c, 2)]
    height, width = _sides(shape)[-1]
    last = weight_norm(nn.Linear(c * height * width, features))
    start = nn.Unflatten(1, (1, shape[0]))
    return nn.Sequential(start, *_activated(blocks), nn.Flatten(), last, nn.ELU())


def decoder(dim: int, shape: Sequence[int], numbers: int, *, features: int = 450) -> nn.Module:
    """From z ``(B, dim)`` to ``(B, numbers, H, W)``: the encoder's mirror image."""
    full, half, quarter, eighth = _sides(shape)
    a, b, c = MAPS
    first = weight_norm(nn.Linear(dim, features)), nn.ELU()
    second = weight_norm(nn.Linear(features, c * eighth[0] * eighth[1])), nn.ELU(), nn.Unflatten(1, (c, *eighth))
    blocks = [
        *(nn.Upsample(quarter), *_activated([Residual(c, b), Residual(b, b)])),
        *(nn.Upsample(half), *_activated([Residual(b, a), Residual(a, a)])),
        *(nn.Upsample(full), Residual(a, numbers)),
    ]
    return nn.Sequential(*first, *second, *blocks)


def _activated(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    return [part for block in blocks for part in (block, nn.ELU())]


def _sides(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width before and after each halving, rounded up."""
    return [(-(-shape[0] // 2**i), -(-shape[1] // 2**i)) for i in range(HALVINGS + 1)]
