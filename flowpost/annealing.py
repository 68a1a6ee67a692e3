"""Hamiltonian Monte Carlo as pure functions of tensors: a step, step sizes that suit, and a flow's noise space."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowpost.density import push, standard_normal_log_prob
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import check_int
from flowpost.numerics.states import made
from flowpost.numerics.watchers import recordable

Gradient: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From positions ``(*batch, dim)`` to log densities ``(*batch)`` and their gradients ``(*batch, dim)``, detached."""


class State(NamedTuple):
    """Where chains are, and what is known of the density there: ``State(position, *gradient(position))``."""

    position: Tensor
    """``(*batch, dim)``"""
    value: Tensor
    """The log density, ``(*batch)``; finite, or the chain stays where it is."""
    slope: Tensor
    """The gradient of the log density, ``(*batch, dim)``."""


def leapfrog(
    state: State, momentum: Tensor, gradient: Gradient, step_size: Tensor, leapfrogs: int, beta: Tensor | None = None
) -> tuple[State, Tensor]:
    """A path of ``H = -log p(position) + |momentum|^2 / 2``: each leapfrog is a half, a whole and a half step.

    Reversible: from where it ends, with the momentum turned, it leads back. It keeps the volume of phase space exactly,
    and H up to an error of order ``step_size^2``. One gradient a leapfrog.

    Args:
        state: where it starts.
        momentum: ``(*batch, dim)``.
        gradient: of the log density.
        step_size: ``(*batch)``, or fewer axes that broadcast with it.
        leapfrogs: how many, at least 1.
        beta: where it is given, the density is `tempered`; the states stay those of p itself.

    Returns:
        The state and the momentum at the end.

    Reference:
        Neal (2011), MCMC Using Hamiltonian Dynamics.

    Example:
        >>> normal = lambda position: (-0.5 * position.square().sum(-1), -position)
        >>> start = torch.ones(1, 1, dtype=torch.float64)
        >>> quarter = torch.tensor(math.pi / 2 / 1000, dtype=torch.float64)
        >>> end, momentum = leapfrog(State(start, *normal(start)), 0 * start, normal, quarter, leapfrogs=1000)
        >>> bool(end.position.abs() < 1e-5), round(momentum.item(), 5)
        (True, -1.0)
    """
    (position, value, slope), size = state, step_size.unsqueeze(-1)
    momentum = momentum + 0.5 * size * _tempered(-position, slope, beta)
    for left in reversed(range(check_int("leapfrogs", leapfrogs, minimum=1))):
        position = position + size * momentum
        value, slope = gradient(position)
        momentum = momentum + (size if left else 0.5 * size) * _tempered(-position, slope, beta)
    return State(position, value, slope), momentum


def hamiltonian_step(
    state: State,
    gradient: Gradient,
    step_size: Tensor,
    leapfrogs: int,
    momentum: Tensor,
    log_uniform: Tensor,
    beta: Tensor | None = None,
) -> tuple[State, Tensor]:
    """One step of Hamiltonian Monte Carlo that leaves ``exp(log p)`` as it is, for every row by itself.

    The proposal at the end of a path of `leapfrog` is taken with probability ``min(1, exp(-dH))``. The masses are 1,
    which suits a density like N(0, I), as a fitted flow makes of its target (`noise_target`). A row whose path leaves
    the finite numbers is rejected, and a rejected row keeps its state bit for bit. A pure function, that reads nothing
    on the host: a CUDA graph can hold it.

    Args:
        state: where the chains are.
        gradient: of the log density; it must treat each row by itself.
        step_size: ``(*batch)``, or fewer axes that broadcast with it; fixed before, as by `adapt`.
        leapfrogs: length of the path, as many gradients.
        momentum: a fresh draw of N(0, I), ``(*batch, dim)``.
        log_uniform: the logarithm of a uniform draw from (0, 1), ``(*batch)``.
        beta: where it is given, the density that stays is `tempered`; the states stay those of p itself, so that the
            next step may have another beta without one gradient more.

    Returns:
        The next state, and the probability ``(*batch)`` with which each proposal was to be accepted.

    Raises:
        ValueError: if `leapfrogs` is below 1.

    Reference:
        Neal (2011), MCMC Using Hamiltonian Dynamics.

    Example:
        >>> normal = lambda position: (-0.5 * position.square().sum(-1), -position)
        >>> start = torch.randn(1000, 2)
        >>> state = State(start, *normal(start))
        >>> momentum, log_uniform = torch.randn(1000, 2), torch.rand(1000).log()
        >>> state, acceptance = hamiltonian_step(state, normal, torch.tensor(0.5), 3, momentum, log_uniform)
        >>> bool(acceptance.mean() > 0.9)
        True
    """
    proposal, last = leapfrog(state, momentum, gradient, step_size, leapfrogs, beta)
    kinetic = 0.5 * (momentum.square() - last.square()).sum(-1)
    log_ratio = tempered(proposal, beta) - tempered(state, beta) + kinetic
    log_ratio = torch.where(log_ratio.isfinite(), log_ratio, -math.inf)  # the momentum is not, where a slope is not
    taken = log_uniform < log_ratio
    kept = State(*(torch.where(_like(taken, old), new, old) for new, old in zip(proposal, state, strict=True)))
    return kept, log_ratio.clamp(max=0).exp()


def tempered(state: State, beta: Tensor | None) -> Tensor:
    """The log of ``N(position; 0, I)^(1 - beta) p(position)^beta``, ``(*batch)``; p itself where beta is None.

    In a flow's noise space it leads from q at beta = 0 to the target at beta = 1.
    """
    return state.value if beta is None else _tempered(standard_normal_log_prob(state.position), state.value, beta)


def _tempered(normal: Tensor, own: Tensor, beta: Tensor | None) -> Tensor:
    return own if beta is None else torch.lerp(normal, own, beta)


def adapt(
    state: State,
    gradient: Gradient,
    step_size: Tensor,
    leapfrogs: int,
    *,
    steps: int = 100,
    acceptance: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Step sizes at which a given share of proposals is accepted, found by stochastic approximation on other chains.

    The chains of this pilot run are thrown away, so that a run with the step sizes it found is one of fixed step sizes,
    and leaves its target as it is. ``log step += 2 t^-0.6 (accepted - acceptance)`` at the pilot's step t, and the
    result is the mean of the logarithm over the second half. Nothing is read on the host.

    Args:
        state: where the pilot's chains start.
        gradient: of the log density.
        step_size: a first guess, better too large than too small by 30, of the shape of what is looked for: of
            ``(*batch)`` each chain has one; of its last axes only, or of ``()``, those chains have one in common that
            differ in the others.
        leapfrogs: as in the run to come.
        steps: of the pilot, each with as many gradients as there are leapfrogs.
        acceptance: the mean of ``min(1, exp(-dH))`` to reach.
        generator: of the pilot's draws; by default torch's own.

    Returns:
        Step sizes, of the guess's shape, without gradient.

    Raises:
        ValueError: if `steps` or `leapfrogs` is below 1, or `acceptance` not between 0 and 1.

    Reference:
        Robbins & Monro (1951); Andrieu & Thoms (2008), A Tutorial on Adaptive MCMC. Hoffman & Gelman (2014), The
        No-U-Turn Sampler, for the acceptance to aim at; their dual averaging, tried here, overshoots where many chains
        share a step size, and its average then accepts too much.

    Example:
        >>> narrow = lambda position: (-0.5 * (position / 0.01).square().sum(-1), -position / 0.01**2)
        >>> start = 0.01 * torch.randn(100, 2)
        >>> found = adapt(State(start, *narrow(start)), narrow, torch.tensor(1.0), leapfrogs=3)
        >>> bool(0.005 < found < 0.03)
        True
    """
    if not 0 < acceptance < 1:
        raise ValueError(f"acceptance: expected a number between 0 and 1, got {acceptance}")
    log_step, steps = step_size.detach().log(), check_int("steps", steps, minimum=1)
    total, first = torch.zeros_like(log_step), steps // 2 + 1
    for t in range(1, steps + 1):
        momentum, log_uniform = draws(state, generator)
        state, accepted = hamiltonian_step(state, gradient, log_step.exp(), leapfrogs, momentum, log_uniform)
        log_step = log_step + 2 * t**-0.6 * (_mean_to(accepted, log_step.shape) - acceptance)
        total = total + log_step if t >= first else total
    return (total / (steps - first + 1)).exp()


def noise_target(q: FlowDistribution, log_density: Callable[[Tensor], Tensor]) -> Gradient:
    """The density of a flow's noise e that a density p of z makes: ``log p(f(e)) + log|det df/de|``, and its gradient.

    Draws e of it are draws f(e) of p. Where q is p it is N(0, I), for which steps of one size fit all directions; so it
    nearly is where q is near p. A call is one pass and one gradient with respect to e.

    Args:
        q: of which f is the flow, ``posterior.at(h)``; its parameters are copied, as they are, without gradient.
        log_density: of z ``(*samples, *batch, dim)``, ``(*samples, *batch)``; normalised or not.

    Returns:
        A function of e ``(*samples, *batch, dim)`` for `hamiltonian_step`. It raises a ValueError for a `log_density`
        of another shape.

    Reference:
        Hoffman et al. (2019), NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport.

    Example:
        >>> q = flowpost.diagonal(0, dim=2).at()
        >>> gradient = noise_target(q, lambda z: -0.5 * (z - 3).square().sum(-1))
        >>> value, slope = gradient(torch.randn(100, 2))
        >>> value.shape, slope.shape
        (torch.Size([100]), torch.Size([100, 2]))
    """
    with torch.inference_mode(mode=False):
        # Else a pass keeps what its weights' slopes need.
        shared = {id(each): each for _, tensors in made(q.flow) for each in tensors.values()}  # copies make their own
        flow = copy.deepcopy(q.flow, shared).requires_grad_(requires_grad=False)
        context = None if q.context is None else recordable(q.context.detach())
    batch = tuple(q.batch_shape)

    def gradient(noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(mode=False), torch.enable_grad():
            leaf = recordable(noise.detach()).requires_grad_()
            samples = tuple(leaf.shape[: leaf.ndim - 1 - len(batch)])
            z, log_det, _ = push(flow, context, batch, samples, leaf)
            found = log_density(z)
            if found.shape != z.shape[:-1]:  # it would broadcast, and mix the rows
                raise ValueError(
                    f"log_density: expected a value for each z, {tuple(z.shape[:-1])}, got shape {tuple(found.shape)}"
                )
            value = (found + log_det).to(z.dtype)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    return gradient


def _like(row: Tensor, tensor: Tensor) -> Tensor:
    """One entry for each row of a tensor, with as many axes."""
    return row if row.ndim == tensor.ndim else row.unsqueeze(-1)


def draws(state: State, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """What `hamiltonian_step` takes from chance: a momentum, and the logarithm of a uniform draw."""
    momentum, uniform = (
        draw(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        for draw, like in ((torch.randn, state.position), (torch.rand, state.value))
    )
    return momentum, uniform.log()


def _mean_to(values: Tensor, shape: torch.Size) -> Tensor:
    """The mean over all axes but the last, which broadcast to a shape."""
    return values.sum_to_size(shape) * (shape.numel() / max(1, values.numel()))
