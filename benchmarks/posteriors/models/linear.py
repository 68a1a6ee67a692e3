"""Linear regressions: the residuals' squares come from a QR factor, so no draw visits an observation.

``|y - X b|^2 = |q - R b|^2 + rest`` with ``R`` and ``q`` from the QR factors of ``(X, y)``; unlike a form in ``X'X`` it
loses no digits, so float32 serves too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.posteriors.densities import cauchy, half_student, normal, squares, student
from benchmarks.posteriors.model import Arrays, Model, Tensors


def factor(x: np.ndarray, y: np.ndarray) -> Arrays:
    """R, q and the rest of a regression of `y` ``(N,)`` on the columns of `x` ``(N, K)``, where N > K."""
    triangle = np.linalg.qr(np.column_stack([x, y]))[1]
    root, target = triangle[:-1, :-1], triangle[:-1, -1]
    return {"root": root, "target": target, "rest": triangle[-1, -1] ** 2, "count": np.asarray(len(y))}


def likelihood(coefficients: Tensor, sigma: Tensor, data: Tensors) -> Tensor:
    """``sum log N(y | X b, sigma)`` for b ``(S, K)`` and sigma ``(S,)``."""
    residuals = data["target"] - coefficients @ data["root"].T
    return squares(residuals.square().sum(-1) + data["rest"], sigma, data["count"])


def _columns(*columns: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(columns[0])), *columns])


def _kidiq(data: Arrays) -> Arrays:
    school, iq = data["mom_hs"], data["mom_iq"]
    return factor(_columns(school, iq, school * iq), data["kid_score"])


def kidiq(p: Tensors, data: Tensors) -> Tensor:
    """Children's scores on their mothers' school and IQ, with interaction."""
    return cauchy(p["sigma"], 2.5) + likelihood(p["beta"], p["sigma"], data)


def _earnings(data: Arrays) -> Arrays:
    height, male = data["height"], data["male"]
    return factor(_columns(height, male, height * male), np.log(data["earn"]))


def flat(p: Tensors, data: Tensors) -> Tensor:
    """A regression whose priors are flat."""
    return likelihood(p["beta"], p["sigma"], data)


def _mesquite(data: Arrays) -> Arrays:
    sizes = [np.log(data[name]) for name in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    return factor(_columns(*sizes, data["group"]), np.log(data["weight"]))


def _mesquite_volume(data: Arrays) -> Arrays:
    volume = data["diam1"] * data["diam2"] * data["canopy_height"]
    return factor(_columns(np.log(volume)), np.log(data["weight"]))


def _kilpisjarvi(data: Arrays) -> Arrays:
    priors = {name: data[name] for name in ("pmualpha", "psalpha", "pmubeta", "psbeta")}
    return {**factor(_columns(data["x"]), data["y"]), **priors}


def kilpisjarvi(p: Tensors, data: Tensors) -> Tensor:
    """Summer temperature on the year."""
    alpha, beta = p["alpha"], p["beta"]
    prior = normal(alpha, data["pmualpha"], data["psalpha"]) + normal(beta, data["pmubeta"], data["psbeta"])
    return prior + likelihood(torch.stack([alpha, beta], -1), p["sigma"], data)


def _diamonds(data: Arrays) -> Arrays:
    x = data["X_transposed"].T
    return factor(_columns(x - x.mean(0)), data["Y"])


def diamonds(p: Tensors, data: Tensors) -> Tensor:
    """Log prices of diamonds on 24 correlated predictors."""
    b, intercept, sigma = p["b"], p["Intercept"], p["sigma"]
    prior = normal(b, 0.0, 1.0).sum(-1) + student(intercept, 3, 8, 10) + half_student(sigma, 3, 10)
    return prior + likelihood(torch.cat([intercept.unsqueeze(-1), b], -1), sigma, data)


def _blr(data: Arrays) -> Arrays:
    return factor(data["X"], data["y"])


def blr(p: Tensors, data: Tensors) -> Tensor:
    """A regression on correlated columns."""
    prior = normal(p["beta"], 0.0, 10.0).sum(-1) + normal(p["sigma"], 0.0, 10.0)
    return prior + likelihood(p["beta"], p["sigma"], data)


def _autoregression(data: Arrays) -> Arrays:
    order, y = int(data["K"]), data["y"]
    lags = [y[order - lag : len(y) - lag] for lag in range(1, order + 1)]
    return factor(_columns(*lags), y[order:])


def autoregression(p: Tensors, data: Tensors) -> Tensor:
    """A series on its last five values."""
    alpha, beta = p["alpha"], p["beta"]
    prior = normal(alpha, 0.0, 10.0) + normal(beta, 0.0, 10.0).sum(-1) + cauchy(p["sigma"], 2.5)
    return prior + likelihood(torch.cat([alpha.unsqueeze(-1), beta], -1), p["sigma"], data)


POSITIVE = constraints.positive
MODELS = {
    "kidiq-kidscore_interaction": Model({"beta": (4,), "sigma": POSITIVE}, _kidiq, kidiq),
    "earnings-logearn_interaction": Model({"beta": (4,), "sigma": POSITIVE}, _earnings, flat),
    "mesquite-logmesquite": Model({"beta": (7,), "sigma": POSITIVE}, _mesquite, flat),
    "mesquite-logmesquite_logvolume": Model({"beta": (2,), "sigma": POSITIVE}, _mesquite_volume, flat),
    "kilpisjarvi_mod-kilpisjarvi": Model({"alpha": (), "beta": (), "sigma": POSITIVE}, _kilpisjarvi, kilpisjarvi),
    "diamonds-diamonds": Model({"b": (24,), "Intercept": (), "sigma": POSITIVE}, _diamonds, diamonds),
    "sblrc-blr": Model({"beta": (5,), "sigma": POSITIVE}, _blr, blr),
    "arK-arK": Model({"alpha": (), "beta": (5,), "sigma": POSITIVE}, _autoregression, autoregression),
}
