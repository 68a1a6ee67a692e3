"""The pictures of a job, one file each, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import inference
from benchmarks.canvas import ACROSS, bar_chart, blank, colour, name_bars, panels, title
from benchmarks.data import Data
from benchmarks.galleries import is_flat, latent_grid, over_epochs
from benchmarks.models import codes, mean_images, posterior_grid
from benchmarks.objective import bound_name
from benchmarks.report import Report, by_posterior
from benchmarks.train import EVALUATION_SEED, seeded
from benchmarks.views import aspect, show
from flowpost.vae import VAE

DPI = 130
COLUMNS = 10  # images a row
TRUE_POSTERIORS = 3  # test images whose true posterior is drawn

Models = Mapping[str, VAE]


def draw(report: Report, data: Data, models: Models) -> None:
    """Draw every picture into the report's folder; `models` has one trained VAE for each posterior."""
    figures = {"curves": curves(report), "nll": bounds(report)}
    if report.config.gaps:
        figures["gaps"] = inference.gaps(report)
    device = torch.device(report.config.device)
    with torch.no_grad(), seeded(EVALUATION_SEED, device):
        figures |= {
            "reconstructions": reconstructions(models, data, device),
            "samples": samples(models, data, device),
            "interpolation": interpolation(models, data, device),
            "latent": latent(models, data, device),
            "calibration": inference.calibration(models, data, device),
        }
        if report.config.dim == 2:
            figures["true_posterior"] = true_posteriors(models, data, device)
            figures |= {"grid": latent_grid(models, data, device)} if is_flat(data) else {}
    epochs = over_epochs(report, data)
    figures |= {} if epochs is None else {"epochs": epochs}
    for name, figure in figures.items():
        figure.savefig(report.run.folder / f"{name}.png", dpi=DPI)


def curves(report: Report) -> Figure:
    """The negative bound against epochs, a panel for each posterior, a line for each seed."""
    groups = by_posterior(report.finished)
    figure, (line,) = panels(len(groups), 3.2, 3.4, sharey=True)
    for panel, (name, runs) in zip(line, groups.items(), strict=True):
        for i, run in enumerate(runs):
            _curve(panel, run, colour(name), labelled=i == 0)
        panel.set(title=title(name), xlabel="epoch")
        panel.grid(alpha=0.3)
    values = [value for run in report.finished for value in run["train"] + run["valid"] if value is not None]
    low, high = min(values), np.quantile(values, 0.95)
    bound = bound_name(report.config)
    for panel in line[::ACROSS]:
        panel.set(
            ylabel=f"{bound} (nats per {report.config.unit})",
            ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)),
        )
    line[0].legend(loc="upper right", fontsize="small")
    figure.suptitle(f"Training on {report.config.name}: {bound} at KL weight 1, a line for each seed")
    return figure


def _curve(panel: Axes, run: dict, colour: str, *, labelled: bool) -> None:
    epochs = np.arange(1, len(run["valid"]) + 1)
    train, valid = ([math.nan if value is None else value for value in run[key]] for key in ("train", "valid"))
    labels = ("train", "validation", "weights kept") if labelled else (None,) * 3
    panel.plot(epochs, train, color="0.55", linestyle=":", linewidth=1.2, label=labels[0])
    panel.plot(epochs, valid, color=colour, linewidth=1.2, label=labels[1])
    best = run["best_epoch"]
    panel.plot(best, valid[best - 1], "o", color="black", markersize=4, label=labels[2], zorder=3)


def bounds(report: Report) -> Figure:
    """A bar from NLL to -ELBO for each posterior: its length is the gap; dots are seeds, whiskers their sd."""
    groups = by_posterior(report.finished)
    figure = bar_chart(len(groups))
    panel = figure.subplots()
    for i, (name, runs) in enumerate(groups.items()):
        ends = np.array([[run["nll"], run["neg_elbo"]] for run in runs])
        low, high = ends.mean(0)
        panel.bar(i, high - low, bottom=low, width=0.6, color=colour(name), alpha=0.35)
        panel.text(i, (low + high) / 2, f"gap {high - low:.2f}", ha="center", va="center", fontsize="small")
        for column, marker in ((0, "o"), (1, "^")):
            spread = ends[:, column].std(ddof=1) if len(runs) > 1 else 0.0
            panel.errorbar(i, ends[:, column].mean(), yerr=spread, color=colour(name), capsize=12, linewidth=1.5)
            offsets = i + 0.09 * (np.arange(len(runs)) - (len(runs) - 1) / 2)
            panel.plot(offsets, ends[:, column], marker, color=colour(name), markersize=5, markeredgecolor="black")
    panel.plot([], [], "ko", label=f"NLL, {report.config.samples} importance samples")
    panel.plot([], [], "k^", label="-ELBO")
    name_bars(panel, groups)
    config = report.config
    panel.set(ylabel=f"nats per {config.unit} (lower is better; axis not from 0)", title=f"Test part of {config.name}")
    panel.use_sticky_edges = False
    panel.margins(y=0.12)
    panel.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def reconstructions(models: Models, data: Data, device: torch.device) -> Figure:
    """Test images, and below each what every model makes of its code."""
    x = data.test[:COLUMNS].to(device)
    rows = [(f"test {data.unit}", x)]
    rows += [(title(name), mean_images(vae, codes(vae, x)[0], x.shape[1:])) for name, vae in models.items()]
    return _gallery(rows, data, "Reconstructions: E[x|z] at one z drawn from q(z|x)")


def samples(models: Models, data: Data, device: torch.device) -> Figure:
    """What each model generates, for the same draws from the prior."""
    rows = []
    for name, vae in models.items():
        noise = torch.Generator().manual_seed(EVALUATION_SEED)
        draws = torch.randn(2 * COLUMNS, vae.posterior.dim, generator=noise).to(device)
        z = vae.sample_prior(2 * COLUMNS, noise=draws)
        first, second = mean_images(vae, z, data.test.shape[1:]).split(COLUMNS)
        rows += [(title(name), first), ("", second)]
    return _gallery(rows, data, "Samples: E[x|z], z drawn from the prior")


def interpolation(models: Models, data: Data, device: torch.device) -> Figure:
    """From one test image to another, in equal steps of z."""
    x = data.test[:2].to(device)
    share = torch.linspace(0, 1, COLUMNS, device=device).unsqueeze(-1)
    rows = []
    for name, vae in models.items():
        start, end = codes(vae, x, 64).mean(0)
        rows.append((title(name), mean_images(vae, torch.lerp(start, end, share), x.shape[1:])))
    return _gallery(
        rows, data, f"Between two test {data.unit}s: E[x|z] in equal steps from one mean of q(z|x) to the other"
    )


def _gallery(rows: Sequence[tuple[str, Tensor]], data: Data, title: str) -> Figure:
    figure = blank(9, 0.5 + 0.75 * len(rows) * aspect(data))
    for panel, (name, x) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        show(panel, x, data, COLUMNS)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return figure


def latent(models: Models, data: Data, device: torch.device) -> Figure:
    """Above, the test images' codes by PCA; below, each unit's distribution over them against the prior."""
    x = data.test[:2000].to(device)
    figure, pairs = panels(len(models), 3.2, 6.2, rows=2, margin=0.8)
    for (scatter, histogram), (name, vae) in zip(pairs.T, models.items(), strict=True):
        z = codes(vae, x, 16).cpu()
        _pca(scatter, z[0], data.labels)
        _marginals(histogram, z.flatten(0, 1), colour(name), "prior" if vae.prior is None else "N(0, 1)")
        scatter.set_title(title(name))
    for above, below in pairs.T[::ACROSS]:
        above.set_ylabel("second principal axis")
        below.set_ylabel("density")
    pairs[1, 0].legend(fontsize="small", loc="upper right")
    what = ", coloured by class" if data.labels is not None else ""
    figure.suptitle(f"Codes z ~ q(z|x) of {len(x)} test {data.unit}s{what}; below, each unit's histogram")
    return figure


def _pca(panel: Axes, z: Tensor, labels: Tensor | None) -> None:
    centred = z - z.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T if z.shape[1] > 1 else torch.cat([centred, torch.zeros_like(centred)], 1)
    if labels is None:
        panel.scatter(*points.T.numpy(), s=6, color="0.3")
    elif labels.max() > 9:
        panel.scatter(*points.T.numpy(), s=6, c=labels[: len(z)].numpy(), cmap="viridis")
    else:
        # The digit itself is the marker, so that nobody depends on ten colours.
        for label in labels.unique().tolist():
            chosen = points[labels[: len(z)] == label]
            panel.scatter(
                *chosen.T.numpy(), s=28, marker=f"${label}$", color=matplotlib.colormaps["tab10"](label), lw=0.2
            )
    panel.set(xlabel="first principal axis", aspect="equal", adjustable="datalim")


def _marginals(panel: Axes, z: Tensor, colour: str, normal: str) -> None:
    edges = np.linspace(-4.5, 4.5, 37).tolist()
    for i, unit in enumerate(z.T):
        label = "a unit of z" if i == 0 else None
        panel.hist(unit.numpy(), edges, density=True, histtype="step", color=colour, alpha=0.5, label=label)
    grid = np.linspace(-4.5, 4.5, 200)
    panel.plot(grid, np.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi), "k--", linewidth=1.5, label=normal)
    panel.set(xlabel="value of the unit")


def true_posteriors(models: Models, data: Data, device: torch.device) -> Figure:
    """For a few test images and every model: p(z|x) of its decoder on a grid, and its q(z|x) on the same grid."""
    x = data.test[:TRUE_POSTERIORS].to(device)
    across, blocks = min(len(models), ACROSS), math.ceil(len(models) / ACROSS)
    figure = blank(1.2 + 2.5 * across, 1 + 4.6 * len(x) * blocks)
    grid = figure.subplots(2 * len(x) * blocks, across + 1, squeeze=False, width_ratios=[0.5] + [1] * across)
    for panel in grid.flatten():
        panel.axis("off")
    for i, image in enumerate(x):
        rows = grid[2 * blocks * i : 2 * blocks * (i + 1)]
        show(rows[0, 0], image.unsqueeze(0), data, 1)
        rows[0, 0].set_title(f"test {data.unit} {i + 1}", fontsize="small")
        for j, (name, vae) in enumerate(models.items()):
            above, below = rows[2 * (j // across) : 2 * (j // across) + 2, 1 + j % across]
            _true_and_fitted(above, below, title(name), vae, image.unsqueeze(0))
    figure.suptitle("Above, each decoder's true posterior p(z|x); below, the fitted q(z|x). White: contours of p(z|x)")
    return figure


def _true_and_fitted(above: Axes, below: Axes, name: str, vae: VAE, x: Tensor) -> None:
    grid = posterior_grid(vae, x)
    true, fitted = (log_density.exp().T.cpu().numpy() for log_density in (grid.log_true, grid.log_fitted))
    levels = true.max() * np.exp([-4.5, -2.0, -0.5])  # 3, 2 and 1 standard deviations of a Gaussian
    for panel, density in ((above, true), (below, fitted)):
        panel.axis("on")
        panel.imshow(density, extent=grid.box, origin="lower", cmap="magma", aspect="auto")
        panel.contour(true, levels, extent=grid.box, colors="white", linewidths=0.7)
        panel.tick_params(labelsize="x-small")
        panel.set_ylabel("$z_2$", fontsize="small")
    above.set_title(f"{name}: p(z|x)", fontsize="small")
    below.set_title(f"q(z|x), KL(q||p) = {grid.kl:.2f} nats", fontsize="small")
    below.set_xlabel("$z_1$", fontsize="small")
