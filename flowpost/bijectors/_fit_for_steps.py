"""Which transforms of `torch.distributions` can be a step, and between which intervals."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import AffineTransform, _InverseTransform

from flowpost.bijectors.base import LINE, Interval


def check_transform(transform: Transform, z: Tensor) -> int:
    """The event dim of a transform that can be a step, which is tried at z; raise if it cannot."""
    if not transform.bijective:
        raise ValueError(f"transform: expected a bijective one, got {transform}")
    events = transform.domain.event_dim, transform.codomain.event_dim
    if events not in ((0, 0), (1, 1)):
        raise ValueError(f"transform: expected event dim 0 or 1, got {events[0]} to {events[1]} of {transform}")
    try:
        found = tuple(cast(Tensor, transform(z)).shape)
    except Exception as error:
        raise ValueError(f"transform: expected one of vectors of dim={len(z)}, and {transform} raised") from error
    if found != tuple(z.shape):
        raise ValueError(f"transform: expected one of vectors of dim={len(z)}, got image shape {found} of {transform}")
    _check_scale(transform, len(z))
    return events[0]


def _check_scale(transform: object, dim: int) -> None:
    """Refuse an affine map of vectors with one scale, which torch counts once in the log-det, and not dim times."""
    transform = transform.inv if isinstance(transform, _InverseTransform) else transform
    for part in [*getattr(transform, "parts", []), *filter(None, [getattr(transform, "base_transform", None)])]:
        _check_scale(part, dim)
    if not isinstance(transform, AffineTransform) or transform.event_dim != 1 or dim == 1:
        return
    if isinstance(transform.scale, Tensor) and transform.scale.shape[-1:] in ((), (1,)):
        got = tuple(transform.scale.shape)
        raise ValueError(
            f"transform: expected a scale for each variable of an AffineTransform with event_dim=1, whose log-det "
            f"torch sums over the scales that there are, got shape {got}; leave out event_dim=1"
        )


def interval_of(name: str, constraint: Constraint) -> Interval:
    """The open interval in which a constraint holds every variable."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if constraint is constraints.real:
        return LINE
    low = getattr(constraint, "lower_bound", -math.inf)
    high = getattr(constraint, "upper_bound", math.inf)
    numbers = all(isinstance(bound, (int, float)) for bound in (low, high))
    if constraint.is_discrete or (low, high) == LINE or not numbers:
        raise ValueError(
            f"transform: expected the real line or one interval of numbers as its {name}, got {constraint}"
        )
    return float(low), float(high)


def only_in(interval: Interval, z: Tensor, log_det: Tensor) -> Tensor:
    """The log-det, nan where z is outside: torch's own inverse of a sigmoid, for one, is finite everywhere."""
    if interval == LINE:
        return log_det
    return torch.where(((z > interval[0]) & (z < interval[1])).all(-1), log_det, math.nan)


def point_in(interval: Interval) -> float:
    """A number in an interval."""
    low, high = interval
    if interval == LINE:
        return 0.5
    if math.inf in interval:
        return low + 1
    return high - 1 if low == -math.inf else (low + high) / 2
