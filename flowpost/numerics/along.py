"""A value that follows one tensor alone, though it is made of others too: what sticking the landing differentiates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from flowpost.numerics.states import named_once
from flowpost.numerics.watchers import full_precision

Values = Callable[[Tensor], Tensor]
Ctx = Any  # of an autograd function: torch types it without what it stores
_PATH = (
    "path gradient: expected first or second derivatives, under torch.func and of a Mixture first ones, got a further "
    "one; take log_prob of a copy whose parameters need no gradient"
)


def along(value: Tensor, z: Tensor, values: Values, module: nn.Module) -> Tensor:
    """The value ``(*batch)`` as a function of z ``(*batch, dim)`` alone.

    First and second derivatives are exact: those of `values`, whatever else it reads held fixed. A third derivative
    raises, and under ``torch.func`` a second one does.

    Args:
        value: what comes back; its own graph is left out.
        z: what it follows.
        values: from z to the same values, each a function of its own row of z.
        module: whose parameters `values` reads.

    Raises:
        RuntimeError: where a derivative is asked for that is not known.
    """
    if torch.compiler.is_compiling():
        # Not by a gradient within: the compiler of torch 2.11 makes one for a single batch size alone.
        frozen = {name: each.detach() for name, each in named_once(module).items()}
        with _reparametrize_module(module, frozen):
            follows = values(z)
        return value.detach() + (follows - follows.detach())

    def total(z: Tensor) -> Tensor:
        return values(z).sum()

    if torch._C._are_functorch_transforms_active():
        with torch.no_grad():  # it follows z and nothing else: no parameter has to be frozen, or un-frozen, for it
            slope = torch.func.grad(total)(z)
        return first_along(value, z, slope)
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():  # the same through the fast nodes; no parameter's grad is touched
        (slope,) = torch.autograd.grad(total(leaf), leaf)
    return _Along.apply(value.detach(), z, slope, partial(_Slope.apply, total, module))


def first_along(value: Tensor, z: Tensor, slope: Tensor) -> Tensor:
    """As `along`, of a slope ``(*batch, dim)`` that is given; a second derivative raises."""
    if torch.compiler.is_compiling():  # which has first derivatives alone
        return value.detach() + ((z - z.detach()) * slope).sum(-1)
    return _Along.apply(value.detach(), z, slope, partial(last, _PATH))


def last(words: str, value: Tensor, *others: Tensor) -> Tensor:
    """A value that would follow others, and raises these words where it is differentiated."""
    return _Last.apply(words, value, *others)


class _Along(torch.autograd.Function):
    """A value with a slope in z, and a function that gives the slope again where it is to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, z: Tensor, slope: Tensor, again: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, z, slope, ctx.again = inputs
        ctx.save_for_backward(z, slope)
        ctx.save_for_forward(z, slope)

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0].unsqueeze(-1) * _again(ctx), None, None

    @staticmethod
    def jvp(ctx: Ctx, *tangents: Tensor) -> Tensor:
        return (tangents[1] * _again(ctx)).sum(-1)


def _again(ctx: Ctx) -> Tensor:
    z, slope = ctx.saved_tensors
    return ctx.again(slope, z) if torch.is_grad_enabled() else slope


class _Slope(torch.autograd.Function):
    """The slope as a function of z; the parameters are kept so that one that has changed since is noticed."""

    @staticmethod
    def forward(ctx: Ctx, total: Values, module: nn.Module, slope: Tensor, z: Tensor) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(z, *module.parameters())
        return slope.clone()

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, leaf = ctx.saved_tensors[0], ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), full_precision(z.device.type):
            (slope,) = torch.autograd.grad(ctx.total(leaf), leaf, create_graph=True)
            found = torch.zeros_like(leaf)
            if slope.requires_grad:  # a Gaussian's is linear, and of one that does not read z it is 0
                (found,) = torch.autograd.grad(
                    slope, leaf, grads[0].detach(), allow_unused=True, materialize_grads=True
                )
        return None, None, None, last(_PATH, found.detach(), z, *grads) if torch.is_grad_enabled() else found


class _Last(torch.autograd.Function):
    """A tensor that would follow others, and is not to be differentiated further."""

    generate_vmap_rule = True

    @staticmethod
    def forward(words: str, value: Tensor, *others: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.words = inputs[0]

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.words)
