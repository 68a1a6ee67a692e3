"""A masked network's outputs: of plain operations, or by hand as one node of the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpost.bijectors.networked import broadcast
from flowpost.masked import passes
from flowpost.masked.gated import plain_network
from flowpost.masked.network import MADE


def outputs(net: MADE, z: Tensor, context: Tensor | None) -> Tensor:
    """What ``net(z, context)`` gives, ``(*batch, outputs, dim)``, by hand where nobody needs to see its operations."""
    if not passes.by_hand(net, z):
        return net(z, context)
    (z,) = broadcast(context, z)
    return Outputs.apply(net, z, context, *passes.flat(net).values())


class Outputs(torch.autograd.Function):
    """`outputs`, by hand; z has the broadcast leading axes, and the parameters come in the order of `passes.flat`."""

    @staticmethod
    def forward(ctx, net: MADE, z: Tensor, context: Tensor | None, *parameters: Tensor):  # noqa: ANN001, ANN205, D102
        *values, last = passes.forward(net, z, context, passes.grouped(net, parameters))
        ctx.net = net
        ctx.save_for_backward(z, context, *parameters, *values)
        return last.view(*z.shape[:-1], net.outputs, net.dim)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205, D102
        net, needs = ctx.net, ctx.needs_input_grad[1:]
        z, context, *rest = ctx.saved_tensors
        parameters, values = rest[: len(needs) - 2], rest[len(needs) - 2 :]
        if torch.is_grad_enabled():
            needed = [each for each, need in zip((z, context, *parameters), needs, strict=True) if need]
            plain = plain_network(net, parameters)(z, context)
            found = iter(torch.autograd.grad(plain, needed, grad, create_graph=True, allow_unused=True))
            return None, *(next(found) if need else None for need in needs)
        grouped = passes.grouped(net, parameters)
        sums = passes.backward(net, grad.reshape(-1, net.outputs * net.dim), values, grouped.weights)
        first = net.stack[0]
        reads = first.staircase.input_gradient(sums[0], grouped.weights[0], first.masks) if needs[0] else None
        inputs = [z.reshape(-1, net.dim), *values]
        others = passes.parameter_gradients(net, sums, inputs, context, z.shape[:-1], grouped, needs[1:])
        return None, None if reads is None else reads.view(z.shape), *others
