"""Chains for a part of the examples: their step sizes, their ways there and back, and the bounds these give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.annealed import PILOT_CHAINS, Walk, anneal, pilot, pilot_temperatures, schedule
from flowpost.annealing import Gradient
from flowpost.importance import summarize
from flowpost.numerics.arguments import check_int

Watch = Callable[[int, int], object]
"""Called with how many temperatures are done, and how many there are in all."""


class AnnealedEstimate(NamedTuple):
    """A bound of log p(x) and what says how tight it is, each ``(B,)``."""

    log_p: Tensor
    """The log of the mean weight, the chains of each noise space counting by its share, float64: a lower bound in
    expectation; of chains back, an upper one."""
    standard_error: Tensor
    """Of log_p, in nats, to first order: ``sd(w) / (sqrt(C) mean(w))`` of chains of one noise space, float64; nan for
    one chain."""
    ess: Tensor
    """Effective number of chains ``(sum w)^2 / sum w^2``, from 1 to C, float64."""
    acceptance: Tensor
    """The mean probability with which a step was accepted; nan where there was none, at one temperature."""


PRIOR_SHARE = 1 / 8
"""Of an estimate, what the chains from the prior count: where they are of no use they cost 0.13 nats, and where they
alone find p(z|x)'s mode it is 2.1 nats too low."""


class Part(NamedTuple):
    """Some examples, in the noise space of their q(z|x) or of p(z), and what the chains that walk there count."""

    gradient: Gradient
    """Of log p(x, f(e)) + log|det df/de|."""
    like: Tensor
    """One e for each example, ``(B, dim)``, whose values mean nothing."""
    chains: int
    share: float
    """Of the estimate: so much of it is the mean of these chains' weights."""


class Chains:
    """Annealed chains at given settings: how many there are of what, and how far they have come.

    Args:
        chains: for each example.
        prior_chains: how many more walk in the noise space of p(z); by default half as many, at least two.
        temperatures: of each chain.
        leapfrogs: of each step.
        path: of the betas.
        pairs: how many (chain, example) pairs move at once.
        progress: told of every temperature.
    """

    def __init__(
        self,
        chains: int,
        prior_chains: int | None,
        temperatures: int,
        leapfrogs: int,
        path: str,
        pairs: int,
        progress: Watch | None = None,
    ) -> None:
        self.chains, self.pairs = check_int("chains", chains, minimum=1), check_int("pairs", pairs, minimum=1)
        self.prior_chains = max(2, chains // 2) if prior_chains is None else check_int("prior_chains", prior_chains, 0)
        self.temperatures = check_int("temperatures", temperatures, minimum=1)
        self.leapfrogs = check_int("leapfrogs", leapfrogs, minimum=1)
        self.path, self.betas, self.progress = path, schedule(temperatures, path), progress
        self.examples, self.done, self.total = max(1, pairs // chains), 0, 0

    def expect(self, parts: int, ways: int = 1) -> None:
        """So many parts of the examples, and ways for each, are to come."""
        groups = [len(self._groups(chains)) for chains in (self.chains, self.prior_chains) if chains]
        pilots = len(groups) * pilot_temperatures(self.temperatures)
        self.total = parts * (pilots + ways * sum(groups) * (self.temperatures - 1))

    def step_sizes(self, part: Part) -> Tensor:
        """Found by a pilot run, whose draws are not those of any way."""
        start = torch.randn_like(part.like.expand(PILOT_CHAINS, *part.like.shape))
        return pilot(part.gradient, start, self.temperatures, self.path, self.leapfrogs, tell=self._tell)

    def lower(self, part: Part, step_sizes: Tensor) -> AnnealedEstimate:
        """Of log p(x), from draws of N(0, I)."""
        walks = (
            self._walk(part, torch.randn_like(part.like.expand(count, *part.like.shape)), step_sizes, backwards=False)
            for count in self._groups(part.chains)
        )
        return _estimate(walks, part.chains)

    def back(self, part: Part, step_sizes: Tensor, start: Tensor) -> AnnealedEstimate:
        """Of log 1 / p(x), back from one exact draw for each example, ``(B, dim)``, which all of its chains share."""
        walks = (
            self._walk(part, start.expand(count, *start.shape), step_sizes, backwards=True)
            for count in self._groups(part.chains)
        )
        return _estimate(walks, part.chains)

    def _groups(self, chains: int) -> list[int]:
        """How many of so many chains of an example move at once."""
        return [min(self.pairs, chains - done) for done in range(0, chains, self.pairs)]

    def _walk(self, part: Part, start: Tensor, step_sizes: Tensor, *, backwards: bool) -> Walk:
        return anneal(
            part.gradient, start, self.betas, step_sizes, self.leapfrogs, backwards=backwards, tell=self._tell
        )

    def _tell(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def mixed(found: Sequence[AnnealedEstimate], parts: Sequence[Part]) -> AnnealedEstimate:
    """One estimate of those of independent chains in several noise spaces: the mean of their means, by their shares."""
    sums = torch.stack([each.log_p + math.log(part.share) for each, part in zip(found, parts, strict=True)])
    log_p = sums.logsumexp(0)
    fractions, chains = (sums - log_p).exp(), sum(part.chains for part in parts)
    nothing = fractions == 0  # weights that are all 0 have no error of their own
    errors, counts = (torch.stack(each) for each in zip(*((e.standard_error, e.ess) for e in found), strict=True))
    error = (fractions * errors).masked_fill(nothing, 0).square().sum(0).sqrt()
    ess = 1 / (fractions.square() / counts).masked_fill(nothing, 0).sum(0)
    accepted = torch.stack([each.acceptance * (part.chains / chains) for each, part in zip(found, parts, strict=True)])
    return AnnealedEstimate(log_p, error, ess, accepted.sum(0))


def _estimate(walks: Iterable[Walk], chains: int) -> AnnealedEstimate:
    shares = []

    def log_weights() -> Iterator[Tensor]:
        for walk in walks:
            shares.append(walk.acceptance * len(walk.log_weight))
            yield walk.log_weight

    log_p, standard_error, ess, _ = summarize(log_weights(), chains)
    return AnnealedEstimate(log_p, standard_error, ess, torch.stack(shares).sum(0) / chains)
