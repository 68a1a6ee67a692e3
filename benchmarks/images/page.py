"""Runs of presets beside what was published of them: one table, and under it what each run is of."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import filling
from benchmarks.canvas import title
from benchmarks.config import ConfigError
from benchmarks.files import Content, as_json
from benchmarks.filling import origin
from benchmarks.images.presets import Preset, load
from benchmarks.report import Report, Result, by_posterior
from benchmarks.run import terminal
from benchmarks.table import Table, mean_sd

BESIDE = ("published", "apart")
HEADER = ("preset", "data", "posterior", "seeds", "-ELBO", *BESIDE, "NLL", *BESIDE, "k>0.7", "annealed")


def publish(reports: Sequence[Report], page: Path | None = None) -> None:
    """Print the table, and put it on a page.

    Raises:
        ConfigError: a folder is not a preset's, or the page is not marked.
    """
    terminal().print(table(reports))
    if page is not None:
        figures = {"what": "images", "runs": [report.content() for report in reports]}
        filling.publish(page, as_json(figures) + "\n", shown)


def shown(content: Content, page: str = "") -> str:
    """The page's text."""
    reports = [Report.of(each, Path()) for each in content["runs"]]
    return f"{table(reports).markdown()}\n\n{protocols(reports)}"


def table(reports: Sequence[Report]) -> Table:
    """A row for each posterior of each run."""
    rows = [_row(report, name, runs) for report in reports for name, runs in by_posterior(report.finished).items()]
    caption = (
        "Test part, nats an image (Frey faces: bits a pixel), mean (sd) over seeds; apart: ours less the published; "
        "k>0.7: share of images whose importance-sampled NLL is not to be trusted; annealed: by how much annealing "
        "moves the NLL of the first test images, the first seed alone; *: changed, as said below; ~: remembered, not "
        "read in the paper"
    )
    return Table(HEADER, rows, caption=caption)


def _preset(report: Report) -> Preset:
    if not report.config.preset:
        raise ConfigError(f"folders: expected runs of presets, got {report.run.folder}")
    return load(report.config.preset)


def _row(report: Report, posterior: str, runs: Sequence[Result]) -> list[str]:
    preset, config = _preset(report), report.config
    published = preset.row(config, posterior)
    mark = "*" if preset.changes(config) else ""
    what = [
        f"{config.preset}{mark}",
        config.data,
        f"{title(posterior)} {preset.sizes(config, posterior)}".strip(),
        str(len(runs)),
    ]
    bits = "_bits" if config.data == "freyfaces" else ""
    bounds = [cell for key in ("neg_elbo", "nll") for cell in _beside(runs, f"{key}{bits}", published)]
    return [*what, *bounds, f"{statistics.fmean(run['heavy_tails'] for run in runs):.2f}", _annealed(runs)]


def _annealed(runs: Sequence[Result]) -> str:
    moved = [run["trusted_nll"] - run["trusted_images_nll"] for run in runs if run.get("trusted_nll") is not None]
    return f"{statistics.fmean(moved):+.2f}" if moved else "-"


def _beside(runs: Sequence[Result], key: str, published: Mapping[str, Any]) -> list[str]:
    """Ours with its spread, theirs, and how far apart."""
    values = [run[key] for run in runs]
    ours = mean_sd(values)
    if key not in published:
        return [ours, "-", "-"]
    mark = "~" if key in published.get("remembered", ()) else ""
    return [ours, f"{mark}{published[key]:.2f}", f"{statistics.fmean(values) - published[key]:+.2f}"]


def protocols(reports: Sequence[Report]) -> str:
    """Of each run: where its protocol is from, what of it was changed, how long it took and where, and the command."""
    return "\n\n".join(protocol(report) for report in reports)


def protocol(report: Report) -> str:
    """One run's paragraph."""
    preset, config = _preset(report), report.config
    changes = preset.changes(config) + _cut(report)
    kept = (
        f"Changed, with the preset's in brackets: {', '.join(changes)}." if changes else "The preset's whole protocol."
    )
    epochs = (f"{run['posterior']} {run['best_epoch']} of {len(run['valid'])}" for run in report.finished)
    best = ", ".join(dict.fromkeys(epochs))  # seeds are often alike
    return f"**{preset.name}**: {preset.source}. {kept} Best epoch: {best}. {origin(report.run.head())}"


def _cut(report: Report) -> list[str]:
    """That minutes ended trainings before their epochs did."""
    config = report.config
    if not config.minutes:
        return []
    epochs = sorted({len(run["valid"]) for run in report.finished})
    return [f"trained for {'-'.join(map(str, epochs))} epochs of {config.epochs}"]
