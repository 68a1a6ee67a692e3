"""`python -m benchmarks sandwich FOLDER ...`: log p(x) of jobs' models between two bounds, and against the integral."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.config import ConfigError, check_device
from benchmarks.data import Data
from benchmarks.files import finite
from benchmarks.filling import TABLES
from benchmarks.job import load_data, models
from benchmarks.quadrature import quadrature
from benchmarks.report import Report
from benchmarks.run import Out, Page, Run, terminal
from benchmarks.sandwich.page import REFINE, Plan, Row, picture, shown
from benchmarks.train import EVALUATION_SEED, seeded
from benchmarks.workers import cpu_threads
from flowpost.evaluation import annealed_estimate, importance_estimate, sandwich
from flowpost.importance import LIMIT, ImportanceEstimate, UnreliableEstimateWarning
from flowpost.vae import VAE

DPI = 130


def sandwich_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of finished jobs; of 2 latents, the integral too.", file_okay=False)
    ],
    *,
    count: Annotated[
        int, typer.Option(min=1, help="Images drawn from each model; of 2 latents and N(0, I), test images too.")
    ] = 100,
    chains: Annotated[int, typer.Option(min=1, help="For each image, either way.")] = 16,
    prior_chains: Annotated[
        int | None, typer.Option(min=0, help="More of them, from the prior; half as many if not given.")
    ] = None,
    temperatures: Annotated[int, typer.Option(min=1, help="Of each chain.")] = 1000,
    leapfrogs: Annotated[int, typer.Option(min=1, help="Gradients at each temperature.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Importance samples for each image, beside it.")] = 1000,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N, whatever a model was trained on.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    out: Out = None,
    page: Page = None,
    mark: Annotated[str, typer.Option(help="Between which marks of the page.")] = TABLES,
) -> None:
    """How far can each estimate of log p(x) be trusted? For the trained model of each posterior's first seed.

    On images drawn from the model, annealing gives a lower bound and an upper one. Importance sampling stands beside
    them, from q(z|x) itself and from a proposal refined for each image. Nothing is trained.
    """
    plan = Plan(count, chains, temperatures, leapfrogs, samples, prior_chains)
    reports = [_moved(Report.read(folder), device) for folder in folders]
    run, console = Run.begin("sandwich", out, device=device, threads=threads, page=page, mark=mark), terminal()
    rows: list[Row] = []
    with cpu_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the table has the share of such images
        for report in reports:
            data = load_data(report.config)
            for name, vae in models(report, data, console).items():
                rows += _rows(vae, name, report, data, plan, console)
                _write(run, rows, plan)
    if not rows:
        raise ConfigError("folders: expected jobs with trained models, got none")


def _moved(report: Report, device: str) -> Report:
    """The report of a job as if it had been trained on a device, where its models then go."""
    report.config = check_device(replace(report.config, device=device))
    return report


def _rows(vae: VAE, name: str, report: Report, data: Data, plan: Plan, console: Console) -> list[Row]:
    """The figures of a model: on its own images, and of two latents on test images."""
    config = report.config
    head = {"data": config.data, "dim": config.dim, "posterior": name, "job": str(report.run.folder)}
    with _seeded(vae):
        found = [head | {"images": "its own"} | _own(vae, data, plan)]
        if config.dim == 2 and not config.prior:  # nobody knows how far out a learned p(z) reaches
            found.append(head | {"images": "test"} | _test(vae, data.test[: plan.count].to(config.device), plan))
    for row in found:
        console.print(f"{name}, {row['dim']} latents, {row['images']}: gap {row['gap']:.3f}, {row['seconds']:.0f} s")
    return found


def _seeded(vae: VAE) -> AbstractContextManager[None]:
    """The same draws every time, on the model's device."""
    return seeded(EVALUATION_SEED, next(vae.parameters()).device)


def _seconds(began: float) -> float:
    """Since then, with what a GPU has still to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _own(vae: VAE, data: Data, plan: Plan) -> Row:
    """On images drawn from the model: all as nats below the upper bound."""
    shape, began = tuple(data.test.shape[1:]), time.perf_counter()
    with _seeded(vae):
        found = sandwich(vae, plan.count, shape, *plan.ladder, prior_chains=plan.prior_chains, samples=plan.samples)
    seconds = _seconds(began)
    x = _drawn_again(vae, plan.count, shape)
    refined = importance_estimate(vae, x, plan.samples, refine=REFINE, pairs=5000)
    return {
        **_figures(found.upper.log_p, found.lower.log_p, found.importance, refined),
        "acceptance": found.lower.acceptance.mean().item(),
        "residual": found.residual.max().item(),
        "seconds": seconds,
    }


def _drawn_again(vae: VAE, count: int, shape: tuple[int, ...]) -> Tensor:
    """The same images as `sandwich` draws, first of all, from the same seed."""
    with _seeded(vae):
        return vae.sample(count, shape)


def _test(vae: VAE, x: Tensor, plan: Plan) -> Row:
    """On test images: all as nats below the integral."""
    began = time.perf_counter()
    found = annealed_estimate(vae, x, *plan.ladder, prior_chains=plan.prior_chains)
    seconds = _seconds(began)
    sampled = importance_estimate(vae, x, plan.samples, pairs=5000)
    refined = importance_estimate(vae, x, plan.samples, refine=REFINE, pairs=5000)
    return {
        **_figures(quadrature(vae, x), found.log_p, sampled, refined),
        "acceptance": found.acceptance.mean().item(),
        "residual": math.nan,
        "seconds": seconds,
    }


def _figures(above: Tensor, lower: Tensor, sampled: ImportanceEstimate, refined: ImportanceEstimate) -> Row:
    """Means over images: the reference, and by how much each estimate falls short of it."""
    short = {"gap": above - lower, "sampled": above - sampled.log_p, "refined": above - refined.log_p}
    row: Row = {"above": above.mean().item(), "worst": (above - lower).max().item(), "count": len(above)}
    for key, values in short.items():
        row |= {key: values.mean().item(), f"{key}_error": values.std().item() / math.sqrt(len(values))}
    for key, estimate in (("heavy", sampled), ("refined_heavy", refined)):
        row[key] = (~(estimate.k_hat <= LIMIT)).double().mean().item()
    return row


def _write(run: Run, rows: Sequence[Row], plan: Plan) -> None:
    """All that is known so far: a stop loses no model."""
    plain = [{key: finite(value) for key, value in row.items()} for row in rows]
    content = run.head() | {"plan": asdict(plan), "rows": plain}
    run.write("sandwich.json", content)
    run.write("sandwich.md", shown(content))
    picture(rows).savefig(run.folder / "sandwich.png", dpi=DPI)
    run.publish("sandwich.json", shown, "sandwich.png")
