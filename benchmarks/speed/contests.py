"""The contests: who takes part at which size, after everyone's work has been checked."""

from __future__ import annotations

from dataclasses import asdict

import torch

from benchmarks.speed import others, splines
from benchmarks.speed.bounds import (
    BACKWARD,
    CAPTURED,
    FORWARD,
    FULL_COVARIANCE,
    MEMORY,
    PLANAR,
    SPLINE,
    TRAINING,
    bound,
    goals,
)
from benchmarks.speed.dense import Dense, products
from benchmarks.speed.hall import Hall, build
from benchmarks.speed.memory import mask_bytes, peak_bytes
from benchmarks.speed.ours import Flowpost
from benchmarks.speed.results import DENSE, EAGER, GRAPH, OURS, PRODUCTS, Contest, Goal, MemoryGoal
from benchmarks.speed.sizes import MINI, Size
from benchmarks.speed.steps import Step, captured, compiled, scoring, scoring_step, training_step, why_not
from benchmarks.speed.timing import Call, Rounds, contest
from benchmarks.speed.work import check_scoring, check_training


def training(hall: Hall, size: Size, *, rounds: Rounds | None = None) -> Contest:
    """The training step, eager."""
    flows, left_out = build(hall, size, check_training, hall.contestants)
    steps = {name: training_step(flow) for name, flow in flows.items()}
    calls: dict[str, Call] = {**steps, PRODUCTS: products(size, hall.device)}
    seconds = contest(calls, hall.device, rounds or hall.rounds)
    if rounds is not None:
        return Contest(TRAINING, str(size), EAGER, seconds, left_out=left_out, at=asdict(size))
    memory = {name: peak_bytes(step, step.clear, hall.device) for name, step in steps.items()}
    most = bound(hall.device, MEMORY, size)
    flat = None if most is None else MemoryGoal(most, OURS, DENSE)
    found = goals(hall.device, TRAINING, size, other=DENSE)
    masks = {name: mask_bytes(flow, hall.device) for name, flow in flows.items() if name == OURS}
    return Contest(TRAINING, str(size), EAGER, seconds, found, memory, flat, left_out, asdict(size), masks)


def training_compiled(hall: Hall, size: Size) -> Contest:
    """The training step compiled, beside the eager one; ours has to be no slower than that."""
    own = {OURS: Flowpost, DENSE: Dense}
    flows, left_out = build(hall, size, check_training, own)
    torch._dynamo.reset()
    calls: dict[str, Call] = {f"{OURS}, eager": training_step(flows[OURS])}
    calls |= {name: compiled(training_step(flow), hall.mode) for name, flow in flows.items()}
    seconds = contest(calls, hall.device, hall.rounds)
    mode = f"compiled{f', {hall.mode}' if hall.mode else ''}"
    goal = Goal(1.0, f"{OURS}, eager")
    return Contest(TRAINING, str(size), mode, seconds, (goal,), left_out=left_out, at=asdict(size))


def training_captured(hall: Hall, size: Size) -> Contest:
    """The training step as one CUDA graph, for everyone whose step can be captured."""
    flows, left_out = build(hall, size, check_training, hall.contestants)
    calls: dict[str, Call] = {f"{OURS}, eager": training_step(flows[OURS]), PRODUCTS: products(size, hall.device)}
    for name, flow in flows.items():
        try:
            calls[name] = captured(training_step(flow))
        except RuntimeError as error:
            left_out[name] = why_not(error)
    seconds = contest(calls, hall.device, hall.rounds)
    found = goals(hall.device, CAPTURED, size, other=DENSE)
    return Contest(TRAINING, str(size), GRAPH, seconds, found, left_out=left_out, at=asdict(size))


def external(hall: Hall, size: Size, *, backward: bool, rounds: Rounds | None = None) -> Contest:
    """The log q of a z from elsewhere. That inverses are right is checked at a small size, where all are fast."""
    invertible = {name: make for name, make in hall.contestants.items() if name != DENSE}
    _, left_out = build(hall, MINI, check_scoring, invertible)
    fit = {name: make for name, make in invertible.items() if name not in left_out}
    flows, wrong = build(hall, size, check_training, fit)
    calls = {name: (scoring_step if backward else scoring)(flow) for name, flow in flows.items()}
    seconds = contest(calls, hall.device, rounds or hall.rounds)
    what = BACKWARD if backward else FORWARD
    found = () if rounds else goals(hall.device, what, size, faster=True)
    return Contest(what, str(size), EAGER, seconds, found, left_out=left_out | wrong, at=asdict(size))


def full_covariance(hall: Hall) -> Contest:
    """Sample, log q and gradients of a Gaussian, beside torch's own."""
    dim, batch, flow = hall.plan.dim, hall.plan.batch, others.full_covariance(hall.plan.dim).to(hall.device)
    numbers = others.numbers_for(flow, batch, hall.device)
    torchs = {
        "MultivariateNormal": others.multivariate_normal(dim, hall.device, copying=False),
        "MultivariateNormal, index_copy": others.multivariate_normal(dim, hall.device, copying=True),
    }
    for name, sampler in torchs.items():
        others.check_gaussian(name, sampler, numbers, dim)
    return _numbers_contest(hall, FULL_COVARIANCE, {OURS: others.ours(flow), **torchs}, numbers)


def planar(hall: Hall) -> Contest:
    """Sample, log q and gradients of planar steps, beside pyro's where it is installed."""
    flow = others.planar(hall.plan.dim)
    samplers = {OURS: others.ours(flow.to(hall.device))}
    if "pyro" in hall.contestants:
        samplers["pyro"] = others.pyro_planar(hall.plan.dim)
    return _numbers_contest(hall, PLANAR, samplers, others.numbers_for(flow, hall.plan.batch, hall.device))


def spline(hall: Hall) -> Contest:
    """Sample, log q and gradients of an element-wise spline, beside those of the libraries that are installed."""
    dim, flow = hall.plan.dim, splines.spline(hall.plan.dim).to(hall.device)
    samplers = {OURS: others.ours(flow)}
    samplers |= {name: make(dim) for name, make in splines.PEERS.items() if name in hall.contestants}
    many = others.numbers_for(flow, splines.MANY, hall.device)
    return _numbers_contest(hall, SPLINE, samplers, others.numbers_for(flow, hall.plan.batch, hall.device), many)


def _numbers_contest(
    hall: Hall,
    what: str,
    samplers: dict[str, others.Sampler],
    numbers: torch.Tensor,
    checked: torch.Tensor | None = None,
) -> Contest:
    """The contest; the work is checked at `checked`, unless at the same numbers."""
    for name, sampler in samplers.items():
        others.check_sampler(name, sampler, numbers if checked is None else checked, hall.plan.dim)
    leaves = {name: numbers.detach().clone().requires_grad_() for name in samplers}
    steps: dict[str, Step] = {name: others.sampling_step(sampler, leaves[name]) for name, sampler in samplers.items()}
    seconds = contest(steps, hall.device, hall.rounds)
    memory = {name: peak_bytes(step, step.clear, hall.device) for name, step in steps.items()}
    size = {"dim": hall.plan.dim, "batch": hall.plan.batch}
    found = goals(hall.device, what, faster=True)
    return Contest(what, f"({size['dim']}, {size['batch']})", EAGER, seconds, found, memory, at=size)
