"""How figures are written: `results.json`, `table.md`, a table on the terminal."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.config import Config, ConfigError, check_device, from_json
from benchmarks.environment import environment, versions
from benchmarks.figures import ACTIVE, INFORMATION_IMAGES, TEST_SAMPLES
from benchmarks.objective import objective_words

SPREAD = {
    "neg_elbo",
    "nll",
    "local_nll",
    "neg_elbo_bits",
    "nll_bits",
}  # figures whose sd the table shows; results.json has all

Run = dict[str, Any]


class Report:
    """The folder of one job: `results.json` and `table.md`, written anew after each run, so that a stop loses nothing.

    Args:
        folder: where to write; made here.
        config: of the job.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.runs: list[Run] = []
        self.environment = environment(config)
        self.begun = self.started = datetime.now().astimezone()
        self.seconds_before = 0.0  # of the processes that went before this one
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    @classmethod
    def read(cls, folder: Path, expected: str = "folder: expected that of a job") -> Report:
        """The report of a job, with its configuration and finished runs; nothing is written.

        Args:
            folder: of the job.
            expected: what an error's message begins with.

        Raises:
            ConfigError: there is no such job.
        """
        path = folder / "results.json"
        report = cls.__new__(cls)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            report.folder, report.config, report.runs = folder, from_json(content["configuration"]), content["runs"]
            report.environment, report.seconds_before = content["environment"], content["seconds"]
            report.started = datetime.fromisoformat(content["started"])
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(f"{expected}, got {path}: {what}") from error
        report.begun = datetime.now().astimezone()
        return report

    @classmethod
    def resume(cls, folder: Path) -> Report:
        """The report of an interrupted job, to go on with.

        Raises:
            ConfigError: there is no such job, or other versions of torch, numpy or flowpost ran it.
        """
        report = cls.read(folder, "resume: expected the folder of an interrupted job")
        check_device(report.config)
        then = report.environment
        changed = [f"{key} {then.get(key)} != {now}" for key, now in versions().items() if then.get(key) != now]
        if changed:
            path = folder / "results.json"
            raise ConfigError(
                f"resume: expected the versions that {path} began with (then != now): {', '.join(changed)}"
            )
        return report

    def add(self, run: Run) -> None:
        """Take in a run, finished or failed, and write."""
        self.runs.append(run)
        self.write()

    def has(self, posterior: str, seed: int) -> bool:
        """Whether a run is taken in, finished or failed: it would only repeat itself."""
        return any((run["posterior"], run["seed"]) == (posterior, seed) for run in self.runs)

    @property
    def finished(self) -> list[Run]:
        """The runs that have figures."""
        return [run for run in self.runs if run["error"] is None]

    def write(self) -> None:
        """Both files, each replaced in one go: never half a file."""
        seconds = self.seconds_before + (datetime.now().astimezone() - self.begun).total_seconds()
        content = {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "configuration": asdict(self.config),
            "environment": self.environment,
            "summary": {name: summarize(runs) for name, runs in by_posterior(self.finished).items()},
            "runs": self.runs,
        }
        replace_text(self.folder / "results.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        replace_text(self.folder / "table.md", self.markdown())

    def rows(self) -> list[list[str]]:
        """The table's header, then a row for each posterior."""
        columns = _columns(self.config)
        rows = [["posterior", *(title for _, title, _ in columns)]]
        for name, runs in by_posterior(self.finished).items():
            summary = summarize(runs)
            cells = [_cell(summary[key], digits, spread=key in SPREAD) for key, _, digits in columns]
            rows.append([name, *cells])
        return rows

    def caption(self) -> str:
        """What the table's numbers are."""
        config = self.config
        counts = [len(runs) for runs in by_posterior(self.finished).values()] or [0]
        seeds = "/".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
        return (
            f"{config.data}, test part; trained on {objective_words(config)}; "
            f"nats per image, mean (sd) over seeds ({seeds} runs); "
            f"-ELBO: {TEST_SAMPLES} samples per image; NLL: {config.samples} importance samples per image; "
            f"gap: -ELBO - NLL; {_gap_words(config)}"
            f"ESS: effective ones of NLL's samples; k>0.7: share of images whose NLL is not to be trusted; "
            f"active: units of z's {config.dim} with Var_x(E_q[z]) > {ACTIVE}; "
            f"MI: of z and the image's index, at most log of {INFORMATION_IMAGES} images or of all there are; "
            f"ms/step: median, {self.environment['device']}, CPU threads: {config.threads}"
        )

    def notes(self) -> list[str]:
        """A line for each run that failed or skipped steps."""
        return [_note(run) for run in self.runs if run["error"] or run["skipped_steps"]]

    def markdown(self) -> str:
        """`table.md`."""
        notes = "".join(f"\n- {note}" for note in self.notes())
        return f"{markdown_table(self.rows())}\n\n{self.caption()}.\n{notes}"

    def table(self) -> Table:
        """The same for a terminal."""
        head, *body = self.rows()
        table = Table(
            box=box.SIMPLE_HEAD, caption=self.caption(), caption_justify="left", padding=(0, 1, 0, 0), show_edge=False
        )
        for title in head:
            first = title == head[0]
            # A terminal too narrow for a number breaks it; it never cuts digits off.
            table.add_column(title, justify="left" if first else "right", no_wrap=first, overflow="fold")
        for row in body:
            table.add_row(*row)
        return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A header and lines in Markdown, all but the first column to the right."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] + ["---:"] * (len(head) - 1), *body])


def _note(run: Run) -> str:
    what = f"failed: {run['error']}" if run["error"] else f"{run['skipped_steps']} steps skipped, not finite"
    if not run["error"]:
        tensors = ", ".join(run["skips"][0]["tensors"]) or "the loss or the norm alone"
        what += f" (the first in epoch {run['skips'][0]['epoch']}: {tensors})"
    return f"{run['posterior']}, seed {run['seed']}: {what}"


def by_posterior(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each posterior, in the order in which they first came."""
    names = dict.fromkeys(run["posterior"] for run in runs)
    return {name: [run for run in runs if run["posterior"] == name] for name in names}


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation over seeds of every figure; no deviation where there is one seed."""
    keys = [key for key, value in runs[0].items() if isinstance(value, (int, float)) and key != "seed"]
    return {key: _mean_sd([run[key] for run in runs]) for key in keys}


def _mean_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _gap_words(config: Config) -> str:
    if not config.gaps:
        return ""
    what = f"approx and amort: of {config.gap_images} images, the gap split into its family's and the encoder's by a q "
    what += f"fitted to each for {config.gap_steps} steps; local: NLL by that q; k local: k>0.7 of it; "
    return what


def _columns(config: Config) -> list[tuple[str, str, int]]:
    """Key, title and decimals of the table's figures."""
    nats = [("neg_elbo", "-ELBO", 2), ("nll", "NLL", 2), ("gap", "gap", 2)]
    split = [("approximation_gap", "approx", 2), ("amortization_gap", "amort", 2)]
    split += [("local_nll", "local", 2), ("local_heavy_tails", "k local", 2)]
    bits = [("neg_elbo_bits", "-ELBO bits/dim", 3), ("nll_bits", "NLL bits/dim", 3)]
    trust = [("ess", "ESS", 0), ("heavy_tails", "k>0.7", 2)]
    rest = [("active_units", "active", 1), ("mutual_information", "MI", 2)]
    cost = [("parameters", "params", 0), ("step_ms", "ms/step", 1)]
    optional = (split if config.gaps else []) + (bits if config.data == "freyfaces" else [])
    return [*nats, *optional, *trust, *rest, *cost]


def _cell(figure: Mapping[str, float | None], digits: int, *, spread: bool) -> str:
    mean, sd = figure["mean"], figure["sd"]
    return f"{mean:,.{digits}f}" + (f" ({sd:.{digits}f})" if spread and sd is not None else "")


def replace_text(path: Path, text: str) -> None:
    """Write a file in one go: never half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
