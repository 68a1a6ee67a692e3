"""Simulation-based calibration: are posteriors right on average, where data can be simulated?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.numerics.arguments import check_int

_ROUNDS = 500  # simulated at once for a band


def sbc_ranks(
    simulate: Callable[[int], tuple[Tensor, Tensor]],
    draw: Callable[[Tensor, int], Tensor],
    simulations: int = 1000,
    samples: int = 127,
    *,
    batch: int = 100,
) -> Tensor:
    """For each simulated (z, x) and each latent, how many of `samples` draws from q(z|x) lie below z.

    If q is the posterior each rank is uniform on 0..samples; the converse does not hold (the prior passes too). If q is
    too narrow, ranks at both ends are too frequent; if it is too wide, those in the middle; if it is biased, those at
    one end.

    Args:
        simulate: from a number n to n draws of z ``(n, dim)`` from the prior and x given each, n on the first axis.
        draw: from x and a number of samples to samples from q(z|x), ``(samples, n, dim)``.
        simulations: how many (z, x).
        samples: from q for each of them; ``samples + 1`` with many divisors is easy to bin.
        batch: how many are simulated at once.

    Returns:
        ``(simulations, dim)``, integers.

    Raises:
        ValueError: if a number is below 1, `simulate` and `draw` do not give those shapes, or one of them gives nan,
            which has no rank.

    Reference:
        Talts et al. (2018), Validating Bayesian Inference Algorithms with Simulation-Based Calibration.

    Example:
        >>> def simulate(n):
        ...     z = torch.randn(n, 2)
        ...     return z, z + torch.randn(n, 2)
        >>> ranks = sbc_ranks(simulate, lambda x, s: x / 2 + 0.5**0.5 * torch.randn(s, *x.shape), 200, 63)
        >>> ranks.shape
        torch.Size([200, 2])
    """
    numbers = {"simulations": simulations, "samples": samples, "batch": batch}
    simulations, samples, batch = (check_int(name, number, 1) for name, number in numbers.items())
    ranks = []
    with torch.no_grad():
        for start in range(0, simulations, batch):
            count = min(batch, simulations - start)
            z, x = simulate(count)
            if z.ndim != 2 or len(z) != count:
                raise ValueError(f"simulate: expected z of shape ({count}, dim), got {tuple(z.shape)}")
            drawn = draw(x, samples)
            if drawn.shape != (samples, *z.shape):
                raise ValueError(f"draw: expected shape {(samples, *z.shape)}, got {tuple(drawn.shape)}")
            for name, values in {"simulate": z, "draw": drawn}.items():
                if values.isnan().any():
                    raise ValueError(f"{name}: expected numbers, which have a rank, got nan")
            ranks.append((drawn < z).sum(0))
    return torch.cat(ranks)


def rank_histogram(ranks: Tensor, samples: int, bins: int = 16) -> Tensor:
    """Counts of ranks in equal bins, ``(dim, bins)``; uniform ranks fill each with ``len(ranks) / bins`` on average.

    Args:
        ranks: ``(simulations, dim)``, integers from 0 to `samples`.
        samples: as in `sbc_ranks`.
        bins: must divide ``samples + 1``.

    Returns:
        ``(dim, bins)``.

    Raises:
        TypeError: if the ranks are no integers.
        ValueError: if the bins do not divide ``samples + 1``, or the ranks are of other samples or another shape.

    Example:
        >>> rank_histogram(torch.tensor([[0], [1], [3], [3]]), samples=3, bins=2)
        tensor([[2, 2]])
    """
    samples = check_int("samples", samples, minimum=1)
    _check_ranks(ranks, samples)
    if check_int("bins", bins, minimum=1) and (samples + 1) % bins:
        raise ValueError(f"bins: expected a divisor of samples + 1 = {samples + 1}, got {bins}")
    return torch.stack([torch.bincount(column // ((samples + 1) // bins), minlength=bins) for column in ranks.mT])


class RankECDF(NamedTuple):
    """Shares of ranks at most k, for k = 0..samples, beside what uniform ranks would have; draw the differences."""

    uniform: Tensor
    """``(k + 1) / (samples + 1)``, ``(samples + 1,)``, float64"""
    ecdf: Tensor
    """``(dim, samples + 1)``, float64"""
    lower: Tensor
    """``(samples + 1,)``, float64"""
    upper: Tensor
    """``(samples + 1,)``, float64"""

    @property
    def inside(self) -> Tensor:
        """Whether a latent's whole curve is within the band, ``(dim,)``."""
        return ((self.lower <= self.ecdf) & (self.ecdf <= self.upper)).all(-1)


def rank_ecdf(ranks: Tensor, samples: int, level: float = 0.95, *, rounds: int = 2000, seed: int = 0) -> RankECDF:
    """The ranks' distribution functions, and a band in which all of a uniform one lies with probability `level`.

    The band is simultaneous over k, and for one latent: for a family of d give ``1 - (1 - level) / d``. The counts at k
    are binomial; the band leaves out of each the same probability, found by simulating `rounds` sets of uniform ranks,
    so a level above ``1 - 1 / rounds`` is out of reach.

    Args:
        ranks: ``(simulations, dim)``, integers from 0 to `samples`.
        samples: as in `sbc_ranks`.
        level: probability in (0, 1).
        rounds: how many sets of ranks are simulated.
        seed: of their own generator; the global one is left alone.

    Returns:
        ``RankECDF(uniform, ecdf, lower, upper)``.

    Raises:
        TypeError: if the ranks are no integers.
        ValueError: if the level is not in (0, 1) or the rounds are too few for it, or the ranks are of other samples or
            another shape.

    Reference:
        Säilynoja, Bürkner & Vehtari (2022), Graphical Test for Discrete Uniformity.

    Example:
        >>> rank_ecdf(torch.arange(64).unsqueeze(-1), samples=63).inside
        tensor([True])
    """
    samples, rounds = check_int("samples", samples, minimum=1), check_int("rounds", rounds, minimum=1)
    if not 0 < level < 1 or rounds * (1 - level) < 1:
        raise ValueError(f"level: expected a probability in (0, {1 - 1 / rounds:.4g}] for {rounds} rounds, got {level}")
    _check_ranks(ranks, samples)
    count = len(ranks)
    uniform = torch.arange(1, samples + 2, dtype=torch.float64, device="cpu") / (samples + 1)
    at_most = _binomial_cdf(count, uniform)  # (samples + 1, count + 1)
    at_least = 1 - torch.nn.functional.pad(at_most, (1, 0))[:, :-1]
    tail = 2 * torch.minimum(at_most, at_least)  # two-sided p-value of each count at each k
    left_out = _smallest_tails(tail, count, samples, rounds, seed).quantile(1 - level, interpolation="lower")
    within = tail >= left_out
    lower, upper = within.int().argmax(-1), count - within.flip(-1).int().argmax(-1)
    counts = torch.stack([torch.bincount(column, minlength=samples + 1) for column in ranks.mT.cpu()]).cumsum(-1)
    return RankECDF(uniform, counts.double() / count, lower.double() / count, upper.double() / count)


def _check_ranks(ranks: Tensor, samples: int) -> None:
    if ranks.is_floating_point():
        raise TypeError(f"ranks: expected integers, as sbc_ranks gives them, got {ranks.dtype}")
    if ranks.ndim != 2 or not len(ranks):
        raise ValueError(f"ranks: expected shape (simulations, dim), got {tuple(ranks.shape)}")
    if ((ranks < 0) | (ranks > samples)).any():
        got = f"from {ranks.min().item()} to {ranks.max().item()}"
        raise ValueError(f"ranks: expected numbers from 0 to samples = {samples}, got {got}; pass samples of sbc_ranks")


def _binomial_cdf(count: int, probability: Tensor) -> Tensor:
    """P(X <= c) of Binomial(count, p) for c = 0..count, ``(*p's shape, count + 1)``."""
    c = torch.arange(count + 1, dtype=torch.float64, device=probability.device)
    ways = math.lgamma(count + 1) - torch.lgamma(c + 1) - torch.lgamma(count - c + 1)
    p = probability.unsqueeze(-1)
    log_mass = ways + torch.xlogy(c, p) + torch.xlogy(count - c, 1 - p)
    return log_mass.exp().cumsum(-1).clamp_max(1)


def _smallest_tails(tail: Tensor, count: int, samples: int, rounds: int, seed: int) -> Tensor:
    """The smallest p-value over k of each of `rounds` sets of uniform ranks."""
    generator, size = torch.Generator("cpu").manual_seed(int(seed)), samples + 1
    rows, found = torch.arange(size, device="cpu"), []
    for start in range(0, rounds, _ROUNDS):
        ranks = torch.randint(size, (min(_ROUNDS, rounds - start), count), generator=generator, device="cpu")
        counts = ranks.new_zeros(len(ranks), size).scatter_add_(1, ranks, torch.ones_like(ranks))
        found.append(tail[rows, counts.cumsum(-1)].amin(-1))
    return torch.cat(found)
