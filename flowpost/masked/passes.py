"""A masked network's passes by hand, forward and backward: no zero is read, and only the layers' values are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.masked.network import MADE, Activation
from flowpost.numerics.watchers import unwatched

_relu_backward = torch.ops.aten.threshold_backward.default
_elu_backward = torch.ops.aten.elu_backward.default
_OF_ITSELF = True  # the derivative from the value and not from its argument


class Known(NamedTuple):
    """An activation whose derivative follows from its own value."""

    name: str
    run: Activation
    """In place."""
    run_array: Callable[[np.ndarray], object]
    """In place, for numpy."""
    gradient: Callable[[Tensor, Tensor], Tensor]
    """From the gradient at the value, and the value, to the gradient at the input."""


_ZERO = np.zeros((), dtype=np.float32)  # an array, for a number of Python's is converted on every call


def _elu_array(x: np.ndarray) -> None:
    below = np.expm1(np.minimum(x, _ZERO))
    np.maximum(x, _ZERO, out=x)
    x += below


_RELU = Known(
    "relu", torch.relu_, lambda x: np.maximum(x, _ZERO, out=x), lambda grad, value: _relu_backward(grad, value, 0)
)
KNOWN: dict[Activation, Known] = {
    F.relu: _RELU,
    torch.relu: _RELU,
    F.elu: Known(
        "elu",
        partial(F.elu, inplace=True),
        _elu_array,
        lambda grad, value: _elu_backward(grad, 1, 1, 1, _OF_ITSELF, value),
    ),
    torch.tanh: Known("tanh", torch.tanh_, lambda x: np.tanh(x, out=x), torch.ops.aten.tanh_backward.default),
}
NAMED = {known.name: known for known in KNOWN.values()}


def by_hand(net: MADE, z: Tensor) -> bool:
    """Whether these passes may stand in for the network's own operations."""
    return net.activation in KNOWN and unwatched(z)


class Parameters(NamedTuple):
    """A network's parameters by what they do; the projection's list is empty where there is no context."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    projection: Sequence[Tensor]


def flat(net: MADE) -> dict[str, Tensor]:
    """The parameters in the order of `Parameters`, by name."""
    layers = net.stack
    weights = {f"layers.{i}.weight": layer.weight for i, layer in enumerate(layers)}
    biases = {f"layers.{i}.bias": layer.bias for i, layer in enumerate(layers)}
    return weights | biases | ({} if net.project is None else {"project.weight": net.project.weight})


def grouped(net: MADE, parameters: Sequence[Tensor]) -> Parameters:
    """The inverse of `flat`."""
    count = len(net.layers)
    return Parameters(parameters[:count], parameters[count : 2 * count], parameters[2 * count :])


def forward(net: MADE, z: Tensor, context: Tensor | None, parameters: Parameters) -> list[Tensor]:
    """The values of every layer, ``(N, width)`` for z ``(*batch, dim)``; the outputs last."""
    x, y = z.reshape(-1, net.dim), start(z, context, parameters)
    values = []
    for layer, weight, bias in zip(net.stack, parameters.weights, parameters.biases, strict=True):
        if values:
            x, y = KNOWN[net.activation].run(y), bias.expand(len(y), -1).clone()
        layer.staircase.add_product(y, x, weight, layer.masks)
        values.append(y)
    return values


def start(z: Tensor, context: Tensor | None, parameters: Parameters) -> Tensor:
    """The first layer's bias and projected context, projected once however many samples share it, ``(N, width)``."""
    bias, batch = parameters.biases[0], z.shape[:-1]
    if context is None:
        return bias.expand(batch.numel(), -1).clone()
    y = torch.addmm(bias, context.reshape(-1, context.shape[-1]), parameters.projection[0].t())
    if context.shape[:-1] == batch:
        return y
    y = y.view(*context.shape[:-1], len(bias)).expand(*batch, -1)
    return y.clone(memory_format=torch.contiguous_format).view(-1, len(bias))


def backward(net: MADE, grad: Tensor, values: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients at the layers' sums, from the one at the outputs, ``(N, width)``, and the hidden layers' values."""
    sums = [grad]
    for layer, weight, value in zip(net.stack[:0:-1], weights[:0:-1], values[::-1], strict=True):
        grad = layer.staircase.input_gradient(grad, weight, layer.masks)
        grad = KNOWN[net.activation].gradient(grad, value)
        sums.append(grad)
    return sums[::-1]


def parameter_gradients(
    net: MADE,
    sums: Sequence[Tensor],
    inputs: Sequence[Tensor],
    context: Tensor | None,
    batch: Sequence[int],
    parameters: Parameters,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients at the context and at the parameters in flat order, None where not needed.

    Args:
        net: the network.
        sums: gradients at the layers' sums, ``(N, width)``.
        inputs: of the layers, ``(N, width)``.
        context: ``(*batch, context_size)`` with axes that may be fewer, or None.
        batch: z's leading axes.
        parameters: the network's.
        needs: for every result whether it is needed.
    """
    count = len(sums)
    context_needs, weights_need, biases_need = needs[0], needs[1 : count + 1], needs[count + 1 : 2 * count + 1]
    weights = [
        layer.staircase.weight_gradient(grad, x, layer.masks) if need else None
        for layer, grad, x, need in zip(net.stack, sums, inputs, weights_need, strict=True)
    ]
    biases = [grad.sum(0) if need else None for grad, need in zip(sums, biases_need, strict=True)]
    if context is None:
        return [None, *weights, *biases]
    first = sums[0]
    if context.shape[:-1] != batch:
        width = first.shape[-1]
        first = first.reshape(*batch, width).sum_to_size(*context.shape[:-1], width).view(-1, width)
    features = (first @ parameters.projection[0]).view(context.shape) if context_needs else None
    projection = first.t() @ context.reshape(-1, context.shape[-1]) if needs[-1] else None
    return [features, *weights, *biases, projection]
