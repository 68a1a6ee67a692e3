"""Targets of any size whose normalizers are exact: what is hard in posteriors of models, one difficulty each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.targets.energies import ENERGIES, Energy

LOG_2PI = math.log(2 * math.pi)
WIDE = 3.0  # standard deviation of the log variance of the funnel's other variables
FREEDOM = 5.0  # degrees of freedom of the Student
BENT = 0.5  # standard deviation of each second variable of the banana about its parabola


def energies(dim: int) -> tuple[Energy, ...]:
    """The targets of a size: the paper's at 2, else these."""
    return ENERGIES if dim == 2 else (funnel(dim), student(dim), banana(dim), gaussian(dim))  # noqa: PLR2004


def funnel(dim: int) -> Energy:
    """Neal's (2003): v ~ N(0, 9), and ``dim - 1`` variables of N(0, e^v)."""

    def potential(z: Tensor) -> Tensor:
        v, others = z[..., 0], z[..., 1:]
        return 0.5 * (v / WIDE).square() + 0.5 * (dim - 1) * v + 0.5 * torch.exp(-v) * others.square().sum(-1)

    return Energy("funnel", potential, math.log(WIDE) + 0.5 * dim * LOG_2PI, bounded=False, dim=dim)


def student(dim: int) -> Energy:
    """Student's t of 5 degrees of freedom: heavy tails, variables correlated by a scale matrix of condition 100."""
    whiten = axes(dim, 100.0)

    def potential(z: Tensor) -> Tensor:
        return 0.5 * (FREEDOM + dim) * torch.log1p((z @ whiten.to(z)).square().sum(-1) / FREEDOM)

    gammas = math.lgamma(0.5 * FREEDOM) - math.lgamma(0.5 * (FREEDOM + dim))
    return Energy("student", potential, gammas + 0.5 * dim * math.log(FREEDOM * math.pi), bounded=False, dim=dim)


def banana(dim: int) -> Energy:
    """Pairs ``a ~ N(0, 1)``, ``b ~ N(a^2 - 1, 0.25)``; at odd sizes the last variable is N(0, 1)."""
    pairs = dim // 2

    def potential(z: Tensor) -> Tensor:
        a, b = z[..., 0 : 2 * pairs : 2], z[..., 1 : 2 * pairs : 2]
        bent = ((b - a.square() + 1) / BENT).square().sum(-1)
        return 0.5 * (a.square().sum(-1) + bent + z[..., 2 * pairs :].square().sum(-1))

    return Energy("banana", potential, pairs * math.log(BENT) + 0.5 * dim * LOG_2PI, bounded=False, dim=dim)


def gaussian(dim: int) -> Energy:
    """N(0, S) with S of condition 10,000: standard deviations from 0.1 to 10, along axes that are no variable's."""
    whiten = axes(dim, 10_000.0)

    def potential(z: Tensor) -> Tensor:
        return 0.5 * (z @ whiten.to(z)).square().sum(-1)

    return Energy("gaussian", potential, 0.5 * dim * LOG_2PI, bounded=False, dim=dim)


def axes(dim: int, condition: float) -> Tensor:
    """W of ``S = (W W')^-1``, ``(dim, dim)``: variances that multiply to 1, evenly spread in their logs, drawn axes."""
    generator = torch.Generator().manual_seed(dim)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    spread = torch.linspace(-0.25, 0.25, dim, dtype=torch.float64)
    return basis * condition**spread
