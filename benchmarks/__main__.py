"""The command line: `python -m benchmarks` trains the same VAE with each posterior and says which one pays."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from benchmarks.data import NAMES, Data, DataError, load
from benchmarks.models import POSTERIORS, count_parameters
from benchmarks.plots import draw
from benchmarks.report import Report, Run, evaluate
from benchmarks.train import Config, ConfigError, History, TrainingError, configure, train_one
from flowpost.vae import VAE

INTERRUPTED = 130  # the shell's code for Ctrl-C

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Newer typers bring a click of their own, and none exports the base class of its errors: it is reached through one.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


# \b: keep these lines as they are.
EXAMPLES = """\b
Examples:
  python -m benchmarks                     digits, four posteriors, three seeds
  python -m benchmarks --quick --dim 2     true posteriors beside the fitted ones
  python -m benchmarks --data mnist-static --posterior diagonal,iaf --seeds 1
"""


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def main_job(
    context: typer.Context,
    *,
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(NAMES)}.")] = "digits",
    posterior: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Posterior to train: {', '.join(POSTERIORS)}; repeat it, or list several with commas.  [default: all]"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of runs of each posterior.  [default: 3]")] = None,
    first_seed: Annotated[int, typer.Option(help="The first run's seed; the next ones count up.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Epochs at most.  [digits: 150]")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better validation -ELBO.  [digits: 30]")
    ] = None,
    kl_warmup: Annotated[
        int | None, typer.Option(help="Epochs over which the KL's weight rises from 0 to 1.  [digits: 20]")
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Size of z; with 2, the true posterior is drawn beside each q(z|x).  [digits: 16]"),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Hidden units a layer of encoder and decoder.  [digits: 256]")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images a training step.  [digits: 128]")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.  [digits: 0.003]")] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Share of hidden units dropped in training.  [default: 0]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Importance samples a test image behind NLL.  [digits: 5000, others: 500]")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="(Sample, image) pairs evaluated at once; lower it if memory runs out.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [digits: 1, others: 2]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.  [default: runs/<time>-<data>]", file_okay=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look within a minute: one seed, few epochs and samples.")
    ] = False,
) -> None:
    """Train the same VAE with each posterior, and print which one pays: nats, seconds, parameters.

    Every posterior gets the same encoder, decoder, optimizer and budget. Training stops early on the validation part;
    the test part is read once, at the end of a run. results.json, table.md and pictures go to the --out folder, and
    are usable after Ctrl-C too. Options that are not given depend on the data set, never on the posterior.
    """
    if context.invoked_subcommand is not None:
        return
    config = configure(
        data,
        quick=quick,
        posteriors=_names(posterior),
        seeds=_seeds(seeds, first_seed, quick=quick),
        epochs=epochs,
        patience=patience,
        kl_warmup=kl_warmup,
        dim=dim,
        width=width,
        batch=batch,
        lr=lr,
        dropout=dropout,
        samples=samples,
        pairs=pairs,
        device=device,
        threads=threads,
    )
    raise typer.Exit(job(config, out))


def _names(given: list[str] | None) -> tuple[str, ...] | None:
    """The posteriors asked for, once each."""
    return tuple(dict.fromkeys(name.strip() for part in given for name in part.split(","))) if given else None


def _seeds(count: int | None, first: int, *, quick: bool) -> tuple[int, ...]:
    return tuple(range(first, first + ((1 if quick else 3) if count is None else count)))


def job(config: Config, out: Path | None = None) -> int:
    """Train, evaluate, write and draw; the exit code."""
    console = Console(markup=False, highlight=False)
    data = load(config.data)
    folder = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.data}"
    torch.set_num_threads(config.threads)
    report, models, code = Report(folder, config), {}, 0
    total = len(config.seeds) * len(config.posteriors)
    try:
        with Display(console, total, config.epochs) as display:
            # Seeds outermost: whoever stops early can still compare all posteriors.
            for seed in config.seeds:
                for name in config.posteriors:
                    vae, run = run_one(data, name, seed, config, display)
                    report.add(run)
                    models.setdefault(name, vae)
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.print(f"Interrupted: {len(report.runs)} of {total} runs are finished; theirs is what {folder} holds.")
    if report.finished:
        console.print(report.table())
        draw(report, data, {name: vae for name, vae in models.items() if vae is not None})
    console.print(f"Table, figures and pictures: {folder}", soft_wrap=True)
    return code or int(len(report.finished) < len(report.runs))


def run_one(data: Data, name: str, seed: int, config: Config, display: Display) -> tuple[VAE | None, Run]:
    """One posterior and seed, trained and evaluated; without figures where training failed."""
    start = time.perf_counter()
    run: Run = {"posterior": name, "seed": seed, "error": None}
    try:
        vae, history = train_one(data, name, seed, config, display.watch(name, seed))
        figures = evaluate(vae, data, config)
    except TrainingError as error:
        display.finish(f"{name}, seed {seed} failed: {error}")
        return None, run | {"error": str(error)}
    run |= figures | {"parameters": count_parameters(vae), "seconds": time.perf_counter() - start} | asdict(history)
    display.finish(
        f"{name}, seed {seed}: -ELBO {run['neg_elbo']:.2f}, NLL {run['nll']:.2f}, best of {len(history.valid)} epochs: "
        f"{history.best_epoch}, {run['seconds']:.0f} s" + _skipped(history)
    )
    return vae, run


def _skipped(history: History) -> str:
    return f", {history.skipped_steps} steps skipped: not finite" if history.skipped_steps else ""


class Display:
    """One live line for the run in hand, where there is a terminal, and a line for each finished run."""

    def __init__(self, console: Console, runs: int, epochs: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[left]}"))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.progress.add_task("", total=runs, left="")
        self.epochs, self.done, self.start = epochs, 0, time.perf_counter()

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def watch(self, name: str, seed: int) -> Callable[[History], None]:
        """What training calls after each epoch."""

        def on_epoch(history: History) -> None:
            epoch = len(history.valid)
            share = self.done + epoch / self.epochs
            seconds = (time.perf_counter() - self.start) * (self.progress.tasks[0].total or 0 - share) / share
            train = history.train[-1]
            text = f"{name} seed {seed}  epoch {epoch}/{self.epochs}  -ELBO train {train or float('nan'):.2f} "
            text += f"valid {history.valid[-1]:.2f}"
            left = f"at most {seconds // 60:.0f}:{seconds % 60:02.0f} left"
            self.progress.update(self.task, completed=share, description=text, left=left)

        return on_epoch

    def finish(self, line: str) -> None:
        """A run has ended."""
        self.done += 1
        self.progress.update(self.task, completed=self.done)
        self.progress.console.print(line, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line on stderr.

    Args:
        arguments: instead of the process's own.

    Returns:
        The exit code: 2 for a wrong option or value, 1 for missing data or a failed run, 130 after Ctrl-C.
    """
    try:
        return app(arguments, standalone_mode=False) or 0
    except USAGE_ERROR as error:
        return _complain(getattr(error, "format_message", error.__str__)(), 2)
    except ConfigError as error:
        return _complain(str(error), 2)
    except DataError as error:
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
