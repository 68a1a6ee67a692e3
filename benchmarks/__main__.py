"""The command line: `python -m benchmarks` trains the same VAE with each posterior and says which one pays."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import flowpost
from benchmarks.checkpoint import Keeper, clear
from benchmarks.config import Config, ConfigError, configure
from benchmarks.data import NAMES, Data, DataError, load
from benchmarks.display import Display
from benchmarks.models import POSTERIORS, build, count_parameters
from benchmarks.plots import draw
from benchmarks.reliability import reliability
from benchmarks.report import Report, Run, by_posterior, evaluate
from benchmarks.speed import speed
from benchmarks.train import History, TrainingError, seeded, train_one
from flowpost.vae import VAE

INTERRUPTED = 130  # the shell's code for Ctrl-C
CHECKPOINTS = "checkpoints"  # a job's folder of them; gone when it is finished

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(reliability)
app.command()(speed)
# Newer typers bring a click of their own, and none exports the base class of its errors: it is reached through one.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


# \b: keep these lines as they are.
EXAMPLES = """\b
Examples:
  python -m benchmarks                     digits, four posteriors, three seeds
  python -m benchmarks --quick --dim 2     true posteriors beside the fitted ones
  python -m benchmarks --data mnist-static --posterior diagonal,iaf --seeds 1
  python -m benchmarks --resume runs/NAME  go on with a job that was stopped
  python -m benchmarks reliability         hard uses, flowpost beside public libraries
  python -m benchmarks speed               times, beside dense layers and public libraries
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
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of a stopped job to go on with, to the same figures; alone.", file_okay=False),
    ] = None,
) -> None:
    """Train the same VAE with each posterior, and print which one pays: nats, seconds, parameters.

    Every posterior gets the same encoder, decoder, optimizer and budget. Training stops early on the validation part;
    the test part is read once, at the end of a run. results.json, table.md and pictures go to the --out folder, and
    are usable after Ctrl-C too. Options that are not given depend on the data set, never on the posterior.
    """
    if context.invoked_subcommand is not None:
        return
    if resume is not None:
        _check_alone(context)
        raise typer.Exit(job(Report.resume(resume)))
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


def _check_alone(context: typer.Context) -> None:
    """Refuse options beside `--resume`: every one of them could change figures."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    others = [f"--{name.replace('_', '-')}" for name in given if name != "resume"]
    if others:
        raise ConfigError(
            f"resume: expected no other option, since the job goes on as it began, got {', '.join(others)}"
        )


def _names(given: list[str] | None) -> tuple[str, ...] | None:
    """The posteriors asked for, once each."""
    return tuple(dict.fromkeys(name.strip() for part in given for name in part.split(","))) if given else None


def _seeds(count: int | None, first: int, *, quick: bool) -> tuple[int, ...]:
    return tuple(range(first, first + ((1 if quick else 3) if count is None else count)))


def job(begun: Config | Report, out: Path | None = None) -> int:
    """Train, evaluate, write and draw, from the beginning or from where a report stopped; the exit code."""
    config = begun.config if isinstance(begun, Report) else begun
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 110)
    data = load(config.data)
    report = begun if isinstance(begun, Report) else _begin(config, out)
    folder, total, code = report.folder, len(config.seeds) * len(config.posteriors), 0
    torch.set_num_threads(config.threads)
    if report.runs:
        console.print(f"{len(report.runs)} of {total} runs are already finished.")
    try:
        with Display(console, total, config.epochs, len(report.runs)) as display:
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
    folder = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.data}"
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
