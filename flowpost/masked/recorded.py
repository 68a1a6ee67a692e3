"""An element-wise step within a node: its values at numbers that a network gave, and its gradients there.

They are in closed form where the step has one, else by autodiff, so a step's formula is written once, in its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.masked.run import ElementWise, Pulling
from flowpost.numerics.products import wide
from flowpost.numerics.watchers import unless_compiled

Pair = tuple[Tensor, Tensor]
Map = Callable[[Tensor, Tensor], Pair]


class Recorded(NamedTuple):
    """An element-wise map at its point and numbers, with the graph of what it gave, where that is to be pulled back.

    Of a step that has a closed form of its gradient, z stands for what is not held: of its forward the numbers, and the
    last two are what the step keeps; of its inverse the last two.
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


def run(step: ElementWise, z: Tensor, numbers: Tensor, *, recording: bool) -> tuple[Tensor, Tensor, Recorded]:
    """A step's image and log-det, and what `pull` needs."""
    if step.has_pull():
        image, log_det, kept = cast(Pulling, step).keep(z, numbers)
        return image, log_det, Recorded(z, z, z, *kept)
    recorded = _record(step._forward, z, z, numbers, recording=recording)
    return recorded.image.detach(), recorded.log_det.detach(), recorded


def pull(step: ElementWise, recorded: Recorded, grad: Tensor, grad_log_det: Tensor) -> Pair:
    """The gradients at z and at the numbers, from those at the image and at the log-det."""
    if step.has_pull():
        return cast(Pulling, step).pull(recorded.z, (recorded.image, recorded.log_det), grad, grad_log_det)
    return _pull(step._forward, recorded, grad, grad_log_det)


def run_inverse(
    step: ElementWise, preimage: Tensor, z: Tensor, numbers: Tensor, *, recording: bool
) -> tuple[Tensor, Tensor, Recorded]:
    """As `run`, of a step's inverse where the preimage is known."""
    if step.has_pull():
        image, log_det = step._inverse(z, numbers, preimage)
        return image, wide(log_det), Recorded(preimage, z, numbers, z, z)
    recorded = _record(_known_inverse(step, preimage), preimage, z, numbers, recording=recording)
    return recorded.image.detach(), recorded.log_det.detach(), recorded


def pull_inverse(step: ElementWise, recorded: Recorded, grad_log_det: Tensor) -> tuple[Pair, Pair]:
    """The slopes of the inverse ``x_i = f^-1(y_i; n_i)`` in y and in the numbers, and what the log-det's gradient adds.

    Where the step has a closed form of its own gradient, it follows by ``dx/dy = 1 / f'``, ``dx/dn = -f_n / f'`` and,
    with the forward's log-det L at x, ``-(L_x dx + L_n dn)``.
    """
    ones = torch.ones_like(recorded.point)
    if not step.has_pull():
        backward = _known_inverse(step, recorded.point)
        return _pull(backward, recorded, ones, None), _pull(backward, recorded, None, grad_log_det)
    x, pulling = recorded.point, cast(Pulling, step)
    kept = pulling.keep(x, recorded.numbers)[2]
    slope, of_numbers = pulling.pull(x, kept, ones, torch.zeros_like(grad_log_det))
    at_x, at_numbers = pulling.pull(x, kept, torch.zeros_like(x), grad_log_det)
    inverse = slope.reciprocal()
    moves = -of_numbers.unflatten(-1, (-1, x.shape[-1])) * inverse.unsqueeze(-2)
    at_numbers = at_numbers + (moves * at_x.unsqueeze(-2)).flatten(-2)
    return (inverse, moves.flatten(-2)), (-at_x * inverse, -at_numbers)


def _known_inverse(step: ElementWise, preimage: Tensor) -> Map:
    return lambda z, numbers: step._inverse(z, numbers, preimage)


def _record(function: Map, point: Tensor, z: Tensor, numbers: Tensor, *, recording: bool) -> Recorded:
    recording = recording and _can_record()
    with torch.set_grad_enabled(recording):
        inputs = z.detach().requires_grad_(recording), numbers.detach().requires_grad_(recording)
        image, log_det = function(*inputs)
        return Recorded(inputs[0] if point is z else point, *inputs, image, wide(log_det))


def _recorded_pull(function: Map, recorded: Recorded, grad: Tensor | None, grad_log_det: Tensor | None) -> Pair:
    """The gradients at z and at the numbers; a gradient that comes as None is zero."""
    point, z, numbers, image, log_det = recorded
    if not image.requires_grad:  # the pass was compiled, which records nothing, and the way back is not
        _, z, numbers, image, log_det = _record(function, point, z, numbers, recording=True)
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


def _traced_pull(function: Map, recorded: Recorded, grad: Tensor | None, grad_log_det: Tensor | None) -> Pair:
    _, z, numbers, *_ = recorded

    def both(z: Tensor, numbers: Tensor) -> Pair:
        image, log_det = function(z, numbers)
        return image, wide(log_det).expand(z.shape[:-1])

    pull = torch.func.vjp(both, z, numbers)[1]
    like = torch.zeros_like(z)
    return pull((like if grad is None else grad, wide(like[..., 0]) if grad_log_det is None else grad_log_det))


# A compiler records nothing: it traces the way back from the numbers.
_can_record = unless_compiled(lambda: True, lambda: False)
_pull = unless_compiled(_recorded_pull, _traced_pull)
