"""The command line: `python -m benchmarks` trains the same VAE with each posterior and says which one pays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.compare import compare
from benchmarks.config import (
    ALL,
    BASIC,
    GRADIENTS,
    OBJECTIVES,
    Config,
    ConfigError,
    configure,
    is_file,
    posterior_names,
)
from benchmarks.data import NAMES, DataError
from benchmarks.encoders import encoders
from benchmarks.flows import PRIORS, parse_options
from benchmarks.images import images
from benchmarks.job import job
from benchmarks.models import POSTERIORS
from benchmarks.own.setup import configure_own
from benchmarks.own.values import forms
from benchmarks.pages import pages
from benchmarks.posteriors.command import posteriors
from benchmarks.reliability.command import reliability
from benchmarks.report import Report
from benchmarks.run import Out, check_alone, terminal
from benchmarks.sandwich import sandwich_command
from benchmarks.speed import speed
from benchmarks.targets import targets

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(compare)
app.command()(encoders)
app.command()(images)
app.command()(pages)
app.command()(posteriors)
app.command()(reliability)
app.command("sandwich")(sandwich_command)
app.command()(speed)
app.command()(targets)
# Newer typers bring a click of their own, and none exports the base class of its errors: it is reached through one.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


# \b: keep these lines as they are.
EXAMPLES = """\b
Examples:
  python -m benchmarks                     digits, four posteriors, three seeds
  python -m benchmarks --quick --dim 2     true posteriors beside the fitted ones
  python -m benchmarks --posterior all     every posterior there is
  python -m benchmarks --data mnist-static --posterior diagonal,iaf --seeds 1
  python -m benchmarks --data mine.npz     your own data; its values say which likelihood
  python -m benchmarks --objective iwae --gradient dreg --train-samples 50
  python -m benchmarks --resume runs/NAME  go on with a job that was stopped
  python -m benchmarks compare runs/*      finished jobs in one table, with differences
  python -m benchmarks encoders            other people's encoders: one line each, and what a flow pays
  python -m benchmarks images --preset small-iaf   a published model, beside the published numbers
  python -m benchmarks posteriors          exact KL to posteriors of data, from flowpost.fit
  python -m benchmarks reliability         hard uses, flowpost beside public libraries
  python -m benchmarks sandwich runs/*     log p(x) of finished jobs' models between two bounds
  python -m benchmarks speed               times, beside dense layers and public libraries
  python -m benchmarks targets             exact KL to densities that are known
"""


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def main_job(
    context: typer.Context,
    *,
    data: Annotated[
        str, typer.Option(help=f"Data set: {', '.join(NAMES)}, or a file FILE.npz of your own (docs/own-data.md).")
    ] = "digits",
    likelihood: Annotated[
        str | None, typer.Option(help=f"p(x|z) of a file: {forms()}.  [default: guessed from its values]")
    ] = None,
    networks: Annotated[
        str | None,
        typer.Option(help="Your encoder and decoder, module:function of networks(shape, dim, numbers)."),
    ] = None,
    posterior: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Posterior to train: {', '.join(POSTERIORS)}, or {ALL}; repeat it, or list several with commas.  "
            f"[default: {', '.join(BASIC)}]"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="RECIPE.OPTION=VALUE, as iaf.steps=4 or iaf.hidden=[128,128]; repeat it.", metavar="TEXT"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of runs of each posterior.  [default: 3]")] = None,
    first_seed: Annotated[int, typer.Option(help="The first run's seed; the next ones count up.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Epochs at most.  [digits: 150]")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better validation -ELBO.  [digits: 30]")
    ] = None,
    kl_warmup: Annotated[
        int | None,
        typer.Option(
            "--kl-warmup", "--warmup", help="Epochs over which the KL's weight rises from 0 to 1.  [digits: 20]"
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help=f"What is maximized: {', '.join(OBJECTIVES)}.")] = "elbo",
    alpha: Annotated[
        float | None, typer.Option(help="Order of the renyi bound, from 0, which is iwae, to below 1.  [renyi: 0.5]")
    ] = None,
    train_samples: Annotated[
        int | None,
        typer.Option(help="Samples of z for each image in a training step: K of iwae, renyi.  [elbo: 1, others: 5]"),
    ] = None,
    gradient: Annotated[
        str,
        typer.Option(help=f"Of the objective: {', '.join(GRADIENTS)}; stl is for the elbo, dreg for the others."),
    ] = "standard",
    free_bits: Annotated[
        float, typer.Option(help="Nats of the whole KL, mean over the batch, that cost nothing; elbo only.")
    ] = 0.0,
    gaps: Annotated[
        bool, typer.Option("--gaps", help="Split the gap: the family's part and the encoder's; costs some minutes.")
    ] = False,
    dim: Annotated[
        int | None,
        typer.Option(help="Size of z; with 2, the true posterior is drawn beside each q(z|x).  [digits: 16]"),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Hidden units a layer of encoder and decoder.  [digits: 256]")
    ] = None,
    encoder_width: Annotated[
        int | None, typer.Option(help="Hidden units a layer of the encoder alone.  [default: --width]")
    ] = None,
    decoder_of: Annotated[
        str,
        typer.Option(
            help="Folder of a finished job: the decoder of its first model is taken, and stays as it is.",
            metavar="FOLDER",
        ),
    ] = "",
    prior: Annotated[
        str, typer.Option(help=f"A learned p(z) in place of N(0, I): {', '.join(PRIORS)}, or NAME:STEPS.")
    ] = "",
    batch: Annotated[int | None, typer.Option(help="Images a training step.  [digits: 128]")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.  [digits: 0.003]")] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Share of hidden units dropped in training.  [default: 0]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Importance samples a test image behind NLL.  [digits: 5000, others: 500]")
    ] = None,
    trusted_images: Annotated[
        int | None,
        typer.Option(
            help="Test images, from the first, whose NLL is annealed too, for the first seed.  [default: 50; quick: 0]"
        ),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="(Sample, image) pairs evaluated at once; lower it if memory runs out.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    eager: Annotated[
        bool,
        typer.Option("--eager", help="On a GPU: no CUDA graph; slower, but it names the tensors that are not finite."),
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [digits: 1, others: 2]")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each in a process of its own.")] = 1,
    out: Out = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look within a minute: one seed, few epochs and samples.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a stopped job to go on with, to the same figures; alone, but for --jobs.", file_okay=False
        ),
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
        check_alone(context, "resume", "jobs")
        raise typer.Exit(job(Report.resume(resume), jobs=jobs))
    options = context.params | {
        "posteriors": posterior_names(posterior) if posterior else None,
        "options": parse_options(option) if option else None,
        "seeds": _seeds(seeds, first_seed, quick=quick),
    }
    known = {item.name for item in fields(Config)}
    given = {name: value for name, value in options.items() if name in known}
    if not is_file(data):
        raise typer.Exit(job(configure(**given, quick=quick), out, jobs=jobs))
    config, lines = configure_own(data, given, quick=quick)
    terminal().print("\n".join(lines), soft_wrap=True)
    raise typer.Exit(job(config, out, jobs=jobs))


def _seeds(count: int | None, first: int, *, quick: bool) -> tuple[int, ...]:
    return tuple(range(first, first + ((1 if quick else 3) if count is None else count)))


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
