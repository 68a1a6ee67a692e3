"""Gated convolutions, the networks of van den Berg et al. (2018): ``h(x) * sigmoid(g(x))`` in every layer.

After the paper's public code: the encoder halves an image twice and ends in a convolution over all that is left; the
decoder is its mirror image. Sides are multiples of 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

KERNEL = 5
MAPS = 32  # the paper's; twice as many after the first halving


class Gated(nn.Module):
    """``h(x) * sigmoid(g(x))`` of two layers of the same sizes."""

    def __init__(self, kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], *sizes: object, **options: object) -> None:
        super().__init__()
        self.value, self.gate = (kind(*sizes, **options) for _ in range(2))  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """The gated values."""
        return self.value(x) * self.gate(x).sigmoid()


def encoder(shape: Sequence[int], *, features: int = 256, maps: int = MAPS) -> nn.Module:
    """From ``(B, H, W)`` to ``(B, features)``, with `maps` channels at first and twice as many in the end."""
    few, many = maps, 2 * maps
    layers = [(1, few, 1), (few, few, 2), (few, many, 1), (many, many, 2), (many, many, 1)]  # channels in, out, stride
    parts = [Gated(nn.Conv2d, *sizes, KERNEL, stride, padding=KERNEL // 2) for *sizes, stride in layers]
    return nn.Sequential(
        nn.Unflatten(1, (1, shape[0])), *parts, Gated(nn.Conv2d, many, features, _left(shape)), nn.Flatten()
    )


def decoder(dim: int, shape: Sequence[int], numbers: int, *, maps: int = MAPS) -> nn.Module:
    """From z ``(B, dim)`` to ``(B, numbers, H, W)``; a softmax over levels has a layer of its own width before it."""
    few, many = maps, 2 * maps
    layers = [(many, many, 1), (many, few, 2), (few, few, 1), (few, few, 2), (few, few, 1)]
    parts = [_widening(*layer) for layer in layers]
    last = [nn.Conv2d(few, numbers, KERNEL, padding=KERNEL // 2), nn.Conv2d(numbers, numbers, 1)]
    end = last if numbers > 1 else [nn.Conv2d(few, 1, 1)]
    return nn.Sequential(nn.Unflatten(1, (dim, 1, 1)), Gated(nn.ConvTranspose2d, dim, many, _left(shape)), *parts, *end)


def _widening(inputs: int, outputs: int, stride: int) -> Gated:
    return Gated(nn.ConvTranspose2d, inputs, outputs, KERNEL, stride, padding=KERNEL // 2, output_padding=stride - 1)


def _left(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width after two halvings."""
    return shape[0] // 4, shape[1] // 4
