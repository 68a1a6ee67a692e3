"""The gated autoregressive step: of plain operations, and by hand as one node of the graph, in either direction.

A step at the usual sizes is bound by the number of recorded operations; one node with a backward of its own costs a
third of them. Where something else than a plain backward looks at the step, the plain operations run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from flowpost.bijectors import passes
from flowpost.bijectors.base import wide_dtype
from flowpost.bijectors.gate import REACH, SPREAD, gate, gate_inverse, gate_parameters
from flowpost.bijectors.made import MADE
from flowpost.bijectors.sweep import arrays, by_variable, plain_sweep, ranked, sweep, transposed_sweep

Network = Callable[[Tensor, Tensor | None], Tensor]
_tanh_backward = torch.ops.aten.tanh_backward.default


def gated(network: Network, bias: float, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The step of plain operations."""
    # Under autocast the network may run in half precision; everything after it does not.
    raw, mean = network(z, context).to(z.dtype).unbind(-2)
    return gate(z, *gate_parameters(raw, mean, bias))


def gated_inverse(
    net: MADE, bias: float, order: Tensor | None, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Its inverse of plain operations, for a context whose leading axes broadcast to z's."""
    images = (z if order is None else z.index_select(-1, order)).unbind(-1)

    def bounded(outputs: Tensor) -> tuple[Tensor, Tensor]:
        raw, mean = outputs.to(z.dtype).unbind(-1)
        return gate_parameters(raw, mean, bias)

    def solve(k: int, outputs: Tensor) -> Tensor:
        logit, mean = bounded(outputs)
        return gate_inverse(images[k].unsqueeze(-1), logit.unsqueeze(-1), mean.unsqueeze(-1))[0].squeeze(-1)

    grouped = ranked(net, passes.grouped(net, parameters), order)
    preimage, outputs = plain_sweep(net, grouped, context, z.shape[:-1], solve)
    logit, _ = bounded(outputs)
    if order is not None:
        preimage = preimage.index_select(-1, torch.argsort(order))
    return preimage, -F.logsigmoid(logit).sum(-1)


class Gated(torch.autograd.Function):
    """`gated`, by hand; z has the broadcast leading axes, and the parameters come in the order of `passes.flat`."""

    @staticmethod
    def forward(ctx, net: MADE, bias: float, z: Tensor, context: Tensor | None, *parameters: Tensor):  # noqa: ANN001, ANN205, D102
        *values, outputs = passes.forward(net, z, context, passes.grouped(net, parameters))
        bounded = outputs.view(*z.shape[:-1], 2, net.dim)
        raw, mean = bounded.unbind(-2)
        raw.mul_(1 / SPREAD)
        mean.mul_(1 / REACH)
        bounded.tanh_()
        logit, mean = raw.mul(SPREAD).add_(bias), mean.mul(REACH)
        s = torch.sigmoid(logit)
        ctx.net, ctx.bias = net, bias
        ctx.save_for_backward(z, context, bounded, s, mean, *parameters, *values)
        return torch.lerp(mean, z, s), F.logsigmoid(logit).sum(-1, dtype=wide_dtype(z))

    @staticmethod
    def backward(ctx, grad: Tensor, grad_log_det: Tensor):  # noqa: ANN001, ANN205, D102
        net, needs = ctx.net, ctx.needs_input_grad[2:]
        z, context, bounded, s, mean, *rest = ctx.saved_tensors
        parameters, values = rest[: len(needs) - 2], rest[len(needs) - 2 :]
        if torch.is_grad_enabled():
            network = _network(net, parameters)
            plain = partial(gated, network, ctx.bias)
            return None, None, *_plain_gradients(plain, z, context, parameters, grad, grad_log_det)
        closed, z_grad = 1 - s, grad * s
        outputs = torch.empty_like(bounded)
        raw_grad, mean_grad = outputs.unbind(-2)
        torch.addcmul(grad_log_det.to(z.dtype).unsqueeze(-1), z_grad, z - mean, out=raw_grad).mul_(closed)
        torch.mul(grad, closed, out=mean_grad)
        outputs = _tanh_backward(outputs, bounded).view(-1, 2 * net.dim)
        grouped = passes.grouped(net, parameters)
        sums = passes.backward(net, outputs, values, grouped.weights)
        if needs[0]:
            first = net.stack[0]
            reads = first.staircase.input_gradient(sums[0], grouped.weights[0], first.masks)
            z_grad.add_(reads.view_as(z_grad))
        inputs = [z.reshape(-1, net.dim), *values]
        others = passes.parameter_gradients(net, sums, inputs, context, z.shape[:-1], grouped, needs[1:])
        return None, None, z_grad, *others


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
            x, values = _solve(net, bias, _columns(z, order), grouped, _start(z, context, grouped))
        else:
            x, values = _columns(known, order), _evaluate(net, order, known, context, parameters)
        bounded = values[-1].unflatten(0, (net.dim, 2))
        logit = bounded.select(1, 0).mul(SPREAD).add_(bias)
        ctx.net, ctx.bias = net, bias
        ctx.save_for_backward(order, z, context, x, logit, *parameters, *values)
        log_det = F.logsigmoid(logit).sum(0, dtype=wide_dtype(z)).neg_().view(z.shape[:-1])
        return _rows(x, order).view(z.shape), log_det

    @staticmethod
    def backward(ctx, grad: Tensor, grad_log_det: Tensor):  # noqa: ANN001, ANN205, D102
        net, needs = ctx.net, ctx.needs_input_grad[4:]
        order, z, context, x, logit, *rest = ctx.saved_tensors
        parameters, (*values, outputs) = rest[: len(needs) - 2], rest[len(needs) - 2 :]
        if torch.is_grad_enabled():

            def plain(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
                return gated_inverse(net, ctx.bias, order, z, context, parameters)

            return None, None, None, None, *_plain_gradients(plain, z, context, parameters, grad, grad_log_det)
        s = torch.sigmoid(logit)
        bounded = outputs.unflatten(0, (net.dim, 2))
        slopes = 1 - bounded * bounded
        # From v to the gradient at the outputs: what the log-det adds, and what v does.
        fixed, moved = torch.zeros_like(bounded), torch.empty_like(bounded)
        torch.mul(s - 1, grad_log_det.reshape(-1).to(z.dtype), out=fixed.select(1, 0))
        torch.mul(s - 1, x - REACH * bounded.select(1, 1), out=moved.select(1, 0))
        torch.sub(1, 1 / s, out=moved.select(1, 1))
        fixed.mul_(slopes)
        moved.mul_(slopes)
        grouped = passes.grouped(net, parameters)
        gradient = passes.KNOWN[net.activation].gradient
        slopes = [gradient(torch.ones_like(value), value) for value in values]
        v = _columns(grad, order).clone()
        sums = [torch.empty_like(each) for each in (*values, outputs)]
        total, fix, move, *written = arrays(v, fixed, moved, *sums)
        outs = written[-1].reshape(moved.shape)

        def respond(k: int) -> None:
            outs[k] = fix[k] + total[k] * move[k]

        with np.errstate(all="ignore"):
            weights = arrays(*ranked(net, grouped, order).weights)
            transposed_sweep(net, weights, arrays(*slopes) if slopes else [], written, total, respond)
        sums[-1] = _by_output(net, sums[-1], order)
        z_grad = _rows(v / s, order).view(z.shape)
        inputs = [_rows(x, order), *(value.t() for value in values)]
        others = passes.parameter_gradients(
            net, [each.t() for each in sums], inputs, context, z.shape[:-1], grouped, needs[1:]
        )
        return None, None, None, None, z_grad, *others


def _solve(
    net: MADE, bias: float, images: Tensor, parameters: passes.Parameters, start: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The preimages ``(dim, N)`` and the layers' values ``(width, N)``, the last of them the bounded outputs."""
    x, count = torch.empty_like(images), images.shape[1]
    biases = [each.unsqueeze(1).expand(-1, count) for each in parameters.biases[1:]]
    values = [start, *(each.clone(memory_format=torch.contiguous_format) for each in biases)]
    # The bounds' inner scales are taken into the last layer: a call per variable less each.
    last = parameters.weights[-1].clone()
    for rows in (last, values[-1]):
        rows[0::2].mul_(1 / SPREAD)
        rows[1::2].mul_(1 / REACH)
    # (-logit, m) from the bounded outputs.
    slopes, offsets = images.new_full((2, 1), REACH), images.new_zeros(2, 1)
    slopes[0].fill_(-SPREAD)
    offsets[0].fill_(-bias)
    image, preimage, slope, offset, *states = arrays(images, x, slopes, offsets, *values)
    pairs = states[-1].reshape(net.dim, 2, count)
    xp: Any = torch if isinstance(pairs, Tensor) else np

    def solve(k: int) -> None:
        """``z = m + (z' - m) / s = z' + (z' - m) exp(-logit)``."""
        xp.tanh(pairs[k], out=pairs[k])
        logit, mean = pairs[k] * slope + offset
        preimage[k] = image[k] + (image[k] - mean) * xp.exp(logit)

    with np.errstate(all="ignore"):
        sweep(net, arrays(*parameters.weights[:-1], last), states, preimage, solve)
    return x, values


def _start(z: Tensor, context: Tensor | None, parameters: passes.Parameters) -> Tensor:
    """What the first layer adds to its product, ``(width, N)``."""
    if context is None or context.shape[:-1] != z.shape[:-1]:
        return passes.start(z, context, parameters).t().contiguous()
    context = context.reshape(-1, context.shape[-1])
    return torch.addmm(parameters.biases[0].unsqueeze(-1), parameters.projection[0], context.t())


def _evaluate(
    net: MADE, order: Tensor | None, known: Tensor, context: Tensor | None, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """As `_solve`, where the preimage is known."""
    *values, outputs = passes.forward(net, known, context, passes.grouped(net, parameters))
    outputs = by_variable(net, outputs.t(), order).contiguous()
    outputs[0::2].mul_(1 / SPREAD)
    outputs[1::2].mul_(1 / REACH)
    return [*(value.t().contiguous() for value in values), outputs.tanh_()]


def _columns(z: Tensor, order: Tensor | None) -> Tensor:
    """From ``(*batch, dim)`` to ``(dim, N)``, the variables in their order."""
    columns = z.reshape(-1, z.shape[-1]).t()
    return columns.contiguous() if order is None else columns.index_select(0, order)


def _rows(columns: Tensor, order: Tensor | None) -> Tensor:
    """From ``(dim, N)``, the variables in their order, to ``(N, dim)``."""
    columns = columns if order is None else columns.index_select(0, torch.argsort(order))
    return columns.t().contiguous()


def _by_output(net: MADE, rows: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `by_variable`."""
    rows = rows.unflatten(0, (net.dim, net.outputs))
    rows = rows if order is None else rows.index_select(0, torch.argsort(order))
    return rows.transpose(0, 1).flatten(0, 1)


def _network(net: MADE, parameters: Sequence[Tensor]) -> Network:
    """The network with the parameters it had, which ``functional_call`` may have taken back since."""
    return lambda *inputs: functional_call(net, dict(zip(passes.flat(net), parameters, strict=True)), inputs)


def _plain_gradients(
    plain: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    z: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    *grads: Tensor,
) -> list[Tensor | None]:
    """What a backward under ``create_graph`` returns: the plain operations' gradients, in the graph."""
    image, log_det = plain(z, context)
    inputs = [z, context, *parameters]
    needed = [each for each in inputs if each is not None and each.requires_grad]
    outputs = [image, log_det.to(grads[1].dtype)]
    found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=True, allow_unused=True))
    return [next(found) if each is not None and each.requires_grad else None for each in inputs]
