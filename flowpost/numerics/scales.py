"""Positive numbers from unconstrained ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.arrays import Array, module_of, numbers_for, positive

SPREAD = 4
"""How far a logarithm moves from where it is at 0; it keeps an autoregressive step's inverse well-conditioned.

A whole number: under ``dynamic=True`` a compiler makes an input of a global float, and loses it between the passes of
an autograd function.
"""
FLOOR = 1e-3
SHIFT = math.log(math.expm1(1 - FLOOR))
"""The constants of `softplus_scale`."""


def softplus_scale(raw: Tensor) -> Tensor:
    """A scale ``softplus(raw + c) + 1e-3`` that is 1 at ``raw = 0`` and never below 1e-3.

    Args:
        raw: unconstrained numbers, any shape, float32 or float64.

    Returns:
        Positive numbers of the same shape and dtype.
    """
    return F.softplus(raw + SHIFT, threshold=40) + FLOOR  # at the default, 20, float64 loses a digit in ten


def log_var_scale(log_var: Tensor) -> Tensor:
    """A scale ``exp(l / 2)``, ``l = v - softplus(v - 20) + softplus(-v - 20)``: log-variance v softly bounded at +-20.

    Within +-8 the bound moves the log-variance by less than 1e-5.

    Args:
        log_var: v, unconstrained numbers, any shape, float32 or float64.

    Returns:
        Positive numbers of the same shape and dtype.
    """
    return _half_log_var(log_var).exp()


def _half_log_var(log_var: Tensor) -> Tensor:
    v = log_var.clamp(-1e3, 1e3)  # where the slope has long underflowed: keeps v - softplus(v - 20) exact
    return 0.5 * (v - F.softplus(v - 20) + F.softplus(-v - 20))


def exp_scale(raw: Tensor) -> Tensor:
    """A scale ``exp(4 tanh(raw / 4))``: an exponential, softly bounded to between 0.018 and 55; 1 at ``raw = 0``.

    The bound is what keeps the inverse of an autoregressive step well-conditioned, as `gate_parameters` does.

    Args:
        raw: unconstrained numbers, any shape, float32 or float64.

    Returns:
        Positive numbers of the same shape and dtype.
    """
    return _bounded_log(raw).exp()


def _bounded_log(raw: Tensor) -> Tensor:
    return SPREAD * torch.tanh(raw / SPREAD)


_LOGS: Mapping[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    exp_scale: _bounded_log,
    log_var_scale: _half_log_var,
}
"""The logarithms of the scales that are exponentials."""


def scale_and_log(scale: Callable[[Tensor], Tensor], raw: Tensor) -> tuple[Tensor, Tensor]:
    """A scale of raw numbers and its logarithm, which of an exponential is what was exponentiated."""
    if scale not in _LOGS:
        found = scale(raw)
        return found, found.log()
    log = _LOGS[scale](raw)
    return log.exp(), log


class Closed(NamedTuple):
    """A scale by its name, written in what numpy and torch both have, and its slope."""

    name: str
    array: Callable[[Array], Callable[[Array], Array]]
    """For arrays like one, tensors or numpy's, ``raw -> scale``."""
    slope: Callable[[Tensor, Tensor], Tensor]
    """``(raw, scale) -> d scale / d raw``"""


def _exp_array(example: Array) -> Callable[[Array], Array]:
    xp, (unit, reach) = module_of(example), numbers_for(example, 1 / SPREAD, SPREAD)
    return lambda raw: xp.exp(xp.tanh(raw * unit) * reach)


def _exp_slope(raw: Tensor, scale: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(scale, torch.tanh(raw / SPREAD))


def _softplus_array(example: Array) -> Callable[[Array], Array]:
    xp, (shift, floor) = module_of(example), numbers_for(example, SHIFT, FLOOR)

    def scale(raw: Array) -> Array:
        raw = raw + shift
        return positive(raw) + xp.log1p(xp.exp(-abs(raw))) + floor

    return scale


CLOSED: Mapping[Callable[[Tensor], Tensor], Closed] = {
    exp_scale: Closed("exp_scale", _exp_array, _exp_slope),
    softplus_scale: Closed("softplus_scale", _softplus_array, lambda raw, _: torch.sigmoid(raw + SHIFT)),
}
