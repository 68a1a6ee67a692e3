"""Where a fit starts: the Gaussians nearest to a density's modes, from several first guesses, chosen by their ELBO."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.variational.gaussian import (
    Gaussian,
    Gradient,
    elbo,
    factorized,
    laplace,
    natural_ascent,
    standard_gaussian,
)

GUESSES, SPREAD = 8, 2.0
"""First guesses: the origin, and points around it, so far away in each coordinate."""
MORE = 4
"""More of them for each mode above `MOST`: of random guesses several climb to the same mode."""
FARTHER, WIDE, LONG = 4, 10.0, 100
"""More guesses, farther out, for modes that none of those climbs to; only in a search of so many steps can they."""
ROUGH, FINE = 32, 256
"""Draws for each Gaussian and step, of the search and of what follows."""
BARRIER = 2.0
"""Nats by which log p must fall on the line between two means if they are to be of two modes."""
NEGLIGIBLE = 7.0
"""Nats: a mode whose ELBO is so far below the best one's has less than a thousandth of the mass, and is left out."""
DOUBTFUL = 30.0
"""Nats: the same of the search, whose factorized Gaussians may leave more of one mode's mass than of another's."""
UNSETTLED = 20.0
"""Nats: the same of Gaussians that have climbed a short way."""
CLIMBING = 1.0
"""Nats by which the ELBO rises from one eighth of a climb's steps to the next, its last, if it has not arrived."""
MOST = 4
"""Modes that q has, the best ones, where nothing else is said."""


class Start(NamedTuple):
    """What the search found."""

    gaussians: list[Gaussian]
    """One for each mode, the best first."""
    elbos: list[float]
    far: bool
    """Whether the best one still climbed when no more steps were allowed: the mass is far from every guess."""


class Steps(NamedTuple):
    """How many steps a budget of gradient evaluations allows."""

    search: int
    full: int

    @staticmethod
    def of(budget: int) -> Steps:
        """A twentieth of it for the search, a tenth for what follows, within bounds that suffice."""
        search = min(150, max(10, budget // (20 * GUESSES * ROUGH)))
        return Steps(search, min(400, max(20, budget // (10 * FINE))))

    def each(self, modes: int) -> int:
        """What follows, for each of several modes: those above `MOST` have the steps of `MOST` between them."""
        return max(20, self.full * MOST // max(MOST, modes))


def find_start(
    gradient: Gradient,
    origin: Tensor,
    budget: int,
    generator: torch.Generator,
    *,
    diagonal: bool,
    most: int = MOST,
    seen: Callable[[Start], object] = lambda start: None,
) -> Start:
    """Fit factorized Gaussians from all guesses, take those of different modes, and give these a full covariance.

    Guesses are the origin, random points around it, and the Laplace approximation, where the density has a highest
    point. None is trusted: a mode of a hierarchical model may be far from all of its mass.

    Args:
        gradient: of log p.
        origin: zeros, ``(dim,)``.
        budget: of gradients of the whole fit, of which this takes about a sixth; up to a half of it where the best
            Gaussian has not yet arrived, as at a posterior that is far from every guess.
        generator: of all draws.
        diagonal: whether the Gaussians stay factorized; a tenth more of the budget finds the ends of narrow ridges.
        most: how many are given a full covariance, the best ones; the others stay as the search left them.
        seen: is called with what there is after each part, for a search that is interrupted.
    """
    steps = Steps.of(budget)
    first = _guesses(origin, most, generator, farther=steps.search >= LONG)
    found, _ = natural_ascent(gradient, first, steps.search, ROUGH, generator, diagonal=True)
    mode = laplace(gradient, origin)
    if mode is not None:
        mode = factorized(mode) if diagonal else mode
        found = Gaussian(torch.cat([found.loc, mode.loc[None]]), torch.cat([found.scale_tril, mode.scale_tril[None]]))
    elbos = elbo(gradient, found, FINE, generator)
    kept = distinct(gradient, found, elbos, DOUBTFUL)
    seen(_start(found, elbos, kept))
    best, others = _taken(found, kept[:most]), _taken(found, kept[most:])
    if len(kept) > 1:  # of one mode, some of them: a short climb brings these together, before each has a long one
        best, _ = natural_ascent(gradient, best, steps.each(len(best.loc)) // 4, FINE, generator, diagonal=diagonal)
        elbos = elbo(gradient, best, FINE, generator)
        kept = distinct(gradient, best, elbos, UNSETTLED)
        seen(_start(best, elbos, kept))
        best = _taken(best, kept)
    full = steps.each(len(best.loc))
    for made in itertools.count(1):
        best, risen = natural_ascent(gradient, best, full, FINE, generator, diagonal=diagonal)
        far = climbs(risen)
        if not far or 2 * (made + 1) * full * FINE * len(best.loc) > budget:
            break
    if diagonal:
        best = _along_ridges(gradient, best, full, generator)
    found = Gaussian(torch.cat([best.loc, others.loc]), torch.cat([best.scale_tril, others.scale_tril]))
    elbos = elbo(gradient, found, 4 * FINE, generator)
    start = _start(found, elbos, distinct(gradient, found, elbos), far=far)
    seen(start)
    return start


def distinct(gradient: Gradient, found: Gaussian, elbos: Tensor, below: float = NEGLIGIBLE) -> list[int]:
    """Which Gaussians are of modes of their own, the best first; those further below the best are left out."""
    best = elbos.max().item()
    kept: list[int] = []
    for index in elbos.argsort(descending=True).tolist():
        enough = elbos[index].item() >= best - below or not kept
        if enough and all(barrier(gradient, found.loc[index], found.loc[k]) for k in kept):
            kept.append(index)
    return kept


def climbs(elbos: Tensor) -> bool:
    """Whether the best of several Gaussians still rises fast, by its ELBO before every step, ``(steps, K)``."""
    size = max(1, len(elbos) // 8)
    before, after = elbos[-2 * size : -size].mean(0), elbos[-size:].mean(0)
    best = after.argmax()
    return bool(after[best] - before[best] > CLIMBING)


def _guesses(origin: Tensor, modes: int, generator: torch.Generator, *, farther: bool) -> Gaussian:
    """Standard Gaussians at the origin and at random points around it, some of them farther out."""
    count = GUESSES + MORE * max(0, modes - MOST)
    away = [SPREAD] * (count - 1) + [WIDE] * (FARTHER if farther else 0)
    random = torch.randn(len(away), len(origin), dtype=origin.dtype, device=origin.device, generator=generator)
    if count > GUESSES:  # with their opposites, which miss fewer directions than as many others would
        random[count // 2 : count - 1] = -random[: (count - 1) // 2]
    random *= origin.new_tensor(away).unsqueeze(-1)
    return standard_gaussian(torch.cat([origin.unsqueeze(0), random]))


def _along_ridges(gradient: Gradient, best: Gaussian, steps: int, generator: torch.Generator) -> Gaussian:
    """Factorized Gaussians, or those that a climb with a full covariance from there leads to, where these are better.

    On a narrow ridge a factorized Gaussian is as narrow as the ridge in every coordinate, and has a long way to go.
    """
    climbed, _ = natural_ascent(gradient, best, steps, FINE, generator)
    turned = factorized(climbed)
    better = elbo(gradient, turned, FINE, generator) > elbo(gradient, best, FINE, generator)
    return Gaussian(
        torch.where(better.unsqueeze(-1), turned.loc, best.loc),
        torch.where(better[:, None, None], turned.scale_tril, best.scale_tril),
    )


def _start(found: Gaussian, elbos: Tensor, kept: list[int], *, far: bool = False) -> Start:
    """Those of `kept`, the best first, that are not negligible."""
    kept = [index for index in kept if not elbos[index] < elbos[kept[0]] - NEGLIGIBLE]
    return Start([found.at(index) for index in kept], [elbos[index].item() for index in kept], far)


def _taken(found: Gaussian, places: list[int]) -> Gaussian:
    return Gaussian(found.loc[places], found.scale_tril[places])


def barrier(gradient: Gradient, one: Tensor, other: Tensor) -> bool:
    """Whether log p falls between two points, on the line that joins them."""
    share = torch.linspace(0, 1, 33, dtype=one.dtype, device=one.device).unsqueeze(-1)
    values = gradient(one + share * (other - one))[0].nan_to_num(nan=-math.inf, neginf=-math.inf)
    return bool(values[1:-1].min() < torch.minimum(values[0], values[-1]) - BARRIER)
