"""The engine for a CPU: blocks of weights that skip zeros, and sweeps on numpy's views. It runs on any device.

Only the layers' values are kept for the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from flowpost.masked import recorded
from flowpost.masked.activations import KNOWN
from flowpost.masked.host import sweep, transposed
from flowpost.masked.layouts import by_output, by_variable, ranked, to_columns, to_rows
from flowpost.masked.network import MADE
from flowpost.masked.recorded import Recorded
from flowpost.masked.run import Link, Parameters, Run, Saved, by_step, grouped, sum_to, taken
from flowpost.numerics.multiplying import affine, product
from flowpost.numerics.products import plus
from flowpost.numerics.watchers import on_host

_Back = tuple[Link, Parameters, Parameters, Recorded, Sequence[Tensor]]
_LARGE = 64.0  # the rounding of sums below it was at most 0.6 of it, in units of eps; B3 allows 8 (dim + 16) of them


def values(
    run: Run, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor], *, recording: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The image, the log-det, and for the way back each link's recorded step and hidden values ``(N, width)``."""
    total, tape = None, []
    for link, group in zip(run, grouped(run, parameters), strict=True):
        numbers, *hidden = _evaluate(link.net, z, context, group)
        z, log_det, kept = recorded.run(link.step, z, numbers, recording=recording)
        total = plus(total, log_det)
        tape += [*kept, *hidden]
    return z, cast(Tensor, total), tape


def gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
    """The gradients at z, at the context and at the parameters."""
    of_context, of_parameters = None, []
    for link, group, need, step, hidden in taken(_links(saved)[::-1]):
        grad, of_numbers = recorded.pull(link.step, step, grad, grad_log_det)
        sums = _sums(link.net, of_numbers.reshape(-1, link.net.outputs * link.net.dim), hidden, group)
        first, of_context, found = _of_network(saved, link.net, step.point, hidden, sums, group, need, of_context)
        grad = grad + link.net.stack[0].staircase.input_gradient(first, group.weights[0]).view(grad.shape)
        of_parameters = found + of_parameters
    return [grad, _like_context(of_context, saved), *of_parameters]


def solve(
    run: Run,
    z: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    preimage: Tensor | None,
    *,
    recording: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The preimage, the log-det, and a tape as that of `values`, of each link's inverse."""
    groups = grouped(run, parameters)
    knowns = [] if preimage is None else _evaluated(run, preimage, context, groups)
    total, tape = None, []
    for place in reversed(range(len(run))):
        link = run[place]
        x, numbers, *hidden = knowns[place] if knowns else _search(link, groups[place], z, context)
        z, log_det, kept = recorded.run_inverse(link.step, x, z, numbers, recording=recording)
        total = plus(total, log_det)
        tape = [*kept, *hidden, *tape]
    return z, cast(Tensor, total), tape


def solve_gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
    """As `gradients`, by the implicit function.

    With ``x_i = f(y_i; c_i(x_{<i}))`` and g the gradient at x, v solves ``v_j = g_j + sum_{i > j} (v_i df_i/dc_i + what
    the log-det adds) dc_i/dx_j``, and the gradient at y is ``v df/dy``: one transposed sweep.
    """
    of_context, of_parameters = None, []
    for link, group, need, step, hidden in taken(_links(saved)):
        net, order = link.net, link.order
        of_map, of_log_det = recorded.pull_inverse(link.step, step, grad_log_det)
        fixed, moved = (
            by_variable(net, each.reshape(-1, net.outputs * net.dim).t(), order)
            .unflatten(0, (net.dim, net.outputs))
            .contiguous()
            for each in (of_log_det[1], of_map[1])
        )
        gradient = KNOWN[net.activation].gradient_
        slopes = [gradient(torch.ones_like(value), value).t().contiguous() for value in hidden]
        weights = ranked(net, group, order).weights
        v, *layers, last = transposed.pull(to_columns(grad, order), fixed, moved, list(weights), slopes, _sizes(net))
        grad = torch.addcmul(of_log_det[0], to_rows(v, order).view(grad.shape), of_map[0])
        sums = [by_output(net, last, order).t(), *(each.t() for each in layers[::-1])]
        _, of_context, found = _of_network(saved, net, step.point, hidden, sums, group, need, of_context)
        of_parameters += found
    return [grad, _like_context(of_context, saved), *of_parameters]


def _like_context(grad: Tensor | None, saved: Saved) -> Tensor | None:
    return None if grad is None else grad.view(cast(Tensor, saved.context).shape)


def _links(saved: Saved) -> list[_Back]:
    """Each link with its parameters, which of them need a gradient, its recorded step and its hidden values."""
    found, first, count = [], 0, len(Recorded._fields)
    for link, group, need in saved.links():
        middle, last = first + count, first + count + len(group.weights) - 1
        found.append((link, group, need, Recorded(*saved.tape[first:middle]), saved.tape[middle:last]))
        first = last
    saved.tape.clear()
    return found


def _evaluate(net: MADE, z: Tensor, context: Tensor | None, group: Parameters) -> list[Tensor]:
    """The numbers ``(*batch, outputs * dim)``, and the hidden layers' values ``(N, width)``."""
    (first, *others), activation, hidden = net.stack, KNOWN[net.activation].run, []
    y = _start(z, context, group)
    first.staircase.add_product(y, z.reshape(-1, net.dim), group.weights[0])
    for layer, weight, bias in zip(others, group.weights[1:], group.biases[1:], strict=True):
        hidden.append(activation(y))
        y = layer.staircase.affine(bias, hidden[-1], weight)
    return [y.view(*z.shape[:-1], y.shape[-1]), *hidden]


def _evaluated(run: Run, x: Tensor, context: Tensor | None, groups: Sequence[Parameters]) -> list[tuple[Tensor, ...]]:
    """For each link its point, where the first is known, its numbers and its hidden values."""
    found = []
    for link, group in zip(run, groups, strict=True):
        numbers, *hidden = _evaluate(link.net, x, context, group)
        found.append((x, numbers, *hidden))
        if len(found) < len(run):
            x = link.step._forward(x, numbers)[0]
    return found


def _start(z: Tensor, context: Tensor | None, group: Parameters) -> Tensor:
    """The first layer's bias and projected context, projected once however many samples share it, ``(N, width)``."""
    bias, batch = group.biases[0], z.shape[:-1]
    if context is None:
        return bias.expand(batch.numel(), -1).clone()
    y = affine(bias, context.reshape(-1, context.shape[-1]), group.projection[0].t())
    if context.shape[:-1] == batch:
        return y
    y = y.view(*context.shape[:-1], len(bias)).expand(*batch, -1)
    return y.clone(memory_format=torch.contiguous_format).view(-1, len(bias))


def _start_columns(z: Tensor, context: Tensor | None, group: Parameters) -> Tensor:
    """As `_start`, ``(width, N)``."""
    if context is None or context.shape[:-1] != z.shape[:-1]:
        return _start(z, context, group).t().contiguous()
    return torch.addmm(group.biases[0].unsqueeze(-1), group.projection[0], context.reshape(-1, context.shape[-1]).t())


def _sums(net: MADE, grad: Tensor, hidden: Sequence[Tensor], group: Parameters) -> Iterator[Tensor]:
    """The gradients ``(N, width)`` at the layers' sums, from that at the outputs to that of the first layer."""
    yield grad
    for layer, weight, value in zip(net.stack[:0:-1], group.weights[:0:-1], hidden[::-1], strict=True):
        grad = KNOWN[net.activation].gradient_(layer.staircase.input_gradient(grad, weight), value)
        yield grad


def _of_network(
    saved: Saved,
    net: MADE,
    point: Tensor,
    hidden: Sequence[Tensor],
    sums: Iterable[Tensor],
    group: Parameters,
    need: Parameters,
    of_context: Tensor | None,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """The gradient at the first layer's sums, that at the context if it is needed, and those at the parameters.

    The one at the context, ``(N, context_size)``, is added to what came of other links. Every layer's is used while it
    is near: they come one by one, the last layer's first.
    """
    weights, biases, at_sums = [], [], point
    inputs = [*hidden[::-1], point.reshape(-1, net.dim)]
    layers = zip(net.stack[::-1], sums, inputs, need.weights[::-1], need.biases[::-1], strict=True)
    for layer, at_sums, x, weight, bias in layers:
        weights.append(layer.staircase.weight_gradient(at_sums, x) if weight else None)
        biases.append(at_sums.sum(0) if bias else None)
    found, context = [*weights[::-1], *biases[::-1]], saved.context
    if context is None:
        return at_sums, None, found
    per_context = sum_to(at_sums, point.shape[:-1], context.shape[:-1])
    found.append(product(per_context.t(), context.reshape(-1, context.shape[-1])) if need.projection[0] else None)
    if not saved.needs[1]:
        return at_sums, None, found
    projection = group.projection[0]
    more = per_context @ projection if of_context is None else torch.addmm(of_context, per_context, projection)
    return at_sums, more, found


def _search(link: Link, group: Parameters, z: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """The preimage by a sweep, the numbers there, and the hidden values.

    A sweep sums in another order than a pass, so where sums are of large terms the numbers are those of a pass: with
    them mapping back gives z'. Only here the sizes are read; who may not read them takes the pass.
    """
    net, order, closed = link.net, link.order, link.step.columns()[1]
    weights, biases, projection = ranked(net, group, order)
    start = _start_columns(z, context, Parameters(weights, biases, projection))
    column = by_step(link.step) if closed is None else closed
    name = KNOWN[net.activation].name
    found, *states = sweep.solve(
        to_columns(z, order), start, list(weights), list(biases[1:]), _sizes(net), name, column
    )
    x = to_rows(found, order).view(z.shape)
    if not on_host(found):
        return x, *_evaluate(net, x, context, group)
    *hidden, outputs = states
    large = _large(weights, [found, *hidden])
    swept = [by_output(net, outputs, order).t(), *(value.t() for value in hidden)]
    if bool(large.any()):
        evaluated = _evaluate(net, x, context, group)
        pairs = zip((each.reshape(len(large), -1) for each in evaluated), swept, strict=True)
        swept = [torch.where(large.unsqueeze(-1), *pair) for pair in pairs]
    # In one layout whoever was evaluated: else a row that is large would change the others' last bits.
    return x, swept[0].reshape(*z.shape[:-1], swept[0].shape[-1]).contiguous(), *swept[1:]


def _large(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """In which rows ``(N,)`` some layer's sums are of large terms, or not finite."""
    pairs = zip(weights, inputs, strict=True)
    squares = [weight.square().sum(1).amax() * x.square().sum(0) for weight, x in pairs]
    return ~torch.stack(squares).amax(0).le(_LARGE**2)


def _sizes(net: MADE) -> list[int]:
    return [size for layer in net.sizes for size in layer]
