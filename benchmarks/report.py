"""A job's figures: `results.json`, `table.md`, the table on the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.config import Config, ConfigError, check_device, from_json
from benchmarks.figures import ACTIVE, ANNEALED, INTEGRATED, LEVELS, TEST_SAMPLES, is_integrated
from benchmarks.files import Content
from benchmarks.filling import origin
from benchmarks.flows import options_words
from benchmarks.objective import objective_words
from benchmarks.run import Run, check_versions
from benchmarks.table import Table, grouped, ranked
from benchmarks.train import tensor_words

JOB = "job"
RESULTS = "results.json"  # a job's figures
SPREAD = {"neg_elbo", "nll", "local_nll", "exact_nll", "neg_elbo_bits", "nll_bits"}  # whose sd the table shows too

Result = dict[str, Any]
"""One posterior and seed: its figures and curves, or its error."""


class Report:
    """What a job has found: written anew after each posterior and seed, so that a stop loses nothing.

    Args:
        run: the job's folder.
        config: of the job.
        results: of the posteriors and seeds that are finished or failed.
    """

    def __init__(self, run: Run, config: Config, results: Sequence[Result] = ()) -> None:
        self.run, self.config, self.results = run, config, list(results)

    @classmethod
    def read(cls, folder: Path, expected: str = "folder: expected that of a job") -> Report:
        """The report of a job, with its configuration and results; nothing is written.

        Args:
            folder: of the job.
            expected: what an error's message begins with.

        Raises:
            ConfigError: there is no such job.
        """
        path = folder / RESULTS
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")), folder)
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(f"{expected}, got {path}: {what}") from error

    @classmethod
    def of(cls, content: Content, folder: Path) -> Report:
        """What `results.json` of a folder says."""
        started = datetime.fromisoformat(content["started"])
        # Jobs of earlier versions do not say their command.
        command, seconds = content.get("command", ""), content["seconds"]
        run = Run(folder, content["environment"], command, JOB, started=started, seconds_before=seconds)
        return cls(run, from_json(content["configuration"]), content["runs"])

    @classmethod
    def resume(cls, folder: Path) -> Report:
        """The report of an interrupted job, to go on with.

        Raises:
            ConfigError: there is no such job, or other versions of torch, numpy or flowpost ran it.
        """
        report = cls.read(folder, "resume: expected the folder of an interrupted job")
        check_device(report.config)
        check_versions("resume", folder / RESULTS, report.run.environment)
        return report

    def add(self, result: Result) -> None:
        """Take in what a posterior and seed came to, and write; the order is the configuration's."""
        self.results.append(result)
        seeds, posteriors = self.config.seeds, self.config.posteriors
        self.results.sort(key=lambda one: (seeds.index(one["seed"]), posteriors.index(one["posterior"])))
        self.write()

    def has(self, posterior: str, seed: int) -> bool:
        """Whether it is finished or failed: it would only repeat itself."""
        return any((one["posterior"], one["seed"]) == (posterior, seed) for one in self.results)

    @property
    def finished(self) -> list[Result]:
        """The results that have figures."""
        return [one for one in self.results if one["error"] is None]

    def write(self) -> None:
        """Both files."""
        self.run.write(RESULTS, self.content())
        self.run.write("table.md", self.table().markdown())

    def content(self) -> dict[str, Any]:
        """All that `results.json` says."""
        return self.run.head() | {
            "configuration": asdict(self.config),
            "summary": {name: summarize(results) for name, results in by_posterior(self.finished).items()},
            "runs": self.results,
        }

    def table(self) -> Table:
        """A row for each posterior, by the trusted NLL; a note for each result that failed or skipped steps."""
        columns, rows = _columns(self.config), []
        for name, results in self._ranked():
            summary = summarize(results)
            rows.append([name, *(_cell(summary.get(key), digits, spread=key in SPREAD) for key, _, digits in columns)])
        notes = [_note(one, self.config) for one in self.results if one["error"] or one["skipped_steps"]]
        return Table(["posterior", *(title for _, title, _ in columns)], rows, caption=self.caption(), notes=notes)

    def _ranked(self) -> list[tuple[str, list[Result]]]:
        """The posteriors in the order of the table, with their finished runs."""
        found = [*by_posterior(self.finished).items()]
        return ranked(found, lambda item: summarize(item[1]).get("trusted_nll", {}).get("mean"))

    def caption(self) -> str:
        """What the table's numbers are."""
        config, unit = self.config, self.config.unit
        counts = [len(results) for _, results in self._ranked()] or [0]  # as the rows stand
        seeds = "/".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
        return (
            f"{config.name}, test part; {_model_words(config)}trained on {objective_words(config)}; "
            f"nats per {unit}, mean (sd) over seeds ({seeds} runs); "
            f"-ELBO: {TEST_SAMPLES} samples per {unit}; NLL: {config.samples} importance samples per {unit}; "
            f"gap: -ELBO - NLL; {gap_words(config)}{exact_words(config)}{trusted_words(config)}"
            f"ESS: effective ones of NLL's samples; k>0.7: share of {unit}s whose NLL is not to be trusted; "
            f"active: units of z's {config.dim} with Var_x(E_q[z]) > {ACTIVE}; "
            f"{_information_words(config, unit)}"
            f"ms/step: median, {self.run.environment['device']}, CPU threads: {config.threads}"
        )


def shown(content: Content, page: str = "") -> str:
    """A page's text."""
    return f"{Report.of(content, Path()).table().markdown()}\n\n{origin(content)}"


def _note(one: Result, config: Config) -> str:
    what = f"failed: {one['error']}" if one["error"] else f"{one['skipped_steps']} steps skipped, not finite"
    if not one["error"]:
        first = one["skips"][0]
        what += f" (the first in epoch {first['epoch']}: {tensor_words(first['tensors'], config)})"
    return f"{one['posterior']}, seed {one['seed']}: {what}"


def by_posterior(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each posterior, in the order in which they first came."""
    return grouped(results, lambda one: one["posterior"])


def summarize(results: Sequence[Result]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation over seeds of every figure; no deviation where there is one seed."""
    numbers = [{key: value for key, value in one.items() if isinstance(value, (int, float))} for one in results]
    keys = [key for key in dict.fromkeys(key for one in numbers for key in one) if key != "seed"]
    return {key: _mean_sd([one[key] for one in numbers if key in one]) for key in keys}


def _mean_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _model_words(config: Config) -> str:
    """What of the model is not as usual."""
    words = {
        "p(x|z)": config.likelihood,
        "prior": config.prior,
        "decoder, frozen, of": config.decoder_of,
        "encoder's width": config.encoder_width,
        "networks": config.networks,
    }
    words |= {name: options_words(config.options[name]) for name in config.options}
    return "".join(f"{name}: {value}; " for name, value in words.items() if value)


def gap_words(config: Config) -> str:
    """What the columns of the split gap are, where there are any."""
    if not config.gaps:
        return ""
    what = (
        f"approx and amort: of {config.gap_images} {config.unit}s, the gap split into its family's and the encoder's "
    )
    what += f"by a q fitted to each for {config.gap_steps} steps; local: NLL by that q; k local: k>0.7 of it; "
    return what


def exact_words(config: Config) -> str:
    """What the exact column is, where there is one."""
    what = f"exact: NLL of {INTEGRATED} {config.unit}s, or of all there are, by the integral over z"
    what += ", none where a p(z|x) is too narrow for its grid; "
    return what if is_integrated(config) else ""


def trusted_words(config: Config) -> str:
    """What the trusted columns are, where there are any."""
    if not config.trusted_images:
        return ""
    chains, temperatures, leapfrogs = ANNEALED
    return (
        f"trusted: NLL of {config.trusted_images} {config.unit}s, the first seed alone, by annealed importance "
        f"sampling, {chains} chains of {temperatures} temperatures of {leapfrogs} leapfrogs, and half as many from the "
        "prior; NLL of them: by importance samples; "
    )


def _information_words(config: Config, unit: str) -> str:
    what = f"MI: of z and the {unit}'s index, at most log of {config.information} {unit}s or of all there are; "
    return what if config.information else ""


def _columns(config: Config) -> list[tuple[str, str, int]]:
    """Key, title and decimals of the table's figures."""
    nats = [("neg_elbo", "-ELBO", 2), ("nll", "NLL", 2), ("gap", "gap", 2)]
    split = [("approximation_gap", "approx", 2), ("amortization_gap", "amort", 2)]
    split += [("local_nll", "local", 2), ("local_heavy_tails", "k local", 2)]
    split += [("exact_nll", "exact", 2)] if is_integrated(config) else []
    bits = [("neg_elbo_bits", "-ELBO bits/dim", 3), ("nll_bits", "NLL bits/dim", 3)]
    trust = [("ess", "ESS", 0), ("heavy_tails", "k>0.7", 2)]
    rest = [("active_units", "active", 1)] + ([("mutual_information", "MI", 2)] if config.information else [])
    cost = [("parameters", "params", 0), ("step_ms", "ms/step", 1)]
    trusted = [("trusted_nll", "trusted", 2), ("trusted_images_nll", "NLL of them", 2)]
    optional = trusted if config.trusted_images else []
    optional = optional + (split if config.gaps else []) + (bits if _has_bits(config) else [])
    return [*nats, *optional, *trust, *rest, *cost]


def _has_bits(config: Config) -> bool:
    """Whether an element is one of many levels, of which people count the bits."""
    return config.data == "freyfaces" or config.likelihood.startswith(LEVELS)


def _cell(figure: Mapping[str, float | None] | None, digits: int, *, spread: bool) -> str:
    if figure is None:
        return "-"  # the first seed failed
    mean, sd = figure["mean"], figure["sd"]
    return f"{mean:,.{digits}f}" + (f" ({sd:.{digits}f})" if spread and sd is not None else "")
