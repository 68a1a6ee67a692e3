"""Any element-wise step made autoregressive: a masked network gives its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.bijectors.networked import Causal, broadcast
from flowpost.masked import passes
from flowpost.masked.masked_inverse import MaskedInverse, by_hand, masked_inverse
from flowpost.masked.outputs import outputs


class Masked(Causal):
    """An element-wise step whose numbers are a network of the variables before: ``z'_i = f(z_i; c_i(z_{<i}, h))``.

    With `Affine` it is the plain form of inverse autoregressive flow, ``z' = mu + sigma z``; masked autoregressive
    flow is ``Inverse(Masked(Inverse(Affine(dim))))``. Invertible because f is in its own variable, so the Jacobian is
    triangular with a positive diagonal. Forward and log-det are one pass of the network and one of f. The inverse is
    one sweep over the variables, which uses each weight once and the inverse of f dim times, and then such a pass; its
    gradient is that of the implicit function, and where the preimage is known there is no search. A fresh step is f at
    its ``initial_context``, the identity where f has one: the network's last layer starts there, with weights of 0.

    Args:
        step: an element-wise bijector of the size of z that reads a context, such as ``Affine(dim, exp_scale)``.
        context_size: size of h, which the network's first layer reads; 0 for none.
        hidden: widths of the network's hidden layers, any number of them.
        order: the variables in the order in which they are computed; by default as they come.
        activation: element-wise; ``F.elu``, ``F.relu`` and ``torch.tanh`` have a backward by hand.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)``.

    Raises:
        TypeError: for a step that is no Bijector.
        ValueError: for a step that is not element-wise, or reads no context.

    Reference:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow, eq. 9, 10;
        Papamakarios et al. (2017), Masked Autoregressive Flow for Density Estimation, eq. 3, 4.

    Example:
        >>> step = Masked(Affine(4), context_size=8, hidden=(32, 32))
        >>> z, log_det = step(torch.randn(50, 16, 4), torch.randn(16, 8))
        >>> log_det.shape
        torch.Size([50, 16])
    """

    def __init__(
        self,
        step: Bijector,
        context_size: int = 0,
        hidden: Sequence[int] = (320, 320),
        *,
        order: Sequence[int] | None = None,
        activation: Callable[[Tensor], Tensor] = F.elu,
    ) -> None:
        if not isinstance(step, Bijector):
            raise TypeError(f"step: expected a Bijector, got {type(step).__name__}")
        if not step.elementwise:
            raise ValueError(f"step: expected an element-wise one, got {type(step).__name__}")
        if not step.context_size:
            name = type(step).__name__
            raise ValueError(f"step: expected one that reads a context, got {name} with context_size=0")
        super().__init__(step.dim, step.context_size // step.dim, context_size, hidden, order, activation)
        self.step = step
        self.domain, self.codomain = step.domain, step.codomain
        with torch.no_grad():
            self.net.stack[-1].bias.copy_(step.initial_context())

    def _numbers(self, z: Tensor, context: Tensor | None) -> Tensor:
        # Under autocast the network may run in half precision; the step does not.
        return outputs(self.net, z, context).to(z.dtype).flatten(-2)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step._forward(z, self._numbers(z, context))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        preimage, z = broadcast(context, preimage, z) if preimage is not None else (None, *broadcast(context, z))
        parameters = tuple(passes.flat(self.net).values())
        if by_hand(self.step, self.net, z):
            return MaskedInverse.apply(self.step, self.net, self.order, preimage, z, context, *parameters)
        return masked_inverse(self.step, self.net, self.order, preimage, z, context, parameters)
