"""The tanh ridge, and gains that keep ``x + gain tanh(x)`` increasing: what planar and Sylvester steps share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-3
K = -math.expm1(-(1 - _EPS))
"""``1 - e^-(1 - eps)``"""
_LOGIT_K = math.log(K / (1 - K))


def ridge(x: Tensor) -> tuple[Tensor, Tensor]:
    """``tanh(x)`` and its slope, the slope to full relative precision also where tanh has rounded to 1."""
    double = 2 * x
    return torch.tanh(x), 4 * torch.sigmoid(double) * torch.sigmoid(-double)


def positive(a: Tensor) -> Tensor:
    """``1 + m(a)`` with the m of `bounded_gain`: a positive number, 1 at a = 0 and never below 1e-3."""
    return _EPS + F.softplus(a + _LOGIT_K, threshold=40)


def bounded_gain(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``m(a) - a``, ``m(a)`` and ``1 + m(a)``, for ``m(a) = log1p(k expm1(a)) > -1`` with m(0) = 0.

    They are ``log1p((1 - k) expm1(-a))``, the sum, and ``eps + log1p(k / (1 - k) e^a)``: none of them cancels.
    """
    low = (a + 40).clamp_max(0)  # the first is linear there: split off before exp overflows
    move = torch.log1p((1 - K) * torch.expm1(low - a)) - low
    room = positive(a)
    return move, torch.where(a > -1, a + move, room - 1), room


def log_slope(gain: Tensor, room: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """``log(1 + gain slope)``: where the gain is near -1, as ``log(room slope + value^2)``, a sum of positive terms.

    Args:
        gain: above -1.
        room: ``1 + gain``.
        value: ``tanh(x)``.
        slope: of tanh at x.
    """
    return torch.where(gain > -0.5, torch.log1p(gain * slope), torch.log(room * slope + value * value))


def log_slope_pull(gain: Tensor, room: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of `log_slope` in the gain and in x, where room is ``1 + gain`` and value and slope are x's."""
    per = slope / torch.addcmul(room * slope, value, value)
    return per, -2 * gain * value * per


def bounded_slope(a: Tensor) -> Tensor:
    """The derivative of the m of `bounded_gain`, and so that of `positive`."""
    return torch.sigmoid(a + _LOGIT_K)


def cascade(start: Tensor, gain: Tensor) -> Tensor:
    """The x with ``x_k = start_k + sum_{j<k} gain_kj tanh(x_j)``: K ridges, each of which sees what those before moved.

    Cost: O(K^2), in K small steps.

    Args:
        start: ``(*batch, K)``.
        gain: ``(*batch, K, K)`` with axes that may be fewer; what is not below its diagonal is not read.
    """
    x = start
    for k, column in enumerate(gain.tril(-1).unbind(-1)[:-1]):
        x = torch.addcmul(x, column, torch.tanh(x[..., k : k + 1]))
    return x
