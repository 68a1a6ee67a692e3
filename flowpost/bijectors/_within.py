"""Steps within another: called so that whoever hooked them sees it, and neighbours that fuse as one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from flowpost.numerics.arguments import refuse_shards
from flowpost.numerics.products import summed
from flowpost.numerics.watchers import all_hooked, hooked, remake

if TYPE_CHECKING:
    from flowpost.bijectors.base import Bijector

Run = tuple[Sequence["Bijector"], Tensor | None]
"""Steps that run as one, and what they read: their contexts side by side, or the one that they share."""


class OfStep:
    """An attribute that is of a step within, of that which is there now; one that is set on the outer step wins.

    Args:
        read: from the outer step to the value.
    """

    def __init__(self, read: Callable[[Any], object]) -> None:
        self.read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self.own = f"_own_{name}"

    def __get__(self, step: Bijector | None, owner: type) -> object:
        if step is None:
            return self
        own = vars(step).get(self.own)
        return self.read(step) if own is None else own

    def __set__(self, step: Bijector, value: object) -> None:
        vars(step)[self.own] = value


def apply(step: Bijector, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """``_forward`` of a step within another: through its call where somebody has hooked it, or all modules."""
    return step(z, context, checked=True) if hooked(step) or all_hooked() else step._forward(z, context)


def apply_inverse(step: Bijector, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
    """``_inverse`` of a step within another: through its own ``inverse`` where somebody has put one there."""
    if "inverse" in step.__dict__:
        return step.inverse(z, context, preimage=preimage, checked=True)
    if hooked(step):
        refuse_shards(step)
        remake(step)
    return step._inverse(z, context, preimage)


def wrapped(step: Bijector) -> bool:
    """Whether somebody wants to see the calls of a step: then it does not run as one with others.

    `torch.distributed.fsdp.register_fsdp_forward_method` puts an ``inverse`` on the instance.
    """
    return hooked(step) or "inverse" in step.__dict__


def run_forward(run: Run, z: Tensor) -> tuple[Tensor, Tensor]:
    """``_forward`` of a run within a chain."""
    steps, context = run
    return apply(steps[0], z, context) if len(steps) == 1 else steps[0]._forward_run(steps, z, context)


def undo(runs: Sequence[Run], z: Tensor, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inverse of runs in sequence, the last of them first; the log-dets summed."""
    knowns: list[Tensor | None] = [preimage] + [None] * (len(runs) - 1)
    if preimage is not None:
        with torch.no_grad():
            for place, run in enumerate(runs[:-1]):
                knowns[place + 1] = preimage = run_forward(run, cast(Tensor, preimage))[0]
    log_dets = []
    for (steps, context), known in zip(reversed(runs), reversed(knowns), strict=True):
        if len(steps) == 1:
            z, log_det = apply_inverse(steps[0], z, context, known)
        else:
            z, log_det = steps[0]._inverse_run(steps, z, context, known)
        log_dets.append(log_det)
    return z, summed(log_dets)
