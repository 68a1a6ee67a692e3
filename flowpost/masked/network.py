"""Masked autoregressive networks (Germain et al. 2015), of plain operations that everything can differentiate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, empty, nn

from flowpost.masked.activations import Activation, check_elementwise
from flowpost.masked.staircase import Staircase
from flowpost.numerics.arguments import check_widths
from flowpost.numerics.rates import Rated


class MaskedLinear(nn.Module):
    """A linear layer whose units read the inputs of at most their degree: ``y_i = b_i + sum_{d_j <= d_i} W_ij x_j``.

    The mask is applied on every call, so that no initialization, load or noise can make a unit read what it must not.

    Args:
        inputs: the inputs' degrees.
        units: the units' degrees.
        groups: how many times the units are repeated.
    """

    def __init__(self, inputs: Sequence[int], units: Sequence[int], groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty(groups * len(units), len(inputs)))
        self.bias = nn.Parameter(empty(groups * len(units)))
        self.lay_out(inputs, units, groups)
        self.reset_parameters()

    def lay_out(self, inputs: Sequence[int], units: Sequence[int], groups: int = 1) -> None:
        """Give the weights that are here to these degrees; masks that are right stay where a CUDA graph reads them."""
        before = getattr(self, "staircase", None)
        if before is None or (before.inputs, before.units) != (list(inputs), [*units] * groups):
            self.staircase = Staircase(inputs, units, groups)
        self.staircase.place(self.weight)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> MaskedLinear:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        self.staircase.place(self.weight)
        return self

    def reset_parameters(self) -> None:
        """Draw weights and biases as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(max(self.weight.shape[-1], 1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``(*batch, in)`` to ``(*batch, out)``."""
        return F.linear(x, self.weight * self.staircase.mask.on(self.weight), self.bias)

    def extra_repr(self) -> str:
        """The sizes, for the module's repr."""
        return f"{len(self.staircase.inputs)}, {len(self.staircase.units)}"


class MADE(Rated):
    """A network whose outputs for variable i depend on the variables before i and on a context, and on nothing else.

    Hidden units have degrees 0..dim-1, sorted; a unit of degree d reads the first d variables, so units of degree 0 see
    the context alone, and the first variable's outputs depend on it. The context enters the first layer, projected once
    per example however many samples share it.

    A module put in a layer's place is called as it is: that its outputs read no later variable is then its own affair.

    Args:
        dim: number of variables.
        outputs: numbers per variable.
        hidden: widths of the hidden layers; empty for a linear map.
        context_size: size of the context; 0 for none.
        activation: element-wise, between layers.
        order: the order of the variables: each one's outputs depend on those before it. By default as they come. It is
            folded into the weights' layout.
        rate: a positive factor on the outputs, as in `Rated`.

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
        rate: float = 1.0,
    ) -> None:
        super().__init__(rate)
        widths = check_widths("hidden", hidden)
        check_elementwise(activation)
        self.dim, self.outputs, self.activation = dim, outputs, activation
        self.units = [[unit * dim // width for unit in range(width)] for width in widths]
        """The degrees of every hidden layer's units."""
        self.sizes = [[degrees.count(degree) for degree in range(dim)] for degrees in self.units]
        """For every hidden layer, how many units have each degree."""
        self.layers = nn.ModuleList(MaskedLinear(*degrees) for degrees in self._degrees(order))
        first = widths[0] if widths else outputs * dim
        self.project = nn.Linear(context_size, first, bias=False) if context_size else None

    def lay_out(self, order: Sequence[int]) -> None:
        """Give the weights that are here to another order of the variables."""
        for layer, degrees in zip(self.layers, self._degrees(order), strict=True):
            if isinstance(layer, MaskedLinear):
                layer.lay_out(*degrees)

    def _degrees(self, order: Sequence[int] | None) -> Iterator[tuple[list[int], list[int], int]]:
        """For every layer the degrees of its inputs and its units, and how many times the units come."""
        places = list(range(self.dim)) if order is None else sorted(range(self.dim), key=list(order).__getitem__)
        # A variable's own degree is one more than what its outputs may read.
        inputs = [[place + 1 for place in places], *self.units]
        groups = [*(1 for _ in self.units), self.outputs]
        return zip(inputs, [*self.units, places], groups, strict=True)

    @property
    def stack(self) -> list[MaskedLinear]:
        """The layers, in a list."""
        layers: Any = self._modules["layers"]  # read on every call: `layers` would be looked up at length
        return list(layers._modules.values())

    @property
    def stairs(self) -> list[Staircase]:
        """Where the layers' weights are not zero."""
        return [layer.staircase for layer in self.stack]

    @property
    def projection(self) -> nn.Linear | None:
        """`project`, found sooner."""
        project: Any = self._modules.get("project")
        return project

    def last_parameters(self) -> list[Tensor]:
        """Those that add to the outputs: the last layer's and, where it is the first too, the projection's."""
        last = self.stack[-1]
        project = [] if self.project is None or len(self.layers) > 1 else [self.project.weight]
        return [last.weight, last.bias, *project]

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs for every variable; see the class."""
        sums = self.sums(z, context)
        return sums if self.rate == 1 else self.rate * sums

    def sums(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The last layer's outputs, before the rate."""
        first, *others = self.layers
        x = first(z) if self.project is None else first(z) + self.project(context)
        for layer in others:
            x = layer(self.activation(x))
        return x.unflatten(-1, (self.outputs, self.dim))
