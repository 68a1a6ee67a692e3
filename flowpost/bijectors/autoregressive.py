"""The inverse autoregressive flow's step: a masked network feeds an LSTM-style gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.networked import Causal, broadcast
from flowpost.masked import passes
from flowpost.masked.gated import Gated, gated
from flowpost.masked.gated_inverse import GatedInverse, gated_inverse


class Autoregressive(Causal):
    """A step of inverse autoregressive flow: ``z'_i = s_i z_i + (1 - s_i) m_i``, m_i and s_i networks of z_{<i} and h.

    Invertible because the gate s is a sigmoid of a bounded logit, so positive, and the Jacobian is triangular. Forward
    and log-det are one pass of the network. The inverse uses each weight once too, in dim steps one after another (and
    one pass more, for its rounding, where the network's sums are large, and always off the CPU); its gradient is that
    of the implicit function, one such sweep back, and where the preimage is known there is no search.
    A fresh step multiplies z by ``sigmoid(2)``: the network's last layer starts at 0.

    Args:
        dim: size of z.
        context_size: size of h, which the network's first layer reads; 0 for none.
        hidden: widths of the network's hidden layers, any number of them.
        order: the variables in the order in which they are computed; by default as they come. It is folded into the
            weights' layout; in that order or its reverse the network's zeros are skipped.
        activation: element-wise; ``F.elu``, ``F.relu`` and ``torch.tanh`` have a backward by hand.
        forget_bias: the gate's logit at the start.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)``.

    Reference:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow, eq. 13, 14, algorithm 1;
        Kingma & Welling (2019), section 3.2.1, algorithm 5.

    Example:
        >>> step = Autoregressive(4, context_size=8, hidden=(32, 32))
        >>> z, log_det = step(torch.randn(50, 16, 4), torch.randn(16, 8))
        >>> log_det.shape
        torch.Size([50, 16])
    """

    def __init__(
        self,
        dim: int,
        context_size: int = 0,
        hidden: Sequence[int] = (320, 320),
        *,
        order: Sequence[int] | None = None,
        activation: Callable[[Tensor], Tensor] = F.elu,
        forget_bias: float = 2.0,
    ) -> None:
        super().__init__(dim, 2, context_size, hidden, order, activation)
        self.forget_bias = forget_bias

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not passes.by_hand(self.net, z):
            return gated(self.net, self.forget_bias, z, context)
        (z,) = broadcast(context, z)
        return Gated.apply(self.net, self.forget_bias, z, context, *passes.flat(self.net).values())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        parameters = tuple(passes.flat(self.net).values())
        if passes.by_hand(self.net, z):
            preimage, z = broadcast(context, preimage, z) if preimage is not None else (None, *broadcast(context, z))
            return GatedInverse.apply(self.net, self.forget_bias, self.order, preimage, z, context, *parameters)
        (z,) = broadcast(context, z)
        return gated_inverse(self.net, self.forget_bias, self.order, z, context, parameters)
