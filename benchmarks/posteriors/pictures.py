"""Pair plots of q over the reference draws, and KL against the gradients it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch.distributions import constraints

from benchmarks.canvas import colour, panels, title
from benchmarks.posteriors.collection import Posterior, posterior
from benchmarks.posteriors.fitting import DEFAULT, GUIDES, Fit
from benchmarks.table import grouped

Pair = tuple[str, str]
SHOWN = 600  # draws of each in a panel
LOWEST, HIGHEST = 1e-3, 1e3  # nats: the lowest end of an axis, and its highest
GREYS = ("0.25", "0.5", "0.7")  # of the guides

PAIRS: Mapping[str, tuple[Pair, ...]] = {
    "eight_schools_centered": (("theta[1]", "tau"), ("mu", "tau")),
    "eight_schools_noncentered": (("theta_trans[1]", "tau"), ("mu", "tau")),
    "gp_pois_regr": (("alpha", "f_tilde[1]"), ("rho", "alpha")),
    "low_dim_gauss_mix_collapse": (("mu[1]", "mu[2]"), ("sigma[1]", "theta")),
    "one_comp_mm_elim_abs": (("K_m", "V_m"), ("k_a", "V_m")),
    "accel_gp": (("sdgp_1", "zgp_1[1]"), ("lscale_sigma_1", "sdgp_sigma_1")),
    "radon_hierarchical_intercept_centered": (("alpha[1]", "sigma_alpha"), ("alpha[1]", "beta[1]")),
    "electric_1c_chr": (("sigma_a[1]", "eta_a[1]"), ("mu_a[1]", "c[1]")),
    "radon_vary_si_chr": (("sigma_a2", "eta2[1]"), ("sigma_a1", "eta1[1]")),
    "hepatitis": (("sigmasq_beta", "beta[1]"), ("sigmasq_alpha", "alpha[1]")),
}
"""What is worth a look, where the first two and the last two coordinates are not."""


def pairs(name: str, draws: Mapping[str, np.ndarray]) -> Figure:
    """Draws of every contender, ``(draws, dim)`` in the free coordinates, over the reference draws: a column each."""
    one = posterior(name)
    reference = one.free(one.reference).numpy()[:: max(1, len(one.reference) // SHOWN)]
    chosen = _chosen(one)
    figure, found = panels(len(draws), 2.1, 2.1 * len(chosen) + 0.3, len(chosen), across=9, margin=0.4)
    for column, (what, own) in zip(found.T, draws.items(), strict=True):
        column[0].set_title(title(what), fontsize="small")
        for panel, (across, up) in zip(column, chosen, strict=True):
            _pair(panel, reference[:, [across, up]], own[:SHOWN, [across, up]], colour_of(what))
            panel.set(xlabel=_label(one, across))
    for panel, (_, up) in zip(found[:, 0], chosen, strict=True):
        panel.set(ylabel=_label(one, up))
    figure.suptitle(f"{name}: draws of q over the reference draws (grey)", fontsize="medium")
    return figure


def _chosen(one: Posterior) -> list[tuple[int, int]]:
    names = one.columns
    given = PAIRS.get(one.short, ((names[0], names[1]), (names[-2], names[-1])))
    return list(dict.fromkeys((names.index(across), names.index(up)) for across, up in given))


def _pair(panel: Axes, reference: np.ndarray, own: np.ndarray, shade: str) -> None:
    panel.plot(*reference.T, ".", color="0.7", markersize=3, markeredgewidth=0)
    panel.plot(*own.T, ".", color=shade, markersize=2.5, markeredgewidth=0, alpha=0.8)
    low, high = reference.min(0), reference.max(0)
    margin = 0.15 * (high - low)  # a q that is far off shall not shrink what it is compared with
    panel.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    panel.tick_params(labelsize="x-small")


def _label(one: Posterior, index: int) -> str:
    """The name of a free coordinate."""
    column = one.columns[index]
    entry = one.spec[column.partition("[")[0]]
    support = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
    if support == constraints.positive:
        return f"log {column}"
    if isinstance(support, constraints.interval):
        return f"logit {column}"
    return column


def colour_of(what: str) -> str:
    """A contender's colour."""
    if what == DEFAULT:
        return "black"
    return GREYS[GUIDES.index(what)] if what in GUIDES else colour(what)


def traces(fits: Sequence[Fit]) -> Figure:
    """KL against gradient evaluations, a panel for each posterior, a line for each contender and seed."""
    groups = grouped(fits, lambda fit: fit.posterior)
    figure, (line,) = panels(len(groups), 2.4, 2.4, across=6)
    labelled: set[str] = set()
    counts = [count for fit in fits for count, _ in fit.history]
    for panel, (name, own) in zip(line, groups.items(), strict=True):
        for fit in own:
            _trace(panel, fit, None if fit.contender in labelled else title(fit.contender))
            labelled.add(fit.contender)
        panel.set(xscale="log", yscale="log", xlim=(min(counts), 1.3 * max(counts)), ylim=(LOWEST, _top(own)))
        panel.xaxis.set_minor_formatter(NullFormatter())  # their labels would lie on one another
        panel.set_title(f"{name}, {posterior(name).dim}", fontsize="x-small")
        panel.tick_params(labelsize="x-small")
        panel.grid(alpha=0.3)
    for panel in line[::6]:
        panel.set_ylabel("KL (nats)", fontsize="small")
    figure.legend(loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    figure.suptitle("KL(q || p) against evaluations of the gradient", fontsize="medium")
    return figure


def _trace(panel: Axes, fit: Fit, label: str | None) -> None:
    """A fit's way, and a dot for what its table says, which has many more draws than a point of the way."""
    shade, dashed = colour_of(fit.contender), "--" if fit.contender in GUIDES else "-"
    points = [(count, max(kl, LOWEST)) for count, kl in fit.history if math.isfinite(kl)]
    if len(points) > 2:  # a Gaussian has two, whose noise would make a slope
        panel.plot(*zip(*points, strict=True), dashed, color=shade, linewidth=1)
    panel.plot(fit.evaluations, max(fit.kl, LOWEST), dashed, marker="o", markersize=3, color=shade, label=label)


def _top(fits: Sequence[Fit]) -> float:
    """The decade above the largest KL of some fits."""
    largest = max((kl for fit in fits for _, kl in fit.history if math.isfinite(kl)), default=LOWEST)
    return min(max(10.0 ** math.ceil(math.log10(max(largest, LOWEST))), 0.1), HIGHEST)
