"""Logistic regressions: ``sum y eta - softplus(eta)``; equal rows are visited once."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from benchmarks.posteriors.densities import normal, softplus
from benchmarks.posteriors.model import Arrays, Model, Tensors


def _pooled(x: np.ndarray, y: np.ndarray) -> Arrays:
    """The different rows of `x` ``(N, K)`` as columns, how often each comes, and ``X'y``."""
    rows, counts = np.unique(x, axis=0, return_counts=True)
    return {"rows": rows.T.copy(), "counts": counts, "target": x.T @ y}


def likelihood(beta: Tensor, data: Tensors) -> Tensor:
    """``sum log Bernoulli(y | s(X b))`` for b ``(S, K)``."""
    return beta @ data["target"] - softplus(beta @ data["rows"]) @ data["counts"]


def _dogs(data: Arrays) -> Arrays:
    shocked = data["y"].astype(np.float64)
    shocks = shocked.cumsum(1) - shocked  # of the trials before
    avoided = np.arange(shocked.shape[1]) - shocks
    return _pooled(np.column_stack([np.ones(shocked.size), avoided.ravel(), shocks.ravel()]), shocked.ravel())


def dogs(p: Tensors, data: Tensors) -> Tensor:
    """Dogs that learn to avoid a shock."""
    return normal(p["beta"], 0.0, 100.0).sum(-1) + likelihood(p["beta"], data)


def _wells(data: Arrays) -> Arrays:
    distance = data["dist"]
    return _pooled(np.column_stack([np.ones(len(distance)), distance]), data["switched"])


def wells(p: Tensors, data: Tensors) -> Tensor:
    """Households that switch to another well, on its distance; the priors are flat."""
    return likelihood(p["beta"], data)


MODELS = {
    "dogs-dogs": Model({"beta": (3,)}, _dogs, dogs),
    "wells_data-wells_dist": Model({"beta": (2,)}, _wells, wells),
}
