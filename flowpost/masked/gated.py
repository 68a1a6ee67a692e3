"""The gated autoregressive step: of plain operations, and by hand as one node of the graph.

A step at the usual sizes is bound by the number of recorded operations; one node with a backward of its own costs a
third of them. A compiler traces both of its passes. Where something else looks at the step, the plain operations run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from flowpost.bijectors.gate import REACH, SPREAD, gate, gate_parameters
from flowpost.masked import passes
from flowpost.masked.network import MADE
from flowpost.numerics.products import wide_dtype

Network = Callable[[Tensor, Tensor | None], Tensor]
_tanh_backward = torch.ops.aten.tanh_backward.default


def gated(network: Network, bias: float, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The step of plain operations."""
    # Under autocast the network may run in half precision; everything after it does not.
    raw, mean = network(z, context).to(z.dtype).unbind(-2)
    return gate(z, *gate_parameters(raw, mean, bias))


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
        closed = torch.sigmoid(-logit)
        ctx.net, ctx.bias = net, bias
        ctx.save_for_backward(z, context, bounded, closed, mean, *parameters, *values)
        return torch.lerp(z, mean, closed), F.logsigmoid(logit).sum(-1, dtype=wide_dtype(z))

    @staticmethod
    def backward(ctx, grad: Tensor, grad_log_det: Tensor):  # noqa: ANN001, ANN205, D102
        net, needs = ctx.net, ctx.needs_input_grad[2:]
        z, context, bounded, closed, mean, *rest = ctx.saved_tensors
        parameters, values = rest[: len(needs) - 2], rest[len(needs) - 2 :]
        if torch.is_grad_enabled():
            network = plain_network(net, parameters)
            plain = partial(gated, network, ctx.bias)
            return None, None, *plain_gradients(plain, z, context, parameters, grad, grad_log_det)
        z_grad = grad * (1 - closed)
        raw_grad = torch.addcmul(grad_log_det.to(z.dtype).unsqueeze(-1), z_grad, z - mean).mul_(closed)
        outputs = _tanh_backward(torch.stack([raw_grad, grad * closed], -2), bounded).view(-1, 2 * net.dim)
        grouped = passes.grouped(net, parameters)
        sums = passes.backward(net, outputs, values, grouped.weights)
        if needs[0]:
            first = net.stack[0]
            reads = first.staircase.input_gradient(sums[0], grouped.weights[0], first.masks)
            z_grad.add_(reads.view_as(z_grad))
        inputs = [z.reshape(-1, net.dim), *values]
        others = passes.parameter_gradients(net, sums, inputs, context, z.shape[:-1], grouped, needs[1:])
        return None, None, z_grad, *others


def plain_network(net: MADE, parameters: Sequence[Tensor]) -> Network:
    """The network with the parameters it had, which ``functional_call`` may have taken back since."""
    return lambda *inputs: functional_call(net, dict(zip(passes.flat(net), parameters, strict=True)), inputs)


def plain_gradients(
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
