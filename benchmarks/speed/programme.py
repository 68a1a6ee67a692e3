"""The programme: every contest of a run, in the order in which they are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks.speed.bounds import BACKWARD, FORWARD, FULL_COVARIANCE, ON_GPU, PLANAR, REPLAYED, SPLINE, STEP, TRAINING
from benchmarks.speed.contests import (
    external,
    full_covariance,
    planar,
    spline,
    training,
    training_captured,
    training_compiled,
)
from benchmarks.speed.growth import growths
from benchmarks.speed.half import AMOUNTS, ERROR, HALF, TRAINED, error, half, trained_error
from benchmarks.speed.hall import Hall
from benchmarks.speed.nll import nll
from benchmarks.speed.results import EAGER, GRAPH, Contest
from benchmarks.speed.sizes import WIDE
from benchmarks.speed.vae import VAE_STEP, vae_step
from flowpost.recipes import RECIPES

Held = Callable[[], Contest]


def programme(hall: Hall) -> Iterator[tuple[str, Held]]:
    """Every contest of the tables, by its title, to be held one after the other: those with goals first."""
    plan, on_gpu = hall.plan, hall.device.type == "cuda"
    for size in plan.training:
        yield f"{TRAINING} {size}", partial(training, hall, size)
    for size in plan.captured if on_gpu else ():
        yield f"{TRAINING} {size}, {GRAPH}", partial(training_captured, hall, size)
    for size in plan.external:
        for backward in (False, True):
            yield f"{BACKWARD if backward else FORWARD} {size}", partial(external, hall, size, backward=backward)
    if on_gpu:
        yield from _on_gpu(hall)
    yield FULL_COVARIANCE, partial(full_covariance, hall)
    yield PLANAR, partial(planar, hall)
    yield SPLINE, partial(spline, hall)
    yield f"NLL, {plan.samples} samples", partial(nll, hall)
    for size in plan.compiled:
        yield f"{TRAINING} {size}, compiled", partial(training_compiled, hall, size)
    yield from growths(hall)


def _on_gpu(hall: Hall) -> Iterator[tuple[str, Held]]:
    """Of whole steps, the recipes first whose seconds are bounded; and what half precision costs and takes away."""
    bounded = {*ON_GPU[STEP], *ON_GPU[REPLAYED]}
    for name in sorted(RECIPES, key=lambda name: name not in bounded):
        yield f"{VAE_STEP}: {name}", partial(vae_step, hall, name)
    for graph in (True, False):
        for size in hall.plan.training:
            yield f"{HALF} {size}, {GRAPH if graph else EAGER}", partial(half, hall, size, graph=graph)
    for amount in AMOUNTS:
        yield f"{ERROR}, pushed by {amount}", partial(error, hall, WIDE, amount)
    yield f"{ERROR}, {TRAINED}", partial(trained_error, hall)


def curves(hall: Hall) -> Iterator[tuple[str, str, Held]]:
    """The contests of the plot: title, what varies, and the contest, in short rounds."""
    rounds = replace(hall.rounds, budget=hall.plan.curve_budget)
    for what, axis, sizes in hall.plan.curves:
        hold = partial(external, backward=False) if what == "external" else training
        for size in sizes:
            yield what, axis, partial(hold, hall, size, rounds=rounds)
