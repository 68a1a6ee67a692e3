"""A step at one context as a `torch.distributions.Transform`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.constraints import Constraint

from flowpost.numerics.remembered import Remembered, remember

if TYPE_CHECKING:
    from flowpost.bijectors.base import Bijector, Interval


def vectors_in(interval: Interval) -> Constraint:
    """That every variable of a vector lies in an open interval."""
    low, high = interval
    if interval == (-math.inf, math.inf):
        return constraints.real_vector
    if low == -math.inf:
        return constraints.independent(constraints.less_than(high), 1)
    each = constraints.greater_than(low) if high == math.inf else constraints.interval(low, high)
    return constraints.independent(each, 1)


class StepTransform(Transform):
    """A step at one context, from noise to posterior; `flowpost.Bijector.as_transform` makes it.

    A `Transform` gives image and log-det by two calls: each is a pass of the step. With a cache (``with_cache()``, size
    1) the log-det of the last pair is remembered with it, as `torch.distributions` remembers the pair, but only while
    the two tensors, the context and the step's parameters, buffers and modes are as they were.

    Args:
        step: with event dim 1.
        context: what it reads, ``(*batch, context_size)``.
        cache_size: 0 or 1.
    """

    bijective = True

    def __init__(self, step: Bijector, context: Tensor | None = None, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.step, self.context = step, context
        self._last: Remembered | None = None

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def domain(self) -> Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where vectors of noise lie."""
        return vectors_in(self.step.domain)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def codomain(self) -> Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where their images lie."""
        return vectors_in(self.step.codomain)

    def with_cache(self, cache_size: int = 1) -> StepTransform:
        """The same with a cache of that size, 0 or 1."""
        return self if cache_size == self._cache_size else StepTransform(self.step, self.context, cache_size)

    def __call__(self, x: Tensor) -> Tensor:
        """The image of x, ``(*batch, dim)``."""
        last = self._last
        if last is not None and last.fits(self._read(x, last.tensors[1]), self.step):
            return last.tensors[1]
        y, log_det = self.step(x, self.context)
        self._keep(x, y, log_det)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        last = self._last
        if last is not None and last.fits(self._read(last.tensors[0], y), self.step):
            return last.tensors[0]
        x, log_det = self.step.inverse(y, self.context)
        self._keep(x, y, -log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The ``log|det dy/dx|`` at x, ``(*batch)``."""
        if self._last is not None and self._last.fits(self._read(x, y), self.step):
            return self._last.result
        return self.step(x, self.context)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the image of an x of a shape: its batch broadcast with the context's."""
        if not shape or shape[-1] != self.step.dim:
            raise ValueError(f"shape: expected (*, {self.step.dim}), got {tuple(shape)}")
        batch = () if self.context is None else self.context.shape[:-1]
        return torch.Size((*torch.broadcast_shapes(shape[:-1], batch), self.step.dim))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The same of a preimage."""
        return self.forward_shape(shape)

    def clear_cache(self) -> None:
        """Forget the last pair, as Pyro does between its steps."""
        self._last = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.step).__name__})"

    def _keep(self, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        if self._cache_size:
            self._last = remember(log_det, self._read(x, y), self.step)

    def _read(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """All that the step makes the log-det of, the pair in front."""
        return [x, y, *([] if self.context is None else [self.context])]

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_inv": None, "_last": None}
