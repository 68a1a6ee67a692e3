"""A VAE's whole training step: by operations, by `flowpost.training.Captured`, and as a CUDA graph's bare replay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.networks import mlp
from benchmarks.speed.bounds import REPLAYED, STEP, bound
from benchmarks.speed.hall import Hall
from benchmarks.speed.results import GRAPH, OURS, SECONDS, Contest, Goal
from benchmarks.speed.steps import captured, why_not
from benchmarks.speed.timing import Call, contest
from flowpost.objectives import elbo
from flowpost.recipes import RECIPES
from flowpost.training import Captured
from flowpost.vae import VAE, Bernoulli

PIXELS, WIDTHS, DIM, BATCH = 784, (512, 512), 32, 128
RATE = 1e-4  # of Adam, on pixels of pure noise
VAE_STEP = "VAE step with Adam"
BARE, BY_OPERATIONS = "bare replay", f"{OURS}, eager"
OVERHEAD = 1.15  # of a captured step, over the bare replay


def step_of(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Forward, backward and fused Adam, of a model of its own."""
    torch.manual_seed(0)
    encoder = mlp.encoder((PIXELS,), hidden=WIDTHS, activation="relu")
    decoder = mlp.decoder(DIM, (PIXELS,), 1, hidden=WIDTHS, activation="relu")
    vae = VAE(encoder, RECIPES[name](WIDTHS[-1], DIM), decoder, Bernoulli()).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=torch.tensor(RATE, device=device), fused=True, capturable=True)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        out = vae(x)
        loss = -elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def vae_step(hall: Hall, name: str) -> Contest:
    """A recipe's step, of three models alike: a captured call copies inputs and results, a bare replay does not."""
    device, left_out = hall.device, {}
    x = torch.rand(BATCH, PIXELS).round().to(device)
    calls: dict[str, Call] = {BY_OPERATIONS: partial(step_of(name, device), x)}
    for who, capture in ((OURS, _by_captured), (BARE, _bare)):
        try:
            calls[who] = capture(step_of(name, device), x)
        except RuntimeError as error:
            left_out[who] = why_not(error)
    limits = ((OURS, bound(device, REPLAYED, name)), (BY_OPERATIONS, bound(device, STEP, name)))
    goals = [Goal(most, name=who, unit=SECONDS) for who, most in limits if most is not None]
    seconds = contest(calls, device, hall.rounds)
    return Contest(VAE_STEP, name, GRAPH, seconds, (*goals, Goal(OVERHEAD, BARE)), left_out=left_out)


def _by_captured(step: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    graph = Captured(step, x.device)
    for _ in range(graph.warmup + 1):
        graph(x)
    return partial(graph, x)


def _bare(step: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    return captured(partial(step, x))
