"""Solving through a masked network variable by variable, and the transposed solve that is the solution's gradient.

A hidden unit depends on no variable from its degree on, so each weight is used once: the work of one pass, cut into dim
small products. By hand the state is ``(units, N)``, where the units of a degree are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.made import MADE
from flowpost.bijectors.passes import KNOWN, Parameters


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
    known: list[list[Tensor]] = [[] for _ in layers]
    outs = []
    for k in range(net.dim):
        values = None
        for (rows, start), inputs, group in zip(layers, known, [*known[1:], outs], strict=True):
            values = start[k]
            if inputs:
                seen = torch.cat(inputs, dim=-1)
                values = values + F.linear(seen, rows[k].narrow(1, 0, seen.shape[-1]))
            group.append(values if group is outs else net.activation(values))
        known[0].append(solve(k, outs[k]).unsqueeze(-1))
    return torch.cat(known[0], dim=-1), torch.stack(outs, dim=-2)


def sweep(
    net: MADE, weights: Sequence[Tensor], starts: Sequence[Tensor], solve: Callable[[int, Tensor], object]
) -> Tensor:
    """The variables ``(dim, N)``, by hand.

    Args:
        net: the network.
        weights: its `ranked` ones.
        starts: what each layer adds to its product, ``(width, N)``; the layers' values are written over it.
        solve: writes variable k, once its outputs ``(outputs, N)`` are in their place, into the row it is given.
    """
    run = KNOWN[net.activation].run
    *hidden, outs = starts
    x = outs.new_empty(net.dim, outs.shape[-1])
    corners = [_corner(weight) for weight in weights]
    parts = [values.split(sizes) for values, sizes in zip(hidden, net.sizes, strict=True)]
    layers = [*zip(hidden, parts, corners, map(_ends, net.sizes), strict=False)]
    outputs, last = net.outputs, corners[-1]
    for k, (row, out) in enumerate(zip(x.unbind(), outs.split(outputs), strict=True)):
        seen, width = x[:k], k
        for values, part, corner, ends in layers:
            first, end = ends[k], ends[k + 1]
            if end > first:
                if width:
                    part[k].addmm_(corner(first, end - first, width), seen)
                run(part[k])
            seen, width = values[:end], end
        if width:
            out.addmm_(last(k * outputs, outputs, width), seen)
        solve(k, row)
    return x


def transposed_sweep(
    net: MADE,
    weights: Sequence[Tensor],
    slopes: Sequence[Tensor],
    grad: Tensor,
    respond: Callable[[int, Tensor, Tensor], object],
) -> list[Tensor]:
    """The gradients at the layers' sums, ``(width, N)``, by hand; the variables' totals come to stand in `grad`.

    Args:
        net: the network.
        weights: its `ranked` ones.
        slopes: of the activations, ``(width, N)`` for every hidden layer.
        grad: the variables' own gradients, ``(dim, N)``.
        respond: from k and variable k's total gradient writes the gradient at its outputs, ``(outputs, N)``.
    """
    hidden = [torch.empty_like(slope) for slope in slopes]
    outs = grad.new_empty(net.dim * net.outputs, grad.shape[-1])
    blocks = [_transposed(weight) for weight in weights]
    parts, steep = (
        [tensor.split(sizes) for tensor, sizes in zip(group, net.sizes, strict=True)] for group in (hidden, slopes)
    )
    layers = [*zip(hidden, parts, steep, blocks[1:], map(_ends, net.sizes), strict=True)][::-1]
    rows, reads = grad.unbind(), weights[0].t()
    for k, out in reversed([*enumerate(outs.split(net.outputs))]):
        respond(k, rows[k], out)
        row, height = k * net.outputs, (net.dim - k) * net.outputs
        above = outs[row:]
        for sums, part, slope, block, ends in layers:
            first, end = ends[k], ends[k + 1]
            if end > first:
                torch.mm(block(row, height, first, end - first), above, out=part[k]).mul_(slope[k])
            above, row, height = sums[first:], first, ends[-1] - first
        if k and height:
            rows[k - 1].addmv_(above.t(), reads[k - 1][row:])
    return [*hidden, outs]


def _ends(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)]


# One `as_strided` for what slicing two axes does in two calls: between small products that is a tenth of the time.


def _corner(weight: Tensor) -> Callable[[int, int, int], Tensor]:
    """From a row, a number of rows and one of columns to that part of the weight."""
    strides, offset, cut = weight.stride(), weight.storage_offset(), weight.as_strided
    return lambda row, height, width: cut((height, width), strides, offset + row * strides[0])


def _transposed(weight: Tensor) -> Callable[[int, int, int, int], Tensor]:
    """From a row and a number of them, a column and a number of them, to that part of the weight, transposed."""
    (down, right), offset, cut = weight.stride(), weight.storage_offset(), weight.as_strided
    return lambda row, height, column, width: cut((width, height), (right, down), offset + row * down + column * right)
