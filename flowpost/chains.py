"""Chains for a part of the examples: their step sizes, their ways there and back, and the bounds these give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.annealed import PILOT_CHAINS, Walk, anneal, pilot, pilot_temperatures, schedule
from flowpost.annealing import Gradient
from flowpost.importance import summarize
from flowpost.numerics.arguments import check_int

Progress = Callable[[int, int], object]
"""Called with how many temperatures are done, and how many there are in all."""


class AnnealedEstimate(NamedTuple):
    """A bound of log p(x) and what says how tight it is, each ``(B,)``."""

    log_p: Tensor
    """``log 1/C sum_c w_c`` of C chains, float64: a lower bound in expectation; of chains back, an upper one."""
    standard_error: Tensor
    """Of log_p, in nats, to first order: ``sd(w) / (sqrt(C) mean(w))``, float64; nan for one chain."""
    ess: Tensor
    """Effective number of chains ``(sum w)^2 / sum w^2``, from 1 to C, float64."""
    acceptance: Tensor
    """The mean probability with which a step was accepted; nan where there was none, at one temperature."""


class Part(NamedTuple):
    """Some examples, in the noise space of their q(z|x) or of p(z), and how many of the chains walk there."""

    gradient: Gradient
    """Of log p(x, f(e)) + log|det df/de|."""
    like: Tensor
    """One e for each example, ``(B, dim)``, whose values mean nothing."""
    chains: int


class Chains:
    """How many there are of what.

    Args:
        chains: for each example.
        from_prior: how many of them walk in the noise space of p(z); by default an eighth.
        temperatures: of each chain.
        leapfrogs: of each step.
        path: of the betas.
        pairs: how many (chain, example) pairs move at once.
        progress: told of every temperature.
    """

    def __init__(
        self,
        chains: int,
        from_prior: int | None,
        temperatures: int,
        leapfrogs: int,
        path: str,
        pairs: int,
        progress: Progress | None = None,
    ) -> None:
        self.chains, self.pairs = check_int("chains", chains, minimum=1), check_int("pairs", pairs, minimum=1)
        self.from_prior = chains // 8 if from_prior is None else check_int("from_prior", from_prior, minimum=0)
        if self.from_prior > chains:
            raise ValueError(f"from_prior: expected at most the {chains} chains, got {from_prior}")
        self.temperatures = check_int("temperatures", temperatures, minimum=1)
        self.leapfrogs = check_int("leapfrogs", leapfrogs, minimum=1)
        self.path, self.betas, self.progress = path, schedule(temperatures, path), progress
        self.examples, self.done, self.total = max(1, pairs // chains), 0, 0

    @property
    def shares(self) -> tuple[int, int]:
        """How many chains walk in the noise space of q(z|x), and in that of p(z)."""
        return self.chains - self.from_prior, self.from_prior

    def expect(self, parts: int, ways: int = 1) -> None:
        """So many parts of the examples, and ways for each, are to come."""
        pilots = pilot_temperatures(self.temperatures)
        walks = sum(
            pilots + ways * len(self._groups(share)) * (self.temperatures - 1) for share in self.shares if share
        )
        self.total = parts * walks

    def step_sizes(self, part: Part) -> Tensor:
        """Found by a pilot run, whose draws are not those of any way."""
        start = torch.randn_like(part.like.expand(PILOT_CHAINS, *part.like.shape))
        return pilot(part.gradient, start, self.temperatures, self.path, self.leapfrogs, tell=self._tell)

    def lower(self, parts: Sequence[tuple[Part, Tensor]]) -> AnnealedEstimate:
        """From draws of N(0, I), in each noise space with its step sizes."""
        return self._estimate(
            self._walk(part, torch.randn_like(part.like.expand(count, *part.like.shape)), sizes, backwards=False)
            for part, sizes in parts
            for count in self._groups(part.chains)
        )

    def upper(self, parts: Sequence[tuple[Part, Tensor, Tensor]]) -> AnnealedEstimate:
        """Back from one exact draw for each example, ``(B, dim)``, which all of its chains in a noise space share."""
        found = self._estimate(
            self._walk(part, start.expand(count, *start.shape), sizes, backwards=True)
            for part, sizes, start in parts
            for count in self._groups(part.chains)
        )
        return found._replace(log_p=-found.log_p)

    def _groups(self, chains: int) -> list[int]:
        """How many of so many chains of an example move at once."""
        return [min(self.pairs, chains - done) for done in range(0, chains, self.pairs)]

    def _walk(self, part: Part, start: Tensor, step_sizes: Tensor, *, backwards: bool) -> Walk:
        return anneal(
            part.gradient, start, self.betas, step_sizes, self.leapfrogs, backwards=backwards, tell=self._tell
        )

    def _estimate(self, walks: Iterator[Walk]) -> AnnealedEstimate:
        shares = []

        def log_weights() -> Iterator[Tensor]:
            for walk in walks:
                shares.append(walk.acceptance * len(walk.log_weight))
                yield walk.log_weight

        log_p, standard_error, ess, _ = summarize(log_weights(), self.chains)
        return AnnealedEstimate(log_p, standard_error, ess, torch.stack(shares).sum(0) / self.chains)

    def _tell(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
