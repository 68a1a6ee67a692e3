"""The inverse autoregressive flow's step: a masked network feeds an LSTM-style gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors import passes
from flowpost.bijectors.base import Bijector, check_order
from flowpost.bijectors.gated import Gated, gated
from flowpost.bijectors.gated_inverse import GatedInverse, gated_inverse
from flowpost.bijectors.made import MADE


class Autoregressive(Bijector):
    """A step of inverse autoregressive flow: ``z'_i = s_i z_i + (1 - s_i) m_i``, m_i and s_i networks of z_{<i} and h.

    Invertible because the gate s is a sigmoid of a bounded logit, so positive, and the Jacobian is triangular. Forward
    and log-det are one pass of the network. The inverse uses each weight once too, in dim steps one after another; its
    gradient is that of the implicit function, one such sweep back, and where the preimage is known there is no search.
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

    order: Tensor | None
    start: Tensor

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
        super().__init__(dim, context_size)
        self.forget_bias = forget_bias
        order = None if order is None else check_order(order, self.dim)
        self.net = MADE(dim, 2, hidden, context_size, activation, order)
        for parameter in self.net.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("order", None if order is None else torch.tensor(order))
        self.register_load_state_dict_pre_hook(_adopt_order)
        bound = 1 / math.sqrt(max(context_size, 1))
        self.register_buffer("start", torch.empty(context_size).uniform_(-bound, bound), persistent=False)

    def initial_context(self) -> Tensor:
        """Features drawn as a linear layer's bias is; at zeros the weights that read h would have no gradient."""
        return self.start.clone()

    def context_gain(self) -> Tensor:
        """Ones: h is features, not parameters, so a head keeps its usual initialization."""
        return torch.ones(self.context_size)

    def causal_order(self) -> Tensor:
        """The order in which the variables are computed."""
        return torch.arange(self.dim) if self.order is None else self.order

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not passes.by_hand(self.net, z):
            return gated(self.net, self.forget_bias, z, context)
        (z,) = _broadcast(context, z)
        return Gated.apply(self.net, self.forget_bias, z, context, *passes.flat(self.net).values())

    def _inverse(self, z: Tensor, context: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        parameters = tuple(passes.flat(self.net).values())
        if passes.by_hand(self.net, z):
            known, z = _broadcast(context, known, z) if known is not None else (None, *_broadcast(context, z))
            return GatedInverse.apply(self.net, self.forget_bias, self.order, known, z, context, *parameters)
        (z,) = _broadcast(context, z)
        return gated_inverse(self.net, self.forget_bias, self.order, z, context, parameters)


def _adopt_order(step: Autoregressive, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Lay the network out for the order of the weights that are about to be loaded."""
    order = state.get(f"{prefix}order")
    if step.order is not None and order is not None and order.shape == step.order.shape:
        step.net.lay_out(order.tolist())


def _broadcast(context: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with the leading axes that they and the context have together."""
    shapes = {each.shape[:-1] for each in (context, *tensors) if each is not None}
    if len(shapes) == 1:
        return tensors
    batch = torch.broadcast_shapes(*shapes)
    return tuple(each.expand(*batch, -1) for each in tensors)
