"""Varying intercepts and slopes. The observations of a group are a line, so a group's residuals are two numbers."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.distributions import constraints

from benchmarks.posteriors.densities import cauchy, inverse_gamma, normal, squares, standard_normal_sum
from benchmarks.posteriors.model import Arrays, Model, Tensors


def _lines(group: np.ndarray, x: np.ndarray, y: np.ndarray, groups: int) -> Arrays:
    """For each group the QR factor of ``(1, x, y)``, whose entries are the numbers of `_line_squares`."""
    factors = np.zeros((groups, 3, 3))
    for index in range(groups):
        own = group == index + 1
        table = np.column_stack([np.ones(own.sum()), x[own], y[own]])
        padded = np.vstack([table, np.zeros((3, 3))])  # a group may have one observation
        factors[index] = np.linalg.qr(padded)[1]
    first, cross, start = factors[:, 0].T
    _, second, slope = factors[:, 1].T
    lines = {"first": first, "cross": cross, "start": start, "second": second, "slope": slope}
    return {**lines, "rest": np.asarray(np.sum(factors[:, 2, 2] ** 2)), "count": np.asarray(len(y))}


def _line_squares(intercepts: Tensor, slopes: Tensor, data: Tensors) -> Tensor:
    """``sum (y - a - b x)^2`` over all observations for a, b ``(S, groups)``."""
    along = data["first"] * intercepts + data["cross"] * slopes - data["start"]
    across = data["second"] * slopes - data["slope"]
    return along.square().sum(-1) + across.square().sum(-1) + data["rest"]


def _column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)


def _as_published(data: Arrays) -> Arrays:
    return {"y": data["y"], "sigma": data["sigma"]}


def eight_schools_centered(p: Tensors, data: Tensors) -> Tensor:
    """Effects of coaching in eight schools."""
    theta, mu, tau = p["theta"], p["mu"], p["tau"]
    effects = normal(theta, _column(mu), _column(tau)) + normal(data["y"], theta, data["sigma"])
    return cauchy(tau, 5.0) + normal(mu, 0.0, 5.0) + effects.sum(-1)


def eight_schools_noncentered(p: Tensors, data: Tensors) -> Tensor:
    """The same in effects of mean 0 and scale 1."""
    raw, mu, tau = p["theta_trans"], p["mu"], p["tau"]
    effects = normal(data["y"], _column(mu) + _column(tau) * raw, data["sigma"])
    return cauchy(tau, 5.0) + normal(mu, 0.0, 5.0) + standard_normal_sum(raw) + effects.sum(-1)


def _radon_centered(data: Arrays) -> Arrays:
    county, uranium = data["county_idx"], data["log_uppm"]
    groups = int(data["J"])
    of_county = np.array([uranium[county == index + 1][0] for index in range(groups)])
    return {**_lines(county, data["floor_measure"], data["log_radon"], groups), "uranium": of_county}


def radon_centered(p: Tensors, data: Tensors) -> Tensor:
    """Radon in the homes of Minnesota: a county's intercept, its uranium, the floor."""
    alpha, beta, mu, sigma = p["alpha"], p["beta"], p["mu_alpha"], p["sigma_alpha"]
    prior = normal(sigma, 0.0, 1.0) + normal(p["sigma_y"], 0.0, 1.0) + normal(mu, 0.0, 10.0)
    prior = prior + normal(beta, 0.0, 10.0).sum(-1) + normal(alpha, _column(mu), _column(sigma)).sum(-1)
    total = _line_squares(alpha + beta[..., :1] * data["uranium"], beta[..., 1:], data)
    return prior + squares(total, p["sigma_y"], data["count"])


def _radon_varying(data: Arrays) -> Arrays:
    return _lines(data["county"], data["x"], data["y"], int(data["J"]))


def radon_varying(p: Tensors, data: Tensors) -> Tensor:
    """A county's intercept and its slope on the floor, both in effects of mean 0 and scale 1."""
    intercepts = _column(p["mu_a1"]) + _column(p["sigma_a1"]) * p["eta1"]
    slopes = 0.1 * _column(p["mu_a2"]) + _column(p["sigma_a2"]) * p["eta2"]
    prior = standard_normal_sum(p["eta1"]) + standard_normal_sum(p["eta2"])
    prior = prior + normal(p["mu_a1"], 0.0, 1.0) + normal(p["mu_a2"], 0.0, 1.0)
    return prior + squares(_line_squares(intercepts, slopes, data), p["sigma_y"], data["count"])


def _hepatitis(data: Arrays) -> Arrays:
    lines = _lines(data["idxn1"], data["tvec1"] - 6.5, data["Yvec1"], int(data["N"]))
    return {**lines, "baseline": data["y0"] - data["y0"].mean()}


def hepatitis(p: Tensors, data: Tensors) -> Tensor:
    """Titres of antibodies in infants: a line in log time for each, and the titre before."""
    variances = [p[f"sigmasq_{name}"] for name in ("y", "alpha", "beta")]
    prior = sum(inverse_gamma(variance, 0.001, 0.001) for variance in variances)
    prior = prior + sum(normal(p[name], 0.0, 1000.0) for name in ("alpha0", "beta0", "gamma"))
    scales = [variance.sqrt() for variance in variances]
    prior = prior + normal(p["alpha"], _column(p["alpha0"]), _column(scales[1])).sum(-1)
    prior = prior + normal(p["beta"], _column(p["beta0"]), _column(scales[2])).sum(-1)
    intercepts = p["alpha"] + _column(p["gamma"]) * data["baseline"]
    return prior + squares(_line_squares(intercepts, p["beta"], data), scales[0], data["count"])


def _electric(data: Arrays) -> Arrays:
    """Two classes for each pair, in the order of the pairs."""
    order = np.argsort(data["pair"], kind="stable")
    classes = {name: data[name][order].reshape(-1, 2).T for name in ("treatment", "pre_test", "y")}
    grades = np.eye(int(data["n_grade"]))[:, data["grade_pair"] - 1]
    return {**classes, "grades": grades}


def electric(p: Tensors, data: Tensors) -> Tensor:
    """Reading scores of paired classes: an effect for each pair, the rest for each grade."""
    of_grade = {name: p[name] @ data["grades"] for name in ("mu_a", "sigma_a", "sigma_y", "b", "c")}  # (S, pairs)
    prior = standard_normal_sum(p["eta_a"]) + standard_normal_sum(p["mu_a"])
    prior = prior + normal(p["b"], 0.0, 100.0).sum(-1) + normal(p["c"], 0.0, 100.0).sum(-1)
    effects = 50 * of_grade["mu_a"] + of_grade["sigma_a"] * p["eta_a"]
    for treatment, pre_test, y in zip(data["treatment"], data["pre_test"], data["y"], strict=True):
        mean = effects + of_grade["b"] * treatment + of_grade["c"] * pre_test
        prior = prior + normal(y, mean, of_grade["sigma_y"]).sum(-1)
    return prior


POSITIVE, BELOW_100 = constraints.positive, constraints.interval(0.0, 100.0)
MODELS = {
    "eight_schools-eight_schools_centered": Model(
        {"theta": (8,), "mu": (), "tau": POSITIVE}, _as_published, eight_schools_centered
    ),
    "eight_schools-eight_schools_noncentered": Model(
        {"theta_trans": (8,), "mu": (), "tau": POSITIVE}, _as_published, eight_schools_noncentered
    ),
    "radon_mn-radon_hierarchical_intercept_centered": Model(
        {"alpha": (85,), "beta": (2,), "mu_alpha": (), "sigma_alpha": POSITIVE, "sigma_y": POSITIVE},
        _radon_centered,
        radon_centered,
    ),
    "radon_vary_si_chr": Model(
        {"eta1": (85,), "eta2": (85,), "mu_a1": (), "mu_a2": ()}
        | dict.fromkeys(("sigma_a1", "sigma_a2", "sigma_y"), BELOW_100),
        _radon_varying,
        radon_varying,
    ),
    "hepatitis": Model(
        dict.fromkeys(("sigmasq_y", "sigmasq_alpha", "sigmasq_beta"), POSITIVE)
        | {"alpha": (106,), "beta": (106,), "gamma": (), "alpha0": (), "beta0": ()},
        _hepatitis,
        hepatitis,
    ),
    "electric_1c_chr": Model(
        {
            "eta_a": (96,),
            "mu_a": (4,),
            "sigma_a": ((4,), BELOW_100),
            "sigma_y": ((4,), BELOW_100),
            "b": (4,),
            "c": (4,),
        },
        _electric,
        electric,
    ),
}
