"""Activation normalization: a learned affine map that starts from a batch's mean and variance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import Bijector, Line
from flowpost.checks import check_finite
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.watchers import remake

_REACH = 20.0


def act_norm(z: Tensor, center: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Element-wise affine map ``z' = (z - center) exp(l)``, ``l = 20 tanh(log_scale / 20)``, ``log_det = sum(l)``.

    Args:
        z: ``(*batch, dim)``.
        center: ``(dim,)``.
        log_scale: ``(dim,)``, unconstrained; softly bounded at +-20.

    Returns:
        z' ``(*batch, dim)`` and log_det ``()``.
    """
    bounded = _bounded(log_scale)
    return (z - center) * bounded.exp(), bounded.sum(-1)


def _bounded(log_scale: Tensor) -> Tensor:
    return _REACH * torch.tanh(log_scale / _REACH)


class ActNorm(Bijector):
    """Learned affine map ``z' = (z - center) exp(l)`` of every variable: `initialize` sets it by a batch.

    Use it between the steps of a deep flow, to start every step on normalized points. It reads no context.

    It is the identity until you call `initialize`. Its first ``forward`` does not do that for you: the map would then
    depend on which batch came first, differ between processes, and undo what was loaded. Invertible for all parameters,
    since l is bounded. Forward, inverse and log-det cost O(dim).

    Args:
        dim: size of z.

    Reference:
        Kingma & Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, section 3.1.

    Example:
        >>> z = 5 + 3 * torch.randn(1000, 2)
        >>> step = ActNorm(2).initialize(z)
        >>> bool((step(z)[0].mean(0).abs() < 1e-5).all())
        True
    """

    triangular = True
    elementwise = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.center = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    @torch.no_grad()
    def initialize(self, z: Tensor) -> ActNorm:
        """Set the parameters so that this batch comes out with zero mean and unit variance.

        In a chain, pass what the steps before this one make of a batch. A variable that is constant over the batch, up
        to rounding, is centred and keeps its scale. The call reads values from the device. With several processes,
        initialize one and let the others load its state.

        Args:
            z: ``(*batch, dim)``, finite, at least one row.

        Returns:
            The step itself.

        Raises:
            TypeError: as `forward`.
            ValueError: as `forward`, and for no row.
            NonFiniteError: a ValueError, for rows that are not finite, of which it names the first.
        """
        self._check(z, None)
        rows = z.reshape(-1, self.dim).to(wide_dtype(z))
        if not len(rows):
            raise ValueError(f"z: expected at least one row, got shape {tuple(z.shape)}")
        check_finite("z", z)
        spread = rows.std(0, correction=0)
        still = spread <= 16 * torch.finfo(z.dtype).eps * rows.abs().amax(0)
        wanted = -torch.where(still, 1, spread).log() / _REACH
        self.center.copy_(rows.mean(0))
        self.log_scale.copy_(_REACH * torch.atanh(wanted.clamp(-0.999, 0.999)))
        return self

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return act_norm(z, self.center, self.log_scale)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        bounded = _bounded(self.log_scale)
        return self.center + z * torch.exp(-bounded), -bounded.sum(-1)

    def _line(self, context: Tensor | None) -> Line:
        remake(self)
        scale = _bounded(self.log_scale).exp()
        return -self.center * scale, scale
