"""Running sums, also where torch has none."""

from __future__ import annotations

import torch
from torch import Tensor


def cumulated(values: Tensor, dim: int) -> Tensor:
    """``values.cumsum(dim)``, also under `torch.use_deterministic_algorithms`, where a GPU has no such operation.

    There it takes O(n^2) memory for n entries along `dim`.
    """
    return _one_by_one(values, dim) if _refused(values) else values.cumsum(dim)


def _refused(values: Tensor) -> bool:
    return values.is_cuda and torch.are_deterministic_algorithms_enabled()


def _one_by_one(values: Tensor, dim: int) -> Tensor:
    """A sum for each entry, of nothing behind it, whatever stands there."""
    last = values.movedim(dim, -1)
    return last.unsqueeze(-2).expand(*last.shape, last.shape[-1]).tril().sum(-1).movedim(-1, dim)
