"""Importance weights in a stream: log of their mean, its error, and how heavy their tail is (Pareto k-hat)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.pareto import pareto_k, tail_size

LIMIT = 0.7
"""Above it an importance-sampling estimate is not to be trusted (Vehtari et al. 2024)."""


class UnreliableEstimateWarning(UserWarning):
    """Importance weights whose tail is too heavy for their mean to be trusted."""


class ImportanceEstimate(NamedTuple):
    """An importance-sampling estimate of log p(x) and what says whether to trust it, each ``(B,)``, float64."""

    log_p: Tensor
    """``log 1/S sum_s w_s``"""
    standard_error: Tensor
    """Of log_p, in nats, to first order: ``sd(w) / (sqrt(S) mean(w))``; too small where k_hat is above 0.7."""
    ess: Tensor
    """Effective sample size ``(sum w)^2 / sum w^2``, from 1 to S."""
    k_hat: Tensor
    """Pareto k of the weights' tail: below 0.5 good, up to 0.7 usable, above it not to be trusted."""


@torch.no_grad()
def summarize(chunks: Iterable[Tensor], samples: int) -> ImportanceEstimate:
    """What log-weights that stream through say, of any model: log p(x) and its diagnostics, without a warning.

    Args:
        chunks: log-weights ``log p(x, z_s) - log q(z_s|x)``, each ``(n, B)``.
        samples: how many there are for each example, over all chunks.

    Returns:
        ``ImportanceEstimate(log_p, standard_error, ess, k_hat)``; the error is nan for one sample.

    Raises:
        ValueError: if the chunks do not have `samples` rows together.

    Example:
        >>> estimate = summarize([torch.zeros(30, 2), torch.zeros(70, 2)], samples=100)
        >>> estimate.log_p, estimate.ess
        (tensor([0., 0.], dtype=torch.float64), tensor([100., 100.], dtype=torch.float64))
    """
    keep, count = tail_size(samples) + 1, 0
    total = square = tail = None
    for chunk in chunks:
        log_w = chunk.double()
        count += len(log_w)
        sums = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
        total = sums[0] if total is None else torch.logaddexp(total, sums[0])
        square = sums[1] if square is None else torch.logaddexp(square, sums[1])
        tail = log_w if tail is None else torch.cat([tail, log_w])
        if len(tail) > 2 * keep:  # not at every chunk: most of the time goes to the decoder, not here
            tail = tail.topk(keep, dim=0).values
    if total is None or square is None or tail is None or count != samples:
        raise ValueError(f"samples: expected {count}, the rows of all chunks, got {samples}")
    ess = torch.exp(2 * total - square).clamp(1, samples)
    # Var(w) / (S mean(w)^2), with the variance's S - 1
    error = ((samples / ess - 1) / (samples - 1)).sqrt() if samples > 1 else torch.full_like(ess, math.nan)
    k_hat = pareto_k(tail.topk(min(keep, samples), dim=0).values, samples)
    return ImportanceEstimate(total - math.log(samples), error, ess, k_hat)


def warn_unreliable(estimate: ImportanceEstimate, samples: int) -> None:
    """Say in plain words where an estimate is not to be trusted."""
    bad = ~(estimate.k_hat <= LIMIT)
    if not bool(bad.any()):
        return
    if tail_size(samples) < 5:
        why = f"{samples} samples are too few for k-hat, which needs 21, so nothing says whether to trust it"
    else:
        why = (
            f"not to be trusted for {int(bad.sum())} of {bad.numel()} examples, whose Pareto k-hat is above {LIMIT} "
            f"(largest {estimate.k_hat.max().item():.2g}): a few samples carry all the weight, so the estimate is "
            f"probably too low and its standard error too small; a posterior closer to p(z|x) helps, more samples "
            f"help slowly"
        )
    warnings.warn(f"log p(x): {why}", UnreliableEstimateWarning, stacklevel=3)
