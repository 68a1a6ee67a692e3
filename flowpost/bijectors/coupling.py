"""Coupling: some variables stay, and a network of them gives the numbers of a step on the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors._networked import Networked
from flowpost.bijectors._within import apply, apply_inverse
from flowpost.bijectors.base import LINE, Bijector, check_reads, check_step
from flowpost.masked.run import broadcast
from flowpost.numerics.arguments import check_module, check_order, check_widths
from flowpost.numerics.constants import Ordered
from flowpost.numerics.rates import Rated
from flowpost.numerics.watchers import changes, check_left, untouched


class Coupling(Ordered, Networked):
    """Coupling ``z'_a = z_a``, ``z'_b = f(z_b; n(z_a, c))``: a step on some variables, whose numbers the others give.

    Use it where drawing and scoring points from elsewhere must both be fast: either costs one pass of the network n and
    one of f. With `Shift` it is additive (NICE) and keeps volumes, with `Affine` affine (RealNVP); any step will do.

    Invertible because z_a is known on both sides, and f is invertible. A fresh coupling is f at its
    ``initial_context``, the identity where f has one.

    Args:
        dim: size of z.
        step: the bijector f of the variables that move, which reads a context; the other ``dim - step.dim`` pass. If
            all of them move, the network reads c alone, and without c it is a learned constant.
        context_size: size of c; 0 for none.
        hidden: widths of the network's hidden layers, any number of them.
        order: the variables, first those that pass; by default as they come.
        activation: element-wise, between the layers.
        network: from its number of inputs, those that pass and then c's, and its number of outputs to any module
            ``(N, inputs) -> (N, outputs)``, in place of `hidden`, `activation` and `rate`. It gets all rows of all
            batch axes in one. Its outputs are multiplied by gains that start at 0. Batch norm in train mode, which
            mixes the rows, is right for the ELBO alone: else call ``eval()`` first.
        rate: a positive factor on the network's outputs, so that an optimizer moves them less fast, as
            in `Masked`.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)``.

    Raises:
        TypeError: for a step that is no Bijector, or a `network` that makes no module.
        ValueError: for a step of more variables than `dim`, one that reads no context, or one not of the real line; in
            a call, for a network's outputs of another shape.

    Reference:
        Dinh et al. (2015), NICE: Non-linear Independent Components Estimation, section 3.2;
        Dinh et al. (2017), Density Estimation using Real NVP, eq. 4 to 8.

    Example:
        >>> step = Coupling(4, Affine(2), context_size=8, hidden=(32, 32))
        >>> z, log_det = step(torch.randn(50, 16, 4), torch.randn(16, 8))
        >>> log_det.shape
        torch.Size([50, 16])
    """

    def __init__(
        self,
        dim: int,
        step: Bijector,
        context_size: int = 0,
        hidden: Sequence[int] = (320, 320),
        *,
        order: Sequence[int] | None = None,
        activation: Callable[[Tensor], Tensor] = F.elu,
        network: Callable[[int, int], nn.Module] | None = None,
        rate: float = 1.0,
    ) -> None:
        super().__init__(dim, context_size)
        _check_step(step, dim)
        self.step, self.passing = step, dim - step.dim
        start, inputs = step.initial_context(), self.passing + context_size
        if not inputs:
            self.net = Constant(start)
        elif network is None:
            self.net = Perceptron(inputs, hidden, start, activation, rate)
        else:
            made = network(inputs, len(start))
            check_module("network", made)
            self.net = Gained(made, start)
        self._set_order(None if order is None else check_order(order, dim))

    def causal_order(self) -> Tensor | None:
        """Those that pass, then the step's own order, where it has one."""
        own = self.step.causal_order()
        if own is None:
            return None
        order = torch.cat([torch.arange(self.passing, device=own.device), self.passing + own])
        return order if self.order is None else self.order[order]

    def extra_repr(self) -> str:
        """Sizes, the order, and how many variables pass, for the module's repr."""
        return f"{super().extra_repr()}, passing={self.passing}"

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        passed, moved = self._split(z)
        moved, log_det = apply(self.step, moved, self._numbers(passed, context))
        return self._merge(passed, moved), log_det

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        passed, moved = self._split(z)
        preimage = None if preimage is None else self._split(preimage)[1]
        moved, log_det = apply_inverse(self.step, moved, self._numbers(passed, context), preimage)
        return self._merge(passed, moved), log_det

    def _numbers(self, passed: Tensor, context: Tensor | None) -> Tensor:
        # Under autocast the network may run in half precision; the step does not.
        return self.net(passed, context).to(passed.dtype)

    def _split(self, z: Tensor) -> Sequence[Tensor]:
        z = z if self._order is None else self._order.take(z)
        return z.split([self.passing, self.step.dim], dim=-1)

    def _merge(self, passed: Tensor, moved: Tensor) -> Tensor:
        z = torch.cat([passed.expand(*moved.shape[:-1], -1), moved], dim=-1)
        return z if self._order is None else self._order.put(z)


class Perceptron(Rated):
    """A multilayer perceptron of variables and c; its last layer starts at 0, with the bias `start`.

    c is projected once however many samples of the variables share it.

    Args:
        inputs: how many numbers both have together.
        hidden: widths of the hidden layers.
        start: the outputs at the start.
        activation: element-wise.
        rate: a positive factor on the outputs.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], start: Tensor, activation: Callable[[Tensor], Tensor], rate: float
    ) -> None:
        super().__init__(rate)
        widths = [inputs, *check_widths("hidden", hidden), len(start)]
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(widths))
        self.activation = activation
        last = cast(nn.Linear, self.layers[-1])
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(start / self.rate)

    def forward(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Outputs for z ``(*batch, variables)`` and the context."""
        first, *others = self.layers
        x = first(z) if context is None else _read(first, z, context)
        for layer in others:
            x = layer(self.activation(x))
        return x if self.rate == 1 else self.rate * x


def _read(layer: nn.Module, z: Tensor, context: Tensor) -> Tensor:
    """A linear layer of both side by side. One that somebody has changed is called, and c is expanded for it."""
    if untouched(layer, nn.Linear):
        of_z, of_context = cast(nn.Linear, layer).weight.split([z.shape[-1], context.shape[-1]], dim=1)
        return F.linear(z, of_z, cast(nn.Linear, layer).bias) + F.linear(context, of_context)
    return layer(torch.cat(broadcast(context, z, context), dim=-1))


class Constant(nn.Module):
    """Where nothing passes and there is no c: the outputs `start`, to be learned."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(start)

    def forward(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Outputs, the same for all."""
        return self.bias


class Gained(nn.Module):
    """Any network of variables and c side by side, ``start + gain * network``, with gains that start at 0."""

    def __init__(self, network: nn.Module, start: Tensor) -> None:
        super().__init__()
        self.network = network
        self.gain, self.bias = nn.Parameter(torch.zeros_like(start)), nn.Parameter(start)

    def forward(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Outputs for z ``(*batch, variables)`` and the context."""
        if context is not None:
            z = torch.cat(broadcast(context, z, context), dim=-1)
        rows = z.reshape(z.shape[:-1].numel(), z.shape[-1])  # as batch norm wants them
        before = changes(rows)
        outputs = self.network(rows)
        check_left("network", rows, before)
        if outputs.shape != (expected := (len(rows), *self.bias.shape)):  # it would broadcast
            raise ValueError(
                f"network: expected a row of outputs for each of inputs, {expected}, got shape {tuple(outputs.shape)}"
            )
        return torch.addcmul(self.bias, self.gain, outputs).view(*z.shape[:-1], len(self.bias))


def _check_step(step: Bijector, dim: int) -> None:
    check_step("step", step)
    if step.dim > dim:
        raise ValueError(f"step: expected one of at most dim={dim} variables, got dim={step.dim}")
    check_reads(step)
    if not step.domain == step.codomain == LINE:
        raise ValueError(f"step: expected one of the real line, got {type(step).__name__} from {step.domain}")
