"""Models with a state that moves in time: a moving average, two populations, a drug in the blood."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.posteriors.densities import cauchy, log_normal, normal, squares
from benchmarks.posteriors.model import Arrays, Model, Tensors

STEPS = 20  # of Runge and Kutta, from one observation to the next


def _series(data: Arrays) -> Arrays:
    return {"y": data["y"]}


def arma(p: Tensors, data: Tensors) -> Tensor:
    """A moving average of a first-order autoregression.

    The errors ``e_t = d_t - theta e_(t-1)`` are ``(1 + theta B)^-1 d`` with B the shift in time, and
    ``(1 - a B)^-1 = (1 + a B) (1 + a^2 B^2) (1 + a^4 B^4) ...``: eight products in the place of a loop over time.
    """
    mu, phi, theta, y = p["mu"].unsqueeze(-1), p["phi"].unsqueeze(-1), p["theta"].unsqueeze(-1), data["y"]
    errors = torch.cat([y[:1] - mu - phi * mu, y[1:] - mu - phi * y[:-1]], -1)  # of theta = 0
    factor, shift = -theta, 1
    while shift < len(y):
        errors = torch.cat([errors[:, :shift], errors[:, shift:] + factor * errors[:, :-shift]], -1)
        factor, shift = factor.square(), 2 * shift
    prior = normal(p["mu"], 0.0, 10.0) + normal(p["phi"], 0.0, 2.0) + normal(p["theta"], 0.0, 2.0)
    return prior + cauchy(p["sigma"], 2.5) + squares(errors.square().sum(-1), p["sigma"], len(y))


def _populations(data: Arrays) -> Arrays:
    logs = np.log(np.vstack([data["y_init"], data["y"]]))
    return {"logs": logs, "jacobian": logs.sum()}


def lotka_volterra(p: Tensors, data: Tensors) -> Tensor:
    """Hares and lynxes, whose pelts were counted every year."""
    theta, sigma = p["theta"], p["sigma"]
    prior = normal(theta[:, ::2], 1.0, 0.5).sum(-1) + normal(theta[:, 1::2], 0.05, 0.05).sum(-1)
    prior = prior + log_normal(sigma, -1.0, 1.0).sum(-1) + log_normal(p["z_init"], math.log(10), 1.0).sum(-1)
    logs = populations(theta, p["z_init"].log(), len(data["logs"]) - 1)
    return prior + normal(data["logs"], logs, sigma.unsqueeze(-2)).sum((-2, -1)) - data["jacobian"]


def populations(theta: Tensor, start: Tensor, years: int) -> Tensor:
    """Log populations ``(S, years + 1, 2)``."""
    growth = torch.stack([theta[:, 0], -theta[:, 2]])
    meeting = torch.stack([-theta[:, 1], theta[:, 3]])
    state, step = start.T, 1 / STEPS
    states = [state]

    def slope(state: Tensor) -> Tensor:
        return growth + meeting * state.exp().flip(0)

    for _ in range(years):
        for _ in range(STEPS):
            first = slope(state)
            second = slope(state + 0.5 * step * first)
            third = slope(state + 0.5 * step * second)
            fourth = slope(state + step * third)
            state = state + step / 6 * (first + 2 * (second + third) + fourth)
        states.append(state)
    return torch.stack(states).permute(2, 0, 1)


def _blood(data: Arrays) -> Arrays:
    logs = np.log(data["C_hat"])
    names = {"dose": "D", "volume": "V", "times": "times"}
    return {"logs": logs, "jacobian": logs.sum()} | {name: data[there] for name, there in names.items()}


def one_compartment(p: Tensors, data: Tensors) -> Tensor:
    """A drug that is absorbed at a rate of its own and eliminated at one that saturates."""
    prior = sum(cauchy(p[name], 1.0) for name in ("k_a", "K_m", "V_m", "sigma"))
    logs = concentrations(p["k_a"], p["K_m"], p["V_m"], data).log()
    return prior + normal(data["logs"], logs, p["sigma"].unsqueeze(-1)).sum(-1) - data["jacobian"]


def concentrations(k_a: Tensor, k_m: Tensor, v_m: Tensor, data: Tensors) -> Tensor:
    """In the blood at the times of the data, ``(S, times)``."""
    count = len(data["times"])
    step = data["times"][-1] / (count * STEPS)
    grid = 0.5 * step * torch.arange(2 * count * STEPS + 1, dtype=k_a.dtype, device=k_a.device)
    absorbed = torch.exp(-grid.unsqueeze(-1) * k_a) * (k_a * data["dose"] / data["volume"])
    most = v_m / data["volume"]
    state, states = torch.zeros_like(k_a), []
    for index in range(count * STEPS):
        early, middle, late = absorbed[2 * index : 2 * index + 3]
        first = early - most * state / (k_m + state)
        point = state + 0.5 * step * first
        second = middle - most * point / (k_m + point)
        point = state + 0.5 * step * second
        third = middle - most * point / (k_m + point)
        point = state + step * third
        fourth = late - most * point / (k_m + point)
        state = state + step / 6 * (first + 2 * (second + third) + fourth)
        if (index + 1) % STEPS == 0:
            states.append(state)
    return torch.stack(states, -1)


POSITIVE = constraints.positive
MODELS = {
    "arma-arma11": Model({"mu": (), "phi": (), "theta": (), "sigma": POSITIVE}, _series, arma),
    "hudson_lynx_hare-lotka_volterra": Model(
        {"theta": ((4,), POSITIVE), "z_init": ((2,), POSITIVE), "sigma": ((2,), POSITIVE)}, _populations, lotka_volterra
    ),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": Model(
        dict.fromkeys(("k_a", "K_m", "V_m", "sigma"), POSITIVE), _blood, one_compartment
    ),
}
