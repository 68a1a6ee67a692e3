"""Masked autoregressive networks (Germain et al. 2015). They know nothing of flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.masked.staircase import Staircase
from flowpost.numerics.arguments import check_int

Activation = Callable[[Tensor], Tensor]


class MaskedLinear(nn.Module):
    """A linear layer whose units read the inputs of at most their degree: ``y_i = b_i + sum_{d_j <= d_i} W_ij x_j``.

    Args:
        inputs: the inputs' degrees.
        units: the units' degrees.
        groups: how many times the units are repeated.
    """

    def __init__(self, inputs: Sequence[int], units: Sequence[int], groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups * len(units), len(inputs)))
        self.bias = nn.Parameter(torch.empty(groups * len(units)))
        self.lay_out(inputs, units, groups)
        self.reset_parameters()

    def lay_out(self, inputs: Sequence[int], units: Sequence[int], groups: int = 1) -> None:
        """Give the weights that are here to these degrees."""
        self.staircase = Staircase(inputs, units, groups)
        self._buffers.clear()
        # Not saved: the degrees say what they are, and how the weight is cut may change.
        for index, mask in enumerate(self.staircase.masks()):
            self.register_buffer(f"mask{index}", mask.to(self.weight), persistent=False)

    def reset_parameters(self) -> None:
        """Draw weights and biases as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(max(self.weight.shape[-1], 1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @property
    def masks(self) -> list[Tensor]:
        """The masks of the blocks' edges."""
        return cast("list[Tensor]", list(self._buffers.values()))

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``(*batch, in)`` to ``(*batch, out)``."""
        return self.staircase.linear(x, self.weight, self.masks) + self.bias


class MADE(nn.Module):
    """A network whose outputs for variable i depend on the variables before i and on a context, and on nothing else.

    Hidden units have degrees 0..dim-1, sorted; a unit of degree d reads the first d variables, so units of degree 0 see
    the context alone, and the first variable's outputs depend on it. The context enters the first layer, projected once
    per example however many samples share it.

    Args:
        dim: number of variables.
        outputs: numbers per variable.
        hidden: widths of the hidden layers; empty for a linear map.
        context_size: size of the context; 0 for none.
        activation: element-wise, between layers; those that `passes.KNOWN` lists run faster.
        order: the variables in the order in which they are before one another; by default as they come. It is folded
            into the weights' layout; zeros are skipped for the default and its reverse.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)`` or None, result ``(*batch, outputs, dim)``.

    Reference:
        Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation, eq. 8 to 10.
    """

    def __init__(
        self,
        dim: int,
        outputs: int,
        hidden: Sequence[int] = (320, 320),
        context_size: int = 0,
        activation: Activation = F.elu,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        widths = [check_int("hidden", width, minimum=1) for width in hidden]
        self.dim, self.outputs, self.activation = dim, outputs, activation
        units = [[unit * dim // width for unit in range(width)] for width in widths]
        self.layers = nn.ModuleList(MaskedLinear(*degrees) for degrees in self._degrees(units, order))
        self.project = nn.Linear(context_size, len(self.stack[0].bias), bias=False) if context_size else None
        self.sizes = [[degrees.count(degree) for degree in range(dim)] for degrees in units]
        """For every hidden layer, how many units have each degree."""

    def lay_out(self, order: Sequence[int]) -> None:
        """Give the weights that are here to another order of the variables."""
        units = [layer.staircase.units for layer in self.stack[:-1]]
        for layer, degrees in zip(self.stack, self._degrees(units, order), strict=True):
            layer.lay_out(*degrees)

    def _degrees(
        self, units: list[list[int]], order: Sequence[int] | None
    ) -> Iterator[tuple[list[int], list[int], int]]:
        """For every layer the degrees of its inputs and its units, and how many times the units come."""
        places = list(range(self.dim)) if order is None else sorted(range(self.dim), key=list(order).__getitem__)
        # A variable's own degree is one more than what its outputs may read.
        inputs = [[place + 1 for place in places], *units]
        return zip(inputs, [*units, places], [*(1 for _ in units), self.outputs], strict=True)

    @property
    def stack(self) -> list[MaskedLinear]:
        """The layers, in a list."""
        return cast("list[MaskedLinear]", list(self.layers))

    def last_parameters(self) -> list[Tensor]:
        """Those that add to the outputs: the last layer's and, where it is the first too, the projection's."""
        last = self.stack[-1]
        project = [] if self.project is None or len(self.layers) > 1 else [self.project.weight]
        return [last.weight, last.bias, *project]

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs for every variable; see the class."""
        first, *others = self.stack
        x = first(z) if self.project is None else first(z) + self.project(context)
        for layer in others:
            x = layer(self.activation(x))
        return x.unflatten(-1, (self.outputs, self.dim))
