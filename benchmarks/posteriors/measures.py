"""How far draws are from the reference draws, by marginals, in units of the posterior's standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from benchmarks.posteriors.collection import Posterior


@dataclass(frozen=True)
class Marginals:
    """What a fit's draws miss of the marginals of the parameters as the model has them."""

    w1_mean: float
    """1-Wasserstein distance, in posterior standard deviations, mean over the marginals."""
    w1_max: float
    """Of the marginal that is farthest away."""
    w1_where: str
    """Its name."""
    mean_error: float
    """The largest error of a mean, in posterior standard deviations, with its sign."""
    sd_ratio: float
    """Of the draws' standard deviation to the posterior's, where it is farthest from 1."""


def marginals(rows: Tensor, posterior: Posterior) -> Marginals:
    """Compare draws ``(n, dim)``, in the order of the posterior's columns, with its reference draws."""
    draws, sd = rows.double().numpy(), posterior.sd.numpy()
    distances = wasserstein(draws, posterior.reference.numpy()) / sd
    errors = (draws.mean(0) - posterior.mean.numpy()) / sd
    ratios = draws.std(0, ddof=1) / sd
    far, off, wide = distances.argmax(), np.abs(errors).argmax(), np.abs(np.log(ratios)).argmax()
    return Marginals(
        w1_mean=float(distances.mean()),
        w1_max=float(distances[far]),
        w1_where=posterior.columns[far],
        mean_error=float(errors[off]),
        sd_ratio=float(ratios[wide]),
    )


def wasserstein(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1-Wasserstein distance of two sets of numbers, ``integral |F^-1 - G^-1|``, column by column.

    Args:
        first: ``(n, columns)``.
        second: ``(m, columns)``.

    Returns:
        ``(columns,)``.
    """
    n, m = len(first), len(second)
    breaks = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # where a quantile function jumps, in 1 / (n m)
    gaps = np.abs(np.sort(first, 0)[breaks[:-1] // m] - np.sort(second, 0)[breaks[:-1] // n])
    return np.diff(breaks) @ gaps / (n * m)
