"""The sweep of an inverse over the variables on a device, and the transposed one, as loops of torch's calls.

The state is ``(N, units)``, as the passes have it. The weights are masked, so what is not known yet may stand as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowpost.masked.activations import NAMED


def solve(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Sequence[int],
    activation: str,
    column: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The preimages ``(N, dim)``. A unit depends on no variable from its degree on, so each is found once.

    Args:
        images: ``(N, dim)``.
        start: what the first layer adds to its product, ``(N, width)``.
        weights: the layers', masked.
        biases: the layers' but for the first.
        order: of the variables.
        activation: its name.
        column: the step's inverse for one variable, as `Solve`.
    """
    known, dim = NAMED[activation], len(order)
    x = torch.zeros_like(images, memory_format=torch.contiguous_format)  # as a compiler has been told
    *sums, outs = [start, *biases]
    values = [each.expand(len(images), -1).clone(memory_format=torch.contiguous_format) for each in sums]
    for k, variable in enumerate(order):
        seen = x
        for weight, value in zip(weights, values, strict=False):
            first, last = ends(k, value.shape[1], dim)
            if last > first:
                known.run(value[:, first:last].addmm_(seen, weight[first:last, : seen.shape[1]].t()))
            seen = value[:, :last]
        rows = weights[-1].unflatten(0, (-1, dim))[:, variable, : seen.shape[1]]
        numbers = torch.addmm(outs.unflatten(-1, (-1, dim))[..., variable], seen, rows.t())
        x[:, variable] = column(images[:, variable], numbers.t())
    return x


def pull(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    order: Sequence[int],
    activation: str,
) -> list[Tensor]:
    """The solution v ``(N, dim)`` of `host.solve_gradients`, and the gradients at the sums, the last layer's first.

    Args:
        grad: g, ``(N, dim)``.
        fixed: what the log-det adds at the outputs, ``(N, outputs * dim)``.
        moved: from v to the gradient at the outputs, ``(N, outputs * dim)``.
        weights: the layers', masked.
        hidden: the layers' values, ``(N, width)``.
        order: of the variables.
        activation: its name.
    """
    v, dim, gradient = grad.clone(memory_format=torch.contiguous_format), len(order), NAMED[activation].gradient
    at_outs = torch.zeros_like(fixed, memory_format=torch.contiguous_format)
    # They stand as slopes until a unit's turn comes.
    sums = [gradient(torch.ones_like(value), value).to(v.dtype).contiguous() for value in hidden[::-1]]
    by_variable = [each.unflatten(-1, (-1, dim)) for each in (at_outs, fixed, moved)]
    for k in reversed(range(dim)):
        at_out, fix, move = (each[:, :, order[k]] for each in by_variable)
        torch.addcmul(fix, v[:, order[k], None], move, out=at_out)
        above, row = at_outs, 0
        for weight, state in zip(weights[:0:-1], sums, strict=True):
            first, last = ends(k, state.shape[1], dim)
            if last > first:
                state[:, first:last].mul_(above @ weight[row:, first:last])
            above, row = state[:, first:], first
        if k:
            v[:, order[k - 1]].addmv_(above, weights[0][row:, order[k - 1]])
    return [v, at_outs, *sums]


def ends(degree: int, width: int, dim: int) -> tuple[int, int]:
    """Where in a hidden layer the units of a degree start and end, by the degrees that `MADE.units` gives."""
    return -(-degree * width // dim), -(-(degree + 1) * width // dim)
