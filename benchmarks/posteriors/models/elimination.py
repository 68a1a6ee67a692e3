"""A concentration that flows in at a given rate and is eliminated at one that saturates, with a gradient by hand.

``C' = f(t) - m C / (K + C)``, C(0) = 0, by the classical method of Runge and Kutta. Where K is small the elimination
sets in within a moment; the published values are those of 20 steps before the first observation, so those are taken,
and fewer later on, where the curve is smooth. In ``X = C + K`` a slope is ``f - m + m K / X``: one quotient a stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.posteriors.models.arrays import differentiable, operations, raw

FIRST, LATER = 20, 4  # steps to the first observation, and from each one to the next
REACH = (0.5, 0.5, 1.0)  # how far along the last slope the second, third and fourth stages are
WEIGHTS = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def lengths(count: int, interval: float) -> list[float]:
    """Of all steps to `count` observations at equal intervals."""
    return [interval / FIRST] * FIRST + [interval / LATER] * (LATER * (count - 1))


def concentrations(inflow: Tensor, most: Tensor, half: Tensor, steps: Tensor) -> Tensor:
    """C at the observations, ``(times, S)``, never below 0.

    Where a step is too long for a draw, so that it would overshoot 0, C stays at 0 and the draw's gradient is 0.

    Args:
        inflow: f at the beginning, middle and end of every step, ends and beginnings once: ``(2 steps + 1, S)``.
        most: m, ``(S,)``.
        half: K, ``(S,)``.
        steps: `lengths`, ``(steps,)``.
    """
    base, steps = inflow - most, steps[:, None]
    rows = torch.stack([base[:-1:2], base[1::2], base[1::2], base[2::2]], 1) * steps.unsqueeze(-1)
    path = plain_path if torch._C._are_functorch_transforms_active() else _Path.apply
    return path(rows, steps * (most * half), half)  # pyright: ignore[reportReturnType]


def plain_path(rows: Tensor, products: Tensor, half: Tensor) -> Tensor:
    """The path, of operations that autograd knows: for second derivatives and `torch.func`.

    Args:
        rows: ``f - m`` times the step's length, of each stage, ``(steps, 4, S)``.
        products: ``m K`` times the step's length, ``(steps, S)``.
        half: K, ``(S,)``.
    """
    state, ends, lost = half, [], torch.zeros_like(half, dtype=torch.bool)
    for stages, product in zip(rows, products, strict=True):
        moves, point = [], state
        for row, reach in zip(stages, (*REACH, 0.0), strict=True):
            moves.append(row + product / point)
            point = torch.maximum(state + reach * moves[-1], half)
            lost = lost | (state + reach * moves[-1] < half)
        end = state + sum(weight * move for weight, move in zip(WEIGHTS, moves, strict=True))
        lost, state = lost | (end < half), torch.maximum(end, half)
        ends.append(state)
    found = torch.stack(ends[FIRST - 1 :: LATER]) - half
    return torch.where(lost, found.detach(), found)


class _Path(torch.autograd.Function):
    """`plain_path` in place."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, products: Tensor, half: Tensor) -> Tensor:  # noqa: ANN401
        points, ends, ops = torch.empty_like(rows), torch.empty_like(products), operations(half)
        state, least = raw(half.clone()), raw(half)
        move, part, point = (raw(torch.empty_like(half)) for _ in range(3))
        for stages, product, kept, end in zip(raw(rows), raw(products), raw(points), raw(ends), strict=True):
            ops.add(state, 0.0, out=end)
            for stage in range(4):
                if stage:
                    ops.add(state, ops.multiply(move, REACH[stage - 1], out=part), out=kept[stage])
                    ops.maximum(kept[stage], least, out=point)
                else:
                    kept[0] = state
                    point[:] = state
                ops.add(stages[stage], ops.divide(product, point, out=part), out=move)
                ops.add(end, ops.multiply(move, WEIGHTS[stage], out=part), out=end)
            ops.maximum(end, least, out=state)
        lost = (points < half).any(0).any(0) | (ends < half).any(0)
        ctx.save_for_backward(rows, products, half, points, lost)
        return (torch.maximum(ends, half) - half)[FIRST - 1 :: LATER]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        rows, products, half, points, lost = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(plain_path, (rows, products, half), gradient)
        ops, of_rows = operations(half), torch.empty_like(points)
        inverse = torch.maximum(points, half).reciprocal()
        slopes, kept = raw(-products.unsqueeze(1) * inverse.square()), raw(of_rows)
        gradient = gradient.masked_fill(lost, 0.0)
        of_state, seen = torch.zeros_like(half), raw(gradient)
        state, after, part = raw(of_state), *(raw(torch.empty_like(half)) for _ in range(2))
        for index in reversed(range(len(rows))):
            observation, beside = divmod(index + 1 - FIRST, LATER)
            if observation >= 0 and not beside:
                ops.add(state, seen[observation], out=state)
            after[:] = state
            for stage in reversed(range(4)):
                own = kept[index, stage]
                ops.multiply(after, WEIGHTS[stage], out=own)
                if stage < 3:
                    ops.add(own, ops.multiply(part, REACH[stage], out=part), out=own)
                ops.add(state, ops.multiply(slopes[index, stage], own, out=part), out=state)
        return of_rows, (of_rows * inverse).sum(1), of_state - gradient.sum(0)
