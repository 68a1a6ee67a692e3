"""The transposed solve: the gradient of what a sweep found, variable by variable from the last one on.

It runs as `sweep` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowpost.masked.host.sweep import GROUP, arrays, by_layer, cut, ends_of, readable
from flowpost.numerics.arrays import Array
from flowpost.numerics.operators import define
from flowpost.numerics.watchers import unless_compiled


def pull(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    slopes: Sequence[Tensor],
    sizes: Sequence[int],
) -> list[Tensor]:
    """The solution v ``(dim, N)`` and the gradients at the layers' sums, ``(width, N)``.

    Args:
        grad: g, ``(dim, N)``.
        fixed: what the log-det adds at the outputs, ``(dim, outputs, N)``.
        moved: from v to the gradient at the outputs, ``(dim, outputs, N)``.
        weights: the layers', `ranked`.
        slopes: of the activations, ``(width, N)``.
        sizes: how many units of each degree, one hidden layer after the other.
    """
    return _either(grad, fixed, moved, weights, slopes, sizes)


def _pull(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    slopes: Sequence[Tensor],
    sizes: Sequence[int],
) -> list[Tensor]:
    v = grad.clone(memory_format=torch.contiguous_format)
    sums = [each.new_empty(each.shape) for each in (*slopes, fixed.flatten(0, 1))]
    total, fix, move, *written = arrays(v, fixed, moved, *sums)
    outs = written[-1].reshape(fixed.shape)

    def respond(k: int) -> None:
        outs[k] = fix[k] + total[k] * move[k]

    with np.errstate(all="ignore"):
        steep = arrays(*slopes) if slopes else []
        _transposed_sweep(by_layer(sizes, len(v)), readable(weights), steep, written, total, respond)
    return [v, *sums]


def _transposed_sweep(
    sizes: Sequence[Sequence[int]],
    weights: Sequence[Array],
    slopes: Sequence[Array],
    sums: Sequence[Array],
    grad: Array,
    respond: Callable[[int], object],
) -> None:
    """Find the gradients at the layers' sums; the variables' total gradients come to stand in `grad`.

    Given k, `respond` writes the gradients at variable k's outputs, whose total gradient is in its place. The others
    are those of `pull`, one for each layer.
    """
    dim, (*hidden, outs) = len(grad), sums
    ends = [ends_of(each) for each in [*sizes, [len(outs) // dim] * dim]]
    above = list(zip(weights, sums, ends, strict=True))  # each layer's gradients, which reach the inputs by its weight
    layers = [
        (*reader, state, end, cut(state, end), cut(slope, end))
        for reader, state, end, slope in zip(above[1:], hidden, ends, slopes, strict=False)
    ][::-1]
    weight_of_first, of_first, end_of_first = above[0]
    last = dim
    for k in reversed(range(dim)):
        if (k + 1) % GROUP == 0 or k + 1 == dim:
            first, last = k // GROUP * GROUP, k + 1
            for weight, source, begins, state, end, _, _ in layers:
                columns, known = slice(end[first], end[last]), begins[last]
                state[columns] = weight[known:, columns].T @ source[known:]
            columns, known = slice(max(first - 1, 0), k), end_of_first[last]
            part = grad[columns]
            part += weight_of_first[known:, columns].T @ of_first[known:]
        respond(k)
        for weight, source, begins, _, end, parts, steep in layers:
            part, rows = parts[k], slice(begins[k], begins[last])
            if len(part):
                part += weight[rows, end[k] : end[k + 1]].T @ source[rows]
                part *= steep[k]
        if k:
            rows = slice(end_of_first[k], end_of_first[last])
            grad[k - 1] += weight_of_first[rows, k - 1] @ of_first[rows]


_pull_operator = define(
    "pull(Tensor grad, Tensor fixed, Tensor moved, Tensor[] weights, Tensor[] slopes, int[] sizes) -> Tensor[]",
    _pull,
    lambda grad, fixed, moved, weights, slopes, *_: [
        grad.new_empty(each.shape) for each in (grad, *slopes, fixed.flatten(0, 1))
    ],
)
_either = unless_compiled(_pull, _pull_operator)
