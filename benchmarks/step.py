"""One optimizer step, written once for every device; run and read one by one, or captured and read once an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from benchmarks.config import Config
from benchmarks.data import binarize
from benchmarks.objective import negative_bound, objective_loss, objective_pass
from benchmarks.team import Team
from flowpost.training import Captured, step_if_finite
from flowpost.vae import VAE

Advance = Callable[[Tensor, Tensor], Tensor]
"""From the batch's indices ``(batch,)`` and the KL's weight to the step's outcome, a scalar on the device."""


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """From the next step on; a tensor is filled, where a graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def whole_step(
    vae: VAE,
    optimizer: torch.optim.Optimizer,
    train: Tensor,
    pixels: torch.Generator | None,
    config: Config,
    average: VAE | None = None,
) -> Advance:
    """From the images' indices on; on a GPU one CUDA graph, which draws on from the generators as they are then.

    So a captured run and an eager one need not draw equal noise.

    Args:
        vae: in training mode from the first step on.
        optimizer: its parameters'.
        train: all training images, on the device.
        pixels: what binary pixels are drawn from, afresh in every step; None for images as they are.
        config: of the job.
        average: whose weights follow the model's, if there is one.
    """

    def advance(index: Tensor, kl_weight: Tensor) -> Tensor:
        x = train[index]  # (batch, H, W)
        x = x if pixels is None else binarize(x, pixels)  # the same draw for encoder and likelihood
        outcome = step(vae, optimizer, x, kl_weight, config)
        if average is not None:
            config.optimization.follow(average, vae)
        return outcome

    return Captured(advance, config.device, generators=[pixels] if pixels else []) if config.captured else advance


def step(vae: VAE, optimizer: torch.optim.Optimizer, x: Tensor, kl_weight: Tensor, config: Config) -> Tensor:
    """One optimizer step; the negative bound at KL weight 1, or nan where it was skipped: nothing finite to follow.

    Of several processes each has the whole batch x and takes its rows; the outcome is that of the batch.
    """
    optimizer.zero_grad()
    team, count = Team.on(config.device), len(x)
    noise = team.noise(config.train_samples, count, config.dim, device=x.device)
    x = x[team.rows(count)]
    with config.optimization.autocast(x.device):
        out = objective_pass(vae, x, config, noise)
    loss = objective_loss(out, kl_weight, config)
    team.part(loss, len(x), count).backward()
    with torch.no_grad():
        bound = team.mean(negative_bound(out, config), count)
    taken = step_if_finite(optimizer, loss if team.count == 1 else bound, max_norm=config.optimization.clip)
    return torch.where(taken, bound, torch.nan)


def outcomes(
    advance: Advance, batches: Iterable[Tensor], kl_weight: Tensor, *, once: bool
) -> Iterator[tuple[float, float]]:
    """Outcome and seconds of each step of an epoch: read after every step, or all at once after the last one."""
    start = time.perf_counter()
    if once:
        found = torch.stack([advance(index, kl_weight) for index in batches]).tolist()
        seconds = (time.perf_counter() - start) / len(found)
        yield from ((outcome, seconds) for outcome in found)
        return
    for index in batches:
        start = time.perf_counter()
        outcome = advance(index, kl_weight).item()
        yield outcome, time.perf_counter() - start
