"""The NLL by importance sampling: what a sample costs beyond the pass that draws it, and that memory stays flat."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import nn

import flowpost as fp
from benchmarks.speed.hall import Hall
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.results import EAGER, OURS, Contest, Goal, MemoryGoal
from benchmarks.speed.sizes import SMALL, Size
from benchmarks.speed.timing import contest
from flowpost.evaluation import log_marginal
from flowpost.vae import VAE, Bernoulli

PIXELS, IMAGES, PAIRS = 64, 16, 1000
CHUNK = PAIRS // IMAGES  # samples of each image in one pass
POSTERIOR, PASS = "its posterior's pass alone", "its VAE's pass alone"


def model(size: Size) -> VAE:
    """An IAF between an encoder and a decoder that cost next to nothing."""
    posterior = fp.iaf(size.context, size.dim, size.steps, (size.hidden, size.hidden), size.context)
    return VAE(nn.Linear(PIXELS, size.context), posterior, nn.Linear(size.dim, PIXELS), Bernoulli()).eval()


def nll(hall: Hall) -> Contest:
    """Seconds per (sample, image) of `log_marginal`, of the VAE's pass and of the posterior's, at the same batch."""
    size = replace(SMALL, batch=IMAGES)
    vae = model(size).to(hall.device)
    x = torch.rand(IMAGES, PIXELS).round().to(hall.device)
    h = vae.encoder(x).detach()
    samples = hall.plan.samples
    no_grad = torch.no_grad()
    chunks = range(-(-samples // CHUNK))  # as many passes as the NLL needs, so that rounds compare like with like
    calls = {
        OURS: lambda: log_marginal(vae, x, samples, pairs=PAIRS),
        PASS: no_grad(lambda: [vae(x, (CHUNK,)) for _ in chunks]),
        POSTERIOR: no_grad(lambda: [vae.posterior(h, (CHUNK,)) for _ in chunks]),
    }
    seconds = contest(calls, hall.device, hall.rounds)
    drawn = {OURS: samples, PASS: CHUNK * len(chunks), POSTERIOR: CHUNK * len(chunks)}
    each = {name: [value / (drawn[name] * IMAGES) for value in values] for name, values in seconds.items()}
    fewer = max(samples // 10, 2 * CHUNK)  # more than one pass, as many samples have
    memory = {
        f"{OURS}, {count} samples": peak_bytes(
            lambda count=count: log_marginal(vae, x, count, pairs=PAIRS), lambda: None, hall.device
        )
        for count in (fewer, samples)
    }
    flat = MemoryGoal(1.05, *reversed(memory))
    goal, what = (Goal(1.5, POSTERIOR),), f"NLL, {samples} samples, per sample"
    return Contest(what, f"{size}, {PAIRS} pairs a pass", EAGER, each, goal, memory, flat, at=asdict(size))
