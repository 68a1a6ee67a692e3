"""The models of published tables, `python -m benchmarks images --preset NAME`, and our numbers beside theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.config import GRADIENTS, LOGS, ConfigError, check_choice, check_device, check_options, posterior_names
from benchmarks.data import NAMES as DATA
from benchmarks.data import load as load_data
from benchmarks.flows import parse_options
from benchmarks.images.page import publish
from benchmarks.images.presets import NAMES, adapt, load
from benchmarks.images.toys import draw
from benchmarks.job import job
from benchmarks.optimizers import OPTIMIZERS, PRECISIONS, RATES
from benchmarks.report import Report
from benchmarks.run import Out, check_alone, terminal

TOY_STEPS = 1500


def images(
    context: typer.Context,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs: trains nothing, and prints their numbers beside the published ones."),
    ] = None,
    *,
    preset: Annotated[str | None, typer.Option(help=f"What to train: {', '.join(NAMES)}.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Another data set: {', '.join(DATA)}.")] = None,
    posterior: Annotated[
        list[str] | None, typer.Option(help="Other posteriors on the preset's networks; repeat it, or use commas.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="RECIPE.OPTION=VALUE, as orthogonal_sylvester.rank=8; repeat it.", metavar="TEXT"),
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Steps of the posterior; iaf-mnist: 2 to 8.")] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Units of each hidden layer of the posterior's networks; iaf-mnist: 320 or 1920.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of weights, data and noise; repeat it for several runs.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="At most.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Of each training; the epoch then in hand is the last.")] = None,
    kl_warmup: Annotated[int | None, typer.Option("--kl-warmup", help="Epochs of it.")] = None,
    samples: Annotated[int | None, typer.Option(help="Importance samples an image behind NLL.")] = None,
    count: Annotated[int | None, typer.Option("--images", help="Test images that are evaluated; 0 for all.")] = None,
    trusted_images: Annotated[
        int | None, typer.Option(help="Test images whose NLL is annealed too; 0 for none.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="(Sample, image) pairs evaluated at once: memory.")] = None,
    gradient: Annotated[str | None, typer.Option(help=f"Of the objective: {', '.join(GRADIENTS)}.")] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = None,
    decay: Annotated[str | None, typer.Option(help=f"Of the learning rate: {', '.join(RATES)}.")] = None,
    clip: Annotated[float | None, typer.Option(help="Norm that longer gradients are shortened to.")] = None,
    averaging: Annotated[
        float | None, typer.Option(help="Share that the averaged weights keep in each step; 0 averages none.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Of the networks in training: {', '.join(PRECISIONS)}.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    eager: Annotated[bool | None, typer.Option("--eager", help="On a GPU: no CUDA graph.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    log: Annotated[str, typer.Option(help=f"Of each epoch: {', '.join(LOGS[1:])}.")] = "csv",
    pictures: Annotated[bool, typer.Option(help="Draw the pictures of a job.")] = True,
    out: Out = None,
    toys: Annotated[
        bool, typer.Option("--toys", help="Train no preset: draw posteriors that tile the prior, and an autoencoder.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a stopped run to go on with, to the same figures.", file_okay=False)
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Put the table of FOLDERS on this page, between its marks.")] = None,
) -> None:
    """Train a model of a published table as its authors did, and print our numbers.

    A preset is a file in benchmarks/images/presets. Options shorten its protocol or change a part; what differs from
    the file is named wherever the run's numbers are shown. A run is resumed to the same figures, on the CPU to the same
    bits. For several GPUs: accelerate launch -m benchmarks images --preset NAME --device cuda.
    """
    if data is not None:
        check_choice("data", data, DATA)
    if resume is not None:
        check_alone(context, "resume", "pictures")
        raise typer.Exit(job(Report.resume(resume), pictures=pictures))
    if toys:
        check_alone(context, "toys", "data", "out")
        found = draw(load_data(data or "digits"), folder := out or Path("runs/toys"), TOY_STEPS)
        terminal().print(f"ELBO of the toy: {found}\nPictures: {folder}", soft_wrap=True)
        return
    if folders:
        check_alone(context, "folders", "page")
        publish([Report.read(folder) for folder in folders], page)
        return
    if page is not None:
        raise ConfigError("page: expected folders of runs whose table goes there, got none")
    if preset is None:
        raise ConfigError(f"preset: expected one of {', '.join(NAMES)}, or folders of runs, got neither")
    given = context.params | {
        "posteriors": posterior_names(posterior) if posterior else None,
        "options": parse_options(option) if option else None,
        "seeds": tuple(dict.fromkeys(seed)) if seed else None,
        "images": count,
    }
    config = check_device(check_options(adapt(load(preset), **given)))
    raise typer.Exit(job(config, out, pictures=pictures))
