"""`python -m benchmarks compare FOLDER ...`: finished jobs in one table, and how far each row is from the reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.config import Config, ConfigError
from benchmarks.figures import TEST_SAMPLES
from benchmarks.files import Content, as_json
from benchmarks.filling import TABLES, fill, origin, publish
from benchmarks.flows import options_words
from benchmarks.objective import bound_name
from benchmarks.report import Report, Result, by_posterior, exact_words, gap_words, trusted_words
from benchmarks.run import Page, terminal
from benchmarks.table import Table, ranked

# Jobs whose figures of a run mean the same.
SHARED = ("data", "data_hash", "likelihood", "samples", "gap_images", "images")
# And what a figure that not all runs have means besides.
BEHIND = {"trusted_nll": "trusted_images", "approximation_gap": "gap_steps"}
# What a row says of its training where not all jobs have the same, besides the optimizer.
SETTINGS = ("preset", "width", "dropout", "batch", "lr", "epochs", "patience", "kl_warmup", "minutes")

TITLES = {
    "neg_elbo": "-ELBO",
    "nll": "NLL",
    "heavy_tails": "k>0.7",
    "approximation_gap": "approx",
    "amortization_gap": "amort",
    "local_nll": "local",
    "local_heavy_tails": "k local",
    "exact_nll": "exact",
    "trusted_nll": "trusted",
    "trusted_images_nll": "NLL of them",
}
CURVES = ("train", "valid", "skips")  # of a run; a page has none

Row = tuple[Config, str, list[Result]]


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished jobs, on the same data.", file_okay=False)],
    *,
    page: Page = None,
    mark: Annotated[str, typer.Option(help="Between which marks of the page.")] = TABLES,
) -> None:
    """One table of several jobs: means and standard errors over seeds, and the difference from the reference.

    The reference is the first job's first posterior. Rows are ranked by the trusted NLL if all have it, else by
    -ELBO. A difference is that of runs of equal seeds, which begin with equal weights and see the images in the same
    order.
    """
    if page is not None:
        fill(page, "", mark)
    content = {"what": "compare", "runs": [_kept(Report.read(folder)) for folder in folders]}
    terminal().print(_table(content).markdown(), soft_wrap=True)
    if page is not None:
        publish(page, f"{as_json(content)}\n", shown, mark)


def _kept(report: Report) -> dict[str, Any]:
    """What a job found, without its curves."""
    content = report.content()
    runs = [{key: value for key, value in run.items() if key not in CURVES} for run in report.results]
    # As long as it ran, for it may have been stopped since.
    return {key: content[key] for key in ("started", "command", "environment", "configuration")} | {
        "seconds": report.run.seconds_before,
        "runs": runs,
    }


def shown(content: Content, page: str = "") -> str:
    """A page's text: the table, and where each job's figures are from."""
    return "\n\n".join([_table(content).markdown(), *(origin(job) for job in content["runs"])])


def _table(content: Content) -> Table:
    reports = [Report.of(job, Path()) for job in content["runs"]]
    rows = [(report.config, name, runs) for report in reports for name, runs in by_posterior(report.finished).items()]
    _check_comparable([report.config for report in reports], rows)
    if not rows:
        raise ConfigError("folders: expected finished runs, got none")
    return replace(table(rows), notes=[line for report in reports for line in _failures(report)])


def _failures(report: Report) -> Iterator[str]:
    """What a job's row has no figures of."""
    for run in report.results:
        if run["error"]:
            trained = _trained(report.config, run["posterior"])
            yield f"{run['posterior']} trained on {trained}, seed {run['seed']}: failed: {run['error']}"


def _check_comparable(configs: Sequence[Config], rows: Sequence[Row]) -> None:
    having = {name: [config for config, _, runs in rows if values(runs, key)] for key, name in BEHIND.items()}
    for name, found in ({name: configs for name in SHARED} | having).items():
        several = sorted({str(getattr(config, name)) for config in found})
        if len(several) > 1:
            raise ConfigError(f"folders: expected jobs of one {name.replace('_', '-')}, got {', '.join(several)}")


def table(rows: Sequence[Row]) -> Table:
    """A row for each posterior of each job, by the trusted NLL or else by -ELBO.

    A figure is `mean ± standard error` where there are two seeds. Differences are from the first of `rows`, whatever
    its rank.
    """
    found = {key for _, _, runs in rows for run in runs for key in run}
    keys = {key: title for key, title in TITLES.items() if key in found}
    # What can be trusted most; `trusted` itself is of the first seed alone.
    best = next(key for key in ("exact_nll", "local_nll", "nll") if key in keys)
    decisive = ("neg_elbo", best)
    apart = [f"less the reference's {keys[key]}" for key in decisive]
    unequal = _unequal([config for config, _, _ in rows])
    header = ["posterior", "trained on", "dim", "seeds", *keys.values(), *apart, "params"]
    body = []
    for config, name, runs in ranked(ranked(rows, lambda row: _mean(row[2], "neg_elbo")), lambda row: _mean(row[2])):
        figures = [mean_error(values(runs, key)) for key in keys]
        figures += [mean_error(differences(runs, rows[0][2], key), signed=True) for key in decisive]
        parameters = f"{runs[0]['parameters']:,}"
        sizes = _sizes(config, name, [other for other, called, _ in rows if called == name])
        body.append(
            [name, _trained(config, name, unequal, sizes), str(config.dim), str(len(runs)), *figures, parameters]
        )
    return Table(header, body, caption=_caption([config for config, _, _ in rows]))


def _mean(runs: Sequence[Result], key: str = "trusted_nll") -> float | None:
    """What the rows are ranked by, where a row has it."""
    found = values(runs, key)
    return statistics.fmean(found) if found else None


def _caption(configs: Sequence[Config]) -> str:
    """What the table's numbers are."""
    config = next((config for config in configs if config.gaps), configs[0])
    return (
        f"{config.name}, test part; nats per {config.unit}, mean ± standard error over seeds; -ELBO: {TEST_SAMPLES} "
        f"samples per {config.unit}; NLL: {config.samples} importance samples per {config.unit}; "
        f"k>0.7: share of {config.unit}s whose NLL is not to be trusted; "
        f"{gap_words(config)}{exact_words(config)}{trusted_words(config)}the reference: the row of differences 0; "
        "differences are of equal seeds; -: not run"
    )


def _settings(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS} | asdict(config.optimization)


def _unequal(configs: Sequence[Config]) -> list[str]:
    """The settings of which the jobs have several."""
    settings = [_settings(config) for config in configs]
    decoders = {Path(config.decoder_of) for config in configs if config.decoder_of}
    unequal = [name for name in settings[0] if len({each[name] for each in settings}) > 1]
    return [*unequal, *(["decoder_of"] if len(decoders) > 1 else [])]


def _sizes(config: Config, posterior: str, others: Sequence[Config]) -> dict[str, object]:
    """The options of a recipe that were asked for, and those whose usual values are not the same in all jobs."""
    usual = [other.flows.get(posterior, {}) for other in others]
    mine, asked = config.flows.get(posterior, {}), config.options.get(posterior, {})
    varied = {key: mine[key] for key in mine if any(each.get(key) != mine[key] for each in usual)}
    return {**varied, **asked}


def _trained(
    config: Config, posterior: str, unequal: Sequence[str] = (), sizes: Mapping[str, object] | None = None
) -> str:
    """The objective, what of the model is not as usual, and the settings that are not those of the other jobs."""
    words = [bound_name(config)[1:]]
    words += [f"{config.train_samples} samples"] if config.objective == "elbo" and config.train_samples > 1 else []
    words += [f"free bits {config.free_bits:g}"] if config.free_bits else []
    words += [options_words(config.options.get(posterior, {}) if sizes is None else sizes)]
    words += [config.gradient] if config.gradient != "standard" else []
    words += [f"prior {config.prior}"] if config.prior else []
    of = f" of {config.decoder_of}" if "decoder_of" in unequal else ""
    words += [f"frozen decoder{of}"] if config.decoder_of else []
    words += [f"encoder {config.encoder_width}"] if config.encoder_width else []
    words += [config.networks] if config.networks else []
    settings = _settings(config)
    words += [f"{name.replace('_', '-')} {settings[name]}" for name in unequal if name in settings]
    return " ".join(filter(None, words))


def differences(runs: Sequence[Result], others: Sequence[Result], key: str) -> list[float]:
    """Of a figure, for each seed that both have."""
    theirs = {run["seed"]: run[key] for run in others if key in run}
    return [run[key] - theirs[run["seed"]] for run in runs if key in run and run["seed"] in theirs]


def values(runs: Sequence[Result], key: str) -> list[float]:
    """Of a figure, of each run that has it."""
    return [run[key] for run in runs if key in run]


def mean_error(values: Sequence[float], *, signed: bool = False) -> str:
    """`mean ± standard error`, the error where there are two values; a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else mean
