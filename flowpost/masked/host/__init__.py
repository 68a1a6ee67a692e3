"""The engine for a CPU: blocks of weights that skip zeros, and sweeps on numpy's views. It runs on any device.

Only the layers' values are kept for the way back. A small network's step costs what its calls do, so all leading axes
become one of rows ``(N, ...)`` at once, and a layer's work stands in one loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from flowpost.masked import recorded
from flowpost.masked.activations import KNOWN
from flowpost.masked.host import sweep, transposed
from flowpost.masked.layouts import by_output, by_variable, ranked, to_columns, to_rows
from flowpost.masked.network import MADE
from flowpost.masked.recorded import Recorded
from flowpost.masked.run import Link, Parameters, Run, Saved, by_step, grouped, over, rows, sum_to
from flowpost.numerics.multiplying import linear, product
from flowpost.numerics.products import plus
from flowpost.numerics.watchers import on_host

_Back = tuple[Link, Parameters, Parameters, Recorded, Sequence[Tensor]]
_LARGE = 64.0  # the rounding of sums below it was at most 0.6 of it, in units of eps; B3 allows 8 (dim + 16) of them


def values(
    run: Run, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor], *, recording: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The image, the log-det, and for the way back each link's recorded step and hidden values ``(N, width)``."""
    total, tape, batch, image = None, [], z.shape[:-1], rows(z)
    for link, group in zip(run, grouped(run, parameters), strict=True):
        numbers, *hidden = _evaluate(link.net, image, _start(batch, context, group), group)
        image, log_det, kept = recorded.run(link.step, image, numbers, recording=recording)
        total = plus(total, log_det)
        tape += [*kept, *hidden]
    return over(batch, image), over(batch, cast(Tensor, total)), tape


def gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
    """The gradients at z, at the context and at the parameters."""
    links, batch, of_context, of_parameters = _links(saved), grad.shape[:-1], None, []
    grad, grad_log_det = rows(grad), grad_log_det.reshape(-1)
    if all(link.step.has_pull() for link in saved.run):
        grad_log_det = grad_log_det.to(grad.dtype)  # once for all of them
    while links:
        link, group, need, step, inputs = links.pop()  # what is held of a link is freed before the next one's turn
        stairs, weights, biases = link.net.stairs, [], []
        gradient_ = KNOWN[link.net.activation].gradient_
        grad, at_sums = recorded.pull(link.step, step, grad, grad_log_det)
        for place in range(len(stairs) - 1, -1, -1):  # of every layer the gradient is used while it is near
            stair, x = stairs[place], inputs[place]
            weights.append(stair.weight_gradient(at_sums, x) if need.weights[place] else None)
            biases.append(at_sums.sum(0) if need.biases[place] else None)
            if place:
                at_sums = gradient_(stair.input_gradient(at_sums, group.weights[place]), x)
        grad = stairs[0].add_input_gradient(grad, at_sums, group.weights[0])
        of_context, projection = _of_context(saved, at_sums, batch, group, need, of_context)
        of_parameters = [*weights[::-1], *biases[::-1], *projection, *of_parameters]
    return [over(batch, grad), _like_context(of_context, saved), *of_parameters]


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
    groups, batch, found = grouped(run, parameters), z.shape[:-1], rows(z)
    knowns = [] if preimage is None else _evaluated(run, rows(preimage), batch, context, groups)
    total, tape = None, []
    for place in reversed(range(len(run))):
        link = run[place]
        x, numbers, *hidden = knowns[place] if knowns else _search(link, groups[place], found, batch, context)
        found, log_det, kept = recorded.run_inverse(link.step, x, found, numbers, recording=recording)
        total = plus(total, log_det)
        tape = [*kept, *hidden, *tape]
    return over(batch, found), over(batch, cast(Tensor, total)), tape


def solve_gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
    """As `gradients`, by the implicit function.

    With ``x_i = f(y_i; c_i(x_{<i}))`` and g the gradient at x, v solves ``v_j = g_j + sum_{i > j} (v_i df_i/dc_i + what
    the log-det adds) dc_i/dx_j``, and the gradient at y is ``v df/dy``: one transposed sweep.
    """
    links, batch, of_context, of_parameters = _links(saved)[::-1], grad.shape[:-1], None, []
    grad, grad_log_det = rows(grad), grad_log_det.reshape(-1)
    while links:
        link, group, need, step, inputs = links.pop()
        net, order = link.net, link.order
        of_map, of_log_det = recorded.pull_inverse(link.step, step, grad_log_det)
        fixed, moved = (
            by_variable(net, each.t(), order).unflatten(0, (net.dim, net.outputs)).contiguous()
            for each in (of_log_det[1], of_map[1])
        )
        gradient = KNOWN[net.activation].gradient_
        slopes = [gradient(torch.ones_like(value), value).t().contiguous() for value in inputs[1:]]
        ranked_weights = ranked(net, group, order).weights
        v, *layers, last = transposed.pull(to_columns(grad, order), fixed, moved, ranked_weights, slopes, _sizes(net))
        grad = torch.addcmul(of_log_det[0], to_rows(v, order), of_map[0])
        sums = [*(each.t() for each in layers), by_output(net, last, order).t()]
        of_parameters += [
            stair.weight_gradient(at_sums, x) if of_weight else None
            for stair, at_sums, x, of_weight in zip(net.stairs, sums, inputs, need.weights, strict=True)
        ]
        of_parameters += [at_sums.sum(0) if of else None for at_sums, of in zip(sums, need.biases, strict=True)]
        of_context, projection = _of_context(saved, sums[0], batch, group, need, of_context)
        of_parameters += projection
    return [over(batch, grad), _like_context(of_context, saved), *of_parameters]


def _like_context(grad: Tensor | None, saved: Saved) -> Tensor | None:
    return None if grad is None else over(cast(Tensor, saved.context).shape[:-1], grad)


def _links(saved: Saved) -> list[_Back]:
    """Each link with its parameters, which of them need a gradient, its recorded step and its layers' inputs."""
    found, first, count = [], 0, len(Recorded._fields)
    for link, group, need in saved.links():
        middle, last = first + count, first + count + len(group.weights) - 1
        step = Recorded(*saved.tape[first:middle])
        found.append((link, group, need, step, [step.point, *saved.tape[middle:last]]))
        first = last
    saved.tape.clear()
    return found


def _evaluate(net: MADE, z: Tensor, start: Tensor, group: Parameters) -> list[Tensor]:
    """The numbers ``(N, outputs * dim)``, and the hidden layers' values ``(N, width)``; `start` is written over."""
    stairs, activation, y, hidden = net.stairs, KNOWN[net.activation].run, start, []
    stairs[0].add_product(y, z, group.weights[0])
    for place in range(1, len(stairs)):
        hidden.append(activation(y))
        y = stairs[place].affine(group.biases[place], y, group.weights[place])
    return [y, *hidden]


def _evaluated(
    run: Run, x: Tensor, batch: Sequence[int], context: Tensor | None, groups: Sequence[Parameters]
) -> list[tuple[Tensor, ...]]:
    """For each link its point, where the first is known, its numbers and its hidden values."""
    found = []
    for link, group in zip(run, groups, strict=True):
        numbers, *hidden = _evaluate(link.net, x, _start(batch, context, group), group)
        found.append((x, numbers, *hidden))
        if len(found) < len(run):
            x = link.step._forward(x, numbers)[0]
    return found


def _start(batch: Sequence[int], context: Tensor | None, group: Parameters) -> Tensor:
    """The first layer's bias and projected context, projected once however many samples share it, ``(N, width)``."""
    bias = group.biases[0]
    if context is None:
        return bias.expand(math.prod(batch), -1).clone()
    y = linear(rows(context), group.projection[0], bias)
    if context.shape[:-1] == batch:
        return y
    y = y.view(*context.shape[:-1], len(bias)).expand(*batch, -1)
    return y.clone(memory_format=torch.contiguous_format).view(-1, len(bias))


def _start_columns(batch: Sequence[int], context: Tensor | None, group: Parameters) -> Tensor:
    """As `_start`, ``(width, N)``."""
    if context is None or context.shape[:-1] != batch:
        return _start(batch, context, group).t().contiguous()
    return torch.addmm(group.biases[0].unsqueeze(-1), group.projection[0], rows(context).t())


def _of_context(
    saved: Saved, at_sums: Tensor, batch: Sequence[int], group: Parameters, need: Parameters, so_far: Tensor | None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient at the contexts ``(N, context_size)``, if it is needed, and that at a projection, if there is one.

    They follow from that at the first layer's sums; the first is added to what came of other links.
    """
    context = saved.context
    if context is None:
        return None, []
    at_sums = sum_to(at_sums, batch, context.shape[:-1])
    found = product(at_sums.t(), rows(context)) if need.projection[0] else None
    if not saved.needs[1]:
        return None, [found]
    projection = group.projection[0]
    return at_sums @ projection if so_far is None else torch.addmm(so_far, at_sums, projection), [found]


def _search(
    link: Link, group: Parameters, z: Tensor, batch: Sequence[int], context: Tensor | None
) -> tuple[Tensor, ...]:
    """The preimage by a sweep, the numbers there, and the hidden values.

    A sweep sums in another order than a pass, so where sums are of large terms the numbers are those of a pass: with
    them mapping back gives z'. Only here the sizes are read; who may not read them takes the pass.
    """
    net, order, closed = link.net, link.order, link.step.columns()[1]
    weights, biases, projection = ranked(net, group, order)
    start = _start_columns(batch, context, Parameters(weights, biases, projection))
    column = by_step(link.step) if closed is None else closed
    name = KNOWN[net.activation].name
    found, *states = sweep.solve(
        to_columns(z, order), start, list(weights), list(biases[1:]), _sizes(net), name, column
    )
    x = to_rows(found, order)
    if not on_host(found):
        return x, *_evaluate(net, x, _start(batch, context, group), group)
    *hidden, outputs = states
    large = _large(weights, [found, *hidden])
    swept = [by_output(net, outputs, order).t(), *(value.t() for value in hidden)]
    if bool(large.any()):
        evaluated = _evaluate(net, x, _start(batch, context, group), group)
        swept = [torch.where(large.unsqueeze(-1), *pair) for pair in zip(evaluated, swept, strict=True)]
    # In one layout whoever was evaluated: else a row that is large would change the others' last bits.
    return x, swept[0].contiguous(), *swept[1:]


def _large(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """In which rows ``(N,)`` some layer's sums are of large terms, or not finite."""
    pairs = zip(weights, inputs, strict=True)
    norm = torch.linalg.vector_norm
    squares = [norm(weight, dim=1).amax().square() * x.square().sum(0) for weight, x in pairs]
    return ~torch.stack(squares).amax(0).le(_LARGE**2)


def _sizes(net: MADE) -> list[int]:
    return [size for layer in net.sizes for size in layer]
