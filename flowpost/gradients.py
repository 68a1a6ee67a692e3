"""Estimators of a bound's gradient: their names, and double reparameterization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowpost.numerics.along import last
from flowpost.numerics.arguments import check_alpha

GRADIENTS = ("standard", "stl", "dreg")
_TWICE = (
    "double reparameterization: expected a first derivative, got a second one, which would be weighed like a first; "
    'for second derivatives of the bound take gradient="standard"'
)


def check_gradient(gradient: str, alpha: float) -> None:
    """Raise for an unknown estimator, or an alpha that it has no use for."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if check_alpha(alpha) and gradient != "dreg":
        raise ValueError(
            f"alpha: expected 0 with gradient={gradient!r}, whose log-densities do not depend on it, got {alpha}; "
            f"give it to objectives.renyi alone"
        )


def reweigh(z: Tensor, alpha: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Double reparameterization: z whose gradient from `iwae` is that of the squared normalized weights.

    Use the z that it returns in the place of the sample everywhere. Add the first zeros to log p(x|z) and the second to
    log q(z), which must depend on z alone (``posterior.path_log_prob``). The backward pass of `iwae`, or of `renyi` of
    the same alpha, brings the normalized weight v of ``w^(1 - alpha)`` to the zeros. There the gradient through z,
    ``v dlog w/dz``, is multiplied by ``1 - weight (1 - alpha) (1 - v)``: at a `kl_weight` of 1 by ``alpha + (1 - alpha)
    v``, for `iwae` by v. So the posterior gets ``(alpha v + (1 - alpha) v^2) dlog w/dz`` and the decoder the plain v,
    in one backward pass. This is right for such a bound over all of z's sample axes, times any factor; it is wrong for
    `elbo`, and for a bound of another alpha. It is a first derivative: one of the gradient that z passes on raises.

    Args:
        z: ``(*samples, B, dim)``.
        alpha: that of the bound, a Python number in [0, 1): 0 for `iwae`.

    Returns:
        z, and zeros ``(*samples, B)`` twice.

    Raises:
        TypeError: if alpha is a tensor.
        ValueError: if alpha is not in [0, 1).
        RuntimeError: where its gradient is differentiated.

    Reference:
        Tucker, Lawson, Gu & Maddison (2018), Doubly Reparameterized Gradient Estimators for Monte
        Carlo Objectives (DReG-IWAE); Daudel, Benton, Shi & Doucet (2023), Alpha-divergence Variational Inference Meets
        Importance Weighted Auto-Encoders, for alpha > 0.

    Example:
        >>> z, zeros, more_zeros = reweigh(torch.ones(3, 5, 2, requires_grad=True))
        >>> zeros.shape
        torch.Size([3, 5])
    """
    return _Reweigh.apply(z, check_alpha(alpha))


class _Reweigh(torch.autograd.Function):
    """The factor, for ``log w = log p(x|z) + b (log p(z) - log q)``, b the KL's weight.

    A sample's term of the bound's gradient is ``v (dlog w/dz dz/dphi - b dlog q/dphi)``, its last part at fixed z. By
    the second reparameterization the mean of ``v dlog q/dphi`` is that of ``dv/dz dz/dphi``, and of one's own z
    ``dv/dz = (1 - alpha) v (1 - v) dlog w/dz``, v being the softmax of ``(1 - alpha) log w``. Both together:
    ``v (1 - b (1 - alpha) (1 - v)) dlog w/dz dz/dphi``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return z.clone(), z.new_zeros(z.shape[:-1]), z.new_zeros(z.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ANN401
        """No tensor to keep: the weights come back with the gradient."""
        ctx.power = 1 - inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        through_z, weight, minus_weight = grads  # of a bound times g: v dlog w/dz g, v g, -b v g
        axes = tuple(range(weight.ndim - 1))
        total = weight.sum(axes, keepdim=True) if axes else weight  # what the loss is scaled by, for each example
        rest = (minus_weight.sum(axes, keepdim=True) if axes else minus_weight) - minus_weight
        factor = 1 + ctx.power * rest / torch.where(total == 0, 1, total)
        found = through_z * factor.unsqueeze(-1)
        # A second derivative comes back by this node, where its weights add up to 0 and say nothing.
        return last(_TWICE, found, *grads) if torch.is_grad_enabled() else found, None
