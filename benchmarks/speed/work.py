"""Equal work, asserted: whoever does less than a step's work, or more, is not timed, and the reason is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.flows import Flow, features, training_loss
from benchmarks.speed.sizes import Size

Loss = Callable[[Tensor, Tensor], Tensor]


class UnequalWork(Exception):
    """A contestant does not do the work that is timed; the message says what differs."""


def check_training(flow: Flow, loss: Loss = training_loss) -> None:
    """Raise unless `flow` is a chain of the size's networks, and a step gives every gradient from both outputs."""
    _check_weights(flow)
    _check_activations(flow)
    device = next(flow.parameters()).device
    with FlopCounterMode(display=False) as counter:  # it hooks itself to the features, where torch 2.5 cannot have it
        flow.sample(features(flow.size, device))
    h = features(flow.size, device)
    z, log_q = flow.sample(h)
    _check_shapes(flow, z, log_q)
    _check_products(flow, counter.get_total_flops())
    _check_outputs(flow, loss, z, log_q)
    _check_gradients(flow, loss(z, log_q), {"h": h, **dict(flow.named_parameters())})


def check_scoring(flow: Flow) -> None:
    """Raise unless `log_prob` of a z that `flow` drew is the log q it came with, and its gradients are complete."""
    h = features(flow.size, next(flow.parameters()).device)
    z, drawn = flow.sample(h)
    z = z.detach().clone().requires_grad_()  # a copy, which no cache knows
    log_q = flow.log_prob(z, h)
    if not torch.allclose(log_q, drawn, rtol=1e-3, atol=1e-3):
        worst = (log_q - drawn).abs().max().item()
        raise UnequalWork(f"{flow.name}: log q of its own samples: expected what came with them, off by {worst}")
    _check_gradients(flow, log_q.sum(), {"z": z, "h": h, **dict(flow.named_parameters())})


def check_same(name: str, found: Iterable[Tensor], wanted: Iterable[Tensor], bound: float = 1e-3) -> None:
    """Raise unless both are the same numbers."""
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=bound, atol=bound):
            raise UnequalWork(f"{name}: expected the same numbers as flowpost's")


def weight_shapes(size: Size, *, joined: bool) -> Counter[tuple[int, ...]]:
    """The matrices of all steps; z's and h's first ones may be `joined` into one."""
    widths = [size.dim + size.context] if joined else [size.dim, size.context]
    first = [(size.hidden, width) for width in widths]
    return Counter((*first, (size.hidden, size.hidden), (2 * size.dim, size.hidden)) * size.steps)


def _check_weights(flow: Flow) -> None:
    found = Counter(tuple(p.shape) for p in flow.parameters() if p.ndim == 2)
    if found not in [weight_shapes(flow.size, joined=joined) for joined in (False, True)]:
        wanted = f"{dict(weight_shapes(flow.size, joined=False))}, or the first two joined"
        raise UnequalWork(f"{flow.name}: weight matrices: expected {wanted}, got {dict(found)}")


def _check_activations(flow: Flow) -> None:
    found = list(flow.activations())
    if len(found) != 2 * flow.size.steps or not all(f is F.relu or isinstance(f, nn.ReLU) for f in found):
        raise UnequalWork(f"{flow.name}: activations: expected {2 * flow.size.steps} ReLUs, got {found}")


def _check_shapes(flow: Flow, z: Tensor, log_q: Tensor) -> None:
    size = flow.size
    rows = (size.samples, size.batch) if size.samples > 1 else (size.batch,)
    if (*z.shape,) != (*rows, size.dim) or (*log_q.shape,) != rows or z.dtype != torch.float32:
        found = f"{tuple(z.shape)}, {tuple(log_q.shape)}, {z.dtype}"
        raise UnequalWork(f"{flow.name}: z and log q: expected {(*rows, size.dim)}, {rows}, float32, got {found}")


def _check_products(flow: Flow, operations: int) -> None:
    """Two operations for each weight and row; h's weights may be applied once an example or once a sample."""
    size = flow.size
    of_h = size.steps * size.hidden * size.context
    low = 2 * ((size.weights - of_h) * size.rows + of_h * size.batch)
    high = 2 * size.weights * size.rows
    if operations > high or (operations < low and not flow.skips_zeros):
        raise UnequalWork(f"{flow.name}: operations of a forward pass: expected {low} to {high}, got {operations}")


def _check_outputs(flow: Flow, loss: Loss, z: Tensor, log_q: Tensor) -> None:
    both = [output.detach().requires_grad_() for output in (z, log_q)]
    gradients = torch.autograd.grad(loss(*both), both, allow_unused=True)
    for name, gradient in zip(("z", "log q"), gradients, strict=True):
        if gradient is None or not gradient.any():
            raise UnequalWork(f"{flow.name}: the loss does not use {name}")


def _check_gradients(flow: Flow, loss: Tensor, leaves: dict[str, Tensor]) -> None:
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is None or not gradient.any() or not gradient.isfinite().all():
            raise UnequalWork(f"{flow.name}: {name} got no gradient, or one that is zero or not finite")
