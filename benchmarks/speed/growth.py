"""What every recipe costs as z grows: where a cost grows faster than it must, a table over dim shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from benchmarks.speed.flows import training_loss
from benchmarks.speed.hall import Hall
from benchmarks.speed.results import EAGER, Contest
from benchmarks.speed.steps import Step
from benchmarks.speed.timing import Call, contest
from benchmarks.table import Table, grouped
from flowpost.recipes import RECIPES

FEATURES, BATCH = 64, 64
SAMPLE, TRAINING, LOG_PROB, HEAD = "sample", "training step", "log_prob", "head"
GROWTH = "cost of a recipe"


def growths(hall: Hall) -> Iterator[tuple[str, partial[Contest]]]:
    """Every recipe at every dim of the plan."""
    for name in RECIPES:
        for dim in hall.plan.growth:
            yield f"{GROWTH}: {name}, dim {dim}", partial(growth, hall, name, dim)


def growth(hall: Hall, name: str, dim: int) -> Contest:
    """A recipe with its defaults: a draw, a training step, log q at z from elsewhere, and its head's own work."""
    torch.manual_seed(0)
    posterior = RECIPES[name](FEATURES, dim).to(hall.device)
    h = torch.randn(BATCH, FEATURES, device=hall.device, requires_grad=True)
    leaves = [h, *posterior.parameters()]
    head = cast(nn.Module, posterior.head)
    with torch.no_grad():
        z = posterior(h).z

    calls: dict[str, Call] = {
        SAMPLE: torch.no_grad()(lambda: posterior(h)),
        TRAINING: Step(leaves, lambda: training_loss(*posterior(h)[:2])),
        LOG_PROB: torch.no_grad()(lambda: posterior.log_prob(z, h)),
        HEAD: Step([h, *head.parameters()], lambda: head(h).sum()),
    }
    rounds = replace(hall.rounds, budget=hall.plan.growth_budget)
    return Contest(GROWTH, name, EAGER, contest(calls, hall.device, rounds), at={"dim": dim})


def growth_tables(contests: Iterable[Contest]) -> list[Table]:
    """One row a recipe: milliseconds at each dim, one after the other."""
    found = grouped((one for one in contests if one.what == GROWTH), lambda one: one.size)
    if not found:
        return []
    dims = " / ".join(str(one.at["dim"]) for one in next(iter(found.values())))

    def times(group: list[Contest], use: str) -> str:
        return " / ".join(_three_digits(1e3 * one.time(use).median) for one in group)

    def ratios(group: list[Contest], use: str, other: str) -> str:
        return " / ".join(_three_digits(spread.median) for one in group if (spread := one.ratio(use, other)))

    rows = [
        [
            name,
            *(times(group, use) for use in (SAMPLE, TRAINING, LOG_PROB)),
            ratios(group, LOG_PROB, SAMPLE),
            ratios(group, TRAINING, HEAD),
        ]
        for name, group in found.items()
    ]
    header = ["recipe", SAMPLE, TRAINING, LOG_PROB, "log_prob in draws", "training step in its head's"]
    caption = (
        f"Medians in ms at dim {dims}; {FEATURES} features, {BATCH} examples, other options by default. How many draws"
        " log_prob takes, and a training step over the head's own product and gradient, are ratios within rounds"
    )
    return [Table(header, rows, "cost over dim", caption)]


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
