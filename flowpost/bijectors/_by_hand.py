"""A step's pass as one node of the autograd graph, with its way back written out, for one point an example.

Where the plain operations are many and small their recording costs more than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from flowpost.numerics.replayed import replay, replays
from flowpost.numerics.watchers import full_precision, recordable, unwatched

Ctx = Any  # of an autograd function: torch types it without what it stores
Plain = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Hand(Protocol):
    """A map's pass and its way back, of z ``(N, dim)`` and a context ``(N, context_size)``; nothing is recorded."""

    def values(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """The image, the log-det ``(N,)``, and what the way back needs."""
        ...

    def gradients(
        self, z: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor, *, of_context: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients at z and, if it is asked for, at the context."""
        ...


def forward(hand: Hand | None, plain: Plain, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The image and the log-det; by the plain operations where the node does not fit, or there is none."""
    if hand is None or not fits(z, context):
        return plain(z, context)
    if torch.is_grad_enabled():
        z, context = recordable(z), recordable(context)
    if z.ndim == 2:
        return cast("tuple[Tensor, Tensor]", _Pass.apply(hand, plain, z, context))
    rows = [each.reshape(-1, each.shape[-1]) for each in (z, context)]
    image, log_det = cast("tuple[Tensor, Tensor]", _Pass.apply(hand, plain, *rows))
    return image.reshape(z.shape), log_det.reshape(z.shape[:-1])


def fits(z: Tensor, context: Tensor) -> bool:
    """Whether an example has one point, and nobody watches; a compiler sees the plain operations, and fuses them."""
    alike = z.shape[:-1] == context.shape[:-1] and z.dtype == context.dtype
    return alike and not torch.compiler.is_compiling() and unwatched(z)


class _Pass(torch.autograd.Function):
    """Image and log-det of rows; second derivatives are those of the plain operations."""

    @staticmethod
    def forward(ctx: Ctx, hand: Hand, plain: Plain, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            image, log_det, kept = hand.values(z, context)
        ctx.hand, ctx.plain = hand, plain
        ctx.save_for_backward(z, context, *kept)
        return image, log_det

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs, (z, context, *kept) = ctx.needs_input_grad[2:], ctx.saved_tensors
        if replays(*grads):
            return None, None, *replay(ctx.plain, (z, context), needs, grads)
        with full_precision(z.device.type):
            return None, None, *ctx.hand.gradients(z, kept, *grads, of_context=needs[1])
