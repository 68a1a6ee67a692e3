"""The programme: every contest of a run, in the order in which they are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks.speed.contests import (
    BACKWARD,
    FORWARD,
    FULL_COVARIANCE,
    PLANAR,
    TRAINING,
    external,
    full_covariance,
    planar,
    training,
    training_captured,
    training_compiled,
)
from benchmarks.speed.growth import growths
from benchmarks.speed.hall import Hall
from benchmarks.speed.nll import nll
from benchmarks.speed.results import Contest

Held = Callable[[], Contest]


def programme(hall: Hall) -> Iterator[tuple[str, Held]]:
    """Every contest of the tables, by its title, to be held one after the other."""
    plan = hall.plan
    for size in plan.training:
        yield f"{TRAINING} {size}", partial(training, hall, size)
    for size in plan.compiled:
        yield f"{TRAINING} {size}, compiled", partial(training_compiled, hall, size)
    if hall.device.type == "cuda":
        for size in plan.training:
            yield f"{TRAINING} {size}, CUDA graph", partial(training_captured, hall, size)
    for size in plan.external:
        for backward in (False, True):
            yield f"{BACKWARD if backward else FORWARD} {size}", partial(external, hall, size, backward=backward)
    yield FULL_COVARIANCE, partial(full_covariance, hall)
    yield PLANAR, partial(planar, hall)
    yield f"NLL, {plan.samples} samples", partial(nll, hall)
    yield from growths(hall)


def curves(hall: Hall) -> Iterator[tuple[str, str, Held]]:
    """The contests of the plot: title, what varies, and the contest, in short rounds."""
    rounds = replace(hall.rounds, budget=hall.plan.curve_budget)
    for what, axis, sizes in hall.plan.curves:
        hold = partial(external, backward=False) if what == "external" else training
        for size in sizes:
            yield what, axis, partial(hold, hall, size, rounds=rounds)
