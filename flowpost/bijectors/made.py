"""Masked autoregressive networks (Germain et al. 2015). They know nothing of flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors.base import check_int


class MaskedLinear(nn.Module):
    """A linear layer whose output i reads the first ``reach[i]`` inputs: ``y_i = b_i + sum_{j < reach[i]} W_ij x_j``.

    With `reach` non-decreasing the weight is a staircase. It is cut into blocks of rows; of each, the columns that all
    rows read are multiplied as they are, the few on the stair's edge are masked on every call, so that no
    initialization, load or noise can make an output read what it must not, and the rest is never touched.

    Args:
        in_features: number of inputs.
        reach: for each output, how many inputs it reads; non-decreasing.
    """

    mask: Tensor

    def __init__(self, in_features: int, reach: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(reach), in_features))
        self.bias = nn.Parameter(torch.empty(len(reach)))
        self.register_buffer("mask", torch.arange(in_features) < torch.tensor(reach).unsqueeze(-1))
        self.blocks = _blocks(in_features, reach)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(max(self.weight.shape[-1], 1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        # `split` and not slices: the backward of a slice fills a tensor of the whole weight's size with zeros.
        heights = [height for height, _ in self.blocks]
        parts = zip(self.weight.split(heights), self.bias.split(heights), self.mask.split(heights), strict=True)
        rows = [_rows(x, *part, widths) for part, (_, widths) in zip(parts, self.blocks, strict=True)]
        return torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]


def _rows(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, widths: list[int]) -> Tensor:
    """The outputs of one block, whose columns are read by all its rows, by some, and by none."""
    x_full, x_stair, _ = x.split(widths, dim=-1)
    full, stair, _ = weight.split(widths, dim=-1)
    y = F.linear(x_stair, stair * mask.split(widths, dim=-1)[1], bias)
    return y + F.linear(x_full, full) if widths[0] else y


def _blocks(in_features: int, reach: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Heights of the blocks of rows, and how many columns all rows of each read, only some, and none."""
    count = max(1, min(8, len(reach) // 128))  # below 128 rows the calls cost more than the zeros
    stops = [round(len(reach) * i / count) for i in range(count + 1)]
    edges = [(reach[start], reach[stop - 1]) for start, stop in pairwise(stops)]
    widths = [[full, edge - full, in_features - edge] for full, edge in edges]
    return [(stop - start, width) for (start, stop), width in zip(pairwise(stops), widths, strict=True)]


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
        activation: element-wise, between layers.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)`` or None, result ``(*batch, dim, outputs)``.

    Reference:
        Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation, eq. 8 to 10.
    """

    def __init__(
        self,
        dim: int,
        outputs: int,
        hidden: Sequence[int] = (320, 320),
        context_size: int = 0,
        activation: Callable[[Tensor], Tensor] = F.elu,
    ) -> None:
        super().__init__()
        widths = [check_int("hidden", width, minimum=1) for width in hidden]
        self.dim, self.outputs, self.activation = dim, outputs, activation
        # A variable's own degree is one more than what its outputs may read.
        degrees = [list(range(1, dim + 1))] + [[unit * dim // width for unit in range(width)] for width in widths]
        degrees.append([variable for variable in range(dim) for _ in range(outputs)])
        self.layers = nn.ModuleList(MaskedLinear(len(a), _reach(a, b)) for a, b in pairwise(degrees))
        self.project = nn.Linear(context_size, len(degrees[1]), bias=False) if context_size else None

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs for every variable; see the class."""
        x = self.layers[0](z)
        if self.project is not None:
            x = x + self.project(context)
        for layer in self.layers[1:]:
            x = layer(self.activation(x))
        return x.unflatten(-1, (self.dim, self.outputs))


def _reach(inputs: Sequence[int], units: Sequence[int]) -> list[int]:
    return [sum(degree <= unit for degree in inputs) for unit in units]
