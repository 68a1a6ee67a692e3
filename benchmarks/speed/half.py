"""Under bfloat16 autocast: a training step is no slower than in float32, and log q is as near to it as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.config import configure
from benchmarks.data import load
from benchmarks.speed.flows import draw, features
from benchmarks.speed.hall import Hall, build
from benchmarks.speed.ours import Flowpost
from benchmarks.speed.results import EAGER, GRAPH, NATS, OURS, Contest, Goal
from benchmarks.speed.sizes import WIDE, Size
from benchmarks.speed.steps import Step, captured, training_step
from benchmarks.speed.timing import Call, contest
from benchmarks.speed.work import check_training
from benchmarks.train import train_one
from flowpost import FlowPosterior
from flowpost.masked import engine
from flowpost.testing import push

HALF, ERROR = "training step in bfloat16", "error of log q in bfloat16"
FULL, PLAIN = f"{OURS}, float32", "plain operations"
WORSE = 1.2  # the error may be so many times that of the plain operations
MOST = 0.01  # nats, of a trained posterior
EPOCHS = 60  # of the digits, of ten steps each
TRAINED = "trained"
AMOUNTS = (0.0, 0.3, 1.0)  # by which the weights are pushed away from where they start
SEEDS, ROWS = 5, 1024


def halved(step: Step, device: torch.device) -> Step:
    """Its forward pass in half precision, as far as autocast goes."""

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return step.loss()

    return replace(step, loss=loss)


def half(hall: Hall, size: Size, *, graph: bool) -> Contest:
    """Both precisions of the training step, by operations or each as one CUDA graph."""
    flows, left_out = build(hall, size, check_training, {OURS: Flowpost, FULL: Flowpost})
    steps = {name: training_step(flow) for name, flow in flows.items()}
    steps[OURS] = halved(steps[OURS], hall.device)
    calls: dict[str, Call] = {name: captured(step) if graph else step for name, step in steps.items()}
    seconds, mode = contest(calls, hall.device, hall.rounds), GRAPH if graph else EAGER
    return Contest(HALF, str(size), mode, seconds, (Goal(1.0, FULL),), left_out=left_out, at=asdict(size))


def error(hall: Hall, size: Size, amount: float) -> Contest:
    """How far half precision moves log q from float32's, on average over rows: a round for each draw of the weights."""
    size = replace(size, batch=ROWS)
    rounds = []
    for seed in range(SEEDS):
        flow = Flowpost(size)
        draw(flow, seed)
        push(flow.posterior.flow, amount, seed)
        rounds.append(_errors(flow.to(hall.device).posterior, features(size, hall.device)))
    return _contest(rounds, f"{size}, pushed by {amount}", Goal(WORSE, PLAIN))


def trained_error(hall: Hall) -> Contest:
    """The same after 600 training steps on the digits: a round for each draw of the noise."""
    data = load("digits")
    config = configure(epochs=EPOCHS, patience=EPOCHS, dim=WIDE.dim, device=str(hall.device))
    vae, _ = train_one(data, "iaf", 0, config, lambda _: None)
    with torch.no_grad():
        h = vae.encoder(data.test.to(hall.device))
    rounds = [_errors(vae.posterior, h) for _ in range(SEEDS)]
    return _contest(rounds, f"dim {WIDE.dim}, {TRAINED}", Goal(MOST, unit=NATS), Goal(WORSE, PLAIN))


@torch.no_grad()
def _errors(posterior: FlowPosterior, h: Tensor) -> dict[str, float]:
    """By the same noise."""
    exact = posterior(h)
    with torch.autocast(h.device.type, torch.bfloat16):
        ours = posterior(h, noise=exact.noise)
        with patch.object(engine, "choose", return_value=None):
            plain = posterior(h, noise=exact.noise)
    return {
        name: (found.log_prob - exact.log_prob).abs().mean().item() for name, found in ((OURS, ours), (PLAIN, plain))
    }


def _contest(rounds: Sequence[dict[str, float]], where: str, *goals: Goal) -> Contest:
    found = {name: [each[name] for each in rounds] for name in rounds[0]}
    return Contest(ERROR, where, EAGER, found, goals, unit=NATS)
