"""`python -m benchmarks sandwich FOLDER ...`: log p(x) of jobs' models between two bounds, and against the integral."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from benchmarks.canvas import blank, title
from benchmarks.config import ConfigError, check_device
from benchmarks.data import Data
from benchmarks.files import Content, finite
from benchmarks.filling import TABLES, origin, pictured
from benchmarks.job import load_data, models
from benchmarks.quadrature import quadrature
from benchmarks.report import Report
from benchmarks.run import Out, Page, Run, terminal
from benchmarks.table import Table, grouped
from benchmarks.train import EVALUATION_SEED, seeded
from benchmarks.workers import cpu_threads
from flowpost.evaluation import annealed_estimate, importance_estimate, sandwich
from flowpost.importance import LIMIT, ImportanceEstimate, UnreliableEstimateWarning
from flowpost.vae import VAE

REFINE = 25  # steps of the chains that a refined proposal is fitted to
DPI = 130


@dataclass(frozen=True)
class Plan:
    """What is spent on each model."""

    count: int
    chains: int
    temperatures: int
    leapfrogs: int
    samples: int


Row = dict[str, Any]


def sandwich_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of finished jobs; of 2 latents, the integral too.", file_okay=False)
    ],
    *,
    count: Annotated[
        int, typer.Option(min=1, help="Images drawn from each model; of 2 latents and N(0, I), test images too.")
    ] = 100,
    chains: Annotated[int, typer.Option(min=1, help="For each image, either way.")] = 16,
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
    plan = Plan(count, chains, temperatures, leapfrogs, samples)
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
        found = sandwich(vae, plan.count, shape, plan.chains, plan.temperatures, plan.leapfrogs, samples=plan.samples)
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
    found = annealed_estimate(vae, x, plan.chains, plan.temperatures, plan.leapfrogs)
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


def shown(content: Content, page: str = "") -> str:
    """The text of the page, or of a file that has no picture beside it."""
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in content["rows"]]
    plot = [pictured(page, "How far each estimate of log p(x) falls short")] if page else []
    return "\n\n".join([*plot, _table(rows, Plan(**content["plan"])).markdown(), origin(content)])


def _named(rows: Sequence[Row], show: Callable[[str], str] = str) -> list[str]:
    """The posterior of each row, with its job's folder where another job has the same row."""
    alike = grouped(rows, _kind)
    several = {kind for kind, found in alike.items() if len({row.get("job") for row in found}) > 1}
    return [show(row["posterior"]) + (f", {row.get('job')}" if _kind(row) in several else "") for row in rows]


def _kind(row: Row) -> tuple[str, int, str]:
    return row["posterior"], row["dim"], row["images"]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "latents": lambda row: str(row["dim"]),
    "images": lambda row: f"{row['count']} {row['images']}",
    "-log p(x), from above": lambda row: f"{-row['above']:.2f}",
    "annealed": lambda row: _error(row, "gap"),
    "worst": lambda row: f"{row['worst']:.2f}",
    "importance": lambda row: _error(row, "sampled"),
    "k>0.7": lambda row: f"{row['heavy']:.2f}",
    "refined": lambda row: _error(row, "refined"),
    "refined k>0.7": lambda row: f"{row['refined_heavy']:.2f}",
    "accepted": lambda row: f"{row['acceptance']:.2f}",
    "residual": lambda row: "-" if math.isnan(row["residual"]) else f"{row['residual']:.0e}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
}


def _table(rows: Sequence[Row], plan: Plan) -> Table:
    caption = (
        "-log p(x), from above: on images drawn from the model by the annealed upper bound, on test images by the "
        "integral over z; annealed, importance, refined: by how many nats each lower bound falls short of it, mean ± "
        "standard error over images; worst: of the annealed one, the worst image; annealed: "
        f"{plan.chains} chains of {plan.temperatures:,} temperatures of {plan.leapfrogs} leapfrogs, and half as many "
        "from the prior; importance: "
        f"{plan.samples:,} samples of q(z|x); refined: as many of a proposal fitted to chains of {REFINE} steps; "
        "k>0.7: share of images whose k-hat is above; residual: of the inverse that the way back starts with; "
        "seconds: of the annealing and importance sampling, both ways on images of the model's own"
    )
    cells = [[name, *(cell(row) for cell in COLUMNS.values())] for name, row in zip(_named(rows), rows, strict=True)]
    return Table(["posterior", *COLUMNS], cells, caption=caption)


def _error(row: Row, key: str) -> str:
    return f"{row[key]:.2f} ± {row[f'{key}_error']:.2f}"


def picture(rows: Sequence[Row]) -> Figure:
    """For each model, how far below the reference each estimate lies: 0 is the upper bound, or the integral."""
    figure = blank(8, 1.6 + 0.5 * len(rows))
    panel = figure.subplots()
    marks = {"sampled": ("o", "importance samples"), "refined": ("s", "refined importance samples")}
    marks["gap"] = ("D", "annealed")
    for key, (mark, label) in marks.items():
        short = [-row[key] for row in rows]
        errors = [row[f"{key}_error"] for row in rows]
        panel.errorbar(short, range(len(rows)), xerr=errors, fmt=mark, label=label, markersize=6, capsize=3)
    panel.axvline(0, color="0.4", linewidth=1)
    names = [f"{name}, {row['dim']}, {row['images']}" for name, row in zip(_named(rows, title), rows, strict=True)]
    panel.set_yticks(range(len(rows)), names)
    panel.invert_yaxis()
    panel.set_xscale("symlog", linthresh=0.1)
    panel.grid(axis="x", alpha=0.3)
    panel.set(xlabel="nats from the upper bound (its own images) or the integral (test images), on average")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure
