"""Guides of pyro's in the same free coordinates, on the same log joint, with the same number of gradients."""

# ruff: noqa: ANN401 - the library is imported by name where it is installed, so it has no types here.

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import module
from benchmarks.posteriors.collection import Posterior
from flowpost.importance import summarize

PARTICLES = 64  # a step
RATE, DECAY = 1e-2, 0.1  # Adam's at the first step, and what is left of it at the last: those of pyro's tutorial
RECORDS = 50  # of the history
LAYERS = 2  # transforms of the flow
WEIGHTS = 10_000  # behind k-hat
SITE = "free"


class Moment(NamedTuple):
    """Of a fit's history."""

    evaluations: int
    elbo: float


@dataclass
class Guide:
    """A fitted guide, as `benchmarks.posteriors.fitting` asks for it."""

    posterior: Posterior
    q: Any
    """Its distribution of the free coordinates."""
    evaluations: int
    history: list[Moment] = field(default_factory=list)
    verdict: str = ""

    def sample(self, n: int) -> Any:
        """Draws of every parameter."""
        return self.posterior.parameters.constrain(self.q.sample((n,)))[0]

    def elbo(self, samples: int) -> tuple[float, float]:
        """By fresh samples, with its standard error."""
        weights = self._log_weights(samples)
        return weights.mean().item(), weights.std().item() / math.sqrt(samples)

    @property
    def k_hat(self) -> float:
        """Of fresh samples."""
        return summarize([self._log_weights(WEIGHTS).unsqueeze(-1)], WEIGHTS).k_hat.item()

    @torch.no_grad()
    def _log_weights(self, samples: int) -> Tensor:
        free = self.q.sample((samples,))
        return self.posterior.log_density(free) - self.q.log_prob(free)


def fit_guide(name: str, one: Posterior, budget: int, seed: int) -> Guide:
    """Fit by `pyro.infer.SVI`, as its documentation does, in float64, from standard deviations of 0.1 around 0.

    Args:
        name: of the guide's class in `pyro.infer.autoguide`.
        one: the posterior.
        budget: of gradient evaluations.
        seed: of everything random.
    """
    pyro, infer, autoguide = module("pyro"), module("pyro.infer"), module("pyro.infer.autoguide")
    initialization, optim = module("pyro.infer.autoguide.initialization"), module("pyro.optim")
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        start = {"init_loc_fn": initialization.init_to_value(values={SITE: torch.zeros(one.dim)})}
        options = {"num_transforms": LAYERS} if name == "AutoIAFNormal" else start
        guide = getattr(autoguide, name)(model(one), **options)
        steps = max(1, budget // PARTICLES)
        optimizer = optim.ClippedAdam({"lr": RATE, "lrd": DECAY ** (1 / steps)})
        loss = infer.Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
        history = _train(infer.SVI(model(one), guide, optimizer, loss), steps)
        return Guide(one, _distribution(guide), steps * PARTICLES, history)
    finally:
        torch.set_default_dtype(before)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def model(one: Posterior) -> Any:
    """The posterior as a model of pyro's, of its free coordinates."""
    pyro, distributions = module("pyro"), module("pyro.distributions")

    def joint() -> None:
        # Guides draw a first point from the prior, which an improper one does not give; masked, this one is flat.
        flat = distributions.Normal(0.0, 1.0).expand([one.dim]).to_event(1).mask(torch.tensor(False))  # noqa: FBT003
        free = pyro.sample(SITE, flat)  # (dim,) of one particle, (particles, dim) of many
        pyro.factor("joint", one.log_density(free.reshape(-1, one.dim)).reshape(free.shape[:-1]))

    return joint


def _train(svi: Any, steps: int) -> list[Moment]:
    """The mean ELBO of each of `RECORDS` spans."""
    history, losses, span = [], [], max(1, steps // RECORDS)
    for step in range(1, steps + 1):
        losses.append(-svi.step())
        if step % span == 0:
            history.append(Moment(step * PARTICLES, float(np.mean(losses))))
            losses = []
    return history


def _distribution(guide: Any) -> Any:
    """The guide's own of the free coordinates."""
    if hasattr(guide, "get_posterior"):
        return guide.get_posterior()
    normal = module("pyro.distributions").Normal
    return normal(getattr(guide.locs, SITE).detach(), getattr(guide.scales, SITE).detach()).to_event(1)
