"""Two pictures of how good inference is: the gap against the family, and simulation-based calibration."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.canvas import ACROSS, bar_chart, colour, name_bars, panels, title
from benchmarks.data import Data
from benchmarks.report import Report, Result, by_posterior
from flowpost.calibration import rank_ecdf, rank_histogram, sbc_ranks
from flowpost.vae import VAE

SIMULATIONS = 1000  # pairs of z and an image drawn from each model
RANKED = 127  # samples of q(z|x) that each z is ranked among
BINS = 16  # of the ranks 0..RANKED
LEVEL = 0.95  # of the bands


def gaps(report: Report) -> Figure:
    """A bar for each posterior: below what the family loses, above what the encoder does; dots are seeds."""
    groups = by_posterior(report.finished)
    figure = bar_chart(len(groups))
    panel = figure.subplots()
    for i, (name, runs) in enumerate(groups.items()):
        _gap_bar(panel, i, runs, colour(name))
    panel.bar(0, 0, color="0.4", label="approximation: log p(x) - ELBO of the best q of the family")
    panel.bar(0, 0, color="0.4", alpha=0.35, label="amortization: what the encoder's q falls short of that")
    name_bars(panel, groups)
    config = report.config
    title = f"Inference gap, {config.gap_images} test {config.unit}s of {config.name}"
    panel.set(ylabel=f"nats per {config.unit}", title=title)
    panel.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", frameon=False)
    return figure


def _gap_bar(panel: Axes, i: int, runs: list[Result], shade: str) -> None:
    parts = np.array([[run["approximation_gap"], run["amortization_gap"]] for run in runs])
    tops = np.concatenate([np.zeros((len(runs), 1)), parts.cumsum(1)], axis=1)
    offsets = i + 0.09 * (np.arange(len(runs)) - (len(runs) - 1) / 2)
    for (below, above), alpha in zip(pairwise(tops.T), (1.0, 0.35), strict=True):
        low, high = below.mean(), above.mean()
        panel.bar(i, high - low, bottom=low, width=0.6, color=shade, alpha=alpha)
        panel.plot(offsets, above, "o", color=shade, markersize=4, markeredgecolor="black")
        white = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
        panel.text(i, (low + high) / 2, f"{high - low:.2f}", ha="center", va="center", fontsize="small", bbox=white)


def calibration(models: Mapping[str, VAE], data: Data, device: torch.device) -> Figure:
    """Of each model's own images: where z ranks among samples of q(z|x), as a histogram and as an ECDF, by unit."""
    figure, pairs = panels(len(models), 3.2, 6.2, rows=2, sharey=True, margin=0.8)
    for (above, below), (name, vae) in zip(pairs.T, models.items(), strict=True):
        ranks = model_ranks(vae, data, device)
        _histograms(above, ranks, colour(name))
        inside = _ecdfs(below, ranks, colour(name))
        above.set_title(title(name))
        below.set_title(f"{inside} of {ranks.shape[1]} units inside", fontsize="small")
    for above, below in pairs.T[::ACROSS]:
        above.set_ylabel(f"z of {SIMULATIONS} a bin")
        below.set_ylabel("ECDF - uniform")
    pairs[0, 0].legend(fontsize="small", loc="upper center")
    figure.suptitle(
        f"Rank of z among {RANKED} samples of q(z|x), for {data.unit}s drawn from each model; grey: if q is right"
    )
    return figure


def model_ranks(vae: VAE, data: Data, device: torch.device) -> Tensor:
    """The ranks ``(SIMULATIONS, dim)`` of z ~ p(z) among samples of q(z|x), x drawn from the model given z."""
    shape = data.test.shape[1:]

    def simulate(count: int) -> tuple[Tensor, Tensor]:
        z = vae.sample_prior(count)
        return z, draw_pixels(vae, z, shape)

    def draw(x: Tensor, samples: int) -> Tensor:
        return vae.encode(x).sample((samples,))

    return sbc_ranks(simulate, draw, SIMULATIONS, RANKED).cpu()


def draw_pixels(vae: VAE, z: Tensor, shape: torch.Size) -> Tensor:
    """An image x ~ p(x|z) for each z ``(N, dim)``, ``(N, *shape)``."""
    return vae.likelihood.sample(vae.decode(z, shape.numel())).view(-1, *shape)


def _histograms(panel: Axes, ranks: Tensor, shade: str) -> None:
    edges = np.linspace(0, RANKED + 1, BINS + 1)
    counts = np.random.Generator(np.random.PCG64(0)).binomial(len(ranks), 1 / BINS, 20_000)
    panel.axhspan(*np.quantile(counts, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]), color="0.85", label=f"{LEVEL:.0%} of bins")
    for i, unit in enumerate(rank_histogram(ranks, RANKED, BINS).numpy()):
        panel.stairs(unit, edges, color=shade, alpha=0.6, label="a unit of z" if i == 0 else None)
    panel.set(xlabel="rank")


def _ecdfs(panel: Axes, ranks: Tensor, shade: str) -> int:
    """The number of units whose curve stays in a band that holds all of them together."""
    outside = (1 - LEVEL) / ranks.shape[1]
    curves = rank_ecdf(ranks, RANKED, 1 - outside, rounds=max(2000, int(20 / outside)))
    k = np.arange(RANKED + 1)
    panel.fill_between(k, curves.lower - curves.uniform, curves.upper - curves.uniform, color="0.85")
    for unit in curves.ecdf - curves.uniform:
        panel.plot(k, unit.numpy(), color=shade, alpha=0.6, linewidth=1)
    panel.set(xlabel="rank")
    return int(curves.inside.sum())
