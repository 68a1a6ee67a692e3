"""The gated autoregressive step's inverse: of plain operations, and by hand as one node of the graph.

Its two sweeps over the variables are in `operators`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.gate import REACH, SPREAD, gate_inverse, gate_parameters
from flowpost.masked import passes
from flowpost.masked.gated import plain_gradients, plain_network
from flowpost.masked.network import MADE
from flowpost.masked.operators import pull, solve
from flowpost.masked.sweep import (
    by_output,
    by_variable,
    first_layer,
    flat_sizes,
    plain_sweep,
    ranked,
    to_columns,
    to_rows,
)
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.watchers import on_host

_LARGE = 64.0  # the rounding of sums below it was at most 0.6 of it, in units of eps; B3 allows 8 (dim + 16) of them


def gated_inverse(
    net: MADE, bias: float, order: Tensor | None, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Its inverse of plain operations, for a context whose leading axes broadcast to z's."""
    images = (z if order is None else z.index_select(-1, order)).unbind(-1)

    def bounded(outputs: Tensor) -> tuple[Tensor, Tensor]:
        raw, mean = outputs.to(z.dtype).unbind(-1)
        return gate_parameters(raw, mean, bias)

    def solve_for(k: int, outputs: Tensor) -> Tensor:
        logit, mean = bounded(outputs)
        return gate_inverse(images[k].unsqueeze(-1), logit.unsqueeze(-1), mean.unsqueeze(-1))[0].squeeze(-1)

    grouped = ranked(net, passes.grouped(net, parameters), order)
    preimage = plain_sweep(net, grouped, context, z.shape[:-1], solve_for)[0]
    if order is not None:
        preimage = preimage.index_select(-1, torch.argsort(order))
    # A pass sums in another order than the sweep: with its numbers mapping back gives z' where the sums are large too.
    return gate_inverse(z, *bounded(plain_network(net, parameters)(preimage, context).transpose(-1, -2)))


class GatedInverse(torch.autograd.Function):
    """`gated_inverse`, by hand; its gradient is that of the implicit function, which one transposed sweep solves for.

    With ``z' = f(z)`` and g the gradient at z, the one at z' is ``v / s``, v the solution of ``v J / s = g``; what it
    costs at outputs that are themselves functions of z, and what the log-det adds, is in the same sweep.
    """

    @staticmethod
    def forward(  # noqa: ANN205, D102
        ctx,  # noqa: ANN001
        net: MADE,
        bias: float,
        order: Tensor | None,
        known: Tensor | None,
        z: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ):
        grouped = ranked(net, passes.grouped(net, parameters), order)
        if known is None:
            start, weights, biases = first_layer(z, context, grouped), list(grouped.weights), list(grouped.biases[1:])
            name = passes.KNOWN[net.activation].name
            images = to_columns(z, order)
            x, *values = solve(images, start, weights, biases, bias, flat_sizes(net), name)
            large = _large(weights, [x, *values[:-1]])
            if not on_host(large) or bool(large.any()):
                evaluated = _evaluate(net, order, to_rows(x, order).view(z.shape), context, parameters)
                values = [torch.where(large, *pair) for pair in zip(evaluated, values, strict=True)]
                logit, mean = _bounded(values, bias)
                x = torch.where(large, images + (images - mean) * torch.exp(-logit), x)
        else:
            x, values = to_columns(known, order), _evaluate(net, order, known, context, parameters)
        logit, _ = _bounded(values, bias)
        ctx.net, ctx.bias = net, bias
        ctx.save_for_backward(order, z, context, x, logit, *parameters, *values)
        log_det = F.logsigmoid(logit).sum(0, dtype=wide_dtype(z)).neg_().view(z.shape[:-1])
        return to_rows(x, order).view(z.shape), log_det

    @staticmethod
    def backward(ctx, grad: Tensor, grad_log_det: Tensor):  # noqa: ANN001, ANN205, D102
        net, needs = ctx.net, ctx.needs_input_grad[4:]
        order, z, context, x, logit, *rest = ctx.saved_tensors
        parameters, (*values, outputs) = rest[: len(needs) - 2], rest[len(needs) - 2 :]
        if torch.is_grad_enabled():

            def plain(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
                return gated_inverse(net, ctx.bias, order, z, context, parameters)

            return None, None, None, None, *plain_gradients(plain, z, context, parameters, grad, grad_log_det)
        s, closing = torch.sigmoid(logit), -torch.sigmoid(-logit)
        bounded = outputs.unflatten(0, (net.dim, 2))
        slopes = 1 - bounded * bounded
        # From v to the gradient at the outputs: what the log-det adds, and what v does.
        fixed = closing * grad_log_det.reshape(-1).to(z.dtype)
        fixed = torch.stack([fixed, torch.zeros_like(fixed)], 1).mul_(slopes)
        moved = torch.stack([closing * (x - REACH * bounded.select(1, 1)), closing / s], 1).mul_(slopes)
        grouped = passes.grouped(net, parameters)
        gradient = passes.KNOWN[net.activation].gradient
        slopes = [gradient(torch.ones_like(value), value) for value in values]
        weights = list(ranked(net, grouped, order).weights)
        v, *sums = pull(to_columns(grad, order), fixed, moved, weights, slopes, flat_sizes(net))
        sums[-1] = by_output(net, sums[-1], order)
        z_grad = to_rows(v / s, order).view(z.shape)
        inputs = [to_rows(x, order), *(value.t() for value in values)]
        others = passes.parameter_gradients(
            net, [each.t() for each in sums], inputs, context, z.shape[:-1], grouped, needs[1:]
        )
        return None, None, None, None, z_grad, *others


def _large(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """In which rows ``(N,)`` some layer's sums are of large terms, or not finite.

    There the rounding of the sweep's sums, which are taken in another order than a pass's, would show in mapping back:
    the pass's numbers are to stand in for them.
    """
    pairs = zip(weights, inputs, strict=True)
    squares = [weight.square().sum(1).amax() * x.square().sum(0) for weight, x in pairs]
    return ~torch.stack(squares).amax(0).le(_LARGE**2)


def _bounded(values: Sequence[Tensor], bias: float) -> tuple[Tensor, Tensor]:
    """The gate's logit and mean, ``(dim, N)``."""
    return values[-1][0::2].mul(SPREAD).add_(bias), values[-1][1::2].mul(REACH)


def _evaluate(
    net: MADE, order: Tensor | None, known: Tensor, context: Tensor | None, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The layers' values as `solve` gives them, where the preimage is known."""
    *values, outputs = passes.forward(net, known, context, passes.grouped(net, parameters))
    outputs = by_variable(net, outputs.t(), order).contiguous()
    outputs[0::2].mul_(1 / SPREAD)
    outputs[1::2].mul_(1 / REACH)
    return [*(value.t().contiguous() for value in values), outputs.tanh_()]
