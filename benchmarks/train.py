"""The one visible loop: a VAE of `benchmarks.models` trained on a data set. No option changes the constants."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.config import Config
from benchmarks.data import Data
from benchmarks.frozen import take_decoder
from benchmarks.models import build
from benchmarks.networks import model_of
from benchmarks.objective import negative_bound
from benchmarks.step import outcomes, set_learning_rate, whole_step
from benchmarks.team import Team
from flowpost import schedules
from flowpost.vae import VAE

BAD_STEPS = 10  # steps in a row without a finite loss and gradient after which a run gives up
NAMED = 3  # tensors named of each skipped step: the first whose gradient was not finite; none of a captured one
SKIPS = 100  # skipped steps told one by one; the others are only counted
WARM_STEPS = 5  # steps left out of the timing: the first ones also allocate
EVALUATION_SEED = 2019  # of the noise of validation and test: the same for every model


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to try."""


@dataclass
class History:
    """What training leaves behind, besides the weights."""

    train: list[float | None] = field(default_factory=list)  # negative bound at KL weight 1, mean over images
    valid: list[float] = field(default_factory=list)  # the same, after the epoch
    best_epoch: int = 0  # counted from 1
    skipped_steps: int = 0
    skips: list[dict[str, Any]] = field(default_factory=list)  # epoch, step and tensors of the first `SKIPS` of them
    resumed_after: int = 0  # the epoch, where a checkpoint was taken up: the timings are of what came after it
    step_ms: float = 0.0  # median; a captured step's is its share of an epoch's


@dataclass
class Loop:
    """All that one epoch hands to the next: what a checkpoint has to hold."""

    vae: VAE
    optimizer: torch.optim.Optimizer  # its lr is set anew in every epoch
    order: torch.Generator  # of the data
    pixels: torch.Generator  # of dynamic binarization
    best_state: dict[str, Tensor]
    average: VAE | None = None  # of the weights, where they are averaged: what is validated and kept
    best: float = math.inf
    epoch: int = 0  # finished ones
    steps: int = 0  # finished ones, skipped ones among them
    bad: int = 0  # steps skipped in a row
    seconds: float = 0.0  # of training
    history: History = field(default_factory=History)

    @property
    def judged(self) -> VAE:
        """The model that is validated and kept."""
        return self.vae if self.average is None else self.average

    def is_over(self, config: Config) -> bool:
        """Whether epochs or minutes are used up, or validation has not improved for `patience` epochs."""
        stale = self.epoch - max(self.history.best_epoch, config.kl_warmup)
        late = 0 < 60 * config.minutes <= self.seconds
        return self.epoch >= config.epochs or stale >= config.patience or late

    def validate(self, valid: Tensor, config: Config) -> None:
        """Note how good the model is after an epoch, and keep the best one's weights."""
        self.history.valid.append(validate(self.judged, valid, config))
        if -math.inf < self.history.valid[-1] < self.best:
            self.best, self.history.best_epoch = self.history.valid[-1], self.epoch
            self.best_state = copy.deepcopy(self.judged.state_dict())

    def skip(self, config: Config) -> None:
        """Take down a step that was not finite; the names are only worked out here, on the rare bad step.

        Raises:
            TrainingError: it was the last of `BAD_STEPS` in a row.
        """
        self.bad += 1
        self.history.skipped_steps += 1
        tensors = [] if config.captured else nonfinite_gradients(self.vae)
        if len(self.history.skips) < SKIPS:
            self.history.skips.append({"epoch": self.epoch + 1, "step": self.steps, "tensors": tensors})
        if self.bad == BAD_STEPS:
            where = f"epoch {self.epoch + 1}; not finite: {tensor_words(tensors, config)}"
            raise TrainingError(f"no finite loss and gradient in {self.bad} steps in a row ({where}); lower --lr")


class Watcher:
    """What looks on while a run trains: this one tells of each epoch, that of `benchmarks.checkpoint` keeps it too.

    Args:
        tell: called after each epoch.
    """

    def __init__(self, tell: Callable[[History], None]) -> None:
        self.tell = tell

    def __call__(self, history: History) -> None:
        """Tell of an epoch."""
        self.tell(history)

    def start(self, loop: Loop) -> None:
        """Before the first epoch."""

    def end_epoch(self, loop: Loop) -> None:
        """After each epoch."""
        self.tell(loop.history)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside, and leave the global generators as they were.

    So are Python's and NumPy's, from which networks of one's own may draw their first weights.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that everybody shares
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def train_one(
    data: Data, posterior: str, seed: int, config: Config, on_epoch: Callable[[History], None]
) -> tuple[VAE, History]:
    """One training run: weights, order of the data and noise depend on the seed alone.

    Raises:
        TrainingError: there was no finite loss and gradient for `BAD_STEPS` steps in a row, or after no epoch a finite
            bound of the validation part.
    """
    device = torch.device(config.device)
    with seeded(seed, device):
        vae = build(data, posterior, **model_of(config, data, posterior))
        if config.decoder_of:
            take_decoder(vae, config)
        torch.manual_seed(seed)  # again: the recipes draw differently many initial weights
        return vae, fit(vae.to(device), data, config, seed, on_epoch)


def fit(vae: VAE, data: Data, config: Config, seed: int, on_epoch: Callable[[History], None]) -> History:
    """Train in place, until validation has not improved for `patience` epochs; the best weights are kept.

    A `Watcher` given as `on_epoch` may also set the loop to where another process left it, bit for bit.
    """
    watcher = on_epoch if isinstance(on_epoch, Watcher) else Watcher(on_epoch)
    device, team = torch.device(config.device), Team.on(config.device)
    train, valid = data.train.to(device), data.valid.to(device)
    loop = begin(vae, config, seed)
    history, times = loop.history, []
    watcher.start(loop)
    before, start = loop.seconds, time.perf_counter()
    model = team.prepare(vae)
    advance = whole_step(model, loop.optimizer, train, loop.pixels if data.dynamic else None, config, loop.average)
    while not loop.is_over(config):
        kl_weight = torch.tensor(schedules.linear(loop.epoch + 1, config.kl_warmup), device=device)
        set_learning_rate(loop.optimizer, config.rate(loop.epoch))
        total, images = 0.0, 0
        vae.train()
        batches = torch.randperm(len(train), generator=loop.order).to(device).split(config.batch)
        steps = outcomes(advance, batches, kl_weight, once=config.captured)
        for index, (loss, seconds) in zip(batches, steps, strict=True):
            times.append(seconds)
            loop.steps += 1
            if math.isnan(loss):
                loop.skip(config)
            else:
                loop.bad = 0
                total, images = total + loss * len(index), images + len(index)  # the last batch may be smaller
        loop.epoch += 1
        history.train.append(total / images if images else None)
        loop.validate(valid, config)
        loop.seconds = team.agreed(before + time.perf_counter() - start, device)
        watcher.end_epoch(loop)
    if not history.best_epoch:
        raise TrainingError(f"no finite bound of the validation part in {loop.epoch} epochs; lower --lr")
    vae.load_state_dict(loop.best_state)
    vae.eval()
    history.step_ms = 1e3 * statistics.median(times[WARM_STEPS:] or times or [0.0])
    return history


def begin(vae: VAE, config: Config, seed: int) -> Loop:
    """The loop before the first epoch."""
    optimizer = config.optimization.build(vae, config.lr, config.device if config.captured else "")
    order, pixels = torch.Generator().manual_seed(seed), torch.Generator(config.device).manual_seed(seed)
    average = copy.deepcopy(vae) if config.optimization.averaging else None
    return Loop(vae, optimizer, order, pixels, copy.deepcopy(vae.state_dict()), average)


def nonfinite_gradients(vae: VAE) -> list[str]:
    """The names of the first `NAMED` parameters whose gradient is not finite."""
    gradients = ((name, parameter.grad) for name, parameter in vae.named_parameters())
    bad = (name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all())
    return list(islice(bad, NAMED))


def tensor_words(tensors: Sequence[str], config: Config) -> str:
    """The tensors of a skipped step, or why there are none."""
    return ", ".join(tensors) or ("--eager tells which tensors" if config.captured else "the loss or the norm alone")


def validate(vae: VAE, x: Tensor, config: Config) -> float:
    """Mean negative bound at KL weight 1, in eval mode, always with the same noise."""
    vae.eval()
    samples = config.valid_draws if config.objective == "elbo" else config.train_samples
    with torch.no_grad(), seeded(EVALUATION_SEED, x.device):
        bounds = [_bound(vae, part, samples, config) for part in x.split(max(1, config.pairs // samples))]
    return Team.on(config.device).mean(torch.cat(bounds).double(), len(x)).item()


def _bound(vae: VAE, x: Tensor, samples: int, config: Config) -> Tensor:
    """The negative bound of each of this process's images."""
    team = Team.on(config.device)
    noise = team.noise(samples, len(x), config.dim, device=x.device)
    return negative_bound(vae(x[team.rows(len(x))], (samples,), noise=noise), config)
