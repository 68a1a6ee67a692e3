"""What the steps share that feed their context to a network: where h starts, and a masked network with its order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import Bijector
from flowpost.masked.network import MADE
from flowpost.numerics.arguments import check_order


class Networked(Bijector):
    """A step whose context is h, the features that a network of its own reads.

    A subclass calls ``_draw_start`` when it is built.
    """

    start: Tensor

    def _draw_start(self) -> None:
        bound = 1 / math.sqrt(max(self.context_size, 1))
        self.register_buffer("start", torch.empty(self.context_size).uniform_(-bound, bound), persistent=False)

    def initial_context(self) -> Tensor:
        """Features drawn as a linear layer's bias is; at zeros the weights that read h would have no gradient."""
        return self.start.clone()

    def head_scale(self) -> Tensor:
        """Ones: h is features, not parameters, so a head keeps its usual initialization."""
        return torch.ones(self.context_size)


class Causal(Networked):
    """A step whose numbers for a variable are a masked network's, of the variables before it and of h.

    A subclass gives ``_forward`` and ``_inverse``. The network's last layer starts at 0.

    Args:
        dim: size of z.
        outputs: numbers per variable.
        context_size: size of h; 0 for none.
        hidden: widths of the network's hidden layers.
        order: the variables in the order in which they are computed; None as they come.
        activation: element-wise.
    """

    order: Tensor | None

    def __init__(
        self,
        dim: int,
        outputs: int,
        context_size: int,
        hidden: Sequence[int],
        order: Sequence[int] | None,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(dim, context_size)
        order = None if order is None else check_order(order, self.dim)
        self.net = MADE(dim, outputs, hidden, context_size, activation, order)
        for parameter in self.net.last_parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("order", None if order is None else torch.tensor(order))
        self.register_load_state_dict_pre_hook(_adopt_order)
        self._draw_start()

    def causal_order(self) -> Tensor:
        """The order in which the variables are computed."""
        return torch.arange(self.dim) if self.order is None else self.order


def _adopt_order(step: Causal, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Lay the network out for the order of the weights that are about to be loaded."""
    order = state.get(f"{prefix}order")
    if step.order is not None and order is not None and order.shape == step.order.shape:
        step.net.lay_out(order.tolist())


def broadcast(context: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with the leading axes that they and the context have together."""
    shapes = {each.shape[:-1] for each in (context, *tensors) if each is not None}
    if len(shapes) == 1:
        return tensors
    batch = torch.broadcast_shapes(*shapes)
    return tuple(each.expand(*batch, -1) for each in tensors)
