"""In plain words: whether a fitted posterior is to be trusted, and if not, why and what helps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowpost.importance import LIMIT, ImportanceEstimate
from flowpost.variational.far import GAP, WIDER, Far
from flowpost.variational.summary import OFF

FAINT = 0.01
"""Nats of KL(q || p) and of mass that may lie beyond the draws: below it a heavy tail does no harm, for by Pinsker's
inequality no probability is off by more than 0.07."""
UNREACHED = "Mass that no draw has reached shows in none of these."


def reasons(
    estimate: ImportanceEstimate,
    elbo: float,
    *,
    lost: str,
    apart: str = "",
    missed: Sequence[str],
    far: Far,
    notes: Sequence[str],
    unseen: float = math.inf,
) -> list[str]:
    """What speaks against a fit, a sentence each; none where nothing does.

    Args:
        estimate: of the log evidence, from draws of q.
        elbo: from the same draws.
        lost: how many of them have no finite log p/q, and where; empty where all have.
        apart: which of them weigh more than the tail of the others has it, and where; empty where none does.
        missed: what is wrong with q's own draws if the weights p/q are right.
        far: what draws far out say.
        notes: what the fit itself had to say.
        unseen: the share of mass that lies beyond the draws, going by the tail of their weights.
    """
    said = []
    k_hat, gap = estimate.k_hat.item(), estimate.log_p.item() - elbo
    light = _is_light(estimate, elbo, unseen) and not (lost or apart or missed or far.sd > OFF)
    if not (k_hat <= LIMIT or light or lost and math.isnan(k_hat)):  # nan where no draw has a weight: no tail to blame
        said.append(
            f"Pareto k-hat is {k_hat:.2f}, above {LIMIT}: q's tails are too light somewhere, and means over its draws, "
            f"importance-sampled ones too, may be wrong there; a richer flow, more steps or budget, or refine() helps, "
            f"but nothing does where a prior is improper and the posterior has no finite integral"
        )
    if apart:
        said.append(
            f"{apart}: more than chance allows, so that q all but misses mass there, of roughly that share; a larger "
            f"budget or other modes= may reach it, and refine() starts at such draws too"
        )
    if gap > GAP and not lost:
        said.append(
            f"the importance-sampled log evidence is {gap:.2f} nats above the ELBO, so KL(q || p) is at least about "
            f"that; a richer flow or a larger budget helps"
        )
    if missed and k_hat <= LIMIT and not lost:
        said.append(
            f"q's own draws have {' and '.join(missed)}; summary() and importance_resample() weight them by p/q, which "
            f"makes up for it, and a richer flow or refine() makes the draws themselves better"
        )
    if lost:
        said.append(f"log p/q is not finite at {lost}")
    if far.rise <= GAP and far.sd > OFF:
        said.append(
            f"draws {WIDER:g} times as far out find a tail that q all but misses, without which its sd there is off by "
            f"-{far.sd:.0%} or more, as near {far.where}; probabilities may be right, and a richer flow helps, or a "
            f"parameter in other terms, whose tails are lighter"
        )
    if far.rise > GAP:
        said.append(
            f"draws {WIDER:g} times as far out raise the log evidence by {far.rise:.2f} nats and more, as near "
            f"{far.where}: q misses mass there, or there is no posterior, for its integral is infinite; a proper "
            f"prior of every parameter helps"
        )
    return [*said, *notes]


def _is_light(estimate: ImportanceEstimate, elbo: float, unseen: float) -> bool:
    """Whether a tail of the weights has so little of the mass that it shows in no mean and no sd."""
    return abs(estimate.log_p.item() - elbo) + unseen < FAINT


def verdict(said: Sequence[str], estimate: ImportanceEstimate, elbo: float, unseen: float = math.inf) -> str:
    """One text of all of it."""
    figures = (
        f"ELBO {elbo:.3f}, log evidence {estimate.log_p.item():.3f} (standard error "
        f"{estimate.standard_error.item():.3f}), k-hat {estimate.k_hat.item():.2f}"
    )
    if not said and estimate.k_hat > LIMIT:
        gap = max(0.0, estimate.log_p.item() - elbo)
        return (
            f"Good for means, sds and probabilities, but not for far tails, where q is too light: KL(q || p) is about "
            f"{gap:.4f} nats, and by it and what may lie beyond the draws no probability is off by more than "
            f"{math.sqrt((gap + unseen) / 2):.2f}; {figures}, above {LIMIT}. {UNREACHED}"
        )
    if not said:
        return f"Nothing speaks against this fit: {figures}. {UNREACHED}"
    return "Not to be trusted as it is: " + "; ".join(said) + f". {figures}."
