"""One fit under way: its budget, its clock, and whoever watches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.variational.ascent import BLOCK, RATE, Ascent, Reading
from flowpost.variational.bound import Fitted, bound, noise_for
from flowpost.variational.families import components
from flowpost.variational.fitted import FittedPosterior
from flowpost.variational.gaussian import Gaussian, rise
from flowpost.variational.mirrored import with_images
from flowpost.variational.missed import find_missed, grown
from flowpost.variational.mixture import Mixture
from flowpost.variational.starts import MOST, Start, Steps, climbs, find_start
from flowpost.variational.target import Target
from flowpost.variational.weighing import Progress, device_of, estimate, weigh

LOOK, SEEN = 10, 1000
"""Readings between two of k-hat, and draws behind one."""
RESTARTS = 8
"""After so many a fit is given up; q is what it was at its best."""
LEAST = 40_000
"""Of a budget, for a look at what q misses to be a small part of it."""
AGAIN = 0.25
"""Of the rate, where a fit goes on."""
RISING = "the ELBO still rose when the budget was spent; a larger budget, or resume=, helps"
FAR = (
    "the posterior is far from the origin of the free coordinates, where the search for it begins; units or a shift "
    "that make parameters about 1 help"
)
INTERRUPTED = "the fit was interrupted; pass resume= to go on"


@dataclass
class Running:
    """A fit of one target."""

    target: Target
    budget: int
    samples: int
    generator: torch.Generator
    watch: Callable[[Progress], object] | None
    begun: float
    temperature: float = 1.0
    peak: float = RATE
    flow: Bijector | None = None
    """Of a further component, where q may have one."""
    most: int = 1
    """Components."""
    spent: int = 0
    far: bool = False
    stopped: bool = False
    """By Ctrl-C."""
    history: list[Progress] = field(default_factory=list)

    def start(self, most: int, *, diagonal: bool) -> Start:
        """Look for modes, and fit a Gaussian to each; Ctrl-C ends it with those found so far, if there are any."""
        origin = torch.zeros(self.target.parameters.dim, dtype=self.target.dtype, device=self.generator.device)
        found: list[Start] = []
        try:
            find_start(
                self._gradient,
                origin,
                self.budget,
                self.generator,
                diagonal=diagonal,
                most=max(most, MOST),
                seen=found.append,
            )
            self._tell(Progress("start", self.spent, self.budget, found[-1].elbos[0], 0.0, math.nan))
        except KeyboardInterrupt:
            if not found:
                raise
            self.stopped = True
        self.far = found[-1].far
        return found[-1]

    def imaged(self, start: Start, *, diagonal: bool) -> Start:
        """The start with images of its Gaussians that it misses, as many as q may have; Ctrl-C ends it without."""
        if self.flow is None or self.stopped or self.budget < LEAST:
            return start
        generator = torch.Generator(self.generator.device).manual_seed(self.generator.initial_seed())
        try:
            return with_images(start, self.most, self.flow, self.target, generator, diagonal=diagonal)
        except KeyboardInterrupt:
            self.stopped = True
        return start

    def after(self, earlier: FittedPosterior) -> Running:
        """The same as the continuation of an earlier fit: its counts go on, and its draws do not come again.

        At a rate as high as the first one, what the earlier fit had gained would be lost at first.
        """
        self.spent, self.history, self.begun = earlier.evaluations, [*earlier.history], self.begun - earlier.seconds
        self.budget += self.spent
        self.peak = AGAIN * self.peak
        self.generator.manual_seed(self.generator.initial_seed() + self.spent)
        return self

    def rise(self, gaussian: Gaussian, *, diagonal: bool) -> tuple[Gaussian, list[str]]:
        """Spend the rest of the budget on one Gaussian, as far as that raises its ELBO; and what is to be said."""
        steps, best = max(2, (self.budget - self.spent) // self.samples), gaussian
        if self.stopped:
            return best, [INTERRUPTED]
        try:
            best, elbos = rise(self._gradient, gaussian, steps, self.samples, self.generator, diagonal=diagonal)
            self._tell(Progress("start", self.spent, self.budget, elbos[-BLOCK:].mean().item(), 0.0, math.nan))
        except KeyboardInterrupt:
            return best, [INTERRUPTED]
        return best, self._rising() if climbs(elbos.unsqueeze(-1)) else []

    def ascend(self, fitted: Fitted, lost: list[str]) -> FittedPosterior:
        """Train a flow, or a mixture of them, until nothing is to be gained, the budget is spent, or Ctrl-C."""
        if self.stopped:
            return self.finish(fitted, lost, [INTERRUPTED])
        draws = noise_for(fitted, self.samples, self.generator).shape[:-1].numel()  # of a mixture as many for each part
        steps = max(1, (self.budget - self.spent) // draws - 1)
        ascent = Ascent(
            fitted,
            lambda noise, weight: bound(fitted, self.target, noise, weight),
            lambda: noise_for(fitted, self.samples, self.generator),
            steps,
            self.generator.device,
            temperature=self.temperature,
            peak=self.peak,
        )
        said: list[str] = []
        readings = self._follow(fitted, ascent, draws, said)
        try:
            for _ in readings:
                if ascent.fall:  # q is about what it will be, and half of the steps or more are left
                    break
            spent = self.spent
            if not said and (more := self._more(fitted, lost)):
                readings.close()  # and with it, on CUDA, the graph's memory
                self.temperature = 1.0
                return self.ascend(more, lost)
            ascent.shorten(-(-(self.spent - spent) // draws))
            for _ in readings:
                pass
        except KeyboardInterrupt:
            said.append(INTERRUPTED)
        ascent.settle()
        if ascent.unsettled:
            said += self._rising()
        return self.finish(fitted, lost, said)

    def _follow(self, fitted: Fitted, ascent: Ascent, draws: int, said: list[str]) -> Generator[None, None, None]:
        """Make an ascent's steps, a block at a time; they are counted and told, and given up where they diverge."""
        made, self.spent = 0, self.spent + draws
        for count, reading in enumerate(ascent.run(), 1):
            made, self.spent = ascent.made, self.spent + (ascent.made - made) * draws
            self._tell(self._progress(fitted, ascent, reading, look=count % LOOK == 0))
            if ascent.restarts > RESTARTS:
                said.append(f"the fit diverged {ascent.restarts} times and was given up")
                return
            yield

    def _more(self, fitted: Fitted, lost: list[str]) -> Mixture | None:
        """Q with a component at a place that it all but misses, if there is one and q may have more; else it is said.

        Its draws are a generator's own, so that where there is none the fit is as it would have been.
        """
        if self.flow is None or lost or self.budget < LEAST:
            return None
        generator = torch.Generator(self.generator.device).manual_seed(self.generator.initial_seed())
        missed = find_missed(fitted, self.target, self._gradient, Steps.of(self.budget).full, generator)
        if missed is None:
            return None
        held = len(components(fitted))
        if held < self.most:
            return grown(fitted, self.flow, missed, self.target, generator)
        elbos = [missed.before - math.log(held)] * held
        start = Start([missed.gaussian] * (held + 1), [*elbos, missed.elbo], far=False)
        lost.append(left_out(start, held, self.target))
        return None

    def finish(self, fitted: Fitted, lost: Sequence[str], said: Sequence[str]) -> FittedPosterior:
        """What the fit came to: `lost` is what q leaves out, `said` what became of this run."""
        seconds = time.perf_counter() - self.begun
        fitted.requires_grad_(requires_grad=True)
        spent, history = self.spent, self.history
        return FittedPosterior(
            fitted, self.target, evaluations=spent, seconds=seconds, history=history, notes=said, left_out=lost
        )

    def _rising(self) -> list[str]:
        """What is said of a fit whose ELBO has not come to rest: also why, where its start had a long way to go."""
        return [RISING, FAR] if self.far else [RISING]

    def _gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        self.spent += len(points)
        return self.target.gradient(points)

    def _progress(self, fitted: Fitted, ascent: Ascent, reading: Reading, *, look: bool) -> Progress:
        k_hat = math.nan
        if look and self.watch is not None:
            weighed = weigh(fitted, self.target, SEEN, torch.Generator(device_of(fitted)).manual_seed(1))
            k_hat = estimate(weighed).k_hat.item()
        return Progress("flow", self.spent, self.budget, reading.elbo, ascent.rate.item(), k_hat)

    def _tell(self, progress: Progress) -> None:
        self.history.append(progress)
        if self.watch is not None:
            self.watch(progress)


def left_out(start: Start, most: int, target: Target) -> str:
    """What to say of modes that were found and are not in q: their share by ELBO, and where the first of them is."""
    elbos = torch.tensor(start.elbos, dtype=torch.float64, device="cpu")
    share = elbos.softmax(0)[most:].sum().item()
    what = "one more mode was" if len(elbos) == most + 1 else f"{len(elbos) - most} more modes were"
    where = target.describe(start.gaussians[most].loc)
    return (
        f"{what} found that q leaves out, of about {share:.0%} of the mass, near {where}; "
        f"a mixture holds them, of flow='realnvp', 'spline_coupling' or 'maf' and modes={len(elbos)} or more; "
        f"if they differ only in the labels of like components, make a parameter of these `ordered`, which leaves one"
    )
