"""Solving through a masked network variable by variable, and the transposed solve that is the solution's gradient.

A hidden unit depends on no variable from its degree on, so each weight is used once: the work of one pass, cut into dim
small products. By hand the state is ``(units, N)``, where the units of a degree are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.masked import passes
from flowpost.masked.network import MADE
from flowpost.masked.passes import Known, Parameters
from flowpost.numerics.watchers import on_host

Array = Any  # a tensor, or numpy's view of one: the sweeps are written in what both can do


def ranked(net: MADE, parameters: Parameters, order: Tensor | None) -> Parameters:
    """The parameters as the sweeps read them: variables in their order, and the outputs of each together."""
    weights, biases, projection = (list(group) for group in parameters)
    if order is not None:
        weights[0] = weights[0].index_select(1, order)
    for group in [weights, biases] if len(weights) > 1 else [weights, biases, projection]:
        group[-1:] = [by_variable(net, tensor, order) for tensor in group[-1:]]
    return Parameters(weights, biases, projection)


def by_variable(net: MADE, outputs: Tensor, order: Tensor | None) -> Tensor:
    """Rows ``(outputs, dim)`` as rows ``(dim, outputs)``, the variables in their order."""
    rows = outputs.unflatten(0, (net.outputs, net.dim)).transpose(0, 1)
    return (rows if order is None else rows.index_select(0, order)).flatten(0, 1)


def by_output(net: MADE, rows: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `by_variable`."""
    rows = rows.unflatten(0, (net.dim, net.outputs))
    rows = rows if order is None else rows.index_select(0, torch.argsort(order))
    return rows.transpose(0, 1).flatten(0, 1)


def flat_sizes(net: MADE) -> list[int]:
    """How many units of each degree, one layer after the other."""
    return [size for layer in net.sizes for size in layer]


def first_layer(z: Tensor, context: Tensor | None, parameters: Parameters) -> Tensor:
    """What the first layer adds to its product, ``(width, N)``."""
    if context is None or context.shape[:-1] != z.shape[:-1]:
        return passes.start(z, context, parameters).t().contiguous()
    context = context.reshape(-1, context.shape[-1])
    return torch.addmm(parameters.biases[0].unsqueeze(-1), parameters.projection[0], context.t())


def to_columns(z: Tensor, order: Tensor | None) -> Tensor:
    """From ``(*batch, dim)`` to ``(dim, N)``, the variables in their order."""
    columns = z.reshape(-1, z.shape[-1]).t()
    return columns.contiguous() if order is None else columns.index_select(0, order)


def to_rows(columns: Tensor, order: Tensor | None) -> Tensor:
    """From ``(dim, N)``, the variables in their order, to ``(N, dim)``."""
    columns = columns if order is None else columns.index_select(0, torch.argsort(order))
    return columns.t().contiguous()


def plain_sweep(
    net: MADE,
    parameters: Parameters,
    context: Tensor | None,
    batch: Sequence[int],
    solve: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The variables ``(*batch, dim)`` and their outputs ``(*batch, dim, outputs)``.

    Of operations that everything can differentiate.

    Args:
        net: the network.
        parameters: its `ranked` ones.
        context: ``(*batch, context_size)`` or None.
        batch: the leading axes.
        solve: from k and variable k's outputs ``(*batch, outputs)`` to that variable, ``(*batch)``.
    """
    starts = list(parameters.biases)
    if context is not None:
        starts[0] = starts[0] + F.linear(context, parameters.projection[0])
    sizes = [*net.sizes, [net.outputs] * net.dim]
    layers = [
        (weight.split(size), start.expand(*batch, -1).split(size, dim=-1))
        for weight, start, size in zip(parameters.weights, starts, sizes, strict=True)
    ]
    # Each list starts with no columns, so that a weight that reads nothing at all has a gradient too: zeros.
    known = [[starts[0].new_zeros(*batch, 0)] for _ in layers]
    outs = []
    for k in range(net.dim):
        for (rows, start), inputs, group in zip(layers, known, [*known[1:], outs], strict=True):
            seen = torch.cat(inputs, dim=-1)
            values = start[k] + F.linear(seen, rows[k].narrow(1, 0, seen.shape[-1]))
            group.append(values if group is outs else net.activation(values))
        known[0].append(solve(k, outs[k]).unsqueeze(-1))
    return torch.cat(known[0], dim=-1), torch.stack(outs, dim=-2)


def arrays(*tensors: Tensor) -> list[Array]:
    """On the CPU numpy's view of their memory, where a small operation costs a third of what it costs through torch."""
    return [tensor.detach().numpy() for tensor in tensors] if on_host(tensors[0]) else list(tensors)


def sweep(
    sizes: Sequence[Sequence[int]],
    activation: Known,
    weights: Sequence[Array],
    values: Sequence[Array],
    x: Array,
    solve: Callable[[int], object],
) -> None:
    """Find the variables by hand, and the layers' values.

    Args:
        sizes: the network's.
        activation: the network's.
        weights: its `ranked` ones.
        values: what each layer adds to its product, ``(width, N)``; the layers' values are written over it.
        x: the variables ``(dim, N)``, to be written.
        solve: given k, writes variable k, whose outputs are in their place.
    """
    run = activation.run if isinstance(x, Tensor) else activation.run_array
    dim = len(x)
    ends = [*map(_ends, [*sizes, [len(weights[-1]) // dim] * dim])]
    layers = [
        (state, _cut(state, end), _cut(weight, end), end)
        for state, weight, end in zip(values, weights, ends, strict=True)
    ]
    *hidden, (_, outs, last, _) = layers
    for k in range(dim):
        seen, width = x[:k], k
        for state, parts, rows, end in hidden:
            part = parts[k]
            if len(part):
                if width:
                    part += rows[k][:, :width] @ seen
                run(part)
            width = end[k]
            seen = state[:width]
        if width:
            out = outs[k]
            out += last[k][:, :width] @ seen
        solve(k)


def transposed_sweep(
    sizes: Sequence[Sequence[int]],
    weights: Sequence[Array],
    slopes: Sequence[Array],
    sums: Sequence[Array],
    grad: Array,
    respond: Callable[[int], object],
) -> None:
    """Find the gradients at the layers' sums by hand; the variables' total gradients come to stand in `grad`.

    Args:
        sizes: the network's.
        weights: its `ranked` ones.
        slopes: of the activations, ``(width, N)`` for every hidden layer.
        sums: the gradients ``(width, N)`` at every layer's sums, to be written.
        grad: the variables' own gradients, ``(dim, N)``.
        respond: given k, writes the gradients at variable k's outputs, whose total gradient is in its place.
    """
    *hidden, outs = sums
    dim, ends = len(grad), [*map(_ends, sizes)]
    layers = [
        (state, weight, _cut(state, end), _cut(slope, end), [0, *end])
        for state, weight, slope, end in zip(hidden, weights[1:], slopes, ends, strict=True)
    ][::-1]
    for k in reversed(range(dim)):
        respond(k)
        row = k * (len(outs) // dim)
        above = outs[row:]
        for state, weight, parts, steep, end in layers:
            first, part = end[k], parts[k]
            if len(part):
                part[:] = (weight[row:, first : end[k + 1]].T @ above) * steep[k]
            row = first
            above = state[row:]
        if k and len(above):
            grad[k - 1] += weights[0][row:, k - 1] @ above


def _ends(sizes: Sequence[int]) -> list[int]:
    return [*accumulate(sizes)]


def _cut(array: Array, ends: Sequence[int]) -> list[Array]:
    return [array[start:end] for start, end in pairwise([0, *ends])]
