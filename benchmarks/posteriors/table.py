"""The tables of a run: what fell short, then every posterior, then every fit."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from benchmarks.posteriors.collection import DATA, Posterior, collection, posterior
from benchmarks.posteriors.fitting import FLOWS, GUIDES, Fit
from benchmarks.table import Table, grouped
from flowpost.importance import LIMIT

FLOOR = 5.0  # standard errors below 0: no KL is smaller, unless log q is not that of the draws
NEAR = 0.05  # nats: full covariance to the best Gaussian, and a flow to the posterior up to SMALL dimensions
SMALL, MIDDLE = 26, 90
WIDE = 0.5  # nats: a flow to the posterior up to MIDDLE dimensions

PUBLISHED = {
    "ADVI, full rank": ("full-rank Gaussian", "ADVI", 1),
    "full-rank Gaussian, STL": ("full-rank Gaussian", "STL", 1),
    "real NVP, STL": ("real NVP", "STL", 1),
    "real NVP, STL, 10 importance samples": ("real NVP", "STL", 10),
}
"""Family, how it was fitted, and samples of the bound."""


@cache
def published(name: str) -> dict[str, float]:
    """Gaps in nats of Agrawal, Sheldon and Domke (2020) for a posterior's full name, by the words of `PUBLISHED`."""
    rows = json.loads((DATA / "published.json").read_text(encoding="utf-8"))["rows"].get(name, [])
    plain = [row for row in rows if row["trained_with"] == 1 and not row["laplace_start"]]
    found = {}
    for words, wanted in PUBLISHED.items():
        own = [row["gap"] for row in plain if _kind(row) == wanted]
        found |= {words: own[0]} if own else {}
    return found


def _kind(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["family"], "ADVI" if row["steps"] == "ADVI" else row["gradient"], row["samples"]


def tolerance(one: Posterior) -> float:
    """Two standard errors of the log evidence."""
    return 2 * one.log_evidence_se


def goal(one: Posterior) -> float:
    """The KL that the best flow should stay below; in the largest, what real NVP left with a search over step sizes."""
    if one.dim <= MIDDLE:
        return NEAR if one.dim <= SMALL else WIDE
    return published(one.name)["real NVP, STL"]


def is_impossible(fit: Fit) -> bool:
    """Whether the KL is so far below 0 that the density cannot be that of the draws."""
    return fit.kl < -FLOOR * fit.standard_error - tolerance(posterior(fit.posterior))


def mean_kl(fits: Sequence[Fit]) -> float:
    """Over seeds; nan where one failed."""
    return math.fsum(fit.kl for fit in fits) / len(fits) if fits else math.nan


def best_flow(fits: Sequence[Fit]) -> tuple[str, list[Fit]] | None:
    """Of one posterior's fits the flow with the smallest mean KL over seeds."""
    flows = {name: own for name, own in _by_contender(fits).items() if name in FLOWS[2:]}
    sound = {name: own for name, own in flows.items() if math.isfinite(mean_kl(own))}
    name = min(sound, key=lambda each: mean_kl(sound[each]), default=None)
    return None if name is None else (name, sound[name])


def _by_contender(fits: Sequence[Fit]) -> dict[str, list[Fit]]:
    return grouped(fits, lambda fit: fit.contender)


def in_order(fits: Iterable[Fit]) -> list[Fit]:
    """Posteriors from the smallest to the largest, and of each our flows, then the guides."""
    places = {one.short: place for place, one in enumerate(collection().values())}
    names = [*FLOWS, *GUIDES]
    return sorted(fits, key=lambda one: (places[one.posterior], names.index(one.contender), one.seed))


def shortfalls(fits: Sequence[Fit]) -> list[str]:
    """A line for each fit that failed or cannot be right, then for each goal that was missed; the gravest first."""
    lines = []
    for fit in fits:
        what = f"{fit.posterior}, {fit.contender}, seed {fit.seed}"
        if fit.failed:
            why = textwrap.shorten(fit.error or "the ELBO of its draws is not finite", 120)  # some show whole tensors
            lines.append(f"{what}: failed: {why}")
        elif is_impossible(fit):
            lines.append(
                f"{what}: KL {fit.kl:.4f} is negative by more than {FLOOR:.0f} standard errors: log q is wrong"
            )
    groups = grouped(fits, lambda fit: fit.posterior)
    missed = [each for name, own in groups.items() for each in _missed(posterior(name), own)]
    return lines + [line for _, line in sorted(missed, key=lambda each: -each[0])]


def _missed(one: Posterior, fits: Sequence[Fit]) -> list[tuple[float, str]]:
    """By how many nats, and in words; what is not in nats comes last."""
    lines = []
    gaussian = mean_kl(_by_contender(fits).get("full_covariance", []))
    if gaussian > one.full_rank.gap + NEAR + tolerance(one):
        words = f"{one.short}: full_covariance leaves {gaussian:.3f}, the best Gaussian known {one.full_rank.gap:.3f}"
        lines.append((gaussian - one.full_rank.gap, words))
    best = best_flow(fits)
    if best is not None:
        name, own = best
        kl, k_hat = mean_kl(own), max(fit.k_hat for fit in own)
        if kl > goal(one) + tolerance(one):
            words = f"{one.short}: the best flow, {name}, leaves {kl:.3f}; the goal is {goal(one):.3f}"
            lines.append((kl - goal(one), words))
        if k_hat > LIMIT:
            lines.append((0.0, f"{one.short}: the best flow, {name}, has k-hat {k_hat:.2f}, above {LIMIT}"))
    return lines


def summary(fits: Sequence[Fit]) -> Table:
    """A row for each posterior: those that fell short first, then the smallest first."""
    groups = grouped(fits, lambda fit: fit.posterior)
    asked = [name for name in (*FLOWS, *GUIDES) if any(fit.contender == name for fit in fits)]
    order = {one.short: place for place, one in enumerate(collection().values())}
    rows = []
    for name in sorted(groups, key=lambda each: (not shortfalls(groups[each]), order[each])):
        one, own = posterior(name), _by_contender(groups[name])
        known = [f"{one.mean_field.gap:.3f}", f"{one.full_rank.gap:.3f}"]
        rows.append([name, str(one.dim), *known, *(_cell(own.get(each, [])) for each in asked)])
    header = ["posterior", "D", "best mean field known", "best full rank known", *asked]
    return Table(header, rows, title="KL(q || p) in nats", caption=_CAPTION, notes=[_evidence()])


_CAPTION = (
    "Log evidence minus ELBO by fresh samples, mean over seeds (smallest to largest); rows that fell short first. "
    "'best known' are Gaussians that were started at the moments of the reference draws"
)


def _evidence() -> str:
    rough = [one for one in collection().values() if one.log_evidence_se]
    errors = ", ".join(f"{one.short} {one.log_evidence_se:.4f}" for one in rough)
    return f"Where the log evidence is a Monte Carlo estimate, 2 of its standard errors are allowed for: {errors}"


def _cell(fits: Sequence[Fit]) -> str:
    if not fits:
        return ""
    if any(fit.failed for fit in fits):
        return f"{sum(fit.failed for fit in fits)} of {len(fits)} failed"
    values = [fit.kl for fit in fits]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean_kl(fits):.3f}{spread}"


def details(fits: Sequence[Fit]) -> Table:
    """A row for each posterior and contender, means over seeds; of k-hat, W1 and errors the worst seed."""
    rows = []
    for (name, what), own in grouped(fits, lambda fit: (fit.posterior, fit.contender)).items():
        sound = [fit for fit in own if not fit.failed]
        rows.append([name, what, _cell(own), *(_details(sound) if sound else [""] * 8)])
    header = ["posterior", "q", "KL", "se", "k-hat", "W1 mean", "W1 max", "mean", "sd", "gradients", "s"]
    return Table(header, rows, title="every fit", caption=_DETAILS)


_DETAILS = (
    "The worst k-hat, W1 and errors of all seeds; k-hat -inf: q is so near to p that no draw weighs much; se: standard "
    "error of the ELBO; W1: 1-Wasserstein distance of the marginals to the reference draws, mean and largest, in "
    "posterior standard deviations (1,000 exact draws are themselves 0.03 away); mean: the largest error of a mean, in "
    "posterior standard deviations; sd: the ratio of standard deviations that is farthest from 1; gradients: "
    "evaluations of the log joint's gradient"
)


def _details(fits: Sequence[Fit]) -> list[str]:
    far = max(fits, key=lambda fit: fit.w1_max)
    mean = max((fit.mean_error for fit in fits), key=abs)
    ratio = max((fit.sd_ratio for fit in fits), key=lambda each: abs(math.log(each)))
    return [
        f"{statistics.fmean(fit.standard_error for fit in fits):.4f}",
        f"{max(fit.k_hat for fit in fits):.2f}",
        f"{max(fit.w1_mean for fit in fits):.3f}",
        f"{far.w1_max:.3f} ({far.w1_where})",
        f"{mean:+.3f}",
        f"{ratio:.3f}",
        f"{statistics.fmean(fit.evaluations for fit in fits):,.0f}",
        f"{statistics.fmean(fit.seconds for fit in fits):.0f}",
    ]


def beside_published(fits: Sequence[Fit]) -> Table | None:
    """Ours beside Agrawal, Sheldon and Domke (2020); nothing where no posterior is in both."""
    rows = []
    for name, own in grouped(fits, lambda fit: fit.posterior).items():
        theirs = published(posterior(name).name)
        if theirs:
            best, gaussian = best_flow(own), _by_contender(own).get("full_covariance", [])
            ours = f"{mean_kl(best[1]):.3f} ({best[0]})" if best else ""
            rows.append([name, *(f"{theirs[words]:.3f}" for words in PUBLISHED), _cell(gaussian), ours])
    if not rows:
        return None
    header = ["posterior", *PUBLISHED, "full_covariance here", "best flow here"]
    return Table(header, rows, title="beside published figures", caption=_PUBLISHED)


_PUBLISHED = (
    "Gaps in nats of Agrawal, Sheldon and Domke (2020), Advances in Black-Box VI: 30,000 iterations of 100 gradients, "
    "a search over step sizes, means over seeds; the same models, data and coordinates. Here: the defaults"
)
