"""The fitted densities beside their targets, laid out as the paper's figure 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.canvas import panels, title
from benchmarks.targets.energies import ENERGIES, LIMIT
from flowpost import FlowPosterior
from flowpost.recipes import RECIPES

DRAWN = 2  # the size of z that a picture can show
CELLS = 120  # of a target, along each axis
COLUMNS = 9  # of a row of panels, the target's one of them
INCHES = 1.35  # a panel

Densities = list[Tensor]
"""For each energy, of the cells ``(count, count)``, the first axis along z1."""


def cells(count: int) -> Tensor:
    """The middles of the window's cells ``(count, count, 2)``; none of them is on the edge."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ticks = LIMIT * (2 * middles - 1)
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1)


def drawn(name: str, dim: int) -> bool:
    """Whether a posterior is drawn: the recipes at size 2. A peer may have no inverse."""
    return name in RECIPES and dim == DRAWN


def targets() -> Densities:
    """Every p."""
    return [energy.log_prob(cells(CELLS)).exp() for energy in ENERGIES]


@torch.no_grad()
def fitted(posteriors: Sequence[FlowPosterior], count: int) -> Densities:
    """Every q, through the inverse: exact up to the map's conditioning."""
    return [posterior.log_prob(cells(count)).nan_to_num(nan=-math.inf).exp() for posterior in posteriors]


def one_recipe(name: str, by_steps: Mapping[str, Densities]) -> Figure:
    """A recipe with more and more steps, as in the paper: an energy a row, the target and every K a column."""
    return _figure({"target": targets()} | dict(by_steps), f"{title(name)}: q(z) fitted to exp(-U(z)) / Z")


def overview(last: Mapping[str, Densities]) -> Figure:
    """Every recipe at its largest K, an energy a row."""
    return _figure({"target": targets()} | dict(last), "q(z) fitted to the target exp(-U(z)) / Z")


def _figure(columns: Mapping[str, Densities], head: str) -> Figure:
    """A row for each energy, densities on the scale of their target."""
    height = INCHES * len(ENERGIES) + 0.3
    figure, found = panels(len(columns), INCHES, height, len(ENERGIES), across=COLUMNS, margin=0.4)
    box = (-LIMIT, LIMIT, -LIMIT, LIMIT)
    for index, (column, (name, densities)) in enumerate(zip(found.T, columns.items(), strict=True)):
        column[0].set_title(name, fontsize="small")
        for energy, panel, density, target in zip(ENERGIES, column, densities, columns["target"], strict=True):
            top = float(target.max())
            panel.imshow(density.T.numpy(), extent=box, origin="lower", cmap="magma", vmin=0, vmax=top)
            panel.set(xticks=[], yticks=[])
            panel.set_ylabel("" if index % COLUMNS else energy.name, rotation=0, ha="right", va="center")
    figure.suptitle(head, fontsize="medium")
    return figure
