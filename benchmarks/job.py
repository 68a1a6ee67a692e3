"""A job: every posterior and seed trained, evaluated, written and drawn; stopped and resumed at any moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

import flowpost
from benchmarks.checkpoint import Keeper, clear
from benchmarks.config import Config, ConfigError, is_file
from benchmarks.data import Data, load
from benchmarks.display import Display
from benchmarks.figures import Figures, evaluate
from benchmarks.files import finite, written
from benchmarks.models import build, count_parameters
from benchmarks.networks import model_of
from benchmarks.objective import bound_name, objective_name
from benchmarks.own.setup import check_networks, load_own
from benchmarks.plots import draw
from benchmarks.report import JOB, RESULTS, Report, Result, by_posterior
from benchmarks.run import Run, terminal
from benchmarks.team import Team
from benchmarks.train import History, TrainingError, seeded, train_one
from benchmarks.watchers import clear_album, watchers
from benchmarks.workers import cpu_threads, side_by_side
from flowpost.vae import VAE

INTERRUPTED = 130  # the shell's code for Ctrl-C
CHECKPOINTS = "checkpoints"  # a job's folder of them; gone when it is finished

Task = tuple[str, int]
"""A posterior and a seed."""


def job(begun: Config | Report, out: Path | None = None, *, pictures: bool = True, jobs: int = 1) -> int:
    """Train, evaluate, write and draw, from the beginning or from where a report stopped; the exit code.

    Args:
        begun: what is to be done, or what is done of it.
        out: folder of a new job.
        pictures: whether to draw.
        jobs: runs that are made side by side; their figures are the same.
    """
    config = begun.config if isinstance(begun, Report) else begun
    team = Team.on(config.device)
    console, data = terminal(quiet=not team.leads), load_data(config)
    if config.networks:
        check_networks(config, data)
    report = begun if isinstance(begun, Report) else begin(shared(counted(config, data), team), out)
    report.run.silent = not team.leads
    with cpu_threads(config.threads):
        code = train(report, data, console, jobs)
        if report.finished and team.leads:
            console.print(report.table())
            if pictures:
                draw(report, data, models(report, data, console))
    console.print(f"Table, figures and pictures: {report.run.folder}", soft_wrap=True)
    return code or int(len(report.finished) < len(report.results))


def load_data(config: Config) -> Data:
    """Of a job: a data set by its name, or a file as it was when the job began."""
    return load_own(config) if is_file(config.data) else load(config.data)


def counted(config: Config, data: Data) -> Config:
    """With as many images of the trusted NLL and of the split gap as there are, which the table's caption tells."""
    there = min(config.images or len(data.test), len(data.test))
    gap_images = min(config.gap_images, there) if config.gaps else config.gap_images
    return replace(config, trusted_images=min(config.trusted_images, there), gap_images=gap_images)


def shared(config: Config, team: Team) -> Config:
    """The configuration of several processes: their steps run operation by operation.

    Raises:
        ConfigError: it has what only one process can do.
    """
    if team.count == 1:
        return config
    if config.dropout or config.free_bits:
        what = "dropout" if config.dropout else "free-bits"
        raise ConfigError(f"{what}: expected 0 with several processes, each of which sees its rows alone")
    if config.batch < team.count:
        raise ConfigError(f"batch: expected at least an image for each of {team.count} processes, got {config.batch}")
    return replace(config, eager=True)


def begin(config: Config, out: Path | None) -> Report:
    """A new job's report; checkpoints of another job in its folder are none of its own."""
    team = Team.on(config.device)
    parts = (config.preset, config.name.removesuffix(".npz"), objective_name(config), _prior_name(config))
    name = "-".join(filter(None, parts))
    _check_new(out, team)
    run = Run.begin(JOB, out, name=name, device=config.device, threads=config.threads)
    run.silent = not team.leads
    report = Report(run, config)
    if team.leads:
        clear(run.folder / CHECKPOINTS)
        clear_album(run.folder)
    report.write()
    team.wait()
    return report


def _check_new(out: Path | None, team: Team) -> None:
    """Refuse a folder with a job of its own, whose figures would be gone; of several processes before any writes."""
    if out is not None and (out / RESULTS).exists():
        begun = "a job; go on with --resume, take another folder, or remove this one"
        raise ConfigError(f"out: expected a folder without a job, got {out}, which has {begun}")
    team.wait()


def _prior_name(config: Config) -> str:
    return f"prior-{config.prior.replace(':', '-')}" if config.prior else ""


def train(report: Report, data: Data, console: Console, jobs: int = 1) -> int:
    """Every posterior and seed that the report does not have yet; the exit code of an interrupt, or 0."""
    config, folder = report.config, report.run.folder
    total, leads = len(config.seeds) * len(config.posteriors), Team.on(config.device).leads
    # Seeds outermost: whoever stops early can still compare all posteriors.
    tasks = [(name, seed) for seed in config.seeds for name in config.posteriors if not report.has(name, seed)]
    if report.results:
        console.print(f"{len(report.results)} of {total} runs are already finished.")
    try:
        with Display(console, total, config.epochs, len(report.results), bound_name(config)) as display:
            for result, line in finished(report, data, tasks, display, jobs):
                report.add(result)
                if leads:
                    clear(folder / CHECKPOINTS, f"{result['posterior']}-{result['seed']}")
                display.finish(line)
        if leads:
            clear(folder / CHECKPOINTS)
    except KeyboardInterrupt:
        done = f"{len(report.results)} of {total} runs are finished"
        console.print(f"Interrupted: {done}; theirs is what {folder} holds.")
        console.print(f"Go on with: python -m benchmarks --resume {folder}", soft_wrap=True)
        return INTERRUPTED
    return 0


def finished(
    report: Report, data: Data, tasks: Sequence[Task], display: Display, jobs: int
) -> Iterator[tuple[Result, str]]:
    """What each run came to, with a line on it, as they end: in this process, or in so many others."""
    if jobs == 1:
        for name, seed in tasks:
            yield run_one(data, name, seed, report, display.watch(name, seed), display.say)
        return
    begun = Report(report.run, report.config)
    for said, result, line in side_by_side(run_apart, [(begun, *task) for task in tasks], jobs):
        for each in said:
            display.say(each)
        yield result, line


def run_apart(report: Report, name: str, seed: int) -> tuple[list[str], Result, str]:
    """The same in a process of its own, which says nothing: what it would have said comes first."""
    said: list[str] = []
    return said, *run_one(load_data(report.config), name, seed, report, lambda _: None, said.append)


def run_one(
    data: Data, name: str, seed: int, report: Report, tell: Callable[[History], None], say: Callable[[str], None]
) -> tuple[Result, str]:
    """Train and evaluate one posterior and seed; without figures where training failed. And a line on it.

    Args:
        data: of the job.
        name: of the posterior.
        seed: of the run.
        report: whose job it is.
        tell: called after each epoch.
        say: where what is found is told.
    """
    start, config = time.perf_counter(), report.config
    result: Result = {"posterior": name, "seed": seed, "error": None}
    keeper = Keeper(tell, report.run.folder / CHECKPOINTS, name, seed, config, say)
    try:
        vae, history = train_one(data, name, seed, config, watchers(keeper, data, report, f"{name}-{seed}"))
        keep_model(vae, report, result)
        figures = evaluate(vae, data, config, seed)
        check_finite(figures)
    except TrainingError as error:
        return result | {"error": str(error)}, f"{name}, seed {seed} failed: {error}"
    cost = {"parameters": count_parameters(vae), "seconds": time.perf_counter() - start}
    result |= figures | cost | asdict(history) | curves(history)
    line = f"{name}, seed {seed}: -ELBO {result['neg_elbo']:.2f}, NLL {result['nll']:.2f}, best of "
    line += f"{len(history.valid)} epochs: {history.best_epoch}, {result['seconds']:.0f} s{_skipped(history)}"
    return result, line


def check_finite(figures: Figures) -> None:
    """Refuse figures that no mean over seeds can have.

    Raises:
        TrainingError: some are not finite.
    """
    if bad := [key for key, figure in figures.items() if not math.isfinite(figure)]:
        raise TrainingError(f"figures of the test part that are not finite: {', '.join(bad)}")


def curves(history: History) -> dict[str, list[float | None]]:
    """Of an epoch whose figure is not finite None: JSON knows no nan."""
    found = {"train": history.train, "valid": history.valid}
    return {key: [finite(figure) for figure in figures] for key, figures in found.items()}


def keep_model(vae: VAE, report: Report, result: Result) -> None:
    """Write a trained model before its figures are reported: a finished run always has its model."""
    if report.run.silent:
        return
    path = _model_path(report, result)
    with written(report.run.folder):
        path.parent.mkdir(exist_ok=True)
        flowpost.save(vae, path)


def models(report: Report, data: Data, console: Console) -> dict[str, VAE]:
    """The trained model of each posterior's first finished run, for the pictures."""
    config, found = report.config, {}
    for name, (first, *_) in by_posterior(report.finished).items():
        with seeded(0, torch.device(config.device)):  # the weights drawn here are replaced at once
            vae = build(data, name, **model_of(config, data, name))
        try:
            found[name] = flowpost.load(_model_path(report, first), into=vae, device=config.device).eval()
        except (OSError, ValueError) as error:
            console.print(f"WARNING: no pictures of {name}: {error}")
    return found


def _model_path(report: Report, result: Result) -> Path:
    return report.run.folder / "models" / f"{result['posterior']}-{result['seed']}.safetensors"


def _skipped(history: History) -> str:
    return f", {history.skipped_steps} steps skipped: not finite" if history.skipped_steps else ""
