"""Products of a matrix an example with points, and the dtype in which log-densities are summed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor


def wide_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which log-densities of `value` are summed: float64, or float32 on a device that has no float64."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def whole_is_faster(weight: Tensor) -> bool:
    """Whether a device multiplies a whole weight in less time than its blocks: a GPU, and meta, which stands for it."""
    return weight.device.type in ("cuda", "meta")


def wide(log_det: Tensor) -> Tensor:
    """Widen a log-det for a sum over steps."""
    return log_det.to(wide_dtype(log_det))


def plus(total: Tensor | None, log_det: Tensor) -> Tensor:
    """A wide total and one log-det more; None is no total yet."""
    if total is None:
        return wide(log_det)
    # A sum widens by itself, unless only a number, without axes, is wide.
    return total + (log_det if total.ndim or not log_det.ndim else wide(log_det))


def summed(log_dets: Sequence[Tensor]) -> Tensor:
    """The sum of log-dets, wide: by two calls where they are many of a kind, else by one each."""
    if len(log_dets) == 1:
        return wide(log_dets[0])
    like = sorted(log_dets, key=lambda each: -each.ndim)[0]  # noqa: RUF015, FURB192 (a compiler knows no max by a key)
    alike = [each for each in log_dets if each.dtype == like.dtype and each.shape == like.shape]
    if len(alike) > 3:
        others = [each for each in log_dets if all(each is not one for one in alike)]
        log_dets = [torch.stack(alike).sum(0, dtype=wide_dtype(like)), *others]
    # First one of most axes, and best a wide one: the others need no call of their own to be widened.
    ordered = sorted(log_dets, key=lambda each: (each.ndim, each.dtype == wide_dtype(each)), reverse=True)
    return cast(Tensor, reduce(plus, ordered, None))


def by_rows(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix @ columns``, as rows: many matrices with a column each are several times slower in torch's libraries."""
    return (columns.mT @ matrix.mT).mT


def by_columns(multiply: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, z: Tensor) -> Tensor:
    """``multiply(matrix, columns)`` of each example's points z ``(*batch, dim)``.

    Leading axes of z that the matrix lacks are samples of one and the same example. They become columns beside one
    another, so that the matrix is never expanded.
    """
    extra = z.ndim + 1 - matrix.ndim
    if extra <= 0:
        return multiply(matrix, z.unsqueeze(-1)).squeeze(-1)
    samples, event = z.shape[:extra], z.shape[extra:]
    columns = z.reshape(math.prod(samples), *event).movedim(0, -1)
    image = multiply(matrix, columns).movedim(-1, 0)
    return image.reshape(*samples, *image.shape[1:])
