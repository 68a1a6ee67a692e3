"""What is read off the test part, and how it is written: `results.json`, `table.md`, a table on the terminal."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

import flowpost
from benchmarks.config import Config, ConfigError, check_device, from_json
from benchmarks.data import Data
from benchmarks.train import EVALUATION_SEED, negative_elbo, seeded
from flowpost.evaluation import log_marginal
from flowpost.vae import VAE

TEST_SAMPLES = 64  # samples of z for each test image behind -ELBO and the active units
ACTIVE = 0.01  # a unit is active where Var_x(E_q[z]) exceeds this (Burda et al. 2016)
SPREAD = {"neg_elbo", "nll", "neg_elbo_bits", "nll_bits"}  # figures whose sd the table shows; results.json has all

Run = dict[str, Any]


def evaluate(vae: VAE, data: Data, config: Config) -> dict[str, float]:
    """What the table says of a trained model, in nats per image: the one place where the test part decides a figure."""
    x = data.test.to(config.device)
    with torch.no_grad(), seeded(EVALUATION_SEED, x.device):
        outs = [vae(part, (TEST_SAMPLES,)) for part in x.split(max(1, config.pairs // TEST_SAMPLES))]
        neg_elbo = torch.cat([negative_elbo(out) for out in outs]).double().mean().item()
        nll = -log_marginal(vae, x, config.samples, pairs=config.pairs).mean().item()
        units = active_units(torch.cat([out.sample.z for out in outs], dim=1))
    figures = {"neg_elbo": neg_elbo, "nll": nll, "gap": neg_elbo - nll, "active_units": units}
    if data.likelihood == "categorical":
        bits = 1 / (x[0].numel() * math.log(2))
        figures |= {"neg_elbo_bits": neg_elbo * bits, "nll_bits": nll * bits}
    return figures


def active_units(z: Tensor) -> int:
    """How many units have Var_x(E_q[z]) > `ACTIVE`, from samples z ``(samples, images, dim)``.

    The variance of a mean of S samples contains 1/S of the samples' own, which alone would exceed the threshold.
    """
    z = z.double()
    noise = z.var(0).mean(0) / len(z)  # (dim,)
    return int((z.mean(0).var(0) - noise > ACTIVE).sum())


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
    def resume(cls, folder: Path) -> Report:
        """The report of an interrupted job, with its configuration and finished runs; nothing is written yet.

        Raises:
            ConfigError: there is no such job, or other versions of torch, numpy or flowpost ran it.
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
            raise ConfigError(f"resume: expected the folder of an interrupted job, got {path}: {what}") from error
        report.begun = datetime.now().astimezone()
        check_device(report.config)
        then = report.environment
        changed = [f"{key} {then.get(key)} != {now}" for key, now in versions().items() if then.get(key) != now]
        if changed:
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
        seeds = "/".join(str(len(runs)) for runs in by_posterior(self.finished).values()) or "0"
        return (
            f"{config.data}, test part; nats per image, mean (sd) over seeds ({seeds} runs); "
            f"-ELBO: {TEST_SAMPLES} samples per image; NLL: {config.samples} importance samples per image; "
            f"gap: -ELBO - NLL; active: units of z's {config.dim} with Var_x(E_q[z]) > {ACTIVE}; "
            f"ms/step: median, {self.environment['device']}, CPU threads: {config.threads}"
        )

    def notes(self) -> list[str]:
        """A line for each run that failed or skipped steps."""
        return [_note(run) for run in self.runs if run["error"] or run["skipped_steps"]]

    def markdown(self) -> str:
        """`table.md`."""
        head, *body = self.rows()
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "".join(f"\n- {note}" for note in self.notes())
        return f"{table}\n\n{self.caption()}.\n{notes}"

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


def _columns(config: Config) -> list[tuple[str, str, int]]:
    """Key, title and decimals of the table's figures."""
    bits = [("neg_elbo_bits", "-ELBO bits/dim", 3), ("nll_bits", "NLL bits/dim", 3)]
    nats = [("neg_elbo", "-ELBO", 2), ("nll", "NLL", 2), ("gap", "gap", 2)]
    rest = [("active_units", "active", 1), ("parameters", "params", 0), ("step_ms", "ms/step", 1)]
    return [*nats, *(bits if config.data == "freyfaces" else []), *rest]


def _cell(figure: Mapping[str, float | None], digits: int, *, spread: bool) -> str:
    mean, sd = figure["mean"], figure["sd"]
    return f"{mean:,.{digits}f}" + (f" ({sd:.{digits}f})" if spread and sd is not None else "")


def environment(config: Config) -> dict[str, object]:
    """What the figures may depend on besides the configuration: versions and hardware."""
    device = torch.device(config.device)
    cpu = _cpu_name()
    return {
        "python": platform.python_version(),
        **versions(),
        "commit": _commit(),
        "system": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    }


def versions() -> dict[str, str]:
    """The versions that a job must keep to: another one may change its figures' last bits."""
    return {"torch": str(torch.__version__), "numpy": np.__version__, "flowpost": flowpost.__version__}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def replace_text(path: Path, text: str) -> None:
    """Write a file in one go: never half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
