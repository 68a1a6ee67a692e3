"""Orbits of two populations by a splitting of order 6, with a gradient by hand.

Lotka and Volterra's equations are Hamiltonian in the logarithms: ``P = log u + log c``, ``Q = log v + log b`` move as
``P' = a - e^Q`` and ``Q' = e^P - d``. Each half is solved exactly while the other stands still, so a step is a row of
kicks, two steps a year leave 1e-6 in the logarithms, and neither population can become negative. Without their own
growth, ``a t`` and ``-d t``, a kick is ``P -= e^(Q + shift)`` or ``Q += e^(P + shift)``; the shifts hold the growth and
the lengths of the kicks, and are known before the orbit is.

A draw whose populations explode within a kick, thousands of standard deviations from the posterior, is sent `FAR` away
without a gradient, so that a fit that begins there meets no number that is not finite.

Reference:
    Blanes and Moan (2002), Practical symplectic partitioned Runge-Kutta and Runge-Kutta-Nystrom methods, scheme S10.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.posteriors.models.arrays import differentiable, operations, raw

STEPS = 2  # a year
MOST = 8.0  # of a kick; those of the posterior are below 1
FAR = 100.0  # in logarithms
_P = (0.0502627644003922, 0.413514300428344, 0.0450798897943977, -0.188054853819569, 0.541960678450780)
_Q = (0.148816447901042, -0.132385865767784, 0.067307604692185, 0.432666402578175)


class Kick(NamedTuple):
    """One kick of a year."""

    of_p: bool
    """Whether P is moved, else Q."""
    falls: bool
    """Whether it is lowered: P is by a kick forward in time, Q by one back."""
    length: float
    """In years, without its sign."""
    time: float
    """Of the variable that stands still, in years."""


def _kicks() -> list[Kick]:
    of_p = [*_P, 1 - 2 * sum(_P), *reversed(_P)]
    of_q = [*_Q, 0.5 - sum(_Q), 0.5 - sum(_Q), *reversed(_Q)]
    step = [(True, of_p[0])]
    for second, first in zip(of_q, of_p[1:], strict=True):
        step += [(False, second), (True, first)]
    kicks, times = [], {True: 0.0, False: 0.0}
    for moved, share in step * STEPS:
        kicks.append(Kick(moved, moved is (share > 0), abs(share) / STEPS, times[not moved]))
        times[moved] += share / STEPS
    return kicks


KICKS = _kicks()
"""Those of a year, in turn."""


def orbit(rates: Tensor, start: Tensor, years: int) -> Tensor:
    """``(P, Q)`` at every year, ``(years + 1, 2, S)``.

    Args:
        rates: ``(a, -d)``, ``(2, S)``: what P and Q grow by in a year where there is none of the other.
        start: ``(P, Q)`` in year 0, ``(2, S)``.
        years: that pass.
    """
    kept = {"dtype": rates.dtype, "device": rates.device}
    passed = torch.arange(years + 1, **kept)
    times = passed[:-1, None] + torch.tensor([kick.time for kick in KICKS], **kept)  # (years, kicks)
    other = torch.stack([rates[int(kick.of_p)] for kick in KICKS])  # (kicks, S)
    lengths = torch.tensor([kick.length for kick in KICKS], **kept).log()
    shifts = (times.unsqueeze(-1) * other + lengths.unsqueeze(-1)).flatten(0, 1)
    walk = plain_walk if torch._C._are_functorch_transforms_active() else _Walk.apply
    return walk(shifts, start) + passed[:, None, None] * rates  # pyright: ignore[reportOperatorIssue]


def plain_walk(shifts: Tensor, start: Tensor) -> Tensor:
    """The orbit without growth, of operations that autograd knows: for second derivatives and `torch.func`."""
    (p, q), states, lost = start, [start], torch.zeros_like(start[0], dtype=torch.bool)
    for year in shifts.split(len(KICKS)):
        for kick, shift in zip(KICKS, year, strict=True):
            pull = (shift + (q if kick.of_p else p)).exp()
            lost = lost | ~(pull <= MOST)
            pull = -pull if kick.falls else pull
            p, q = (p + pull, q) if kick.of_p else (p, q + pull)
        states.append(torch.stack([p, q]))
    return torch.where(lost, FAR, torch.stack(states))


class _Walk(torch.autograd.Function):
    """`plain_walk` in place: three operations a kick, and two on the way back."""

    @staticmethod
    def forward(ctx: Any, shifts: Tensor, start: Tensor) -> Tensor:  # noqa: ANN401
        ops, pulls = operations(start), torch.empty_like(shifts)
        states = start.new_empty(len(shifts) // len(KICKS) + 1, *start.shape)
        states[0] = start
        state, kept = raw(start.clone()), raw(states)
        p, q = state
        with np.errstate(all="ignore"):
            for index, (shift, pull) in enumerate(zip(raw(shifts), raw(pulls), strict=True)):
                kick = KICKS[index % len(KICKS)]
                moved, other = (p, q) if kick.of_p else (q, p)
                ops.exp(ops.add(other, shift, out=pull), out=pull)
                (ops.subtract if kick.falls else ops.add)(moved, pull, out=moved)
                if (index + 1) % len(KICKS) == 0:
                    kept[(index + 1) // len(KICKS)] = state
        lost = ~(pulls <= MOST).all(0)  # a nan is above everything
        ctx.save_for_backward(shifts, start, pulls.masked_fill_(lost, 0.0), lost)
        return states.masked_fill_(lost, FAR)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        shifts, start, pulls, lost = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(plain_walk, (shifts, start), gradient)
        ops, of_shifts, of_start = operations(start), torch.empty_like(shifts), gradient[-1].masked_fill(lost, 0.0)
        of_states, state = raw(gradient.masked_fill(lost, 0.0)), raw(of_start)
        of_p, of_q = state
        passed = list(zip(raw(pulls), raw(of_shifts), strict=True))
        for index in reversed(range(len(passed))):
            (pull, of_shift), kick = passed[index], KICKS[index % len(KICKS)]
            moved, other = (of_p, of_q) if kick.of_p else (of_q, of_p)
            ops.multiply(pull, moved, out=of_shift)
            if kick.falls:
                ops.negative(of_shift, out=of_shift)
            ops.add(other, of_shift, out=other)
            if index % len(KICKS) == 0:
                state += of_states[index // len(KICKS)]
        return of_shifts, of_start
