"""The planar flow: one tanh ridge a step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import by_columns, by_rows, wide_dtype
from flowpost.numerics.ridge import bounded_gain, cascade, log_slope, ridge
from flowpost.numerics.roots import correct
from flowpost.numerics.tanh_roots import solve_ridges, tanh_root
from flowpost.numerics.watchers import full_precision


def _invertible(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``u_hat``, ``w.u_hat = m(w.u)`` and ``1 + m >= eps``, with m(0) = 0, so that u = 0 is exactly the identity."""
    a = (w * u).sum(-1, keepdim=True)
    move, wu, room = bounded_gain(a)
    square = (w * w).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    u_hat = (move / square * w).add_(u)
    # Far below zero u_hat is a small difference of large numbers: what rounding left along w is put right.
    along = w.detach()
    left = (wu.detach() - (along * u_hat.detach()).sum(-1, keepdim=True)) / square.detach()
    return u_hat.add_(left * along), wu, room


def planar(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Planar map ``z' = z + u_hat tanh(w.z + b)``, ``log_det = log(1 + w.u_hat tanh'(w.z + b))``.

    ``u_hat`` moves u along w so that ``w.u_hat = m(w.u) > -1``, which makes the map invertible (Rezende & Mohamed 2015,
    A.1, shifted so that u = 0 is the identity and floored so that the log-det is finite).

    Args:
        z: ``(*batch, dim)``.
        u: ``(*batch, dim)``.
        w: ``(*batch, dim)``.
        b: ``(*batch, 1)``.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``.
    """
    u_hat, wu, room = _invertible(u, w)
    value, slope = ridge((w * z).sum(-1, keepdim=True) + b)
    return z + u_hat * value, log_slope(wu, room, value, slope).squeeze(-1)


def planar_chain(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """K planar maps in sequence, equal to K calls of `planar`; only K scalars a point are computed one by one.

    The k-th map sees ``w_k.z_k = w_k.z + sum_{j<k} w_k.u_hat_j tanh(w_j.z_j + b_j)``: with the products ``w_k.u_hat_j``
    at hand, no point between z and z' is needed. Cost: O(K (K + dim)).

    Args:
        z: ``(*batch, dim)``.
        u: ``(*batch, K, dim)``.
        w: ``(*batch, K, dim)``.
        b: ``(*batch, K)``.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``, summed in float64.
    """
    u_hat, wu, room = _invertible(u, w)
    with full_precision(z.device.type):
        value, slope = ridge(cascade(_across(w, z) + b, w @ u_hat.mT))
        image = z + by_columns(by_rows, u_hat.mT, value)
    log_det = log_slope(wu.squeeze(-1), room.squeeze(-1), value, slope)
    return image, log_det.sum(-1, dtype=wide_dtype(z))


def planar_chain_inverse(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, preimage: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Undo `planar_chain`: K increasing scalar equations, the last of which has one unknown, each before it one more.

    With ``x_k = w_k.z_k + b_k`` they are ``x_k + sum_{j>=k} w_k.u_hat_j tanh(x_j) = w_k.z' + b_k``: no point between z'
    and z is needed. Cost: O(K (K + dim)), and K scalar roots, one after the other.

    Args:
        z: the image z', ``(*batch, dim)``.
        u: ``(*batch, K, dim)``.
        w: ``(*batch, K, dim)``.
        b: ``(*batch, K)``.
        preimage: where it is known, ``(*batch, dim)``: no search is run.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``, summed in float64, first and second
        derivatives exact.
    """
    u_hat, wu, room = _invertible(u, w)
    wu = wu.squeeze(-1)
    with full_precision(z.device.type):
        product = w @ u_hat.mT
        root = None if preimage is None else cascade(_across(w, preimage) + b, product).detach()
        gain = torch.diagonal_scatter(product.triu(1), wu, dim1=-2, dim2=-1)
        value, slope = solve_ridges(gain, _across(w, z) + b, root)
        image = z - by_columns(by_rows, u_hat.mT, value)
    log_det = log_slope(wu, room.squeeze(-1), value, slope)
    return image, -log_det.sum(-1, dtype=wide_dtype(z))


def _across(w: Tensor, z: Tensor) -> Tensor:
    """The ``w_k.z`` of all maps, ``(*batch, K)``."""
    return by_columns(by_rows, w, z) if z.ndim >= w.ndim else (w * z.unsqueeze(-2)).sum(-1)


def planar_inverse(z: Tensor, u: Tensor, w: Tensor, b: Tensor, preimage: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Undo `planar`: along w it is one increasing scalar equation, ``x + w.u_hat tanh(x) = w.z' + b``.

    Args:
        z: the image z', ``(*batch, dim)``.
        u: ``(*batch, dim)``.
        w: ``(*batch, dim)``.
        b: ``(*batch, 1)``.
        preimage: where it is known, ``(*batch, dim)``: no search is run.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``, first and second derivatives exact.
    """
    u_hat, wu, room = _invertible(u, w)
    target = (w * z).sum(-1, keepdim=True) + b

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = ridge(x)
        return x - target + wu * value, 1 + wu * slope

    if preimage is None:
        root = tanh_root(wu, target)
    else:
        root = ((w * preimage).sum(-1, keepdim=True) + b).detach()
    value, slope = ridge(correct(residual, root))
    return z - u_hat * value, -log_slope(wu, room, value, slope).squeeze(-1)


class Planar(Bijector):
    """Planar flow ``z' = z + u_hat tanh(w.z + b)``: it stretches or squeezes z along u_hat, across one hyperplane.

    Use 8 or more after an `Affine` for a posterior that is not Gaussian and cheap to draw from. A `Sylvester` step
    moves z along more directions at once. Planar steps in sequence run together in a `Chain`.

    Invertible for every context: u is moved to u_hat, for which ``w.u_hat > -1``. Identity where u = 0, for any
    direction w, which is drawn at random when the step is built. Forward and log-det cost O(dim); the inverse is one
    scalar root a point, by a monotone Newton iteration, with exact first and second derivatives.

    Args:
        dim: size of z.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, 2 * dim + 1)``: u, w and b.

    Reference:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, eq. 10 to 12 and A.1.

    Example:
        >>> step = Planar(2)
        >>> z = torch.randn(5, 2)
        >>> image, log_det = step(z, torch.randn(5, 5))
    """

    def __init__(self, dim: int) -> None:
        # w = 0 would be a point without gradient.
        w = torch.randn(check_int("dim", dim, minimum=1), device="cpu") / math.sqrt(dim)
        super().__init__(dim, 2 * dim + 1, start=torch.cat([torch.zeros_like(w), w, w.new_zeros(1)]))

    def _numbers(self, context: Tensor | None) -> tuple[Tensor, ...]:
        return cast(Tensor, context).split([self.dim, self.dim, 1], dim=-1)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return planar(z, *self._numbers(context))

    def _fuses(self, *, shared: bool) -> Hashable | None:
        own = type(self)
        ours = own._forward is Planar._forward and own._inverse is Planar._inverse and own._numbers is Planar._numbers
        return Planar if ours and not shared else None

    def _forward_run(self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return planar_chain(z, *self._numbers_of(steps, context))

    def _inverse_run(
        self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None, preimage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return planar_chain_inverse(z, *self._numbers_of(steps, context), preimage)

    def _numbers_of(self, steps: Sequence[Bijector], context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers of a run, an axis of steps before the last: ``(*batch, K, dim)`` twice, and ``(*batch, K)``."""
        u, w, b = self._numbers(cast(Tensor, context).unflatten(-1, (len(steps), self.context_size)))
        return u, w, b.squeeze(-1)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        u, w, b = self._numbers(context)
        return planar_inverse(z, u, w, b, preimage)
