"""How far each estimate of log p(x) falls short: the table and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.canvas import blank, title
from benchmarks.files import Content
from benchmarks.filling import origin, pictured
from benchmarks.table import Table, grouped

REFINE = 25  # steps of the chains that a refined proposal is fitted to


@dataclass(frozen=True)
class Plan:
    """What is spent on each model."""

    count: int
    chains: int
    temperatures: int
    leapfrogs: int
    samples: int
    prior_chains: int | None = None  # half as many as the others

    @property
    def ladder(self) -> tuple[int, int, int]:
        """Of the chains from q(z|x)."""
        return self.chains, self.temperatures, self.leapfrogs


Row = dict[str, Any]


def shown(content: Content, page: str = "") -> str:
    """The text of the page, or of a file that has no picture beside it."""
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in content["rows"]]
    plot = [pictured(page, "How far each estimate of log p(x) falls short")] if page else []
    return "\n\n".join([*plot, table(rows, Plan(**content["plan"])).markdown(), origin(content)])


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


def table(rows: Sequence[Row], plan: Plan) -> Table:
    """A row for each model and kind of images."""
    caption = (
        "-log p(x), from above: on images drawn from the model by the annealed upper bound, on test images by the "
        "integral over z; annealed, importance, refined: by how many nats each lower bound falls short of it, mean ± "
        "standard error over images; worst: of the annealed one, the worst image; annealed: "
        f"{plan.chains} chains of {plan.temperatures:,} temperatures of {plan.leapfrogs} leapfrogs, and "
        f"{'half as many' if plan.prior_chains is None else plan.prior_chains} from the prior; importance: "
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
