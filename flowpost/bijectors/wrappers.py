"""Bijectors made of one other: its inverse, and where its context comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.bijectors._within import OfStep, apply, apply_inverse, wrapped
from flowpost.bijectors.base import Bijector, Interval, Line, check_reads, check_step
from flowpost.masked.run import Column
from flowpost.numerics.arguments import check_int
from flowpost.numerics.watchers import full_precision, remake

_MOST_WEIGHTS = 100_000_000
"""Of a head that nobody has asked for by name: 400 MB, and 1.6 GB while Adam trains it."""


class _Wrapper(Bijector):
    """One step whose context comes from elsewhere; a subclass says from where."""

    triangular = True  # where its step is; of a class with a map of its own not
    domain = cast(Interval, OfStep(lambda outer: outer.step.domain))
    codomain = cast(Interval, OfStep(lambda outer: outer.step.codomain))

    def __init__(self, step: Bijector, context_size: int) -> None:
        check_step("step", step)
        super().__init__(step.dim, context_size)
        self._join(step)
        self.step = step
        self.event_ndim = step.event_ndim
        self.triangular = self.triangular and step.triangular

    @abstractmethod
    def _read(self, context: Tensor | None) -> Tensor | None: ...

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return apply(self.step, z, self._read(context))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return apply_inverse(self.step, z, self._read(context), preimage)

    def _is_triangular(self) -> bool:
        return self.triangular and self.step._is_triangular()

    def causal_order(self) -> Tensor | None:
        """The step's."""
        return self.step.causal_order()

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        remake(self)
        return self.step._push_gaussian(loc, tril, self._read(context))

    def _line(self, context: Tensor | None) -> Line:
        remake(self)
        return self.step._line(self._read(context))


class Learned(_Wrapper):
    """A step without context: its numbers are a parameter, the same for every example.

    Use it where there is no encoder, or for a step that need not depend on x. Cost: the step's.

    Args:
        step: a bijector that reads a context; the parameter starts at ``step.initial_context()``.

    Raises:
        ValueError: if the step reads no context.

    Example:
        >>> flow = Learned(Planar(2))
        >>> flow.context_size
        0
        >>> z, log_det = flow(torch.zeros(5, 2))
    """

    def __init__(self, step: Bijector) -> None:
        super().__init__(step, 0)
        check_reads(step)
        self.elementwise = step.elementwise
        self.context = nn.Parameter(step.initial_context())

    def _read(self, context: Tensor | None) -> Tensor | None:
        return self.context.view((-1,) + (1,) * (self.event_ndim - 1))


class Conditioned(_Wrapper):
    """A step whose context is a linear function of any feature vector: ``context = W features + b``.

    Use it in a model of your own, which hands features to a flow step by step; a `FlowPosterior` has one head for all
    of its steps. Cost: the step's, and one product of the features.

    Args:
        step: a bijector that reads a context.
        features: size of the feature vector, which becomes this step's own ``context_size``.

    Raises:
        ValueError: if the step reads no context.

    Example:
        >>> flow = Conditioned(Planar(2), features=16)
        >>> z, log_det = flow(torch.zeros(5, 2), torch.randn(5, 16))
    """

    def __init__(self, step: Bijector, features: int) -> None:
        super().__init__(step, check_int("features", features, minimum=1))
        self.head = linear_head(features, step)

    def _read(self, context: Tensor | None) -> Tensor | None:
        features = cast(Tensor, context)
        with full_precision(features.device.type):
            return self.head(features)

    def head_scale(self) -> Tensor:
        """Ones: the context is features."""
        return self._like.new_ones(self.context_size)


class Inverse(Bijector):
    """A step run the other way: ``forward`` is its inverse, so MAF is ``Inverse(Autoregressive(...))``.

    Use it where the points to be scored come from elsewhere, and the step's inverse costs more than its forward.
    ``Inverse(Inverse(step))`` is ``step``. Cost: the step's, with the directions swapped.

    Args:
        step: any bijector.

    Example:
        >>> step = Planar(2)
        >>> Inverse(Inverse(step)) is step
        True
    """

    domain = cast(Interval, OfStep(lambda outer: outer.step.codomain))
    codomain = cast(Interval, OfStep(lambda outer: outer.step.domain))

    def __new__(cls, step: Bijector | None = None) -> Bijector:
        """The step itself where `step` is an inverse; None comes from pickle and deepcopy."""
        return step.step if isinstance(step, Inverse) else super().__new__(cls)

    def __init__(self, step: Bijector) -> None:
        check_step("step", step)
        super().__init__(step.dim, step.context_size)
        self._join(step)
        self.step = step
        self.event_ndim = step.event_ndim
        self.elementwise = step.elementwise

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return apply_inverse(self.step, z, context, None)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return apply(self.step, z, context)

    def columns(self) -> tuple[Column | None, Column | None]:
        """The step's, the other way round."""
        there, back = self.step.columns()
        return back, there

    def _fuses(self, *, shared: bool) -> Hashable | None:
        kind = self.step._fuses(shared=True) if shared and not wrapped(self.step) else None
        return None if kind is None else (Inverse, kind)

    def _forward_run(self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inner = _inner(steps)
        return inner[0]._inverse_run(inner, z, context, None)

    def _inverse_run(
        self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None, preimage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inner = _inner(steps)
        return inner[0]._forward_run(inner, z, context)

    def causal_order(self) -> Tensor | None:
        """The step's: an inverse is triangular in the same order."""
        return self.step.causal_order()

    def initial_context(self) -> Tensor:
        """The step's."""
        return self.step.initial_context()

    def head_scale(self) -> Tensor:
        """The step's."""
        return self.step.head_scale()


def _inner(steps: Sequence[Bijector]) -> list[Bijector]:
    """The steps that inverses are of: what they undo, in the order in which it was done."""
    return [cast(Inverse, step).step for step in reversed(steps)]


def linear_head(features: int, step: Bijector) -> nn.Linear:
    """A linear layer from features to the step's context that starts at the step's ``initial_context``, where it is.

    Raises:
        ValueError: if the step reads no context, or so much of it that the layer would have over 100 million weights.
    """
    check_reads(step)
    if (weights := features * step.context_size) > _MOST_WEIGHTS:
        raise ValueError(
            f"features: expected a head of at most {_MOST_WEIGHTS:,} weights, got {weights:,}, from {features:,} "
            f"features to the {step.context_size:,} numbers of a flow of dim={step.dim}; use a flow whose numbers do "
            f"not grow as dim^2 (householder, planar, iaf), a smaller dim, or a head of your own: "
            f"FlowPosterior(features, flow, head)"
        )
    start = step.initial_context()
    head = nn.Linear(features, step.context_size, device=start.device, dtype=start.dtype)
    with torch.no_grad():
        head.bias.copy_(start)
        head.weight.mul_(step.head_scale().unsqueeze(-1))
    return head
