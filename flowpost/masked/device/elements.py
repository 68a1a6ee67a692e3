"""An element-wise step within the device's engine: by a fused kernel where there is one, else by its own operations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flowpost.masked import recorded
from flowpost.masked.device import fused
from flowpost.masked.recorded import Pair, Recorded
from flowpost.masked.run import ElementWise, as_dtype
from flowpost.numerics.products import plus

Mapped = tuple[Tensor, Tensor, list[Tensor]]
"""What was mapped, the log-det so far, and what the way back needs: first of all where the network was evaluated."""


def kept_tensors(step: ElementWise, z: Tensor) -> int:
    """How many tensors the way back needs."""
    return len(Recorded._fields) if fused.closed(step, z) is None else 2


def run(step: ElementWise, z: Tensor, numbers: Tensor, total: Tensor | None, *, recording: bool) -> Mapped:
    """A step's image, its log-det added to what came before, and what `pull` needs."""
    column = fused.closed(step, z)
    if column is not None:
        return *fused.element(z, numbers, total, column, inverse=False), [z, numbers]
    image, log_det, kept = recorded.run(step, z, as_dtype(numbers, z.dtype), recording=recording)
    return image, plus(total, log_det), list(kept)


def pull(step: ElementWise, kept: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor) -> Pair:
    """The gradients at z and at the numbers."""
    column = fused.closed(step, grad)
    if column is not None:
        return fused.element_pull(kept[0], kept[1], grad, grad_log_det, column)
    return recorded.pull(step, Recorded(*kept), grad, grad_log_det)


def run_inverse(
    step: ElementWise, x: Tensor, z: Tensor, numbers: Tensor, total: Tensor | None, *, recording: bool
) -> Mapped:
    """As `run`, of the step's inverse at z, whose preimage x is known."""
    column = fused.closed(step, z)
    if column is not None:
        return *fused.element(z, numbers, total, column, inverse=True), [x, numbers]
    found, log_det, kept = recorded.run_inverse(step, x, z, as_dtype(numbers, z.dtype), recording=recording)
    return found, plus(total, log_det), list(kept)


def pull_inverse(
    step: ElementWise, kept: Sequence[Tensor], grad_log_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of the inverse ``x = f^-1(y; n)``: dx/dy, dx/dn, and what the log-det adds at n and, where it may, at y."""
    column = fused.closed(step, kept[0])
    if column is not None:
        return *fused.element_slopes(kept[0], kept[1], grad_log_det, column), None
    of_map, of_log_det = recorded.pull_inverse(step, Recorded(*kept), grad_log_det)
    return *of_map, of_log_det[1], of_log_det[0]
