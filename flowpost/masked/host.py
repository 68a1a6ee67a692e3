"""The engine for a CPU: blocks of weights that skip zeros, and sweeps on numpy's views. It runs on any device.

Only the layers' values are kept for the way back. An element-wise step is differentiated by autodiff, at the numbers
that the network gave, so its formula is written once, in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.masked import sweep
from flowpost.masked.activations import KNOWN
from flowpost.masked.layouts import by_output, by_variable, ranked, to_columns, to_rows
from flowpost.masked.network import MADE
from flowpost.masked.run import ElementWise, Link, Parameters, Pulling, Run, grouped
from flowpost.numerics.products import wide
from flowpost.numerics.watchers import on_host

_LARGE = 64.0  # the rounding of sums below it was at most 0.6 of it, in units of eps; B3 allows 8 (dim + 16) of them
Pair = tuple[Tensor, Tensor]
Map = Callable[[Tensor, Tensor], Pair]


def values(
    run: Run, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor], *, recording: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The image, the log-det, and for the way back each link's hidden values ``(N, width)`` and recorded step."""
    total, tape = z.new_zeros(()), []
    for link, group in zip(run, grouped(run, parameters), strict=True):
        *hidden, outputs = _pass(link.net, z, context, group)
        numbers = outputs.view(*z.shape[:-1], outputs.shape[-1])
        if link.step.has_pull():
            image, log_det, kept = cast(Pulling, link.step).keep(z, numbers)
            recorded = Recorded(z, z, numbers, *kept)
        else:
            recorded = _record(link.step._forward, z, numbers, recording)
            image, log_det = recorded.image.detach(), recorded.log_det.detach()
        tape += [*recorded, *hidden]
        z, total = image, total + wide(log_det)
    return z, total, tape


def pull(
    run: Run, tape: Sequence[Tensor], parameters: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradient at z, and those at the sums ``(N, width)`` of every layer."""
    sums: list[Tensor] = []
    links = zip(run, grouped(run, parameters), _cut(run, tape), strict=True)
    for link, group, (recorded, hidden) in reversed(list(links)):
        net, shape = link.net, grad.shape
        if link.step.has_pull():
            kept = recorded.image, recorded.log_det
            grad, of_numbers = cast(Pulling, link.step).pull(recorded.z, kept, grad, grad_log_det)
        else:
            grad, of_numbers = _pull(link.step._forward, recorded, grad, grad_log_det)
        steep = of_numbers.reshape(-1, net.outputs * net.dim)
        layers = [steep]
        for layer, weight, value in zip(net.stack[:0:-1], group.weights[:0:-1], hidden[::-1], strict=True):
            steep = KNOWN[net.activation].gradient(layer.staircase.input_gradient(steep, weight), value)
            layers.append(steep)
        grad = grad + net.stack[0].staircase.input_gradient(steep, group.weights[0]).view(shape)
        sums = layers[::-1] + sums
    return grad, sums


def weight_gradients(
    run: Run,
    tape: Sequence[Tensor],
    sums: Sequence[Tensor],
    context: Tensor | None,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients at the context and at the parameters, None where not needed."""
    of_context, found, first, place = None, [], 0, 1
    for link, group, (recorded, hidden) in zip(run, grouped(run, parameters), _cut(run, tape), strict=True):
        net, count, point = link.net, len(link.net.layers), recorded.point
        inputs, layers = [point.reshape(-1, net.dim), *hidden], sums[first : first + count]
        triples = zip(net.stack, layers, inputs, needs[place : place + count], strict=True)
        found += [layer.staircase.weight_gradient(grad, x) if need else None for layer, grad, x, need in triples]
        biases = needs[place + count : place + 2 * count]
        found += [grad.sum(0) if need else None for grad, need in zip(layers, biases, strict=True)]
        first, place = first + count, place + 2 * count
        if context is not None:
            at_context = _sum_to(layers[0], point.shape[:-1], context.shape[:-1])
            if needs[0]:
                more = (at_context @ group.projection[0]).view(context.shape)
                of_context = more if of_context is None else of_context + more
            found.append(at_context.t() @ context.reshape(-1, context.shape[-1]) if needs[place] else None)
            place += 1
    return [of_context, *found]


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
    total, tape = z.new_zeros(()), []
    for place in reversed(range(len(run))):
        link = run[place]
        x, numbers, *hidden = knowns[place] if knowns else _search(link, groups[place], z, context)
        recorded = _record(_known_inverse(link.step, x), z, numbers, recording, x)
        tape = [*recorded, *hidden, *tape]
        z, total = recorded.image.detach(), total + recorded.log_det.detach()
    return z, total, tape


def transposed_solve(
    run: Run, tape: Sequence[Tensor], parameters: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradient at the image, and those at the sums of every layer, by the implicit function.

    With ``x_i = f(y_i; c_i(x_{<i}))`` and g the gradient at x, v solves ``v_j = g_j + sum_{i > j} (v_i df_i/dc_i + what
    the log-det adds) dc_i/dx_j``, and the gradient at y is ``v df/dy``: one transposed sweep.
    """
    sums: list[Tensor] = []
    for link, group, (recorded, hidden) in zip(run, grouped(run, parameters), _cut(run, tape), strict=True):
        net, order, ones = link.net, link.order, torch.ones_like(grad)
        backward = _known_inverse(link.step, recorded.point)
        # Element-wise, so the gradient of the sum over all variables has every variable's own slope.
        of_map = _pull(backward, recorded, ones, None)
        of_log_det = _pull(backward, recorded, None, grad_log_det)
        fixed, moved = (
            by_variable(net, each.reshape(-1, net.outputs * net.dim).t(), order)
            .unflatten(0, (net.dim, net.outputs))
            .contiguous()
            for each in (of_log_det[1], of_map[1])
        )
        gradient = KNOWN[net.activation].gradient
        slopes = [gradient(torch.ones_like(value), value).t().contiguous() for value in hidden]
        weights = ranked(net, group, order).weights
        v, *layers = sweep.pull(to_columns(grad, order), fixed, moved, list(weights), slopes, _sizes(net))
        layers[-1] = by_output(net, layers[-1], order)
        sums += [each.t() for each in layers]
        grad = torch.addcmul(of_log_det[0], to_rows(v, order).view(ones.shape), of_map[0])
    return grad, sums


def _pass(net: MADE, z: Tensor, context: Tensor | None, group: Parameters) -> list[Tensor]:
    """The values of every layer, ``(N, width)``; the outputs last."""
    x, y = z.reshape(-1, net.dim), _start(z, context, group)
    found = []
    for layer, weight, bias in zip(net.stack, group.weights, group.biases, strict=True):
        if found:
            x, y = KNOWN[net.activation].run(y), bias.expand(len(y), -1).clone()
        layer.staircase.add_product(y, x, weight)
        found.append(y)
    return found


def _evaluated(run: Run, x: Tensor, context: Tensor | None, groups: Sequence[Parameters]) -> list[tuple[Tensor, ...]]:
    """For each link its point, where the first is known, its numbers and its hidden values."""
    found = []
    for link, group in zip(run, groups, strict=True):
        numbers, *hidden = _evaluate(link.net, x, context, group)
        found.append((x, numbers, *hidden))
        if len(found) < len(run):
            x = link.step._forward(x, numbers)[0]
    return found


def _evaluate(net: MADE, z: Tensor, context: Tensor | None, group: Parameters) -> list[Tensor]:
    """The numbers ``(*batch, outputs * dim)`` and the hidden values."""
    *hidden, outputs = _pass(net, z, context, group)
    return [outputs.view(*z.shape[:-1], outputs.shape[-1]), *hidden]


def _start(z: Tensor, context: Tensor | None, group: Parameters) -> Tensor:
    """The first layer's bias and projected context, projected once however many samples share it, ``(N, width)``."""
    bias, batch = group.biases[0], z.shape[:-1]
    if context is None:
        return bias.expand(batch.numel(), -1).clone()
    y = torch.addmm(bias, context.reshape(-1, context.shape[-1]), group.projection[0].t())
    if context.shape[:-1] == batch:
        return y
    y = y.view(*context.shape[:-1], len(bias)).expand(*batch, -1)
    return y.clone(memory_format=torch.contiguous_format).view(-1, len(bias))


def _start_columns(z: Tensor, context: Tensor | None, group: Parameters) -> Tensor:
    """As `_start`, ``(width, N)``."""
    if context is None or context.shape[:-1] != z.shape[:-1]:
        return _start(z, context, group).t().contiguous()
    return torch.addmm(group.biases[0].unsqueeze(-1), group.projection[0], context.reshape(-1, context.shape[-1]).t())


def _search(link: Link, group: Parameters, z: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """The preimage by a sweep, the numbers there, and the hidden values.

    A sweep sums in another order than a pass, so where sums are of large terms the numbers are those of a pass: with
    them mapping back gives z'. Only here the sizes are read; who may not read them takes the pass.
    """
    net, order, closed = link.net, link.order, link.step.columns()[1]
    weights, biases, projection = ranked(net, group, order)
    start = _start_columns(z, context, Parameters(weights, biases, projection))
    column = _by_step(link.step) if closed is None else closed
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


def _by_step(step: ElementWise) -> Callable[[Tensor, Tensor], Tensor]:
    """The step's own inverse, asked for one variable."""
    return lambda image, numbers: step._inverse(image.unsqueeze(-1), numbers.t(), None)[0].squeeze(-1)


def _large(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """In which rows ``(N,)`` some layer's sums are of large terms, or not finite."""
    pairs = zip(weights, inputs, strict=True)
    squares = [weight.square().sum(1).amax() * x.square().sum(0) for weight, x in pairs]
    return ~torch.stack(squares).amax(0).le(_LARGE**2)


class Recorded(NamedTuple):
    """An element-wise map at its point and numbers, with the graph of what it gave, where that is to be pulled back.

    Of a step's forward that has a closed form of its gradient, the last two are what the step keeps.
    """

    point: Tensor
    """Where the network was evaluated, ``(*batch, dim)``."""
    z: Tensor
    """What was mapped: the point, or for an inverse its image."""
    numbers: Tensor
    """``(*batch, outputs * dim)``"""
    image: Tensor
    log_det: Tensor
    """In the wide dtype; of fewer axes where it is a constant."""


def _record(function: Map, z: Tensor, numbers: Tensor, recording: bool, point: Tensor | None = None) -> Recorded:  # noqa: FBT001
    # A compiler records nothing: it traces the way back from the numbers.
    recording = recording and not torch.compiler.is_compiling()
    with torch.set_grad_enabled(recording):
        inputs = z.detach().requires_grad_(recording), numbers.detach().requires_grad_(recording)
        image, log_det = function(*inputs)
        return Recorded(inputs[0] if point is None else point, *inputs, image, wide(log_det))


def _pull(function: Map, recorded: Recorded, grad: Tensor | None, grad_log_det: Tensor | None) -> Pair:
    """The gradients at z and at the numbers, from those at the image and at the log-det; None for zero."""
    _, z, numbers, image, log_det = recorded
    if torch.compiler.is_compiling():
        return _traced_pull(function, z, numbers, grad, grad_log_det)
    pairs = [(image, grad), (log_det, None if grad_log_det is None else grad_log_det.sum_to_size(log_det.shape))]
    # A shift's log-det, say, is a constant and in no graph.
    pairs = [pair for pair in pairs if pair[0].requires_grad and pair[1] is not None]
    if not pairs:
        return torch.zeros_like(z), torch.zeros_like(numbers)
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs, (z, numbers), grads, retain_graph=True, materialize_grads=True, allow_unused=True
    )
    return found[0], found[1]


def _traced_pull(function: Map, z: Tensor, numbers: Tensor, grad: Tensor | None, grad_log_det: Tensor | None) -> Pair:
    def both(z: Tensor, numbers: Tensor) -> Pair:
        image, log_det = function(z, numbers)
        return image, wide(log_det).expand(z.shape[:-1])

    pull = torch.func.vjp(both, z, numbers)[1]
    like = torch.zeros_like(z)
    return pull((like if grad is None else grad, wide(like[..., 0]) if grad_log_det is None else grad_log_det))


def _known_inverse(step: ElementWise, x: Tensor) -> Map:
    """The step's inverse where the preimage is known."""
    return lambda z, numbers: step._inverse(z, numbers, x)


def _cut(run: Run, tape: Sequence[Tensor]) -> Iterator[tuple[Recorded, Sequence[Tensor]]]:
    """Each link's part of a tape: its recorded step and its hidden values."""
    first, count = 0, len(Recorded._fields)
    for link in run:
        last = first + count + len(link.net.layers) - 1
        yield Recorded(*tape[first : first + count]), tape[first + count : last]
        first = last


def _sum_to(grad: Tensor, batch: Sequence[int], smaller: Sequence[int]) -> Tensor:
    """A gradient ``(N, width)`` over leading axes summed to the fewer, or shorter, ones of a context."""
    if tuple(batch) == tuple(smaller):
        return grad
    width = grad.shape[-1]
    return grad.reshape(*batch, width).sum_to_size(*smaller, width).view(-1, width)


def _sizes(net: MADE) -> list[int]:
    return [size for layer in net.sizes for size in layer]
