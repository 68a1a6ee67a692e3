"""From real coordinates to numbers and vectors that a constraint allows, with the log-det, without saturating."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.sums import cumulated

Shape = tuple[int, ...]


class Map:
    """A bijection from ``(*batch, *free_shape)`` to ``(*batch, *shape)``; a subclass writes the two directions.

    ``_forward`` returns the values and terms that add up to ``log|det|``, None where that is 0.

    Args:
        shape: of the values.
        free_shape: of the coordinates.
    """

    def __init__(self, shape: Shape, free_shape: Shape) -> None:
        self.shape, self.free_shape = shape, free_shape
        self.size = math.prod(free_shape)

    def forward(self, free: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values ``(*batch, *shape)`` of coordinates ``(*batch, size)``, and the log-det ``(*batch)``."""
        batch = free.shape[:-1]
        values, terms = self._forward(free.reshape((*batch, *self.free_shape)))
        return values, terms if terms is None or terms.ndim == len(batch) else terms.flatten(len(batch)).sum(-1)

    def inverse(self, values: Tensor) -> Tensor:
        """Coordinates ``(*batch, size)``; not finite, or of other values, where `values` are outside the support."""
        batch = values.shape[: values.ndim - len(self.shape)]
        return self._inverse(values).reshape((*batch, self.size))

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _inverse(self, values: Tensor) -> Tensor:
        raise NotImplementedError


class Line(Map):
    """All real numbers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape)

    def _forward(self, free: Tensor) -> tuple[Tensor, None]:
        return free, None

    def _inverse(self, values: Tensor) -> Tensor:
        return values


class HalfLine(Map):
    """``x = bound + sign exp(u)``, ``log|det| = sum u``; strictly beyond the bound also where the sum rounds to it."""

    def __init__(self, shape: Shape, bound: Tensor, sign: int) -> None:
        super().__init__(shape, shape)
        self.sign, self._bound = sign, Constant(bound) if bound.any() else None

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor]:
        values = self.sign * free.exp() if self.sign < 0 else free.exp()
        if self._bound is not None:
            bound = self._bound.on(free)
            values = bound + values
            beyond = torch.nextafter(bound, torch.full_like(bound, self.sign * math.inf))
            values = torch.where(values == bound, beyond, values)
        return values, free

    def _inverse(self, values: Tensor) -> Tensor:
        away = values if self._bound is None else values - self._bound.on(values)
        return (self.sign * away).log()


class Interval(Map):
    """``x = a + (b - a) s(u)`` with the logistic s, ``log|det| = sum log s(u) + log s(-u) + log(b - a)``.

    Each half is reckoned from its own end, so that no digit of the distance to it is lost; the ends are not reached.
    Where x has rounded to an end and is moved off it, its slope in u is below one rounding.
    """

    def __init__(self, shape: Shape, low: Tensor, high: Tensor) -> None:
        super().__init__(shape, shape)
        self._low, self._high, self._log_width = Constant(low), Constant(high), Constant((high - low).log())

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._low.on(free), self._high.on(free)
        width = high - low
        values = torch.where(free < 0, low + width * torch.sigmoid(free), high - width * torch.sigmoid(-free))
        values = torch.minimum(torch.maximum(values, torch.nextafter(low, high)), torch.nextafter(high, low))
        return values, F.logsigmoid(free) + F.logsigmoid(-free) + self._log_width.on(free)

    def _inverse(self, values: Tensor) -> Tensor:
        return (values - self._low.on(values)).log() - (self._high.on(values) - values).log()


class Simplex(Map):
    """Sticks broken in turn: ``z_k = s(u_k - log(n - k))``, ``x_k = z_k prod_{j<k} (1 - z_j)``, all in logarithms.

    At u = 0 all entries are equal. ``log|det| = sum_{k<n} log x_k + log(1 - z_k)``, of all entries but the last.

    Reference:
        Stan Development Team, Stan Reference Manual, chapter on constraint transforms, unit simplex.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, (*shape[:-1], shape[-1] - 1))
        self._offset = Constant(torch.arange(shape[-1] - 1, 0, -1, dtype=torch.float64).log())

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor]:
        logit = free - self._offset.on(free)
        left = F.logsigmoid(-logit)
        before = F.pad(cumulated(left, -1), (1, 0))
        log_values = before + F.pad(F.logsigmoid(logit), (0, 1))
        return positive_exp(log_values), log_values[..., :-1] + left

    def _inverse(self, values: Tensor) -> Tensor:
        rest = cumulated(values.flip(-1), -1).flip(-1)[..., 1:]
        return values[..., :-1].log() - rest.log() + self._offset.on(values)


class Ascending(Map):
    """``x_1 = u_1``, ``x_k = x_{k-1} + exp(u_k)``; ``log|det| = sum_{k>1} u_k``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape)

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor]:
        first, others = free[..., :1], free[..., 1:]
        return cumulated(torch.cat([first, others.exp()], -1), -1), others

    def _inverse(self, values: Tensor) -> Tensor:
        return torch.cat([values[..., :1], values.diff(dim=-1).log()], -1)


class Given(Map):
    """Whatever else `torch.distributions.biject_to` knows, as torch or the user has written it."""

    def __init__(self, shape: Shape, transform: Any) -> None:  # noqa: ANN401
        super().__init__(shape, tuple(transform.inverse_shape(torch.Size(shape))))
        self._transform = transform

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor]:
        values = self._transform(free)
        return values, self._transform.log_abs_det_jacobian(free, values)

    def _inverse(self, values: Tensor) -> Tensor:
        return self._transform.inv(values)


def positive_exp(logs: Tensor) -> Tensor:
    """An exponential that stays positive: a share of 0 would be a density of 0 or of infinity."""
    return logs.exp().clamp(min=torch.finfo(logs.dtype).tiny)
