"""Which map goes with which constraint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from flowpost.variational.maps import Ascending, Given, HalfLine, Interval, Line, Map, Shape, Simplex
from flowpost.variational.matrices import CorrCholesky, LowerCholesky


class _Ordered(Constraint):
    """Vectors whose entries ascend."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.diff(dim=-1) > 0).all(-1)


ordered = _Ordered()
"""A constraint as those of `torch.distributions.constraints`: vectors whose entries ascend, ``x_1 < x_2 < ...``."""


_VECTORS: dict[type, type[Simplex] | type[Ascending]] = {type(constraints.simplex): Simplex, _Ordered: Ascending}
_MATRICES: dict[type, type[LowerCholesky] | type[CorrCholesky]] = {
    type(constraints.lower_cholesky): LowerCholesky,
    type(constraints.corr_cholesky): CorrCholesky,
}
KNOWN = (
    "real, positive, nonnegative, greater_than, less_than, interval, unit_interval, half_open_interval, simplex, "
    "lower_cholesky, corr_cholesky of torch.distributions.constraints, ordered of flowpost.variational.parameters, and "
    "whatever else torch.distributions.biject_to takes"
)


def map_to(constraint: Constraint, shape: Shape) -> Map:
    """The bijection onto the values of a shape that a constraint allows.

    Raises:
        ValueError: for a constraint that has no bijection, or none of that shape; it begins at "expected".
    """
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    kind = type(constraint)
    if kind in _VECTORS:
        if not shape:
            raise ValueError("expected a vector, got a scalar; write a pair (size, constraint)")
        return _VECTORS[kind](shape)
    if kind in _MATRICES:
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(f"expected a square matrix, got shape {shape}; write a pair ((n, n), constraint)")
        return _MATRICES[kind](shape)
    if kind is type(constraints.real):
        return Line(shape)
    if isinstance(constraint, (constraints.greater_than, constraints.greater_than_eq)):
        return HalfLine(shape, _bound(constraint.lower_bound, shape), 1)
    if isinstance(constraint, constraints.less_than):
        return HalfLine(shape, _bound(constraint.upper_bound, shape), -1)
    if isinstance(constraint, (constraints.interval, constraints.half_open_interval)):
        return _interval(shape, _bound(constraint.lower_bound, shape), _bound(constraint.upper_bound, shape))
    return _given(constraint, shape)


def _interval(shape: Shape, low: Tensor, high: Tensor) -> Interval:
    if not (low < high).all():
        raise ValueError(f"expected a lower bound below the upper one, got {low.tolist()} and {high.tolist()}")
    return Interval(shape, low, high)


def _bound(bound: Any, shape: Shape) -> Tensor:  # noqa: ANN401
    value = torch.as_tensor(bound).detach().to("cpu", torch.float64)
    if not value.isfinite().all():
        raise ValueError(f"expected finite bounds, got {bound}; write greater_than, less_than or real")
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(f"expected bounds that broadcast to {shape}, got shape {tuple(value.shape)}") from None


def _given(constraint: Constraint, shape: Shape) -> Given:
    try:
        transform = biject_to(constraint)
    except NotImplementedError:
        raise ValueError(f"expected a constraint among {KNOWN}, got {constraint!r}") from None
    try:
        made = Given(shape, transform)
        for batch in ((), (1 + max(shape, default=0),)):  # of no size that an axis of the shape has
            values, log_det = made.forward(torch.zeros(*batch, made.size))
            if values.shape != (*batch, *shape) or log_det is None or log_det.shape != batch:
                raise ValueError
    except (AssertionError, IndexError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"expected a constraint whose biject_to makes shape {shape} of real numbers and has a log-det, "
            f"got {constraint!r} ({error or type(error).__name__})"
        ) from None
    return made
