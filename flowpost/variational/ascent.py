"""The fit itself: the ELBO of a flow, raised by Adam along its path gradient until nothing is to be gained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from flowpost.training import Captured
from flowpost.variational.bound import Bound

RATE = 2e-2
"""Adam's at first, in coordinates where the density is about standard."""
WARM_UP, BLOCK = 50, 25
"""Steps in which the rate rises, and steps that make one reading of the ELBO."""
CLIP = 4.0
"""A gradient's norm over the usual one, at most: one draw far out in a tail moves nothing far."""
FALL = 5.0
"""A reading so many standard deviations of log p/q below the best one means that the fit has diverged."""
EXACT = 1e-4
"""Nats: half the variance of log p/q, which is KL(q || p) where that is small. Below it there is nothing to gain."""
SMALL = 1e-3
"""Nats that are not waited for."""
NEAR = 0.05
"""Nats: a fit that comes so near is not said to need more."""
PATIENCE = 12
"""Readings before and after which the ELBO is compared, at least."""


Step: TypeAlias = Callable[[Tensor], Tensor]
"""From noise to what `Ascent` reads of a step."""


class Reading(NamedTuple):
    """What one block of steps says."""

    elbo: float
    """The median over the steps of the mean of log p/q, in nats: one draw far out in a tail does not move it."""
    variance: float
    """Of log p/q, the median of the steps too."""
    lost: float
    """Share of the draws that were left out, as their value or gradient was not finite."""


class Ascent:
    """Adam on the path gradient of the ELBO.

    The rate rises, stays while the ELBO rises or until half of the steps are made, and falls to 0 as a half cosine over
    as many steps again. A fit that diverges goes on from the best weights that were seen, at half the rate.

    Args:
        module: whose parameters are fitted.
        objective: of noise and the weight of log p, as `bound` is; it reads no value on the host.
        noise: what the objective takes, anew for every step.
        steps: how many there can be.
        device: where all of it is; on CUDA a step is one graph.
        temperature: of the density at first, at least 1; it falls to 1 over the first third of the steps.
        peak: the highest rate.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Callable[[Tensor, Tensor], Bound],
        noise: Callable[[], Tensor],
        steps: int,
        device: torch.device,
        *,
        temperature: float = 1.0,
        peak: float = RATE,
    ) -> None:
        self.objective, self.noise, self.steps = objective, noise, steps
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.peak, self.made, self.restarts = peak, 0, 0
        self.fall: range | None = None
        self.hurried = False
        self.readings: list[Reading] = []
        self.best = self._copy()
        self.top: Reading | None = None
        self.device = device
        self.cold = steps // 3 if temperature > 1 else 0
        self.heat = temperature
        self.rate, self.weight = torch.tensor(RATE, device=device), torch.tensor(1.0, device=device)
        self.usual = torch.zeros((), dtype=torch.float64, device=device)  # a running mean of the gradient's norm
        self.adam = self._fresh()

    def run(self) -> Iterator[Reading]:
        """Make the steps, a block at a time; each block's reading is yielded, and nothing is lost between two.

        None is made where log p/q is constant to begin with: on a gradient of noise alone Adam would only move away. At
        a temperature it may be constant in one of several modes, and steps are made.
        """
        if self._is_exact() and not self.cold:
            return
        step = self._launched()
        while self.made < self.steps:
            count = min(BLOCK, self.steps - self.made)
            before, rows = self._copy(), []
            for _ in range(count):
                self.rate.fill_(self._rate())
                self.weight.fill_(self._weight())
                step, row = self._once(step, self.noise())
                rows.append(row)
                self.made += 1
            elbo, variance, lost = torch.stack(rows).double().cpu().nanmedian(0).values.tolist()
            reading = Reading(elbo, variance, lost)
            self._judge(reading, before)
            yield reading
            exact = self.made >= self.cold and reading.variance < 2 * EXACT and not reading.lost
            if exact or self.fall and self.made >= self.fall.stop:
                return

    def shorten(self, steps: int) -> None:
        """Make so many steps fewer: something else has spent them."""
        self.steps = max(self.made, self.steps - steps)
        if self.fall:
            self.fall = range(self.fall.start, min(self.steps, self.fall.stop))

    def settle(self) -> None:
        """Go back to the best weights where the last ones are not about as good."""
        if self.readings and self.top and self._fell(self.readings[-1]):
            self._restore()

    @property
    def unsettled(self) -> bool:
        """Whether the rate had to fall while the ELBO still rose, and log p/q is not nearly constant."""
        return self.hurried and bool(self.readings) and self.readings[-1].variance > 2 * NEAR

    def _is_exact(self) -> bool:
        ratio = self.objective(self.noise(), self.weight).ratio.detach()
        return bool(ratio.isfinite().all()) and ratio.var().item() < 2 * EXACT

    def _launched(self) -> Step:
        """A step, on CUDA as one graph; it is not held here: a cycle would keep the graph's memory of the device."""
        return Captured(self._step, self.device) if self.device.type == "cuda" else self._step

    def _once(self, step: Step, noise: Tensor) -> tuple[Step, Tensor]:
        """One step, and how the next ones are made: a log joint that reads values on the host makes no graph."""
        try:
            return step, step(noise)
        except RuntimeError:
            if step == self._step:
                raise
        # Not within `except`: the error holds the failed step's graph, and that keeps autograd on the stream of it.
        return self._step, self._step(noise)

    def _step(self, noise: Tensor) -> Tensor:
        self.adam.zero_grad()
        loss, ratio, share = self.objective(noise, self.weight)
        loss.backward()
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
        fine = norm.isfinite()
        usual = torch.where(self.usual > 0, self.usual, norm)
        factor = torch.where(fine, (CLIP * usual / norm.clamp_min(1e-300)).clamp_max(1), 0.0)
        self.usual.copy_(torch.where(fine, usual + 0.05 * (norm.minimum(CLIP * usual) - usual), self.usual))
        for gradient in gradients:
            gradient.copy_(torch.where(fine, gradient * factor.to(gradient.dtype), 0.0))
        self.adam.step()
        kept = ratio.isfinite()
        ratio = torch.where(kept, ratio, 0.0)
        mean = (share * ratio).sum()
        variance = (share * torch.where(kept, ratio - mean, 0.0).square()).sum()
        return torch.stack([mean, variance, 1 - kept.double().mean()]).detach()

    def _rate(self) -> float:
        if self.fall is None:
            return self.peak * min(1.0, (self.made + 1) / WARM_UP)
        return self.peak * 0.5 * (1 + math.cos(math.pi * (self.made - self.fall.start) / len(self.fall)))

    def _weight(self) -> float:
        """Of log p: it rises from 1 / temperature to 1, as a geometric series."""
        return self.heat ** min(0.0, self.made / self.cold - 1) if self.cold else 1.0

    def _judge(self, reading: Reading, before: list[Tensor]) -> None:
        """Take a reading, and the weights before its steps: those after them may be on their way down.

        Of a tempered density none is the best: the ELBO, that of p itself, falls there for the sake of other modes.
        """
        self.readings.append(reading)
        if self._fell(reading):
            self._restore()
            self.peak, self.restarts = 0.5 * self.peak, self.restarts + 1
            self.readings.pop()
        elif self.made > self.cold and (self.top is None or reading.elbo > self.top.elbo):
            self.top, self.best = reading, before
        if self.fall is None and self.made >= self.cold and (2 * self.made >= self.steps or self._still()):
            self.hurried = not self._still()
            self.fall = range(self.made, min(self.steps, 2 * self.made))

    def _fell(self, reading: Reading) -> bool:
        bad = not math.isfinite(reading.elbo) or reading.lost > 0.5
        return bad or (self.top is not None and reading.elbo < self.top.elbo - FALL * math.sqrt(self.top.variance))

    def _still(self) -> bool:
        """Whether the ELBO no longer rises by more than its readings scatter."""
        elbos = [reading.elbo for reading in self.readings]
        size = max(PATIENCE, len(elbos) // 4)
        if len(elbos) < 2 * size:
            return False
        before, after = elbos[-2 * size : -size], elbos[-size:]
        return _mean(after) - _mean(before) < max(SMALL, 2 * math.hypot(_error(before), _error(after)))

    def _copy(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.weights]

    def _restore(self) -> None:
        with torch.no_grad():
            for weight, best in zip(self.weights, self.best, strict=True):
                weight.copy_(best)
        for state in self.adam.state.values():
            for value in state.values():
                value.zero_()

    def _fresh(self) -> torch.optim.Adam:
        graphs = self.rate.is_cuda
        return torch.optim.Adam(self.weights, lr=self.rate, fused=graphs or None, capturable=graphs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """The standard error of their mean."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
