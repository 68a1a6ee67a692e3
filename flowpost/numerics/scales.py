"""Positive numbers from unconstrained ones."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

_FLOOR = 1e-3
_SHIFT = math.log(math.expm1(1 - _FLOOR))


def softplus_scale(raw: Tensor) -> Tensor:
    """A scale ``softplus(raw + c) + 1e-3`` that is 1 at ``raw = 0`` and never below 1e-3.

    Args:
        raw: unconstrained numbers, any shape, float32 or float64.

    Returns:
        Positive numbers of the same shape and dtype.
    """
    return F.softplus(raw + _SHIFT) + _FLOOR
