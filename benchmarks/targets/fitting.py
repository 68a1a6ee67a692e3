"""One posterior fitted to every energy at once, and its exact KL: independent fits, batched over the energies."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from benchmarks.optimizers import CLIP_NORM
from benchmarks.targets.contestants import batches, build, rate
from benchmarks.targets.energies import ENERGIES, STRIP, Energy
from benchmarks.train import BAD_STEPS, seeded
from flowpost import Chain, FlowPosterior
from flowpost.schedules import linear

START = 0.01  # the temperature's, as in the paper
ANNEALED = 0.5  # share of the iterations after which it is 1
REACH = 1.5  # standard deviation of where the starts are
CHUNK = 20_000  # samples evaluated at once
ROUGH = 5_000  # samples by which the best start is found

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What decides a fit's figures besides the recipe, its steps and the energy."""

    iterations: int = 3000  # Adam's steps
    starts: int = 3  # fits of each posterior, from different densities; the best one is kept
    batch: int = 128  # samples a step
    pace: float = 1.0  # times which each posterior's learning rate is taken
    samples: int = 100_000  # fresh ones behind KL
    cells: int = 120  # of the pictures, along each axis
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """What the table says of a fitted posterior."""

    posterior: str
    steps: int | None
    """K, where the recipe has `steps`."""
    dim: int
    energy: str
    kl: float
    """KL(q || p) in nats; nan where a sample was not finite, or where every start was given up."""
    standard_error: float
    """Of `kl`."""
    skipped_steps: int
    """Of all starts: gradient or loss were not finite."""
    parameters: int
    seconds: float
    """Of training, all energies and starts together."""
    rate: float
    """Adam's learning rate at the start."""
    seed: int = 0

    @property
    def what(self) -> str:
        """The posterior, and K where it has one."""
        return self.posterior if self.steps is None else f"{self.posterior}, K = {self.steps}"

    def as_json(self) -> dict[str, object]:
        """The fields, with None in the place of a nan, which JSON does not have."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fit:
        """What `as_json` wrote."""
        numbers = {name: math.nan if content[name] is None else content[name] for name in ("kl", "standard_error")}
        return cls(**{**content, **numbers})


def fit(
    name: str, steps: int | None, plan: Plan, energies: Sequence[Energy] = ENERGIES
) -> tuple[list[FlowPosterior], list[Fit]]:
    """Fit a posterior to energies of one size by minimizing ``E_q[log q + U] + log Z``, each from several starts.

    Energies and starts have weights, Adam moments and bad steps of their own: they share a batch for speed alone.

    Returns:
        For every energy the best posterior, in float64, and its figures.
    """
    with seeded(plan.seed, torch.device("cpu")):
        plain = [build(name, steps, energies[0].dim) for _ in range(plan.starts * len(energies))]
        begun, lr = time.perf_counter(), plan.pace * rate(name)
        skipped, alive = train(plain, energies, plan, lr, together=batches(name))
        seconds = time.perf_counter() - begun
        posteriors, fits = [], []
        for index, energy in enumerate(energies):
            own = slice(index, None, len(energies))
            fitted = [place(posterior, energy).double() for posterior in plain[own]]
            rough = [kl(posterior, energy, ROUGH)[0] for posterior in fitted]
            ranks = [_rank(*each) for each in zip(rough, alive[own].tolist(), strict=True)]
            best = fitted[ranks.index(min(ranks))]
            figures = kl(best, energy, plan.samples) if min(ranks) < math.inf else (math.nan, math.nan)
            parameters = sum(parameter.numel() for parameter in best.parameters())
            posteriors.append(best)
            what = name, steps, energy.dim, energy.name
            fits.append(Fit(*what, *figures, int(skipped[own].sum()), parameters, seconds, lr, plan.seed))
    return posteriors, fits


def _rank(figure: float, alive: bool) -> float:  # noqa: FBT001 - a column of a table
    return figure if alive and not math.isnan(figure) else math.inf


def place(posterior: FlowPosterior, energy: Energy) -> FlowPosterior:
    """The posterior on the energy's domain."""
    return FlowPosterior(0, Chain(posterior.flow, STRIP)) if energy.bounded else posterior


def train(
    posteriors: Sequence[FlowPosterior], energies: Sequence[Energy], plan: Plan, lr: float, *, together: bool = True
) -> tuple[Tensor, Tensor]:
    """Fit posteriors of one architecture in place, to the energies in turn.

    Args:
        posteriors: fresh ones, as many as there are energies, or a multiple.
        energies: of one size.
        plan: the fit's.
        lr: Adam's learning rate at the start; it falls to 0 as a half cosine.
        together: draw from all of them in one `torch.func.vmap`; else from one after the other.

    Returns:
        For each the number of steps skipped, and whether it never had `BAD_STEPS` of them in a row.
    """
    energies = [energies[index % len(energies)] for index in range(len(posteriors))]
    parameters, buffers = stack_module_state(list(posteriors))  # each tensor (posteriors, ...)
    optimizer, dim = torch.optim.Adam(parameters.values()), energies[0].dim
    centres = REACH * torch.randn(len(posteriors), 1, dim)
    skipped = torch.zeros(len(posteriors), dtype=torch.long)
    in_a_row, worst = skipped.clone(), skipped.clone()
    for iteration in range(plan.iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * iteration / plan.iterations))
        optimizer.zero_grad()
        noise = torch.randn(len(posteriors), plan.batch, dim)
        z, log_q = draw(posteriors[0], parameters, buffers, noise, together=together)
        losses = free_energies(z, log_q, energies, centres, temperature(iteration, plan))
        losses.sum().backward()
        bad = ~shorten(parameters, losses.detach())
        step(optimizer, parameters, bad)
        skipped += bad
        in_a_row = (in_a_row + 1) * bad
        worst = torch.maximum(worst, in_a_row)
    for index, posterior in enumerate(posteriors):
        posterior.load_state_dict({name: stacked[index].detach() for name, stacked in parameters.items()}, strict=False)
    return skipped, worst < BAD_STEPS


def temperature(iteration: int, plan: Plan) -> float:
    """What U is multiplied by: from `START` up to 1, linearly, so that no mode is lost before it is seen."""
    return START + (1 - START) * linear(iteration, math.ceil(ANNEALED * plan.iterations))


def draw(
    posterior: FlowPosterior, parameters: Tensors, buffers: Tensors, noise: Tensor, *, together: bool = True
) -> tuple[Tensor, Tensor]:
    """Where every set of weights puts its own noise ``(sets, samples, dim)``: z, of the same shape, and its log q."""

    def one(parameters: Tensors, buffers: Tensors, noise: Tensor) -> tuple[Tensor, Tensor]:
        given = {"sample_shape": tuple(noise.shape[:1]), "noise": noise}
        z, log_q, _ = functional_call(posterior, (parameters, buffers), (), given)
        return z, log_q

    if together:
        return vmap(one)(parameters, buffers, noise)
    found = []
    for i, own in enumerate(noise):
        weights, constants = ({name: each[i] for name, each in group.items()} for group in (parameters, buffers))
        found.append(one(weights, constants, own))
    return torch.stack([z for z, _ in found]), torch.stack([log_q for _, log_q in found])


def free_energies(z: Tensor, log_q: Tensor, energies: Sequence[Energy], centres: Tensor, temperature: float) -> Tensor:
    """Each fit's mean of ``log q + t U + (1 - t) |z - centre|^2 / 2``, ``(fits,)``: from a normal density to p."""
    bounded = torch.tensor([energy.bounded for energy in energies]).unsqueeze(-1)
    if bounded.any():
        on_strip, log_det = STRIP(z)
        z, log_q = torch.where(bounded.unsqueeze(-1), on_strip, z), torch.where(bounded, log_q - log_det, log_q)
    potentials = torch.stack([energy.potential(points) for energy, points in zip(energies, z, strict=True)])
    start = 0.5 * (z - centres).square().sum(-1)
    return (log_q + temperature * potentials + (1 - temperature) * start).mean(-1)


def shorten(parameters: Tensors, losses: Tensor) -> Tensor:
    """Shorten every fit's gradient to `CLIP_NORM`, or to 0 where it or the loss is not finite; which are finite."""
    gradients = [each.grad for each in parameters.values() if each.grad is not None]
    # In float64: the squares of a finite gradient may overflow in float32.
    norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    finite = norm.isfinite() & losses.isfinite()
    for gradient in gradients:
        rows = (-1, *[1] * (gradient.ndim - 1))
        gradient.mul_((CLIP_NORM / norm).clamp_max(1).view(rows))
        gradient.masked_fill_(~finite.view(rows), 0.0)
    return finite


def step(optimizer: torch.optim.Optimizer, parameters: Tensors, bad: Tensor) -> None:
    """One step of the optimizer that leaves the weights of bad fits where they are."""
    kept = {name: value[bad].detach().clone() for name, value in parameters.items()} if bad.any() else {}
    optimizer.step()
    with torch.no_grad():
        for name, value in kept.items():
            parameters[name][bad] = value


@torch.no_grad()
def kl(posterior: FlowPosterior, energy: Energy, samples: int) -> tuple[float, float]:
    """KL(q || p) in nats from fresh samples of q, with its standard error; nan where one of them is not finite."""
    ratios = []
    for begun in range(0, samples, CHUNK):
        count = min(CHUNK, samples - begun)  # never 0: not every library draws nothing
        z, log_q, _ = posterior(sample_shape=(count,))
        # Not `energy.log_prob`: a sample may round to the very edge of the domain.
        ratios.append(log_q + energy.potential(z) + energy.log_normalizer)
    ratio = torch.cat(ratios)
    return ratio.mean().item(), (ratio.std() / math.sqrt(samples)).item()
