"""One contender fitted to one posterior, and all that the tables say of it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import flowpost
from benchmarks.files import finite
from benchmarks.peers import here
from benchmarks.posteriors.collection import Posterior, posterior
from benchmarks.posteriors.measures import marginals

DEFAULT = "default"  # what `flowpost.fit` takes where nothing is said
FLOWS = ("diagonal", "full_covariance", DEFAULT, "planar", "iaf", "realnvp", "spline_coupling")
GUIDES = ("AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal")
"""Of pyro."""
LARGE = 90  # dimensions above which a fit has three times the budget
PICTURED = 1000  # draws kept for the pictures


@dataclass(frozen=True)
class Plan:
    """What decides a fit's figures besides the posterior, the contender and the seed."""

    budget: int | None = None
    """Gradient evaluations of a fit; None is 1,000,000 up to `LARGE` dimensions, and 3,000,000 above."""
    samples: int = 20_000
    """Fresh ones behind the KL and the marginals."""

    def budget_of(self, one: Posterior) -> int:
        """Of a fit of this posterior."""
        return self.budget or (1_000_000 if one.dim <= LARGE else 3_000_000)


class Moment(Protocol):
    """A record of a fit's history."""

    @property
    def evaluations(self) -> int:
        """Gradient evaluations so far."""
        ...

    @property
    def elbo(self) -> float:
        """The ELBO at that moment."""
        ...


class Fitted(Protocol):
    """What a contender's fit must give; `flowpost.FittedPosterior` does."""

    @property
    def evaluations(self) -> int:
        """Of the gradient, in all."""
        ...

    @property
    def history(self) -> Iterable[Moment]:
        """Of the fit, in turn."""
        ...

    @property
    def verdict(self) -> Any:  # noqa: ANN401
        """What it says of itself, in words; empty where it is to be trusted."""
        ...

    @property
    def k_hat(self) -> Any:  # noqa: ANN401
        """Pareto k of its importance weights."""
        ...

    def sample(self, n: int) -> Any:  # noqa: ANN401
        """Draws of every parameter, constrained, ``(n, *shape)``."""
        ...

    def elbo(self, samples: int) -> tuple[Any, Any]:
        """The ELBO by fresh samples, with its standard error."""
        ...


Contender = Callable[[Posterior, int, int], Fitted]
"""A posterior, a budget of gradient evaluations and a seed to a fit."""


@dataclass(frozen=True)
class Fit:
    """What is reported of one contender, posterior and seed."""

    posterior: str
    contender: str
    seed: int
    budget: int
    kl: float = math.nan
    """KL(q || p) in nats, the log evidence minus the ELBO; nan where there is none."""
    standard_error: float = math.nan
    """Of the ELBO."""
    k_hat: float = math.nan
    w1_mean: float = math.nan
    w1_max: float = math.nan
    w1_where: str = ""
    mean_error: float = math.nan
    sd_ratio: float = math.nan
    evaluations: int = 0
    seconds: float = math.nan
    verdict: str = ""
    error: str = ""
    history: tuple[tuple[int, float], ...] = ()
    """Gradient evaluations and KL, along the fit."""

    @property
    def failed(self) -> bool:
        """Whether it has no KL."""
        return not math.isfinite(self.kl)

    def as_json(self) -> dict[str, object]:
        """The fields, with None in the place of what is not finite, which JSON does not have."""
        plain: dict[str, object] = {name: finite(value) for name, value in asdict(self).items() if name != "history"}
        return plain | {"history": [[count, finite(kl)] for count, kl in self.history]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fit:
        """What `as_json` wrote."""
        known = {each.name for each in fields(cls)} - {"history"}
        given: dict[str, Any] = {
            name: math.nan if value is None else value for name, value in content.items() if name in known
        }
        if content["k_hat"] is None and content["kl"] is not None:
            given["k_hat"] = -math.inf  # of a q so near to p that no weight counts; JSON has no infinity
        history = tuple((count, math.nan if kl is None else kl) for count, kl in content["history"])
        return cls(**given, history=history)


def contenders() -> tuple[str, ...]:
    """Those that can be asked here."""
    return FLOWS + (GUIDES if here("pyro") else ())


def contender(name: str) -> Contender:
    """A flow of flowpost's, or a guide of pyro's."""
    if name in GUIDES:
        from benchmarks.posteriors.guides import fit_guide

        return lambda one, budget, seed: fit_guide(name, one, budget, seed)
    flow = None if name == DEFAULT else name
    return lambda one, budget, seed: flowpost.fit(one.log_joint, one.spec, flow, budget=budget, seed=seed)


def fit(name: str, what: str, seed: int, plan: Plan) -> tuple[Fit, np.ndarray]:
    """Fit a contender and measure it.

    Args:
        name: of the posterior.
        what: the contender.
        seed: of weights and noise.
        plan: of the run.

    Returns:
        The figures, and draws in the free coordinates for the pictures, ``(draws, dim)``; where the fit raised an
        error there are none, and the figures have its words.
    """
    one = posterior(name)
    head = Fit(one.short, what, seed, plan.budget_of(one))
    begun = time.perf_counter()
    try:
        with stopping():
            fitted = contender(what)(one, head.budget, seed)
        return _measured(head, one, fitted, plan, time.perf_counter() - begun)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        taken = time.perf_counter() - begun
        return replace(head, error=words, seconds=taken), np.zeros((0, one.dim), dtype=np.float32)


@contextmanager
def stopping() -> Iterator[None]:
    """Ctrl-C inside ends the run: `flowpost.fit` answers it with a q of less than its budget, which is no result."""
    asked = []

    def handle(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


@torch.no_grad()
def _measured(head: Fit, one: Posterior, fitted: Fitted, plan: Plan, seconds: float) -> tuple[Fit, np.ndarray]:
    elbo, error = map(float, fitted.elbo(plan.samples))
    values = fitted.sample(plan.samples)
    rows = one.parameters.flat({key: value.cpu().double() for key, value in values.items()})
    history = tuple((int(each.evaluations), one.log_evidence - float(each.elbo)) for each in fitted.history)
    found = replace(
        head,
        kl=one.log_evidence - elbo,
        standard_error=error,
        k_hat=float(fitted.k_hat),
        evaluations=int(fitted.evaluations),
        seconds=seconds,
        verdict=str(fitted.verdict or ""),
        history=history,
        **asdict(marginals(rows, one)),
    )
    return found, _free(one, rows[:PICTURED]).float().numpy()


def _free(one: Posterior, rows: Tensor) -> Tensor:
    """The free coordinates of draws that may have rounded to the edge of their support: those are left out."""
    try:
        return one.free(rows)
    except ValueError:
        return rows[:0]
