"""How heavy the tail of importance weights is, by a Pareto distribution fitted to the largest of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def tail_size(samples: int) -> int:
    """How many of the largest weights are the tail, ``min(samples / 5, 3 sqrt(samples))``, rounded up.

    Reference:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto Smoothed Importance Sampling.

    Example:
        >>> tail_size(1000)
        95
    """
    return math.ceil(min(0.2 * samples, 3 * math.sqrt(samples)))


def pareto_k(tail: Tensor, samples: int) -> Tensor:
    """The shape k of a generalized Pareto distribution fitted to the tail of importance weights, for each example.

    The weights have ``1/k`` finite moments. Below 0.5 a sum of them converges as usual; up to 0.7 more slowly, but its
    standard error still means something; above, neither. A heavy tail that no sample has reached cannot be seen.

    Args:
        tail: log of the ``tail_size(samples) + 1`` largest weights, ``(M + 1, *batch)``; the smallest of them is the
            threshold.
        samples: how many weights there were.

    Returns:
        k-hat ``(*batch)``, float64, drawn towards 0.5 as much as ten more tail values of that shape would. Infinite for
        a tail below 5, where nothing can be said, so below 21 samples; minus infinite where the
        tail's weights are all equal; nan where a weight is.

    Reference:
        Vehtari et al. (2024); Zhang & Stephens (2009), A New and Efficient Estimation Method for the Generalized Pareto
        Distribution.
    """
    size = tail_size(samples)
    if size < 5:
        return torch.full(tail.shape[1:], math.inf, dtype=torch.float64, device=tail.device)
    tail = tail.double().sort(0).values
    top = tail[-1]
    threshold = (tail[0] - top).exp()
    shape = fit_pareto((tail[1:] - top).exp() - threshold)
    shape = (size * shape + 10 * 0.5) / (size + 10)
    level = 1 - threshold < 100 * torch.finfo(torch.float64).eps
    return torch.where(top.isfinite(), torch.where(level, -math.inf, shape), math.nan)


@torch.no_grad()
def smoothed(log_w: Tensor) -> Tensor:
    """Log-weights whose largest ones are those that a Pareto distribution fitted to them would have on average.

    The largest weight of a heavy tail is mostly chance, and in a weighted mean it counts as much as all its chance. No
    weight becomes larger than the largest one was. Too few weights to say anything, and a tail of equal ones, stay.

    Args:
        log_w: ``(S,)``; minus infinity for a weight of 0.

    Returns:
        ``(S,)``, float64.

    Reference:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto Smoothed Importance Sampling, Algorithm 1.

    Example:
        >>> smoothed(torch.tensor([1.0, 2.0]))
        tensor([1., 2.], dtype=torch.float64)
    """
    log_w = log_w.double()
    tail = _tail(log_w)
    if tail is None:
        return log_w
    size = len(tail.places)
    level = (torch.arange(size, dtype=torch.float64, device=log_w.device) + 0.5) / size
    excess = tail.scale * torch.expm1(-tail.k_hat * torch.log1p(-level)) / tail.k_hat  # quantiles
    return log_w.index_copy(0, tail.places, log_w.max() + (tail.threshold + excess).log().clamp_max(0))


@torch.no_grad()
def chance_of_largest(log_w: Tensor) -> float:
    """How likely the Pareto distribution fitted to the tail of weights has one as large as their largest, at most.

    It is small where a few draws have found mass that the others do not know of, such as a mode that q all but misses:
    these are not of the tail's shape, and `smoothed` would take from them what they have found.

    Args:
        log_w: ``(S,)``; minus infinity for a weight of 0.

    Returns:
        The chance, summed over the draws of the tail, so that it may exceed 1; 1 where `smoothed` leaves all weights.

    Example:
        >>> log_w = torch.cat([0.1 * torch.randn(9999), torch.tensor([7.0])])
        >>> chance_of_largest(log_w) < 1e-4
        True
    """
    tail = _tail(log_w.double())
    if tail is None:
        return 1.0
    # The largest is 1 in its own units; a negative shape ends somewhere, and beyond its end there is no chance.
    beyond = (1 + tail.k_hat * (1 - tail.threshold) / tail.scale).clamp_min(0).log() / -tail.k_hat
    return len(tail.places) * beyond.exp().item()


@torch.no_grad()
def unseen(log_w: Tensor) -> float:
    """The share of all weight that is where no more than one of these draws is, going by the Pareto fit to their tail.

    A heavy tail does harm by what lies beyond the draws. Of weights that are nearly equal that is next to nothing, also
    where k-hat is somewhat above 0.7. The shape is taken one standard error larger than it was found.

    Args:
        log_w: ``(S,)``; minus infinity for a weight of 0.

    Returns:
        From 0; infinite where the tail may have no mean, or too few weights say anything; 0 for equal weights.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> steep, flat = (scale * torch.randn(10_000, generator=generator).exp() for scale in (1, 1e-3))
        >>> unseen(steep) > 1, unseen(flat) < 1e-3
        (True, True)
    """
    log_w = log_w.double()
    tail = _tail(log_w)
    if tail is None:
        return 0.0 if len(log_w) and bool((log_w == log_w[0]).all()) else math.inf
    size = len(tail.places)
    k = tail.k_hat.item() + (1 + max(0.0, tail.k_hat.item())) / math.sqrt(size)
    if k >= 1:
        return math.inf
    beyond = tail.threshold + tail.scale * (size**k / (1 - k) - 1) / k  # the mean of a Pareto above its 1 - 1/M
    return (beyond / (log_w - log_w.max()).exp().sum()).item()


class _Tail(NamedTuple):
    """A Pareto distribution fitted to the largest of some weights, which are divided by the very largest."""

    places: Tensor
    """Of the weights of the tail, in ascending order, ``(M,)``."""
    threshold: Tensor
    """The weight below them."""
    k_hat: Tensor
    """The shape, as `pareto_k` has it."""
    scale: Tensor


def _tail(log_w: Tensor) -> _Tail | None:
    """None where there are too few weights to say anything, or equal ones."""
    size = tail_size(len(log_w))
    values, places = log_w.topk(min(size + 1, len(log_w)))
    k_hat = pareto_k(values, len(log_w))
    if not bool(k_hat.isfinite()):
        return None
    values = values.flip(0) - values[0]
    k, theta = _fit_pareto(values[1:].exp() - values[0].exp())
    return _Tail(places.flip(0)[1:], values[0].exp(), k_hat, k / theta)


def fit_pareto(excess: Tensor) -> Tensor:
    """Zhang & Stephens' estimate of the shape k of ``p(x) ~ (1 + k x / sigma)^(-1/k - 1)``, for each example.

    With ``theta = k / sigma`` the likelihood's best k is ``mean log(1 + theta x)``. Theta is the mean of a grid, which
    stands for a prior that depends on the data, weighted by the profile likelihood ``n (log(theta / k) - k - 1)``.

    Args:
        excess: values over a threshold, ``(n, *batch)``, ascending, not negative, the last positive.

    Returns:
        ``(*batch)``.

    Reference:
        Zhang & Stephens (2009), with the sign of k turned.
    """
    return _fit_pareto(excess)[0]


def _fit_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """K, and theta: k over the scale."""
    count = len(excess)
    points = 30 + math.isqrt(count)
    quartile = excess[math.floor(count / 4 + 0.5) - 1].clamp_min(torch.finfo(excess.dtype).tiny)
    thetas, fits = [], []
    for i in range(1, points + 1):  # one row at a time: points * n values for each example would be much memory
        theta = (math.sqrt(points / (i - 0.5)) - 1) / (3 * quartile) - 1 / excess[-1]
        k = torch.log1p(theta * excess).mean(0)
        thetas.append(theta)
        fits.append(count * (torch.log(theta / k) - k - 1))
    weights = torch.stack(fits).softmax(0)
    theta = (weights * torch.stack(thetas)).sum(0)
    return torch.log1p(theta * excess).mean(0), theta
