"""Log densities with every constant, element-wise unless they say `sum`; a scale is a standard deviation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """``log N(x | loc, scale)``."""
    return -0.5 * ((x - loc) / scale).square() - _log(scale) - HALF_LOG_2_PI


def standard_normal_sum(x: Tensor) -> Tensor:
    """``sum log N(x | 0, 1)`` over the last axis."""
    return -0.5 * x.square().sum(-1) - x.shape[-1] * HALF_LOG_2_PI


def squares(total: Tensor, scale: Tensor, count: Tensor | int) -> Tensor:
    """``sum log N`` of `count` residuals whose squares have the sum `total`."""
    return -0.5 * total / scale.square() - count * (scale.log() + HALF_LOG_2_PI)


def cauchy(x: Tensor, scale: float) -> Tensor:
    """``log Cauchy(x | 0, scale)``."""
    return -torch.log1p((x / scale).square()) - math.log(math.pi * scale)


def student(x: Tensor, df: float, loc: float, scale: float) -> Tensor:
    """``log StudentT(x | df, loc, scale)``."""
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi) - math.log(scale)
    return constant - (df + 1) / 2 * torch.log1p(((x - loc) / scale).square() / df)


def half_student(x: Tensor, df: float, scale: float) -> Tensor:
    """The same on ``x > 0`` alone, around 0."""
    return student(x, df, 0.0, scale) + math.log(2)


def gamma(x: Tensor, shape: float, rate: float) -> Tensor:
    """``log Gamma(x | shape, rate)``."""
    return (shape - 1) * x.log() - rate * x + shape * math.log(rate) - math.lgamma(shape)


def inverse_gamma(x: Tensor, shape: float, scale: float) -> Tensor:
    """``log InverseGamma(x | shape, scale)``."""
    return shape * math.log(scale) - math.lgamma(shape) - (shape + 1) * x.log() - scale / x


def beta(x: Tensor, first: float, second: float) -> Tensor:
    """``log Beta(x | first, second)``."""
    constant = math.lgamma(first + second) - math.lgamma(first) - math.lgamma(second)
    return constant + (first - 1) * x.log() + (second - 1) * torch.log1p(-x)


def log_normal(x: Tensor, loc: float, scale: float) -> Tensor:
    """``log LogNormal(x | loc, scale)``."""
    return normal(x.log(), loc, scale) - x.log()


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)`` to the last digits; torch's own threshold, 20, costs 2e-9 a term."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def _log(scale: Tensor | float) -> Tensor | float:
    return scale.log() if isinstance(scale, Tensor) else math.log(scale)
