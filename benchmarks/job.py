"""A job: every posterior and seed trained, evaluated, written and drawn; stopped and resumed at any moment."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

import flowpost
from benchmarks.checkpoint import Keeper, clear
from benchmarks.config import Config
from benchmarks.data import Data, load
from benchmarks.display import Display
from benchmarks.figures import evaluate
from benchmarks.models import build, count_parameters
from benchmarks.objective import bound_name, objective_name
from benchmarks.plots import draw
from benchmarks.report import Report, Run, by_posterior
from benchmarks.train import History, TrainingError, seeded, train_one
from flowpost.vae import VAE

INTERRUPTED = 130  # the shell's code for Ctrl-C
CHECKPOINTS = "checkpoints"  # a job's folder of them; gone when it is finished


def job(begun: Config | Report, out: Path | None = None) -> int:
    """Train, evaluate, write and draw, from the beginning or from where a report stopped; the exit code."""
    config = begun.config if isinstance(begun, Report) else begun
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    data = load(config.data)
    report = begun if isinstance(begun, Report) else _begin(config, out)
    folder, total, code = report.folder, len(config.seeds) * len(config.posteriors), 0
    torch.set_num_threads(config.threads)
    if report.runs:
        console.print(f"{len(report.runs)} of {total} runs are already finished.")
    try:
        with Display(console, total, config.epochs, len(report.runs), bound_name(config)) as display:
            # Seeds outermost: whoever stops early can still compare all posteriors.
            for seed in config.seeds:
                for name in config.posteriors:
                    if not report.has(name, seed):
                        run_one(data, name, seed, report, display)
        clear(folder / CHECKPOINTS)
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.print(f"Interrupted: {len(report.runs)} of {total} runs are finished; theirs is what {folder} holds.")
        console.print(f"Go on with: python -m benchmarks --resume {folder}", soft_wrap=True)
    if report.finished:
        console.print(report.table())
        draw(report, data, models(report, data, console))
    console.print(f"Table, figures and pictures: {folder}", soft_wrap=True)
    return code or int(len(report.finished) < len(report.runs))


def _begin(config: Config, out: Path | None) -> Report:
    """A new job's report; checkpoints of another job in its folder are none of its own."""
    what = "-".join(filter(None, (config.data, objective_name(config))))
    folder = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{what}"
    clear(folder / CHECKPOINTS)
    return Report(folder, config)


def run_one(data: Data, name: str, seed: int, report: Report, display: Display) -> None:
    """Train and evaluate one posterior and seed, and report it; without figures where training failed."""
    start, config = time.perf_counter(), report.config
    run: Run = {"posterior": name, "seed": seed, "error": None}
    keeper = Keeper(display.watch(name, seed), report.folder / CHECKPOINTS, name, seed, config, display.say)
    try:
        vae, history = train_one(data, name, seed, config, keeper)
        figures = evaluate(vae, data, config)
    except TrainingError as error:
        report.add(run | {"error": str(error)})
        line = f"{name}, seed {seed} failed: {error}"
    else:
        run |= figures | {"parameters": count_parameters(vae), "seconds": time.perf_counter() - start} | asdict(history)
        keep_model(vae, report, run)
        report.add(run)
        line = f"{name}, seed {seed}: -ELBO {run['neg_elbo']:.2f}, NLL {run['nll']:.2f}, best of "
        line += f"{len(history.valid)} epochs: {history.best_epoch}, {run['seconds']:.0f} s{_skipped(history)}"
    clear(keeper.folder, keeper.run)
    display.finish(line)


def keep_model(vae: VAE, report: Report, run: Run) -> None:
    """Write a trained model before its figures are reported: a finished run always has its model."""
    path = _model_path(report, run)
    path.parent.mkdir(exist_ok=True)
    flowpost.save(vae, path)


def models(report: Report, data: Data, console: Console) -> dict[str, VAE]:
    """The trained model of each posterior's first finished run, for the pictures."""
    config, found = report.config, {}
    for name, runs in by_posterior(report.finished).items():
        with seeded(0, torch.device(config.device)):  # the weights drawn here are replaced at once
            options = dict(config.flows.get(name, {}))
            vae = build(data, name, dim=config.dim, width=config.width, dropout=config.dropout, options=options)
        try:
            found[name] = flowpost.load(_model_path(report, runs[0]), into=vae, device=config.device).eval()
        except (OSError, ValueError) as error:
            console.print(f"WARNING: no pictures of {name}: {error}")
    return found


def _model_path(report: Report, run: Run) -> Path:
    return report.folder / "models" / f"{run['posterior']}-{run['seed']}.safetensors"


def _skipped(history: History) -> str:
    return f", {history.skipped_steps} steps skipped: not finite" if history.skipped_steps else ""
