"""The engine for a GPU, of torch's operations and, where Triton is, of fused kernels: few calls, and no host read.

Every call is launched whatever the numbers are, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.masked.activations import KNOWN
from flowpost.masked.device import elements, full, fused, loops
from flowpost.masked.run import Link, Parameters, Run, Saved, by_step, grouped, rows, taken
from flowpost.numerics.watchers import autocast_dtype, full_precision

_Back = tuple[Tensor, full.Pulled]
"""The gradient before a link, and the link's own."""
_Known = tuple[Tensor, Tensor, list[Tensor]]
"""A link's point, the numbers there, and the hidden values."""


class _Taped(NamedTuple):
    """A link as the way back finds it."""

    link: Link
    place: int
    kept: Sequence[Tensor]
    """What its step kept."""
    hidden: Sequence[Tensor]
    need: Parameters
    """Which parameters need a gradient."""


def values(
    run: Run, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor], *, recording: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The image, the log-det, and for the way back what each link's step keeps and hidden values ``(N, width)``."""
    dtype = autocast_dtype(z)
    with full_precision(z.device.type):
        groups = full.masked(run, grouped(run, parameters), dtype)
        total, tape = None, []
        for link, group, start in zip(run, groups, full.starts(context, groups), strict=True):
            numbers, hidden = full.evaluate(link.net, z, start, group)
            z, total, kept = elements.run(link.step, z, numbers, total, recording=recording)
            tape += [*kept, *hidden] if recording else []
        return z, cast(Tensor, total), tape


def gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
    """The gradients at z, at the context and at the parameters."""
    dtype, groups, needs = _products_dtype(saved.tape), *saved.groups()
    links, masked = _links(saved, needs)[::-1], _masked(saved.run, groups, dtype)
    grad, found = _through(links, _link_gradients, masked, grad, grad_log_det)
    return [grad, *full.parameter_gradients(saved, found[::-1], groups, needs, grad.shape[:-1])]


def _link_gradients(taped: _Taped, group: Parameters, grad: Tensor, grad_log_det: Tensor) -> _Back:
    link, _, kept, hidden, need = taped
    grad, of_numbers = elements.pull(link.step, kept, grad, grad_log_det)
    steps = full.sums(link.net, rows(of_numbers), hidden, group.weights)
    pulled = full.pull(kept[0], hidden, steps, need)
    return full.add_product(grad, pulled.first, group.weights[0]), pulled


def solve(
    run: Run,
    z: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    preimage: Tensor | None,
    *,
    recording: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The preimage, the log-det, and a tape as that of `values`, of each link's inverse.

    A sweep finds a link's preimage. The numbers there are a pass's, which sums in another order: with them mapping back
    gives z'. Under autocast a search is in full precision, and numbers at a known preimage are those of its pass.
    """
    dtype = None if preimage is None else autocast_dtype(z)
    with full_precision(z.device.type):
        groups = full.masked(run, grouped(run, parameters), dtype)
        starts = full.starts(context, groups)
        points = [] if preimage is None else _points(run, preimage, groups, starts)
        total, tape = None, []
        for place in reversed(range(len(run))):
            link, group, start = run[place], groups[place], starts[place]
            if points:
                x, numbers, hidden = points[place]
            else:
                x = _search(link, z, start, group)
                numbers, hidden = full.evaluate(link.net, x, start, group)
            z, total, kept = elements.run_inverse(link.step, x, z, numbers, total, recording=recording)
            tape = [*kept, *hidden, *tape] if recording else []
        return z, cast(Tensor, total), tape


def solve_gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
    """As `gradients`, by the implicit function; see `host.solve_gradients`."""
    groups, needs = saved.groups()
    links, masked = _links(saved, needs), _masked(saved.run, groups, None)
    grad, found = _through(links, _link_solve_gradients, masked, grad, grad_log_det)
    return [grad, *full.parameter_gradients(saved, found, groups, needs, grad.shape[:-1])]


def _link_solve_gradients(taped: _Taped, group: Parameters, grad: Tensor, grad_log_det: Tensor) -> _Back:
    link, _, kept, hidden, need = taped
    slope, moved, fixed, added = elements.pull_inverse(link.step, kept, grad_log_det)
    v, *sums = _pull(link, rows(grad), rows(fixed), rows(moved), hidden, group)
    v = v.view(grad.shape)
    grad = v * slope if added is None else torch.addcmul(added, v, slope)
    return grad, full.pull(kept[0], hidden, ((each, None) for each in sums), need)


def _points(run: Run, x: Tensor, groups: Sequence[Parameters], starts: Sequence[Tensor]) -> list[_Known]:
    """What is known of each link where the run's own preimage x is."""
    found: list[_Known] = []
    for link, group, start in zip(run, groups, starts, strict=True):
        found.append((x, *full.evaluate(link.net, x, start, group)))
        if len(found) < len(run):
            x = elements.run(link.step, *found[-1][:2], None, recording=False)[0]
    return found


def _products_dtype(tape: Sequence[Tensor]) -> torch.dtype | None:
    """The half precision in which a pass ran its products, if it did."""
    return next((each.dtype for each in tape if each.dtype in (torch.float16, torch.bfloat16)), None)


def _through(
    links: list[_Taped],
    pull: Callable[[_Taped, Parameters, Tensor, Tensor], _Back],
    masked: Callable[[int], Parameters],
    grad: Tensor,
    grad_log_det: Tensor,
) -> tuple[Tensor, list[full.Pulled]]:
    """The gradient beyond the links, and each link's, whose masked weights nobody holds afterwards."""
    found = []
    for taped in taken(links):
        grad, pulled = pull(taped, masked(taped.place), grad, grad_log_det)
        found.append(pulled)
    return grad, found


def _links(saved: Saved, needs: Sequence[Parameters]) -> list[_Taped]:
    """Each link with what its step kept, its hidden values, and which parameters need a gradient."""
    found, first = [], 0
    for link, need in zip(saved.run, needs, strict=True):
        middle = first + elements.kept_tensors(link.step, saved.parameters[0])
        last = middle + len(need.weights) - 1
        found.append(_Taped(link, len(found), saved.tape[first:middle], saved.tape[middle:last], need))
        first = last
    saved.tape.clear()
    return found


def _masked(run: Run, groups: list[Parameters], dtype: torch.dtype | None) -> Callable[[int], Parameters]:
    """From a link's place to its parameters, the weights masked again: all by one call, or each where they are large.

    The gradients of all weights take as much memory as the weights, and the masked ones of one link are to be all else.
    """
    if full.are_small(weight for group in groups for weight in group.weights):
        return full.masked(run, groups, dtype).__getitem__
    return lambda place: full.masked(run[place : place + 1], groups[place : place + 1], dtype)[0]


def _search(link: Link, z: Tensor, start: Tensor, group: Parameters) -> Tensor:
    """The preimage of z ``(*batch, dim)``."""
    column, name = link.step.columns()[1], KNOWN[link.net.activation].name
    starts = rows(start.expand(*z.shape[:-1], start.shape[-1]))
    inputs = rows(z), starts, group.weights, group.biases[1:]
    if column is None:
        return loops.solve(*inputs, _order(link, z)[1], name, by_step(link.step)).view(z.shape)
    return fused.sweep(*inputs, *_order(link, z), name, column).view(z.shape)


def _pull(
    link: Link, grad: Tensor, fixed: Tensor, moved: Tensor, hidden: Sequence[Tensor], group: Parameters
) -> list[Tensor]:
    name = KNOWN[link.net.activation].name
    return fused.transposed_sweep(grad, fixed, moved, group.weights, hidden, *_order(link, grad), name)


def _order(link: Link, like: Tensor) -> tuple[Tensor | None, Sequence[int]]:
    """The order of the variables as an index, None as they come, and as ints."""
    if link.order is None:
        return None, range(link.net.dim)
    return link.order.on(like)[0], link.order.order
