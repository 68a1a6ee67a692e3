"""The four two-dimensional energies of Rezende & Mohamed (2015), and the densities ``p(z) = exp(-U(z)) / Z``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost import Bijector

LIMIT = 4.0
"""U2 to U4 do not change along z1: p is 0 where |z1| is larger."""


class Energy(NamedTuple):
    """A target."""

    name: str
    potential: Callable[[Tensor], Tensor]
    """U of points ``(*batch, dim)``, ``(*batch)``."""
    log_normalizer: float
    """log Z."""
    bounded: bool = True
    """Whether p is 0 outside ``|z1| < LIMIT``."""
    dim: int = 2

    def log_prob(self, z: Tensor) -> Tensor:
        """The log p(z) of points ``(*batch, dim)``, ``(*batch)``."""
        log_prob = -self.potential(z) - self.log_normalizer
        return torch.where(z[..., 0].abs() < LIMIT, log_prob, -math.inf) if self.bounded else log_prob


def ring(z: Tensor) -> Tensor:
    """U1: two opposite arcs of a ring."""
    first, radius = z[..., 0], torch.linalg.vector_norm(z, dim=-1)
    return 0.5 * ((radius - 2) / 0.4) ** 2 - _log_two_ridges((first - 2) / 0.6, (first + 2) / 0.6)


def wave(z: Tensor) -> Tensor:
    """U2: a sine."""
    return 0.5 * (_off_wave(z) / 0.4) ** 2


def bump(z: Tensor) -> Tensor:
    """U3: a sine that splits in two for a while."""
    split = 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6) ** 2)
    return -_log_two_ridges(_off_wave(z) / 0.35, (_off_wave(z) + split) / 0.35)


def fork(z: Tensor) -> Tensor:
    """U4: a sine that splits in two for good."""
    split = 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    return -_log_two_ridges(_off_wave(z) / 0.4, (_off_wave(z) + split) / 0.35)


def _off_wave(z: Tensor) -> Tensor:
    return z[..., 1] - torch.sin(0.5 * math.pi * z[..., 0])


def _log_two_ridges(a: Tensor, b: Tensor) -> Tensor:
    return torch.logaddexp(-0.5 * a * a, -0.5 * b * b)


def _strip(*deviations: float) -> float:
    """The log Z of normal ridges of these widths over the whole strip, wherever they run."""
    return math.log(2 * LIMIT * math.sqrt(2 * math.pi) * sum(deviations))


ENERGIES = (
    Energy("U1", ring, 1.8775016261, bounded=False),  # by quadrature; the others' are exact
    Energy("U2", wave, _strip(0.4)),
    Energy("U3", bump, _strip(0.35, 0.35)),
    Energy("U4", fork, _strip(0.4, 0.35)),
)


class Strip(Bijector):
    """Put z1 on ``(-4, 4)``: ``z1' = 4 tanh(z1 / 2)``, ``z2' = z2``, ``log_det = log 8 - |z1| - 2 log(1 + e^-|z1|)``.

    The last step of every posterior that is fitted to U2, U3 or U4: whatever puts mass where p is 0 has an infinite KL.
    Standard normal noise comes out nearly uniform.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        first, second = z.unbind(-1)
        return torch.stack([LIMIT * torch.tanh(0.5 * first), second], -1), _log_slope(first)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        first, second = z.unbind(-1)
        first = torch.log1p(first / LIMIT) - torch.log1p(-first / LIMIT)
        return torch.stack([first, second], -1), -_log_slope(first)


def _log_slope(first: Tensor) -> Tensor:
    return math.log(2 * LIMIT) - F.softplus(first) - F.softplus(-first)


STRIP = Strip()
