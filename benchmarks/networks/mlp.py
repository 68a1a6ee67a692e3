"""Plain layers: the networks of the small set-ups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU}


def encoder(shape: Sequence[int], *, hidden: Sequence[int], activation: str) -> nn.Module:
    """From ``(B, *shape)`` to the last hidden layer ``(B, hidden[-1])``."""
    return nn.Sequential(nn.Flatten(), *_layers([math.prod(shape), *hidden], activation))


def decoder(dim: int, shape: Sequence[int], numbers: int, *, hidden: Sequence[int], activation: str) -> nn.Module:
    """From z ``(B, dim)`` to ``numbers`` outputs for each element, ``(B, numbers * elements)``."""
    return nn.Sequential(*_layers([dim, *hidden], activation), nn.Linear(hidden[-1], numbers * math.prod(shape)))


def _layers(widths: Sequence[int], activation: str) -> list[nn.Module]:
    make = ACTIVATIONS[activation]
    return [part for sizes in pairwise(widths) for part in (nn.Linear(*sizes), make())]
