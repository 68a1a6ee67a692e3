"""The two nodes of the autograd graph, a run's pass and its inverse; where an engine cannot stand in, plain operations.

A run at the usual sizes is bound by the number of recorded operations; one node with a backward of its own costs a
third of them. A compiler traces both of a node's passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flowpost.masked import engine, plain
from flowpost.masked.run import Run, Saved, broadcast, flat
from flowpost.numerics.replayed import replay, replays
from flowpost.numerics.watchers import unless_compiled

Ctx = Any  # of an autograd function: torch types it without what it stores


def forward(run: Run, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The image of z under a run, and the log-det."""
    if engine.choose(run, z) is None:
        return plain.forward(run, z, context)
    (z,) = broadcast(context, z)
    inputs = _apart(z, context, *flat(run))
    return cast("tuple[Tensor, Tensor]", _Pass.apply(run, torch.is_grad_enabled(), *inputs))


def inverse(run: Run, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
    """The preimage of z under a run, and the log-det of the inverse."""
    if engine.choose_inverse(run, z) is None:
        return plain.inverse(run, z, context, preimage)
    z, *others = broadcast(context, z) if preimage is None else broadcast(context, z, preimage)
    known = others[0] if others else None
    inputs = _apart(known, z, context, *flat(run))
    return cast("tuple[Tensor, Tensor]", _Solve.apply(run, torch.is_grad_enabled(), *inputs))


def _viewed(*inputs: Tensor | None) -> Sequence[Tensor | None]:
    """In place of one that came before, a view of it."""
    found: list[Tensor | None] = []
    for each in inputs:
        came = each is not None and any(each is one for one in found)
        found.append(cast(Tensor, each).view_as(cast(Tensor, each)) if came else each)
    return found


# A compiler leaves its graph where a node takes a tensor twice.
_apart = unless_compiled(lambda *inputs: inputs, _viewed)
# A compiler, that of torch 2.11, loses the gradient of an output that some operation before gave already, as that of a
# cast to its own dtype is.
_own = unless_compiled(lambda log_det: log_det, Tensor.clone)
# So that an engine can free on its way back what it no longer needs.
_let_go = unless_compiled(lambda ctx: ctx.maybe_clear_saved_tensors(), lambda ctx: None)


class _Pass(torch.autograd.Function):
    """A run's pass; z has the broadcast leading axes, and the parameters come as `flat` gives them."""

    @staticmethod
    def forward(
        ctx: Ctx,
        run: Run,
        recording: bool,  # noqa: FBT001
        z: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        image, log_det, tape = engine.engine_on(z).values(run, z, context, parameters, recording=recording)
        ctx.run = run
        ctx.save_for_backward(z, context, *parameters, *tape)
        return image, _whole(log_det, z)

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run, needs = ctx.run, ctx.needs_input_grad[2:]
        z, context, *rest = ctx.saved_tensors
        parameters, tape = rest[: len(needs) - 2], list(rest[len(needs) - 2 :])
        if replays(*grads):

            def forward(z: Tensor, context: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
                return _outputs(z, *plain.forward(run, z, context, parameters), like=grads[1])

            return None, None, *replay(forward, (z, context, *parameters), needs, grads)
        _let_go(ctx)
        del rest
        saved = Saved(run, tape, context, parameters, needs)
        with engine.precisely(z):
            return None, None, *engine.engine_on(z).gradients(saved, *grads)


class _Solve(torch.autograd.Function):
    """A run's inverse; its gradient is that of the implicit function."""

    @staticmethod
    def forward(
        ctx: Ctx,
        run: Run,
        recording: bool,  # noqa: FBT001
        preimage: Tensor | None,
        z: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        found, log_det, tape = engine.engine_on(z).solve(run, z, context, parameters, preimage, recording=recording)
        ctx.run = run
        ctx.save_for_backward(preimage, z, context, *parameters, *tape)
        return found, _whole(log_det, z)

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run, needs = ctx.run, ctx.needs_input_grad[3:]
        preimage, z, context, *rest = ctx.saved_tensors
        parameters, tape = rest[: len(needs) - 2], list(rest[len(needs) - 2 :])
        if replays(*grads):

            def inverse(z: Tensor, context: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
                return _outputs(z, *plain.inverse(run, z, context, preimage, parameters), like=grads[1])

            return None, None, None, *replay(inverse, (z, context, *parameters), needs, grads)
        _let_go(ctx)
        del rest
        saved = Saved(run, tape, context, parameters, needs)
        with engine.precisely(z):
            return None, None, None, *engine.engine_on(z).solve_gradients(saved, *grads)


def _whole(log_det: Tensor, z: Tensor) -> Tensor:
    """A log-det for each point, also where it is a constant."""
    return _own(log_det) if log_det.shape == z.shape[:-1] else log_det.expand(z.shape[:-1]).clone()


def _outputs(z: Tensor, image: Tensor, log_det: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """A node's outputs, by plain operations."""
    return image, _whole(log_det, z).to(like.dtype)
