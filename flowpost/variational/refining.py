"""Draws of q moved towards p by Hamiltonian Monte Carlo, in the noise space of the component that each belongs to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowpost.annealing import State, adapt, draws, hamiltonian_step, noise_target
from flowpost.numerics.arguments import check_int
from flowpost.posterior import FlowPosterior
from flowpost.variational.bound import Fitted
from flowpost.variational.families import components
from flowpost.variational.target import Target


def refined(posterior: Fitted, target: Target, z: Tensor, steps: int, leapfrogs: int) -> Tensor:
    """Where chains from z ``(n, dim)`` end, each in the noise space of the component with the highest density there."""
    check_int("steps", steps, minimum=1)
    parts, moved = components(posterior), z.clone()
    with torch.no_grad():
        densities = torch.stack([part.log_prob(z) for part in parts])
        owner = densities.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(0)
    for k, part in enumerate(parts):
        own = owner == k
        if own.any():
            moved[own] = _chains(part, target, z[own], steps, leapfrogs)
    return moved


def _chains(part: FlowPosterior, target: Target, z: Tensor, steps: int, leapfrogs: int) -> Tensor:
    with torch.no_grad():
        noise, _ = part.flow.inverse(z)
    gradient = noise_target(part.at(), target)
    state = State(noise, *gradient(noise))
    step_size = adapt(state, gradient, noise.new_tensor(0.5), leapfrogs)
    for _ in range(steps):
        state, _ = hamiltonian_step(state, gradient, step_size, leapfrogs, *draws(state))
    with torch.no_grad():
        return part.flow(state.position)[0]
