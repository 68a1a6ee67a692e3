"""The transposed solve: the gradient of what a sweep found, variable by variable from the last one on.

It runs as `sweep` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowpost.masked.run import Array
from flowpost.masked.sweep import Operator, arrays, by_layer, cut, ends_of, readable


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
    run = _pull_operator if torch.compiler.is_compiling() else _pull
    return run(grad, fixed, moved, weights, slopes, sizes)


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
    *hidden, outs = sums
    dim, ends = len(grad), [*map(ends_of, sizes)]
    layers = [
        (state, weight, cut(state, end), cut(slope, end), [0, *end])
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


_pull_operator: Operator = torch.library.custom_op(
    "flowpost::pull",
    lambda *inputs: _pull(*inputs),
    mutates_args=(),
    schema="(Tensor grad, Tensor fixed, Tensor moved, Tensor[] weights, Tensor[] slopes, int[] sizes) -> Tensor[]",
)


@torch.library.register_fake("flowpost::pull")
def _pulled(
    grad: Tensor, fixed: Tensor, moved: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor], *_: object
) -> list[Tensor]:
    return [each.new_empty(each.shape) for each in (grad, *slopes, fixed.flatten(0, 1))]
