"""Autoregressive steps: a masked network gives the numbers of an element-wise step; with a gate, IAF's own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors._networked import Networked
from flowpost.bijectors._within import OfStep
from flowpost.bijectors.base import Bijector, Interval, check_reads, check_step
from flowpost.bijectors.gate import Gate
from flowpost.masked import nodes
from flowpost.masked.engine import fits
from flowpost.masked.network import MADE
from flowpost.masked.run import Link
from flowpost.numerics.arguments import check_order
from flowpost.numerics.constants import Ordered


class Masked(Ordered, Networked):
    """An element-wise step whose numbers are a network of the variables before: ``z'_i = f(z_i; n_i(z_{<i}, c))``.

    With `Affine` it is the plain form of inverse autoregressive flow, ``z' = mu + sigma z``; masked autoregressive
    flow is ``Inverse(Masked(Inverse(Affine(dim))))``. Use it to make a step of your own autoregressive.

    Invertible because f is in its own variable, so the Jacobian is triangular with a positive diagonal. Forward and
    log-det are one pass of the network and one of f. The inverse is one sweep over the variables, which uses each
    weight once and inverts f for one variable after the other. Its gradient is that of the implicit function. Where the
    preimage is known nothing is searched. A fresh step is f at its ``initial_context``, the identity where f has one:
    the network's last layer starts there, with weights of 0.

    Args:
        step: an element-wise bijector of the size of z that reads a context, such as ``Affine(dim, exp_scale)``.
        context_size: size of c, which the network's first layer reads; 0 for none.
        hidden: widths of the network's hidden layers, any number of them.
        order: the variables in the order in which they are computed; by default as they come. It is folded into the
            weights' layout: in that order or its reverse the network's zeros are skipped.
        activation: element-wise; with ``F.elu``, ``F.relu`` and ``torch.tanh`` a whole run of steps is one node of the
            autograd graph.
        rate: a positive factor on the network's outputs, so that an optimizer moves them less fast;
            ``1 / sqrt(hidden[-1])`` in the recipes whose steps are no gates, which would shrink q to a point before its
            mean has learned to follow x.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)``.

    Raises:
        TypeError: for a step that is no Bijector.
        ValueError: for a step or an activation that is not element-wise, or a step that reads no context.

    Reference:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow, eq. 9, 10;
        Papamakarios et al. (2017), Masked Autoregressive Flow for Density Estimation, eq. 3, 4.

    Example:
        >>> step = Masked(Affine(4), context_size=8, hidden=(32, 32))
        >>> z, log_det = step(torch.randn(50, 16, 4), torch.randn(16, 8))
        >>> log_det.shape
        torch.Size([50, 16])
    """

    domain = cast(Interval, OfStep(lambda masked: masked.step.domain))
    codomain = cast(Interval, OfStep(lambda masked: masked.step.codomain))

    def __init__(
        self,
        step: Bijector,
        context_size: int = 0,
        hidden: Sequence[int] = (320, 320),
        *,
        order: Sequence[int] | None = None,
        activation: Callable[[Tensor], Tensor] = F.elu,
        rate: float = 1.0,
    ) -> None:
        check_step("step", step)
        if not step.elementwise:
            raise ValueError(f"step: expected an element-wise one, got {type(step).__name__}")
        check_reads(step)
        super().__init__(step.dim, context_size)
        order = None if order is None else check_order(order, step.dim)
        self.net = MADE(step.dim, step.context_size // step.dim, hidden, context_size, activation, order, rate)
        self.step = step
        super()._set_order(order)
        for parameter in self.net.last_parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.net.stack[-1].bias.copy_(step.initial_context() / self.net.rate)

    def causal_order(self) -> Tensor:
        """The order in which the variables are computed."""
        return torch.arange(self.dim, device=self._like.device) if self.order is None else self.order

    def _set_order(self, order: Sequence[int] | None) -> None:
        super()._set_order(order)
        if order is not None:
            self.net.lay_out(order)

    def _link(self) -> Link:
        parts: dict[str, Any] = self._modules  # read on every call: a module looks its attributes up at length
        return Link(parts["net"], parts["step"], self._order)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return nodes.forward([self._link()], z, context)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return nodes.inverse([self._link()], z, context, preimage)

    def _fuses(self, *, shared: bool) -> Hashable | None:
        ours = type(self)._forward is Masked._forward and type(self)._inverse is Masked._inverse
        if not ours or not (shared or not self.context_size) or not fits(self._link()):
            return None
        return Masked, self.net.activation, self.context_size

    def _forward_run(self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return nodes.forward([cast(Masked, step)._link() for step in steps], z, context)

    def _inverse_run(
        self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None, preimage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return nodes.inverse([cast(Masked, step)._link() for step in steps], z, context, preimage)


class Autoregressive(Masked):
    """A step of inverse autoregressive flow: ``z'_i = gain (s_i z_i + (1 - s_i) m_i)``, m_i, s_i of z_{<i} and c.

    `Masked` of a `Gate`: use it for posteriors that are drawn from and scored at their own samples, which costs one
    pass of the network. A fresh step multiplies z by ``gain sigmoid(forget_bias)``.

    With ``gain=1``, the paper's step, each variable's slope in its own value is below 1, so every step shrinks volume
    at every z. With ``gain=1 / sigmoid(forget_bias)`` a fresh step is the identity, as in the recipe `iaf`.

    Args:
        dim: size of z.
        context_size: size of c, which the network's first layer reads; 0 for none.
        hidden: widths of the network's hidden layers, any number of them.
        order: as in `Masked`.
        activation: as in `Masked`.
        forget_bias: the gate's logit at the start.
        gain: a positive constant.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)``.

    Reference:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow, eq. 13, 14, algorithm 1;
        Kingma & Welling (2019), section 3.4, algorithm 3, eq. 3.30 to 3.32.

    Example:
        >>> step = Autoregressive(4, context_size=8, hidden=(32, 32))
        >>> z, log_det = step(torch.randn(50, 16, 4), torch.randn(16, 8))
        >>> log_det.shape
        torch.Size([50, 16])
    """

    takes_older_states = True
    """Whether a state from before gates had a gain makes this the step of then, of gain 1; else it is refused."""

    def __init__(
        self,
        dim: int,
        context_size: int = 0,
        hidden: Sequence[int] = (320, 320),
        *,
        order: Sequence[int] | None = None,
        activation: Callable[[Tensor], Tensor] = F.elu,
        forget_bias: float = 2.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__(Gate(dim, forget_bias, gain), context_size, hidden, order=order, activation=activation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        gate, key = cast(Gate, self.step), f"{prefix}step.constant_gain"
        whole = all(f"{prefix}net.{name}" in state_dict for name, _ in self.net.named_parameters())
        if key in state_dict:
            gate.take_gain_back()  # of a state in parts, the first of which ended before it
        elif self.takes_older_states and gate.gain != 1 and whole:
            gate.drop_gain()
        super()._load_from_state_dict(state_dict, prefix, *args)
