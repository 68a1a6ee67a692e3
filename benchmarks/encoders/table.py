"""The two tables of a run: every encoder's line and start, and what a short training made of three."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.encoders.fitting import Fit, Plan
from benchmarks.encoders.starts import FLOWS, Start
from benchmarks.table import Table, grouped, mean_sd


def lines(starts: Sequence[Start]) -> Table:
    """A row for each encoder: the line that wraps it, and how far from its own Gaussian it starts."""
    rows = [[each.name, f"`{each.line}`", _largest(each.single), _largest(each.double)] for each in starts]
    caption = (
        f"abs(dz): the largest distance of z from loc + std * noise of the encoder's own Gaussian before any training, "
        f"over {', '.join(FLOWS)} and all latents; float32 rounds a z between 2 and 4 to 2.4e-07. -: the encoder "
        f"returns features and has no Gaussian of its own, or it is of half precision"
    )
    header = ["encoder", "the line", "abs(dz), float32", "abs(dz), float64"]
    return Table(header, rows, "lines", caption, numbers=False)


def _largest(distances: Mapping[str, float] | None) -> str:
    return "-" if distances is None else f"{max(distances.values()):.1e}"


class Trained(NamedTuple):
    """On which data, and for how long."""

    data: str
    plan: Plan


def elbos(fits: Sequence[Fit], trained: Mapping[str, Trained]) -> Table:
    """A row for each model: the ELBO when it is wrapped, and after more steps with the Gaussian and with the flow."""
    rows = []
    for name, group in grouped(fits, lambda fit: fit.model).items():
        of = trained[name]
        cells = [mean_sd([read(fit) for fit in group]) for read in COLUMNS.values()]
        time = statistics.fmean(fit.flow_ms / fit.gaussian_ms for fit in group)
        rows.append([name, of.data, f"{of.plan.before:,} + {of.plan.after:,}", *cells, f"{time:.1f}"])
    header = ["model", "data", "steps", *COLUMNS, "time"]
    return Table(header, rows, "ELBO before and after", caption(fits, next(iter(trained.values())).plan))


COLUMNS: dict[str, Callable[[Fit], float]] = {
    "before": lambda fit: fit.before,
    "flow at step 0": lambda fit: fit.start,
    "Gaussian after": lambda fit: fit.gaussian,
    "flow after": lambda fit: fit.flow,
    "gain": lambda fit: fit.flow - fit.gaussian,
}


def caption(fits: Sequence[Fit], plan: Plan) -> str:
    """What the numbers are."""
    seeds = len({fit.seed for fit in fits})
    skipped = sum(fit.skipped_steps for fit in fits)
    return (
        f"Nats an image, mean (standard deviation) over {seeds} seeds; of the test part {plan.images:,} images at "
        f"most, at equal distances, with {plan.samples} samples of z each. steps: with the encoder's own Gaussian and "
        f"its closed-form KL, then more of them with it, and equally many with the flow ({plan.flow}) from the same "
        f"weights, on the same batches of {plan.batch}. gain: of the flow over the Gaussian, both after; time: of a "
        f"step with the flow, in steps with the Gaussian. Steps skipped as not finite: {skipped}"
    )
