"""Models with a state that moves in time: a moving average, two populations, a drug in the blood."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.posteriors.densities import cauchy, log_normal, normal, squares
from benchmarks.posteriors.model import Arrays, Model, Tensors
from benchmarks.posteriors.models.elimination import concentrations, lengths
from benchmarks.posteriors.models.orbits import orbit

LEAST = 1e-6  # of a concentration: none is seen below


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
    first, second, third, fourth = theta.unbind(-1)
    shift = torch.stack([fourth, second]).log()  # makes both rates of meeting 1
    states = orbit(torch.stack([first, -third]), start.T + shift, years) - shift
    return states.permute(2, 0, 1)


def _blood(data: Arrays) -> Arrays:
    steps = np.array(lengths(len(data["times"]), data["times"][0]))
    ends = np.concatenate([[0.0], np.cumsum(steps)])
    grid = np.interp(np.arange(2 * len(steps) + 1) / 2, np.arange(len(ends)), ends)  # the middles too
    logs = np.log(data["C_hat"])
    constants = {"jacobian": logs.sum(), "dose": data["D"], "volume": data["V"]}
    return {"logs": logs, "grid": grid[:, None], "steps": steps, **constants}


def one_compartment(p: Tensors, data: Tensors) -> Tensor:
    """A drug that is absorbed at a rate of its own and eliminated at one that saturates."""
    prior = sum(cauchy(p[name], 1.0) for name in ("k_a", "K_m", "V_m", "sigma"))
    inflow = torch.exp(-data["grid"] * p["k_a"]) * (p["k_a"] * data["dose"] / data["volume"])
    found = concentrations(inflow, p["V_m"] / data["volume"], p["K_m"], data["steps"])
    logs = found.clamp_min(LEAST).log().T
    return prior + normal(data["logs"], logs, p["sigma"].unsqueeze(-1)).sum(-1) - data["jacobian"]


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
