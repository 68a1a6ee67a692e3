"""The posteriors without a network: given numbers for each example, flowpost beside torch and pyro."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import flowpost as fp
from benchmarks.peers import module, pyro
from benchmarks.speed.flows import log_normal, training_loss
from benchmarks.speed.steps import Step
from benchmarks.speed.work import UnequalWork, check_same

STEPS = 16  # of planar

Sampler = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""The numbers ``(batch, numbers)``, and noise to map instead of a fresh draw, to z and log q."""


def ours(flow: fp.Bijector) -> Sampler:
    """A flowpost posterior whose context are the numbers."""
    posterior = fp.FlowPosterior(flow.context_size, flow, head=nn.Identity())

    def sample(numbers: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_q, _ = posterior(numbers, noise=noise)
        return z, log_q

    return sample


def full_covariance(dim: int) -> fp.Bijector:
    """The flow of the recipe, without its head."""
    return fp.Chain(fp.UnitLowerTriangular(dim), fp.Affine(dim))


def planar(dim: int) -> fp.Bijector:
    """Planar steps alone."""
    return fp.Chain(*(fp.Planar(dim) for _ in range(STEPS)))


def multivariate_normal(dim: int, device: torch.device, *, copying: bool) -> Sampler:
    """`MultivariateNormal` whose Cholesky factor has the numbers below its diagonal; arguments are not validated.

    Args:
        dim: size of z.
        device: of the numbers.
        copying: assemble the factor by one `index_copy`, the fastest way found, instead of by indexed assignments.
    """
    row, column = torch.tril_indices(dim, dim, -1, device=device).unbind(0)
    on = torch.arange(dim, device=device)
    place = torch.cat([row * dim + column, on * dim + on])

    def copied(entries: Tensor, scale: Tensor) -> Tensor:
        zeros = entries.new_zeros(len(entries), dim * dim)
        return zeros.index_copy(-1, place, torch.cat([entries, scale], dim=-1)).view(-1, dim, dim)

    def assigned(entries: Tensor, scale: Tensor) -> Tensor:
        tril = entries.new_zeros(len(entries), dim, dim)
        tril[:, row, column] = entries
        tril[:, on, on] = scale
        return tril

    def sample(numbers: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        entries, loc, raw = numbers.split([len(row), dim, dim], dim=-1)
        tril = (copied if copying else assigned)(entries, fp.functional.softplus_scale(raw))
        q = MultivariateNormal(loc, scale_tril=tril, validate_args=False)
        z = q.rsample() if noise is None else loc + (tril @ noise.unsqueeze(-1)).squeeze(-1)
        return z, q.log_prob(z)

    return sample


def as_unit_lower(numbers: Tensor, dim: int) -> Tensor:
    """The numbers for flowpost's ``diag(scale) L`` that make `multivariate_normal`'s factor."""
    row = torch.tril_indices(dim, dim, -1, device=numbers.device)[0]
    entries, loc, raw = numbers.split([len(row), dim, dim], dim=-1)
    return torch.cat([entries / fp.functional.softplus_scale(raw)[:, row], loc, raw], dim=-1)


def pyro_planar(dim: int) -> Sampler:
    """Pyro's `ConditionalPlanar`s, each with a slice of the numbers for its network."""
    conditional = module(pyro.TRANSFORMS).ConditionalPlanar
    width = 2 * dim + 1

    def numbers_of(step: int, numbers: Tensor) -> tuple[Tensor, ...]:
        u, w, bias = numbers[..., step * width : (step + 1) * width].split([dim, dim, 1], dim=-1)
        return bias, u, w

    chain = [conditional(partial(numbers_of, step)) for step in range(STEPS)]

    def sample(numbers: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.randn(*numbers.shape[:-1], dim, device=numbers.device) if noise is None else noise
        log_q = log_normal(z)
        for step in chain:
            z, log_det = pyro.call(step, z, numbers)
            log_q = log_q - log_det
        return z, log_q

    return sample


def numbers_for(flow: fp.Bijector, batch: int, device: torch.device) -> Tensor:
    """Numbers ``(batch, context_size)`` near the flow's start, a leaf that wants its gradient."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(batch, flow.context_size, generator=generator)
    return (flow.initial_context().cpu() + 0.1 * noise).to(device).requires_grad_()


def sampling_step(sampler: Sampler, numbers: Tensor) -> Step:
    """Draw z and its log q, and take the gradient in every number."""
    return Step([numbers], lambda: training_loss(*sampler(numbers, None)))


def check_sampler(name: str, sampler: Sampler, numbers: Tensor, dim: int) -> None:
    """Raise unless z and log q are of one row each and every number has a gradient."""
    z, log_q = sampler(numbers, None)
    if z.shape != (len(numbers), dim) or log_q.shape != z.shape[:-1]:
        raise UnequalWork(f"{name}: expected z ({len(numbers)}, {dim}), got {tuple(z.shape)}, {tuple(log_q.shape)}")
    (gradient,) = torch.autograd.grad(training_loss(z, log_q), numbers)
    if not (gradient != 0).any(0).all() or not gradient.isfinite().all():
        raise UnequalWork(f"{name}: some numbers have no gradient")


def check_gaussian(name: str, sampler: Sampler, numbers: Tensor, dim: int) -> None:
    """Raise unless a Gaussian sampler makes flowpost's z and log q of the same noise and factor."""
    noise = torch.randn(len(numbers), dim, device=numbers.device)
    wanted = ours(full_covariance(dim).to(numbers.device))(as_unit_lower(numbers, dim), noise)
    check_same(name, sampler(numbers, noise), wanted)
