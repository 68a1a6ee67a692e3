"""What the steps share whose context is c, numbers that a network of their own reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int


class Networked(Bijector):
    """A step whose context is c, numbers that a network of its own reads: not parameters of the map.

    c starts as a linear layer's bias does; at zeros the weights that read it would have no gradient.
    """

    def __init__(self, dim: int, context_size: int) -> None:
        size = check_int("context_size", context_size, minimum=0)
        bound = 1 / math.sqrt(max(size, 1))
        super().__init__(dim, context_size, torch.empty(size, device="cpu").uniform_(-bound, bound))

    def head_scale(self) -> Tensor:
        """Ones: a head keeps its usual initialization."""
        return self._like.new_ones(self.context_size)
