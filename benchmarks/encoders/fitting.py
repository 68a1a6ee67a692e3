"""Three encoders of other people's in a VAE: trained with their own Gaussian, then on with it and with a flow."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from benchmarks.encoders import libraries as lib
from benchmarks.heads import PixelLogit
from benchmarks.models import likelihood_of
from benchmarks.optimizers import CLIP_NORM
from benchmarks.train import EVALUATION_SEED, seeded
from flowpost import wrap
from flowpost.outputs import Read
from flowpost.training import step_if_finite
from flowpost.vae import VAE
from flowpost.wrapped import WrappedPosterior

WIDTH = 256  # hidden units of a decoder
STATE = 128  # of the GRU
CHANNELS = 4  # of AutoencoderKL's z
CHUNK = 20_000  # (sample, image) pairs evaluated at once


@dataclass(frozen=True)
class Plan:
    """What decides the figures besides the model and the data."""

    before: int = 1_500  # steps with the encoder's own Gaussian
    after: int = 1_000  # more steps, of both
    batch: int = 128
    lr: float = 1e-3  # Adam's; in the steps after, it falls to 0 as a line
    dim: int = 32  # of z, where the model leaves it open
    flow: str = "iaf"
    samples: int = 16  # of z for each test image
    images: int = 2_000  # of the test part, at equal distances: its first ones are of few classes


@dataclass(frozen=True)
class Fit:
    """The ELBOs of one model and seed, in nats an image of the test part."""

    model: str
    seed: int
    before: float
    """With the encoder's own Gaussian, when it is wrapped."""
    start: float
    """With the flow, before its first step."""
    gaussian: float
    """With the Gaussian, trained on."""
    flow: float
    """With the flow, trained on."""
    skipped_steps: int
    gaussian_ms: float
    """Of a step with the Gaussian, mean of those after."""
    flow_ms: float
    """The same with the flow."""


@dataclass(frozen=True)
class Model:
    """An encoder with its pair, the way to read it, and a decoder."""

    encoder: nn.Module
    decoder: nn.Module
    dim: int
    read: Read | None = None

    def vae(self, data: Data, flow: str) -> VAE:
        """A VAE of the encoder with a posterior; the parts themselves, not copies."""
        return VAE(self.wrapped(data, flow), self.decoder, likelihood_of(data))

    def wrapped(self, data: Data, flow: str) -> WrappedPosterior:
        """The encoder with a posterior: with ``"diagonal"`` it is the encoder's own Gaussian."""
        return wrap(self.encoder, self.dim, example=data.train[:2], read=self.read, flow=flow)


class Recurrent(nn.Module):
    """A GRU that reads an image row by row, and two heads on its last state."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, STATE, batch_first=True)
        self.loc, self.log_var = nn.Linear(STATE, dim), nn.Linear(STATE, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of ``(B, rows, columns)``."""
        _, state = self.gru(x)
        return self.loc(state[-1]), self.log_var(state[-1])


class Grey(nn.Module):
    """From counts ``(B, H, W)`` to grey levels between 0 and 1, with an axis of channels if wanted."""

    def __init__(self, levels: int, *, channels: bool) -> None:
        super().__init__()
        self.levels, self.channels = levels, channels

    def forward(self, x: Tensor) -> Tensor:
        """The grey levels."""
        x = x / self.levels
        return x.unsqueeze(1) if self.channels else x


def pythae(data: Data, plan: Plan) -> Model:
    """The MLP of pythae."""
    encoder = lib.pythae_mlp((1, *data.train.shape[1:]), plan.dim)
    return Model(nn.Sequential(Grey(data.levels, channels=True), encoder), _decoder(data, plan.dim), plan.dim, _names)


def diffusers(data: Data, plan: Plan) -> Model:
    """AutoencoderKL with its own decoder; its moments are flattened to one z an image."""
    del plan
    moments, images = lib.autoencoder_kl(CHANNELS)
    rows, columns = (size // 4 for size in data.train.shape[1:])
    encoder = nn.Sequential(Grey(data.levels, channels=True), moments)
    decoder = nn.Sequential(nn.Unflatten(1, (CHANNELS, rows, columns)), images)
    return Model(encoder, decoder, CHANNELS * rows * columns, _moments)


def gru(data: Data, plan: Plan) -> Model:
    """A GRU over rows."""
    encoder = nn.Sequential(Grey(data.levels, channels=False), Recurrent(data.train.shape[-1], plan.dim))
    return Model(encoder, _decoder(data, plan.dim), plan.dim)


@dataclass(frozen=True)
class Contest:
    """A model, the data it is trained on, and for how long."""

    name: str
    library: str
    data: str
    make: Callable[[Data, Plan], Model]
    plan: Plan


CONTESTS = (
    Contest("pythae MLP", "pythae", "mnist-static", pythae, Plan()),
    Contest("GRU, row by row", "torch", "mnist-static", gru, Plan()),
    Contest("diffusers AutoencoderKL, one z an image", "diffusers", "digits", diffusers, Plan(before=600, after=450)),
)


def _names(out: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - a ModelOutput, where pythae is
    return out.embedding, out.log_covariance


def _moments(out: Tensor) -> list[Tensor]:
    return [part.flatten(1) for part in out.chunk(2, 1)]


def _decoder(data: Data, dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, WIDTH), nn.ELU(), nn.Linear(WIDTH, WIDTH), nn.ELU(), PixelLogit(WIDTH, data))


def fit(contest: Contest, data: Data, seed: int) -> Fit:
    """Train with the Gaussian; from there on with it and, in a copy, with the flow: equal steps, batches and rates."""
    plan = contest.plan
    test = spaced(data.test, plan.images)
    with seeded(seed, torch.device("cpu")):
        model = contest.make(data, plan)
        gaussian = model.vae(data, "diagonal")
        skipped = train(gaussian, data, plan.before, plan, seed, falling=False)[1]
        before = score(gaussian, test, plan)
        flowing = copy.deepcopy(model).vae(data, plan.flow)
        start = score(flowing, test, plan)
        ends, times = [], []
        for vae in (gaussian, flowing):
            torch.manual_seed(seed)
            milliseconds, bad = train(vae, data, plan.after, plan, seed + 1, falling=True)
            times.append(milliseconds)
            ends.append(score(vae, test, plan))
            skipped += bad
    return Fit(contest.name, seed, before, start, ends[0], ends[1], skipped, times[0], times[1])


def spaced(x: Tensor, count: int) -> Tensor:
    """So many rows at equal distances, or all where there are fewer."""
    return x[torch.arange(min(count, len(x))) * len(x) // min(count, len(x))]


def train(vae: VAE, data: Data, steps: int, plan: Plan, seed: int, *, falling: bool) -> tuple[float, int]:
    """Train in place with a fresh Adam; milliseconds a step, and the number of steps skipped as not finite."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=plan.lr)
    batches = _batches(len(data.train), plan.batch, seed)
    vae.train()
    taken, begun = [], time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = plan.lr * (1 - step / steps if falling else 1)
        optimizer.zero_grad()
        terms = vae.elbo_terms(data.train[next(batches)])
        loss = (terms.kl - terms.reconstruction).mean()
        loss.backward()
        taken.append(step_if_finite(optimizer, loss, max_norm=CLIP_NORM))
    seconds = time.perf_counter() - begun
    return 1e3 * seconds / max(1, steps), sum(not each for each in torch.stack(taken).tolist()) if taken else 0


def _batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of full batches, in an order that the seed alone decides."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=order)[: count // batch * batch].split(batch)


@torch.no_grad()
def score(vae: VAE, x: Tensor, plan: Plan) -> float:
    """The mean ELBO, always with the same noise."""
    vae.eval()
    with seeded(EVALUATION_SEED, x.device):
        terms = [vae.elbo_terms(part, (plan.samples,)) for part in x.split(max(1, CHUNK // plan.samples))]
    return torch.cat([each.reconstruction - each.kl for each in terms]).double().mean().item()
