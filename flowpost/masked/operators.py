"""The two sweeps of the gated step's inverse, by hand; a compiler, which would unroll them, sees operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpost.bijectors.gate import REACH, SPREAD
from flowpost.masked.passes import NAMED
from flowpost.masked.sweep import arrays, sweep, transposed_sweep


def solve(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias: float,
    sizes: Sequence[int],
    activation: str,
) -> list[Tensor]:
    """The preimages ``(dim, N)`` and the layers' values ``(width, N)``, the last of them the bounded outputs.

    Args:
        images: ``(dim, N)``.
        start: what the first layer adds to its product, ``(width, N)``; its values are written over it.
        weights: the layers', `ranked`.
        biases: the layers' but for the first.
        bias: the forget bias.
        sizes: the network's, one layer after the other.
        activation: its name.
    """
    run = _solve_operator if torch.compiler.is_compiling() else _solve
    return run(images, start, weights, biases, bias, sizes, activation)


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
        fixed: what the log-det adds at the outputs, ``(dim, 2, N)``.
        moved: from v to the gradient at the outputs, ``(dim, 2, N)``.
        weights: the layers', `ranked`.
        slopes: of the activations, ``(width, N)``.
        sizes: the network's, one layer after the other.
    """
    run = _pull_operator if torch.compiler.is_compiling() else _pull
    return run(grad, fixed, moved, weights, slopes, sizes)


def _solve(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias: float,
    sizes: Sequence[int],
    activation: str,
) -> list[Tensor]:
    x, (dim, count) = images.new_empty(images.shape), images.shape
    expanded = [each.unsqueeze(1).expand(-1, count) for each in biases]
    values = [start, *(each.clone(memory_format=torch.contiguous_format) for each in expanded)]
    # The bounds' inner scales are taken into the last layer: a call per variable less each.
    last = weights[-1].clone()
    for rows in (last, values[-1]):
        rows[0::2].mul_(1 / SPREAD)
        rows[1::2].mul_(1 / REACH)
    # (-logit, m) from the bounded outputs.
    slopes, offsets = images.new_full((2, 1), REACH), images.new_zeros(2, 1)
    slopes[0].fill_(-SPREAD)
    offsets[0].fill_(-bias)
    image, preimage, slope, offset, *states = arrays(images, x, slopes, offsets, *values)
    pairs = states[-1].reshape(dim, 2, count)
    xp: Any = torch if isinstance(pairs, Tensor) else np

    def find(k: int) -> None:
        """``z = m + (z' - m) / s = z' + (z' - m) exp(-logit)``."""
        xp.tanh(pairs[k], out=pairs[k])
        logit, mean = pairs[k] * slope + offset
        preimage[k] = image[k] + (image[k] - mean) * xp.exp(logit)

    with np.errstate(all="ignore"):
        layers = arrays(*weights[:-1], last)
        sweep(_by_layer(sizes, dim), NAMED[activation], layers, states, preimage, find)
    return [x, *values]


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
        transposed_sweep(_by_layer(sizes, len(v)), arrays(*weights), steep, written, total, respond)
    return [v, *sums]


_Operator = Callable[..., list[Tensor]]
_solve_operator: _Operator = torch.library.custom_op(
    "flowpost::gated_solve",
    # An operator must not return what it was given.
    lambda images, start, *others: _solve(images, start.clone(memory_format=torch.contiguous_format), *others),
    mutates_args=(),
    schema="(Tensor images, Tensor start, Tensor[] weights, Tensor[] biases, float bias, int[] sizes, str activation)"
    " -> Tensor[]",
)
_pull_operator: _Operator = torch.library.custom_op(
    "flowpost::gated_pull",
    lambda *inputs: _pull(*inputs),
    mutates_args=(),
    schema="(Tensor grad, Tensor fixed, Tensor moved, Tensor[] weights, Tensor[] slopes, int[] sizes) -> Tensor[]",
)


@torch.library.register_fake("flowpost::gated_solve")
def _solved(
    images: Tensor, start: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *_: object
) -> list[Tensor]:
    layers = [images.new_empty(len(each), images.shape[1]) for each in biases]
    return [images.new_empty(images.shape), start.new_empty(start.shape), *layers]


@torch.library.register_fake("flowpost::gated_pull")
def _pulled(
    grad: Tensor, fixed: Tensor, moved: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor], *_: object
) -> list[Tensor]:
    return [each.new_empty(each.shape) for each in (grad, *slopes, fixed.flatten(0, 1))]


def _by_layer(sizes: Sequence[int], dim: int) -> list[Sequence[int]]:
    return [sizes[first : first + dim] for first in range(0, len(sizes), dim)]
