"""The inverse of an element-wise step with a network's numbers: of plain operations, and by hand as one node.

By hand the search records nothing, and where the preimage is known there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.masked import passes
from flowpost.masked.gated import plain_network
from flowpost.masked.network import MADE
from flowpost.masked.operators import pull
from flowpost.masked.sweep import (
    arrays,
    by_output,
    by_variable,
    first_layer,
    flat_sizes,
    plain_sweep,
    ranked,
    sweep,
    to_columns,
    to_rows,
)


def by_hand(step: Bijector, net: MADE, z: Tensor) -> bool:
    """Whether `MaskedInverse` may stand in; a compiler, which would have to trace a step's own gradient, sees all."""
    alone = next(step.parameters(), None) is None
    return alone and passes.by_hand(net, z) and not torch.compiler.is_compiling()


def masked_inverse(
    step: Bijector,
    net: MADE,
    order: Tensor | None,
    known: Tensor | None,
    z: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The inverse of plain operations, for a context whose leading axes broadcast to z's."""

    def columns(x: Tensor) -> Sequence[Tensor]:
        return (x if order is None else x.index_select(-1, order)).split(1, dim=-1)

    images = columns(z)
    knowns = [None] * net.dim if known is None else columns(known)

    def solve(k: int, numbers: Tensor) -> Tensor:
        return step._inverse(images[k], numbers.to(z.dtype), knowns[k])[0].squeeze(-1)

    grouped = ranked(net, passes.grouped(net, parameters), order)
    preimage = plain_sweep(net, grouped, context, z.shape[:-1], solve)[0]
    if order is not None:
        preimage = preimage.index_select(-1, torch.argsort(order))
    # A pass sums in another order than the sweep: with its numbers mapping back gives z' where the sums are large too.
    numbers = plain_network(net, parameters)(preimage, context)
    return step._inverse(z, numbers.to(z.dtype).flatten(-2), known)


class MaskedInverse(torch.autograd.Function):
    """`masked_inverse`, by hand; its gradient is that of the implicit function, which one transposed sweep solves for.

    With ``x_i = f(y_i; c_i(x_{<i}))`` and g the gradient at x, v solves ``v_j = g_j + sum_{i > j} (v_i df_i/dc_i + what
    the log-det adds) dc_i/dx_j``, and the gradient at y is ``v df/dy``.
    """

    @staticmethod
    def forward(  # noqa: ANN205, D102
        ctx,  # noqa: ANN001
        step: Bijector,
        net: MADE,
        order: Tensor | None,
        known: Tensor | None,
        z: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ):
        x = _search(step, net, order, z, context, parameters) if known is None else known
        *values, outputs = passes.forward(net, x, context, passes.grouped(net, parameters))
        numbers = outputs.view(*z.shape[:-1], net.outputs * net.dim)
        preimage, log_det = step._inverse(z, numbers, known)
        ctx.step, ctx.net = step, net
        ctx.save_for_backward(order, known, z, context, x, numbers, *parameters, *values)
        return preimage, log_det.expand(z.shape[:-1]).clone()

    @staticmethod
    def backward(ctx, grad: Tensor, grad_log_det: Tensor):  # noqa: ANN001, ANN205, D102
        step, net, needs = ctx.step, ctx.net, ctx.needs_input_grad[4:]
        order, known, z, context, x, numbers, *rest = ctx.saved_tensors
        parameters, values = rest[: len(needs) - 2], rest[len(needs) - 2 :]
        if torch.is_grad_enabled():
            image, log_det = masked_inverse(step, net, order, known, z, context, parameters)
            pairs = [(image, grad), (log_det.expand(z.shape[:-1]), grad_log_det)]
            # A log-det that is constant, as a shift's, is in no graph.
            outputs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            needed = [each for each, need in zip((z, context, *parameters), needs, strict=True) if need]
            found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=True, allow_unused=True))
            return None, None, None, None, *(next(found) if need else None for need in needs)
        of_map, of_log_det = _slopes(step, z, numbers, x, grad_log_det)
        fixed, moved = (
            by_variable(net, each.reshape(-1, numbers.shape[-1]).t(), order).unflatten(0, (net.dim, net.outputs))
            for each in (of_log_det[1], of_map[1])
        )
        grouped = passes.grouped(net, parameters)
        gradient = passes.KNOWN[net.activation].gradient
        slopes = [gradient(torch.ones_like(value), value).t().contiguous() for value in values]
        weights = list(ranked(net, grouped, order).weights)
        v, *sums = pull(
            to_columns(grad, order), fixed.contiguous(), moved.contiguous(), weights, slopes, flat_sizes(net)
        )
        sums[-1] = by_output(net, sums[-1], order)
        z_grad = torch.addcmul(of_log_det[0], to_rows(v, order).view(z.shape), of_map[0])
        inputs = [x.reshape(-1, net.dim), *values]
        others = passes.parameter_gradients(
            net, [each.t() for each in sums], inputs, context, z.shape[:-1], grouped, needs[1:]
        )
        return None, None, None, None, z_grad, *others


@torch.no_grad()
def _search(
    step: Bijector,
    net: MADE,
    order: Tensor | None,
    z: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The preimage, each variable by the step's inverse for one variable."""
    grouped, images = ranked(net, passes.grouped(net, parameters), order), to_columns(z, order)
    x = images.new_empty(images.shape)
    biases = [bias.unsqueeze(1).expand(-1, images.shape[1]) for bias in grouped.biases[1:]]
    values = [first_layer(z, context, grouped), *(b.clone(memory_format=torch.contiguous_format) for b in biases)]

    def solve(k: int) -> None:
        numbers = values[-1].narrow(0, k * net.outputs, net.outputs)
        x[k] = step._inverse(images[k].unsqueeze(-1), numbers.t(), None)[0].squeeze(-1)

    preimage, *states = arrays(x, *values)
    with np.errstate(all="ignore"):
        sweep(net.sizes, passes.KNOWN[net.activation], arrays(*grouped.weights), states, preimage, solve)
    return to_rows(x, order).view(z.shape)


Pair = tuple[Tensor, ...]


def _slopes(step: Bijector, z: Tensor, numbers: Tensor, x: Tensor, grad_log_det: Tensor) -> tuple[Pair, Pair]:
    """What the step's inverse says of z and its numbers: the slopes of each variable, and the log-det's gradient."""
    with torch.enable_grad():
        inputs = z.detach().requires_grad_(), numbers.detach().requires_grad_()
        preimage, log_det = step._inverse(*inputs, x)
        # Element-wise: the gradient of the sum has every variable's own slope.
        of_map = torch.autograd.grad(
            preimage.sum(), inputs, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        if not log_det.requires_grad:
            return of_map, (torch.zeros_like(z), torch.zeros_like(numbers))
        total = (log_det * grad_log_det).sum()
        return of_map, torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)
