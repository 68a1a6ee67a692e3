"""The plot of a run: cost against dim, hidden width and samples, a line for each contestant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.speed.results import DENSE, OURS, PRODUCTS, Contest

# Okabe and Ito's palette, which colour-blind readers can tell apart; a marker each for those who print in grey.
STYLES = {
    OURS: ("#D55E00", "o"),
    DENSE: ("#000000", "s"),
    PRODUCTS: ("#999999", "."),
    "zuko": ("#0072B2", "^"),
    "nflows": ("#009E73", "v"),
    "pyro": ("#CC79A7", "D"),
    "normflows": ("#56B4E9", "P"),
}
DPI = 130

Curves = dict[tuple[str, str], list[Contest]]
"""By what is timed and the size that varies."""


def draw(curves: Curves, path: Path) -> None:
    """Write the plot."""
    columns = 2 if len(curves) > 1 else 1
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, ((_, axis), contests) in zip(panels, curves.items(), strict=False):
        _panel(panel, axis, contests)
    for panel in panels[len(curves) :]:
        panel.axis("off")
    lines = {str(line.get_label()): line for panel in panels for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize="small")
    figure.suptitle("Time of one call, median and quartiles; both axes logarithmic")
    figure.savefig(path, dpi=DPI)


def _panel(panel: Axes, axis: str, contests: Sequence[Contest]) -> None:
    for name, (colour, marker) in STYLES.items():
        here = [one for one in contests if name in one.seconds]
        if not here:
            continue
        x = [one.at[axis] for one in here]
        low, middle, high = ([1e3 * getattr(one.time(name), key) for one in here] for key in ("low", "median", "high"))
        panel.plot(x, middle, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms", title=f"{contests[0].what}: {_fixed(contests)}")
    panel.title.set_fontsize("small")
    panel.set_xticks([one.at[axis] for one in contests])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for ticks in (panel.xaxis, panel.yaxis):
        ticks.set_minor_locator(NullLocator())
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.tick_params(labelsize="x-small")
    panel.grid(alpha=0.3)


def _fixed(contests: Sequence[Contest]) -> str:
    """The sizes that do not vary."""
    fixed = {key: value for key, value in contests[0].at.items() if len({one.at[key] for one in contests}) == 1}
    return ", ".join(f"{key} {value}" for key, value in fixed.items() if (key, value) != ("samples", 1))
