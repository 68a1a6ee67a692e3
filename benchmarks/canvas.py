"""What all pictures of a job share: sizes, colours, names."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.models import POSTERIORS

# Okabe and Ito's palette, which colour-blind readers can tell apart, for the first; then Tol's muted one, which comes
# round again: no picture tells posteriors apart by colour alone.
COLOURS = {"diagonal": "#0072B2", "full_covariance": "#D55E00", "planar": "#009E73", "iaf": "#CC79A7"}
OTHERS = ("#56B4E9", "#E69F00", "#332288", "#117733", "#882255", "#999933", "#44AA99", "#CC6677", "#AA4499", "#88CCEE")
ACROSS = 5  # panels side by side: more of them go on below


def blank(width: float, height: float) -> Figure:
    """A figure of its own, which no global state holds on to."""
    return Figure(figsize=(width, height), layout="constrained")


def colour(name: str) -> str:
    """A posterior's colour, the same in every picture."""
    others = [each for each in POSTERIORS if each not in COLOURS]
    return COLOURS[name] if name in COLOURS else OTHERS[others.index(name) % len(OTHERS)]


def title(name: str) -> str:
    """A posterior's name, in words."""
    return name.replace("_", " ")


def panels(
    count: int,
    width: float,
    height: float,
    rows: int = 1,
    *,
    across: int = ACROSS,
    sharey: bool = False,
    margin: float = 0.6,
) -> tuple[Figure, np.ndarray]:
    """A figure of `count` columns of `rows` panels each; those that do not fit side by side go on below.

    Args:
        count: of the columns.
        width: of a panel, in inches.
        height: of a column, in inches.
        rows: panels in a column.
        across: columns side by side, at most.
        sharey: whether panels in the same place of their columns share their vertical axis.
        margin: added to the figure's width.

    Returns:
        The figure, and its panels ``(rows, count)``.
    """
    across, blocks = min(count, across), math.ceil(count / across)
    figure = blank(width * across + margin, height * blocks)
    made = figure.subplots(rows * blocks, across, squeeze=False)
    found = made.reshape(blocks, rows, across).transpose(1, 0, 2).reshape(rows, -1)
    for panel in found[:, count:].flatten():
        panel.axis("off")
    if sharey:
        for line in found:
            for index, panel in enumerate(line[1:count], 1):
                panel.sharey(line[0])
                panel.tick_params(labelleft=index % across == 0)
    return figure, found[:, :count]


def bar_chart(count: int) -> Figure:
    """A figure for so many bars, narrower ones where they are many."""
    return blank(min(1.5, 0.4 + 5.5 / count) * count + 2.2, 4 if count <= ACROSS else 5)


def name_bars(panel: Axes, names: Iterable[str]) -> None:
    """Name the bars at 0, 1, ... of a panel; many names are written upwards."""
    labels = [title(name) for name in names]
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(labels) > ACROSS else {}
    panel.set_xticks(range(len(labels)), labels, **turned)
