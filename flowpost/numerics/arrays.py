"""What numpy's arrays and tensors spell differently, for what is written once for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpost.numerics import sums
from flowpost.numerics.products import wide_dtype

Array = Any
"""A tensor, or one of numpy's: a sweep is written in what both can do."""
_ZERO = np.zeros((), dtype=np.float32)


def module_of(example: Array) -> Any:  # noqa: ANN401
    """Whose functions suit an array: torch or numpy."""
    return torch if isinstance(example, Tensor) else np


def numbers_for(example: Array, *numbers: float) -> Sequence[Any]:
    """Numbers for arithmetic with arrays of a kind and dtype; numpy converts one of Python's on every call.

    For a hundred entries that takes as long as the operation.
    """
    return numbers if isinstance(example, Tensor) else [np.asarray(each, example.dtype) for each in numbers]


def positive(array: Array) -> Array:
    """The same, with 0 for what is below."""
    return array.clamp_min(0) if isinstance(array, Tensor) else np.maximum(array, _ZERO)


def wide(array: Array) -> Array:
    """The same in float64, where there is float64."""
    return array.to(wide_dtype(array)) if isinstance(array, Tensor) else array.astype(float)


def like(array: Array, other: Array) -> Array:
    """The same in the other's dtype."""
    return array.to(other.dtype) if isinstance(array, Tensor) else array.astype(other.dtype)


def take(array: Array, index: Array, axis: int) -> Array:
    """Along an axis, the entries that an index of as many axes names."""
    if isinstance(array, Tensor):
        return torch.take_along_dim(array, index, axis)
    return np.take_along_axis(array, index, axis)


def cumulated(array: Array, axis: int) -> Array:
    """Running sums along an axis."""
    return sums.cumulated(array, axis) if isinstance(array, Tensor) else array.cumsum(axis)
