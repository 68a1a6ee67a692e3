"""`python -m benchmarks compare FOLDER ...`: finished jobs in one table, and how far each row is from the first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.config import Config, ConfigError
from benchmarks.objective import bound_name
from benchmarks.report import Report, Result, by_posterior
from benchmarks.run import terminal
from benchmarks.table import Table

# Jobs whose figures of a run mean the same.
SHARED = ("data", "data_hash", "likelihood", "samples", "gap_images")

Row = tuple[Config, str, list[Result]]


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished jobs, on the same data.", file_okay=False)],
) -> None:
    """One table of several jobs: means and standard errors over seeds, and the difference from the first row.

    A difference is that of runs of equal seeds, which begin with equal weights and see the images in the same order.
    """
    reports = [Report.read(folder) for folder in folders]
    rows = [(report.config, name, runs) for report in reports for name, runs in by_posterior(report.finished).items()]
    _check_comparable([report.config for report in reports])
    if not rows:
        raise ConfigError("folders: expected finished runs, got none")
    terminal().print(table(rows).markdown(), soft_wrap=True)


def _check_comparable(configs: Sequence[Config]) -> None:
    for name in SHARED:
        values = sorted({str(getattr(config, name)) for config in configs})
        if len(values) > 1:
            raise ConfigError(f"folders: expected jobs of one {name.replace('_', '-')}, got {', '.join(values)}")


def table(rows: Sequence[Row]) -> Table:
    """A row for each posterior of each job; `mean ± standard error` where there are two seeds."""
    keys = {"neg_elbo": "-ELBO", "nll": "NLL"}
    if all(config.gaps for config, _, _ in rows):
        keys |= {"approximation_gap": "approx", "amortization_gap": "amort"}
        keys |= {"local_nll": "local", "local_heavy_tails": "k local"}
    decisive = ("neg_elbo", "local_nll" if "local_nll" in keys else "nll")
    apart = [f"less the first's {keys[key]}" for key in decisive]
    header = ["posterior", "trained on", "dim", "seeds", *keys.values(), *apart]
    body = []
    for config, name, runs in rows:
        figures = [mean_error([run[key] for run in runs]) for key in keys]
        figures += [mean_error(differences(runs, rows[0][2], key), signed=True) for key in decisive]
        body.append([name, _trained(config), str(config.dim), str(len(runs)), *figures])
    return Table(header, body)


def _trained(config: Config) -> str:
    """The objective, and what of the model is not as usual."""
    words = [bound_name(config)[1:]]
    words += [config.gradient] if config.gradient != "standard" else []
    words += [f"prior {config.prior}"] if config.prior else []
    words += [f"encoder {config.encoder_width}"] if config.encoder_width else []
    words += [config.networks] if config.networks else []
    return " ".join(words)


def differences(runs: Sequence[Result], others: Sequence[Result], key: str) -> list[float]:
    """Of a figure, for each seed that both have."""
    theirs = {run["seed"]: run[key] for run in others}
    return [run[key] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]


def mean_error(values: Sequence[float], *, signed: bool = False) -> str:
    """`mean ± standard error`, the error where there are two values; a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else mean
