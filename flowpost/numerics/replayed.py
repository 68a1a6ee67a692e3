"""Gradients by operations that autograd records: what a node with a way back by hand gives where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowpost.numerics.watchers import batched, full_precision, unwatched


def replays(*grads: Tensor) -> bool:
    """Whether a node's way back is that of the plain operations.

    So for a second derivative, for many gradients at once, and where a transform of ``torch.func`` or forward-mode
    differentiation goes through the way back alone, of a graph that was made outside of it.
    """
    return torch.is_grad_enabled() or batched(*grads) or not unwatched(grads[0])


def replay(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """What a backward under ``create_graph`` returns, or one of many gradients: the plain operations' gradients.

    The inputs may depend on one another: z on a parameter, say, or one parameter may come twice. Each is replaced by a
    view, so that what reaches one through another is left to those who made it so, and not counted twice.

    Args:
        function: from the inputs to the node's outputs, by plain operations.
        inputs: the node's.
        needs: which of them a gradient is asked for.
        grads: at the outputs.
    """
    wanted = [each for each, need in zip(inputs, needs, strict=True) if need and each is not None]

    def of_wanted(*own: Tensor) -> tuple[Tensor, ...]:
        given = iter(own)
        return tuple(function(*(next(given) if need else each for each, need in zip(inputs, needs, strict=True))))

    # A transform would not see what autograd alone records.
    pull = _by_autograd if unwatched(grads[0]) else _by_transform
    with full_precision(grads[0].device.type):
        found = iter(pull(of_wanted, wanted, grads))
    return [next(found) if need else None for need in needs]


def _by_autograd(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [each.view_as(each) for each in inputs]
        pairs = [(output, grad) for output, grad in zip(function(*own), grads, strict=True) if output.requires_grad]
        outputs, slopes = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, own, slopes, create_graph=recorded, allow_unused=True)


def _by_transform(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor]:
    return torch.func.vjp(function, *inputs)[1](tuple(grads))
