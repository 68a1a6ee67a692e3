"""Draws of q with what p says of them, and how far a fit has come."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.importance import ImportanceEstimate, summarize
from flowpost.pareto import chance_of_largest, smoothed, unseen
from flowpost.variational.bound import Fitted, draw, noise_for
from flowpost.variational.families import components
from flowpost.variational.target import Target

CHUNK = 1000
"""Draws at once."""
SAME, LITTLE = 0.5, 1e-3
"""Nats by which a weight may exceed the mean of all, and the share of all weight that those of more may have together:
where they have less, no weight counts much, and the tail's shape means nothing."""
APART, FOUND = 1e-4, 0.01
"""The chance below which weights are too large for their tail, and the share of all weight that is worth a word."""
COARSE = 0.5
"""Nats to which a log joint may be rounded without a word."""


class Progress(NamedTuple):
    """What a fit has come to."""

    stage: str
    """"start" or "flow"."""
    evaluations: int
    """Gradients of the log joint so far, one for each draw."""
    budget: int
    elbo: float
    rate: float
    k_hat: float
    """nan where it was not asked for: it costs a thousand draws."""

    def __str__(self) -> str:
        tail = "" if math.isnan(self.k_hat) else f"  k-hat {self.k_hat:.2f}"
        return (
            f"{self.stage}  {self.evaluations:>9,} of {self.budget:,}  ELBO {self.elbo:.3f}  rate {self.rate:.1e}{tail}"
        )


class Weighed(NamedTuple):
    """Draws of q and what p says of them."""

    z: Tensor
    """Free coordinates, ``(S, dim)``."""
    log_ratio: Tensor
    """log p/q, ``(S,)``, float64; minus infinity where it is not finite."""
    share: Tensor
    """What each stands for, ``(S,)``; together 1."""


def device_of(fitted: Fitted) -> torch.device:
    """Where a posterior is."""
    return next(components(fitted)[0].flow.buffers()).device


@torch.no_grad()
def weigh(fitted: Fitted, target: Target, samples: int, generator: torch.Generator) -> Weighed:
    """About so many draws of q with their log p/q, a thousand at a time; no gradient is taken.

    The noise of a whole thousand is centred, so that the means of a Gaussian q have no Monte Carlo error.
    """
    rows = []
    for start in range(0, samples, CHUNK):
        count = min(CHUNK, samples - start)
        noise = noise_for(fitted, count, generator)
        z, log_q, share = draw(fitted, _centred(noise) if count == CHUNK else noise)
        ratio = (target(z) - log_q).double().nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        rows.append((z, ratio, share.double() * len(z)))
    z, ratio, share = (torch.cat(column) for column in zip(*rows, strict=True))
    return Weighed(z, ratio, share / share.sum())


def _centred(noise: Tensor) -> Tensor:
    """Noise ``(..., S, dim)`` less its mean over the S, and times what makes each of them N(0, I) again, exactly.

    Any two are correlated by ``-1 / (S - 1)``, so that what is estimated stays unbiased.
    """
    count = noise.shape[-2]
    return (noise - noise.mean(-2, keepdim=True)) * math.sqrt(count / (count - 1))


def estimate(weighed: Weighed) -> ImportanceEstimate:
    """Of the log evidence; k-hat is minus infinity where draws that weigh much more than others have next to nothing.

    A q so near to p that its weights are almost equal has a tail too, of any shape, and would be blamed for it. Any
    other tail is smoothed, unless some weights stand apart from it.
    """
    log_w = weighed.log_ratio + (weighed.share * len(weighed.share)).log()
    found = summarize([log_w.unsqueeze(-1)], len(log_w))
    above = log_w - found.log_p
    heavy = torch.where(above < SAME, 0.0, above.exp()).mean()
    k_hat = torch.where(heavy < LITTLE, -math.inf, found.k_hat)
    if bool(k_hat.isfinite()):
        found = summarize([_tamed(log_w).unsqueeze(-1)], len(log_w))
    return ImportanceEstimate(*(value.squeeze(0) for value in found._replace(k_hat=k_hat)))


def unseen_of(weighed: Weighed) -> float:
    """The share of mass that lies beyond the draws, going by the tail of their weights."""
    return unseen(weighed.log_ratio + (weighed.share * len(weighed.share)).log())


def smooth(weighed: Weighed, k_hat: float) -> Weighed:
    """The same draws with the weights that `estimate` reckons with, given its k-hat."""
    if not math.isfinite(k_hat):
        return weighed
    of_share = (weighed.share * len(weighed.share)).log()
    raw = weighed.log_ratio + of_share
    new = _tamed(raw)
    return weighed._replace(log_ratio=torch.where(new == raw, weighed.log_ratio, new - of_share))


def resampled(weighed: Weighed, count: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """So many of the draws, ``(count, dim)``, taken with chances in proportion to their weights, and k-hat of these.

    Raises:
        ValueError: if none has a weight.
    """
    if weighed.log_ratio.isinf().all():
        raise ValueError(
            f"log_joint: expected a finite log p/q at some draws of q, got none at any of {len(weighed.z)}, so that "
            f"there is none to take or to refine; the verdict says where and why"
        )
    k_hat = estimate(weighed).k_hat.item()
    chances = (smooth(weighed, k_hat).log_ratio + weighed.share.log()).softmax(0)
    taken = torch.multinomial(chances, count, replacement=True, generator=generator)
    return weighed.z[taken], k_hat


def _tamed(log_w: Tensor) -> Tensor:
    """Smoothed log-weights; as they are where the largest is not one of its tail, for it has found something."""
    return log_w if chance_of_largest(log_w) < APART else smoothed(log_w)


def where_apart(weighed: Weighed, target: Target) -> str:
    """How many draws have weights too large for the tail of the others, their share, and where the largest is.

    Empty where there is none, or where they matter little.
    """
    log_w = weighed.log_ratio + weighed.share.log()
    if not chance_of_largest(log_w) < APART:
        return ""
    apart = log_w > smoothed(log_w).max()
    share = log_w.softmax(0)[apart].sum().item()
    if share < FOUND:
        return ""
    where = target.describe(weighed.z[int(log_w.argmax())])
    return f"{int(apart.sum())} of {len(log_w)} draws have {share:.0%} of all weight, as near {where}"


def mean_and_error(weighed: Weighed) -> tuple[float, float]:
    """The mean of log p/q, and its standard error from draws that are taken as independent."""
    mean = (weighed.share * weighed.log_ratio).sum()  # minus infinity where one of them is
    variance = (weighed.share * (weighed.log_ratio - mean)).square().sum()
    return mean.item(), variance.sqrt().item()


def where_lost(weighed: Weighed, target: Target) -> str:
    """How many of the draws have no log p/q, and where one of them is; empty if there is none."""
    lost = weighed.log_ratio.isinf()
    if not lost.any():
        return ""
    first = weighed.z[int(lost.int().argmax())]
    with torch.no_grad():
        value = target(first.unsqueeze(0)).item()
    cure = "; give the parameters constraints that are its support, and units in which they are about 1"
    hint = cure if value == -math.inf else ""
    if not target.parameters.flat(target.parameters.constrain(first)[0]).isfinite().all():
        hint = "; there may be no posterior, for its integral is infinite; a proper prior of every parameter helps"
    said = f"is {value:.4g} at {target.describe(first)}"
    if raised := target.refusal(first):
        said = f"raises {raised}"
        hint = "; add a small number to the diagonal of a matrix" if "LinAlgError" in raised else ""
    return f"{lost.double().mean():.2%} of q's draws; log_joint {said}{hint}"


def doubts(weighed: Weighed, target: Target) -> list[str]:
    """What is said of a log joint that has changed, is rounded, as one of 3e7 is in float32, or has no gradient."""
    changed = target.changed()
    said = [f"the log joint was {changed}: it is not one"] if changed else []
    z = weighed.z[:CHUNK]
    with torch.inference_mode(mode=False):
        if torn := target.torn(z, *target.gradient(z), FOUND):
            said.append(f"the log joint has {torn}")
    size, dtype = weighed.log_ratio.abs().min().item(), target.coarsest
    step = size * torch.finfo(dtype).eps
    if COARSE < step < math.inf:
        said.append(
            f"the log joint is about {size:.1g} in size, which {dtype} rounds to {step:.1g} nats, and with it every "
            f"weight; its data in float64 help, or a constant left out"
        )
    return said
