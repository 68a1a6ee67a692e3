"""Solving through a masked network variable by variable; `transposed` has the solution's gradient.

A hidden unit depends on no variable from its degree on, so each weight is used once: the work of one pass, cut into dim
small products. The state is ``(units, N)``, where the units of a degree are neighbours in memory. On the CPU the loop
runs on numpy's views of the tensors, where a small operation costs a third of what it costs through torch. A compiler,
which would unroll the loop, sees an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from flowpost.masked.activations import NAMED
from flowpost.masked.run import COLUMNS, Column
from flowpost.numerics.arrays import Array
from flowpost.numerics.operators import define
from flowpost.numerics.watchers import on_host, unless_compiled

_ZERO = np.zeros((), dtype=np.float32)  # an array, for a number of Python's is converted on every call
_BY_ARRAY: dict[str, Callable[[Array], object]] = {
    "relu": lambda x: np.maximum(x, _ZERO, out=x),
    "tanh": lambda x: np.tanh(x, out=x),
}
"""Activations in place by numpy, where torch is not faster on the same memory."""
GROUP = 8  # variables; products of the few rows of one run at a third of the speed of many rows


def solve(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sizes: Sequence[int],
    activation: str,
    column: Column | Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """The preimages ``(dim, N)`` and the layers' values ``(width, N)``, the last of them the outputs.

    Args:
        images: ``(dim, N)``.
        start: what the first layer adds to its product, ``(width, N)``; its values are written over it.
        weights: the layers', `ranked`.
        biases: the layers' but for the first, `ranked`.
        sizes: how many units of each degree, one hidden layer after the other.
        activation: its name.
        column: the step's inverse for one variable: its closed form, or a function of tensors as in `Solve`.
    """
    if not isinstance(column, Column):
        return _solve(images, start, weights, biases, sizes, activation, column)
    return _by_name(images, start, weights, biases, sizes, activation, column.name, column.constants)


def _solve(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sizes: Sequence[int],
    activation: str,
    column: str | Callable[[Tensor, Tensor], Tensor],
    constants: Sequence[float] = (),
) -> list[Tensor]:
    x, (dim, count) = images.new_empty(images.shape), images.shape
    expanded = [each.unsqueeze(1).expand(-1, count) for each in biases]
    values = [start, *(each.clone(memory_format=torch.contiguous_format) for each in expanded)]
    image, preimage, *states = arrays(images, x, *values)
    if isinstance(column, str):
        outs = states[-1].reshape(dim, len(values[-1]) // dim, count)
        closed = COLUMNS[column](image, constants)

        def find(k: int) -> None:
            preimage[k] = closed(image[k], outs[k])
    else:
        numbers = values[-1].view(dim, len(values[-1]) // dim, count)

        def find(k: int) -> None:
            x[k] = column(images[k], numbers[k])

    known, layers = NAMED[activation], by_layer(sizes, dim)
    by_array = None if isinstance(image, Tensor) else _BY_ARRAY.get(activation)
    hidden = [
        value.split(list(size)) if by_array is None else cut(state, ends_of(size))
        for value, state, size in zip(values, states, layers, strict=False)
    ]
    with np.errstate(all="ignore"):
        _sweep(layers, by_array or known.run, hidden, readable(weights), states, preimage, find)
    return [x, *values]


def readable(weights: Sequence[Tensor]) -> list[Array]:
    """As `arrays`, of parameters: ``.numpy()`` would fix their storage's size for good, which sharding changes."""
    return [np.from_dlpack(each.detach()) for each in weights] if on_host(weights[0]) else list(weights)


def arrays(*tensors: Tensor) -> list[Array]:
    """Numpy's views of tensors, where they can be had."""
    return [tensor.detach().numpy() for tensor in tensors] if on_host(tensors[0]) else list(tensors)


def by_layer(sizes: Sequence[int], dim: int) -> list[Sequence[int]]:
    """From one list for all layers to one for each."""
    return [sizes[first : first + dim] for first in range(0, len(sizes), dim)]


def _sweep(
    sizes: Sequence[Sequence[int]],
    activate: Callable[[Array], object],
    hidden: Sequence[Sequence[Array]],
    weights: Sequence[Array],
    values: Sequence[Array],
    x: Array,
    find: Callable[[int], object],
) -> None:
    """Find the variables x ``(dim, N)``, and the layers' values; both are written.

    What is known before a group of variables is multiplied for all of the group at once.

    Args:
        sizes: of each hidden layer, how many units of each degree.
        activate: the network's activation, in place.
        hidden: the hidden layers' values by degree, as `activate` takes them.
        weights: the layers', `ranked`.
        values: what each layer adds to its product, ``(width, N)``, and then its values.
        x: the variables.
        find: given k, writes variable k, whose outputs are in their place.
    """
    dim = len(x)
    ends = [ends_of(each) for each in [*sizes, [len(weights[-1]) // dim] * dim]]
    inputs = [x, *values[:-1]]
    begins = [range(dim + 1), *ends[:-1]]  # of each layer's inputs, where those begin that are not known before k
    stops = [range(dim + 1), *(each[1:] for each in ends[:-1])]
    wholes = list(zip(inputs, begins, values, weights, ends, strict=True))
    cuts = [(cut(value, end), cut(weight, end)) for _, _, value, weight, end in wholes]
    layers = list(zip(inputs, begins, stops, cuts, [*hidden, None], strict=True))
    first = 0
    for k in range(dim):
        if k % GROUP == 0:
            first, last = k, min(k + GROUP, dim)
            for known, begin, value, weight, end in wholes:
                rows, width = slice(end[first], end[last]), begin[first]
                if width:
                    part = value[rows]
                    part += weight[rows, :width] @ known[:width]
        for known, begin, stop, (parts, rows), active in layers:
            start, width, part = begin[first], stop[k], parts[k]
            if len(part):
                if start < width:
                    part += rows[k][:, start:width] @ known[start:width]
                if active is not None:
                    activate(active[k])
        find(k)


def ends_of(sizes: Sequence[int]) -> list[int]:
    """Where parts of such sizes begin and end, one after the other."""
    return [*accumulate(sizes, initial=0)]


def cut(array: Array, ends: Sequence[int]) -> list[Array]:
    """The rows from each end to the next."""
    return [array[start:end] for start, end in pairwise(ends)]


# An operator must not return what it was given, and a sweep writes over its start.
_solve_operator = define(
    "solve(Tensor images, Tensor start, Tensor[] weights, Tensor[] biases, int[] sizes, str activation, str column,"
    " float[] constants) -> Tensor[]",
    lambda images, start, *others: _solve(images, start.clone(memory_format=torch.contiguous_format), *others),
    lambda images, start, _, biases, *__: [
        images.new_empty(images.shape),
        start.new_empty(start.shape),
        *(images.new_empty(len(each), images.shape[1]) for each in biases),
    ],
)
_by_name = unless_compiled(_solve, _solve_operator)
