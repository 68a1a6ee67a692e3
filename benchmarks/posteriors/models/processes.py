"""Gaussian processes: on eleven points by a Cholesky factor, and as sums of eigenfunctions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.posteriors.densities import (
    HALF_LOG_2_PI,
    gamma,
    half_student,
    inverse_gamma,
    normal,
    standard_normal_sum,
    student,
)
from benchmarks.posteriors.model import Arrays, Model, Tensors

JITTER = 1e-10  # part of the model


def _squared_distances(data: Arrays) -> np.ndarray:
    x = data["x"].astype(np.float64)
    return (x[:, None] - x) ** 2


def _covariance(rho: Tensor, alpha: Tensor, diagonal: Tensor, distances: Tensor) -> Tensor:
    """``alpha^2 exp(-d^2 / (2 rho^2)) + diagonal I`` for each draw, ``(S, N, N)``."""
    rho, alpha, diagonal = (each[:, None, None] for each in (rho, alpha, diagonal))
    smooth = alpha.square() * torch.exp(-0.5 * distances / rho.square())
    return smooth + diagonal * torch.eye(len(distances), dtype=distances.dtype, device=distances.device)


def _cholesky(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The factor, and whether there is one; where there is none, it is that of the identity."""
    sound = torch.linalg.cholesky_ex(covariance.detach()).info == 0
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky_ex(torch.where(sound[:, None, None], covariance, identity)).L, sound


def _prior(p: Tensors) -> Tensor:
    return gamma(p["rho"], 25.0, 4.0) + normal(p["alpha"], 0.0, 2.0)


def _regression(data: Arrays) -> Arrays:
    return {"distances": _squared_distances(data), "y": data["y"]}


def gp_regression(p: Tensors, data: Tensors) -> Tensor:
    """The length, the scale and the noise's variance of a Gaussian process."""
    root, sound = _cholesky(_covariance(p["rho"], p["alpha"], p["sigma"], data["distances"]))
    y = data["y"].expand(len(root), -1).unsqueeze(-1)
    white = torch.linalg.solve_triangular(root, y, upper=False).squeeze(-1)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    likelihood = standard_normal_sum(white) - log_det
    return _prior(p) + normal(p["sigma"], 0.0, 1.0) + likelihood.masked_fill(~sound, -math.inf)


def _poisson(data: Arrays) -> Arrays:
    factorials = sum(math.lgamma(count + 1) for count in data["k"])
    return {"distances": _squared_distances(data), "k": data["k"], "factorials": np.asarray(factorials)}


def gp_poisson(p: Tensors, data: Tensors) -> Tensor:
    """Counts whose log rate is a Gaussian process.

    The jitter leaves the covariance nearly singular, so its factor is taken in float64 whatever the draws are in.
    """
    rho, alpha = p["rho"].double(), p["alpha"].double()
    jitter = torch.full_like(rho, JITTER)
    root, sound = _cholesky(_covariance(rho, alpha, jitter, data["distances"].double()))
    f = (root @ p["f_tilde"].double().unsqueeze(-1)).squeeze(-1)
    counts = (data["k"] * f - f.exp()).sum(-1) - data["factorials"]
    likelihood = counts.masked_fill(~sound, -math.inf).to(p["rho"].dtype)
    return _prior(p) + standard_normal_sum(p["f_tilde"]) + likelihood


def _eigenfunctions(data: Arrays) -> Arrays:
    renamed = {
        "x": "Xgp_1",
        "frequencies": "slambda_1",
        "x_sigma": "Xgp_sigma_1",
        "frequencies_sigma": "slambda_sigma_1",
    }
    arrays = {name: data[there] for name, there in renamed.items()}
    squared = {name: arrays[name][:, 0] ** 2 for name in ("frequencies", "frequencies_sigma")}
    return {**arrays, **squared, "y": data["Y"]}


def _process(scale: Tensor, length: Tensor, weights: Tensor, x: Tensor, squared_frequencies: Tensor) -> Tensor:
    """A Gaussian process at the observations, ``(S, N)``; the weights are of mean 0 and scale 1."""
    scale, length = scale.unsqueeze(-1), length.unsqueeze(-1)
    amplitude = scale * (math.sqrt(2 * math.pi) * length).sqrt()  # the root of the spectral density at 0
    return (amplitude * torch.exp(-0.25 * length.square() * squared_frequencies) * weights) @ x.T


def accelerations(p: Tensors, data: Tensors) -> Tensor:
    """The head's acceleration in crashes of motorcycles: one process is the mean, another the log of the noise."""
    prior = student(p["Intercept"], 3, -13, 36) + student(p["Intercept_sigma"], 3, 0, 10)
    for kind in ("1", "sigma_1"):
        prior = prior + half_student(p[f"sdgp_{kind}"], 3, 36) + inverse_gamma(p[f"lscale_{kind}"], 1.124909, 0.0177)
        prior = prior + standard_normal_sum(p[f"zgp_{kind}"])
    mean = _process(p["sdgp_1"], p["lscale_1"], p["zgp_1"], data["x"], data["frequencies"])
    weights = p["sdgp_sigma_1"], p["lscale_sigma_1"], p["zgp_sigma_1"]
    log_sigma = p["Intercept_sigma"].unsqueeze(-1) + _process(*weights, data["x_sigma"], data["frequencies_sigma"])
    residuals = (data["y"] - p["Intercept"].unsqueeze(-1) - mean) * torch.exp(-log_sigma)
    return prior - (0.5 * residuals.square() + log_sigma + HALF_LOG_2_PI).sum(-1)


POSITIVE = constraints.positive
MODELS = {
    "gp_pois_regr-gp_regr": Model({"rho": POSITIVE, "alpha": POSITIVE, "sigma": POSITIVE}, _regression, gp_regression),
    "gp_pois_regr-gp_pois_regr": Model({"rho": POSITIVE, "alpha": POSITIVE, "f_tilde": (11,)}, _poisson, gp_poisson),
    "mcycle_gp-accel_gp": Model(
        {"Intercept": (), "sdgp_1": POSITIVE, "lscale_1": POSITIVE, "zgp_1": (40,)}
        | {"Intercept_sigma": (), "sdgp_sigma_1": POSITIVE, "lscale_sigma_1": POSITIVE, "zgp_sigma_1": (20,)},
        _eigenfunctions,
        accelerations,
    ),
}
