"""Element-wise maps from the line onto an interval, for latents that are bounded: sigmoid, softplus, tanh."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.base import Bijector


def sigmoid(z: Tensor) -> tuple[Tensor, Tensor]:
    """Element-wise ``z' = 1 / (1 + exp(-z))``, ``log_det = sum(-softplus(z) - softplus(-z))``.

    torch's own has the slope ``s (1 - s)``, which is rounding alone where s is near 1; this one's is exact.

    Args:
        z: ``(*batch, dim)``.

    Returns:
        z' ``(*batch, dim)``, between 0 and 1, and log_det ``(*batch)``.
    """
    image, log_slope = _sigmoid(z)
    return image, log_slope.sum(-1)


def _sigmoid(z: Tensor) -> tuple[Tensor, Tensor]:
    above, below = _sides(z)
    falling, rising = torch.exp(-above), torch.exp(below)
    image = torch.where(z < 0, rising / (1 + rising), 1 / (1 + falling))
    return image, -(_softplus(z) + _softplus(-z))


def sigmoid_inverse(z: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `sigmoid`: ``log z' - log(1 - z')``, nan outside (0, 1).

    Args:
        z: the image z', ``(*batch, dim)``.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``.
    """
    low, high = z.log(), torch.log1p(-z)
    return low - high, -(low + high).sum(-1)


def softplus(z: Tensor) -> tuple[Tensor, Tensor]:
    """Element-wise ``z' = log(1 + exp(z))``, ``log_det = sum(-softplus(-z))``.

    Args:
        z: ``(*batch, dim)``.

    Returns:
        z' ``(*batch, dim)``, positive, and log_det ``(*batch)``.
    """
    image, log_slope = _soft(z)
    return image, log_slope.sum(-1)


def _soft(z: Tensor) -> tuple[Tensor, Tensor]:
    return _softplus(z), -_softplus(-z)


def softplus_inverse(z: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `softplus`: ``log(exp(z') - 1) = z' + log(1 - exp(-z'))``, nan below 0.

    Args:
        z: the image z', ``(*batch, dim)``.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``.
    """
    slope = torch.log(-torch.expm1(-z))
    return z + slope, -slope.sum(-1)


def tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    """Element-wise hyperbolic tangent, ``log_det = sum(2 (log 2 - z - softplus(-2 z)))``.

    torch's own has the slope ``1 - t^2``, which is rounding alone where t is near 1; this one's is exact.

    Args:
        z: ``(*batch, dim)``.

    Returns:
        z' ``(*batch, dim)``, between -1 and 1, and log_det ``(*batch)``.
    """
    image, log_slope = _tanh(z)
    return image, log_slope.sum(-1)


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    above, below = _sides(z)
    falling, rising = torch.exp(-2 * above), torch.exp(2 * below)
    far = torch.where(z < 0, (rising - 1) / (1 + rising), (1 - falling) / (1 + falling))
    image = torch.where(z.abs() < 0.5, torch.tanh(z.clamp(-0.5, 0.5)), far)
    return image, 2 * (math.log(2) - z - _softplus(-2 * z))


def tanh_inverse(z: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `tanh`: ``(log(1 + z') - log(1 - z')) / 2``, nan outside (-1, 1).

    Args:
        z: the image z', ``(*batch, dim)``.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``.
    """
    low, high = torch.log1p(z), torch.log1p(-z)
    return 0.5 * (low - high), -(low + high).sum(-1)


def _sides(z: Tensor) -> tuple[Tensor, Tensor]:
    """The z from 0 up, and those below, 0 elsewhere: a clamp's slope at 0 is 1 or 0, by torch's version."""
    return torch.where(z < 0, 0, z), torch.where(z < 0, z, 0)


def _softplus(z: Tensor) -> Tensor:
    return F.softplus(z, threshold=40)  # 20, the default, is 2e-9 from the function


def _at_known(curve: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor, preimage: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of a curve where it is known, from its own slope: near an end the rounded z' has lost the way back.

    Two corrections as in `flowpost.numerics.roots.correct`, of which nothing but the derivatives is wanted.
    """
    for _ in range(2):
        image, log_slope = curve(preimage)
        slope = log_slope.exp().clamp_min(torch.finfo(z.dtype).tiny)
        preimage = preimage - ((image - image.detach()) - (z - z.detach())) / slope
    return preimage, -curve(preimage)[1].sum(-1)


class Sigmoid(Bijector):
    """Element-wise ``z' = 1 / (1 + exp(-z))``, from the line onto (0, 1); it reads no context.

    Use it as the last step of a flow whose latents are probabilities or proportions, each by itself.

    The log-det is exact for every z. The image is rounded: beyond z = 17 in float32, 37 in float64, it is 1, and below
    -88 and -709 it is no normal number; such an image has no finite preimage. Even at z = 10 the preimage of a float32
    image is off by 1e-3. So take the log q of samples from the pass that drew them; `FlowPosterior.path_log_prob` knows
    their preimages. Cost: O(dim).

    Args:
        dim: size of z.

    Example:
        >>> z, log_det = Sigmoid(2)(torch.zeros(2))
        >>> z
        tensor([0.5000, 0.5000])
    """

    elementwise = True
    codomain = (0.0, 1.0)

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return sigmoid(z)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return sigmoid_inverse(z) if preimage is None else _at_known(_sigmoid, z, preimage)


class Softplus(Bijector):
    """Element-wise ``z' = log(1 + exp(z))``, from the line onto the positive numbers; it reads no context.

    Use it as the last step of a flow whose latents are positive, such as rates and scales.

    Image, log-det and preimage are exact for every z above -88 in float32, -709 in float64. Below, the image is no
    normal number. Cost: O(dim).

    Args:
        dim: size of z.

    Example:
        >>> z, log_det = Softplus(2)(torch.zeros(2))
        >>> z
        tensor([0.6931, 0.6931])
    """

    elementwise = True
    codomain = (0.0, math.inf)

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return softplus(z)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return softplus_inverse(z) if preimage is None else _at_known(_soft, z, preimage)


class Tanh(Bijector):
    """Element-wise ``z' = tanh(z)``, from the line onto (-1, 1); it reads no context.

    Use it as the last step of a flow whose latents are bounded on both sides, such as actions.

    The log-det is exact for every z. The image is rounded: beyond +-9 in float32, 19 in float64, it is +-1, which has
    no finite preimage. As with `Sigmoid`, take the log q of samples from the pass that drew them. Cost: O(dim).

    Args:
        dim: size of z.

    Example:
        >>> z, log_det = Tanh(2)(torch.zeros(2))
        >>> log_det
        tensor(0.)
    """

    elementwise = True
    codomain = (-1.0, 1.0)

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return tanh(z)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return tanh_inverse(z) if preimage is None else _at_known(_tanh, z, preimage)
