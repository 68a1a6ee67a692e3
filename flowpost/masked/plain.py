"""A run of plain operations: what everything can differentiate, trace and export, and what calls a changed layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.masked.engine import untouched
from flowpost.masked.layouts import ranked
from flowpost.masked.network import MADE
from flowpost.masked.run import ElementWise, Link, Parameters, Run, broadcast, flat, grouped
from flowpost.numerics.products import plus
from flowpost.numerics.watchers import hooked

Network = Callable[[Tensor, Tensor | None], Tensor]


def forward(
    run: Run, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The image and the log-det; `parameters` stand in for the networks' own."""
    total = None
    for link, network in zip(run, _networks(run, parameters), strict=True):
        # Under autocast the network may run in half precision; the step does not.
        numbers = network(z, context).to(z.dtype).flatten(-2)
        z, log_det = _step(link.step, z, numbers)
        total = plus(total, log_det)
    return z, cast(Tensor, total)


def inverse(
    run: Run, z: Tensor, context: Tensor | None, preimage: Tensor | None, parameters: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The preimage and the log-det of the inverse; a weight is used once, or a changed layer called dim times."""
    groups = _groups(run, parameters)
    total = None
    knowns = _preimages(run, context, preimage)
    for link, group, known in zip(reversed(run), reversed(groups), reversed(knowns), strict=True):
        z, *others = broadcast(context, z) if known is None else broadcast(context, z, known)
        known = others[0] if others else None
        numbers, found = _search(link, group, z, context, known)
        z, log_det = link.step._inverse(z, numbers, found if known is None else known)
        total = plus(total, log_det)
    return z, cast(Tensor, total)


def _search(
    link: Link, group: Parameters | None, z: Tensor, context: Tensor | None, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The numbers at the preimage, and the preimage without its gradient."""
    variables = range(link.net.dim) if link.order is None else link.order.order
    images = [z.narrow(-1, i, 1) for i in variables]
    knowns = [None if known is None else known.narrow(-1, i, 1) for i in variables]

    def solve(k: int, numbers: Tensor) -> Tensor:
        return link.step._inverse(images[k], numbers.to(z.dtype), knowns[k])[0]

    if group is None:
        return _by_calls(link.net, list(variables), z, context, solve)
    preimage = _by_sweep(link, group, z, context, solve)
    # A pass sums in another order than the sweep: with its numbers mapping back gives z' where the sums are large too.
    return _with(link.net, group)(preimage, context).to(z.dtype).flatten(-2), preimage.detach()


def _by_calls(
    net: nn.Module,
    variables: Sequence[int],
    z: Tensor,
    context: Tensor | None,
    solve: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Variable by variable, each from a pass of the network over those before it."""
    columns = [torch.zeros_like(column) for column in z.split(1, dim=-1)]
    numbers = list(columns)
    for k, variable in enumerate(variables):
        outputs = net(torch.cat(columns, dim=-1), context)
        numbers[variable] = outputs.select(-1, variable)
        columns[variable] = solve(k, numbers[variable])
    return torch.stack(numbers, dim=-1).to(z.dtype).flatten(-2), torch.cat(columns, dim=-1).detach()


def _by_sweep(
    link: Link, group: Parameters, z: Tensor, context: Tensor | None, solve: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Variable by variable, each weight used once: a unit depends on no variable from its degree on."""
    net, batch = link.net, z.shape[:-1]
    weights, biases, projection = ranked(net, group, link.order)
    starts = list(biases)
    if context is not None:
        starts[0] = starts[0] + F.linear(context, projection[0])
    sizes = [*net.sizes, [net.outputs] * net.dim]
    layers = [
        (weight.split(size), start.expand(*batch, -1).split(size, dim=-1))
        for weight, start, size in zip(weights, starts, sizes, strict=True)
    ]
    # Each list starts with no columns, so that a weight that reads nothing at all has a gradient too: zeros.
    values = [[starts[0].new_zeros(*batch, 0)] for _ in layers]
    for k in range(net.dim):
        for (rows, start), inputs, group_of in zip(layers, values, [*values[1:], None], strict=True):
            seen = torch.cat(inputs, dim=-1)
            sums = start[k] + F.linear(seen, rows[k].narrow(1, 0, seen.shape[-1]))
            if group_of is None:
                values[0].append(solve(k, sums))
            else:
                group_of.append(net.activation(sums))
    found = torch.cat(values[0], dim=-1)
    return found if link.order is None else link.order.put(found)


def _preimages(run: Run, context: Tensor | None, preimage: Tensor | None) -> list[Tensor | None]:
    """What each link maps, in order, where the run's own preimage is known."""
    knowns = [preimage] + [None] * (len(run) - 1)
    if preimage is not None:
        with torch.no_grad():
            for place, link in enumerate(run[:-1]):
                knowns[place + 1] = forward([link], cast(Tensor, knowns[place]), context)[0]
    return knowns


def _groups(run: Run, parameters: Sequence[Tensor] | None) -> list[Parameters] | list[None]:
    """Each network's parameters; None where weights do not say all that the layers do."""
    if parameters is not None:
        return grouped(run, parameters)
    if all(untouched(link.net) for link in run):
        return grouped(run, flat(run))
    return [None] * len(run)


def _networks(run: Run, parameters: Sequence[Tensor] | None) -> list[Network]:
    if parameters is None:
        return [link.net for link in run]
    return [_with(link.net, group) for link, group in zip(run, grouped(run, parameters), strict=True)]


def _with(net: MADE, group: Parameters) -> Network:
    """The network with the parameters it had, whose last ones have the rate in them.

    They may be another call's by now, as those of a ``functional_call`` that is over; and a compiler traces no module
    that is made for a call.
    """

    def sums(z: Tensor, context: Tensor | None) -> Tensor:
        masked = [
            weight * layer.staircase.mask.on(weight) for layer, weight in zip(net.stack, group.weights, strict=True)
        ]
        x = F.linear(z, masked[0], group.biases[0])
        if group.projection:
            x = x + F.linear(cast(Tensor, context), group.projection[0])
        for weight, bias in zip(masked[1:], group.biases[1:], strict=True):
            x = F.linear(net.activation(x), weight, bias)
        return x.unflatten(-1, (net.outputs, net.dim))

    return sums


def _step(step: ElementWise, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(step, nn.Module) and hooked(step):
        return step(z, numbers, checked=True)
    return step._forward(z, numbers)
