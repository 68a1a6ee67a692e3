"""Steps in sequence: each with a context of its own, or all with the same."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.bijectors._within import OfStep, Run, run_forward, undo, wrapped
from flowpost.bijectors.base import Bijector, Interval, Line
from flowpost.numerics.products import summed

Pair = tuple[Bijector, Tensor | None]
"""A step and the context that it reads."""


class _Steps(Bijector):
    """Steps applied one after the other; a subclass says what each of them reads."""

    shared: bool
    triangular = True  # where all its steps are; of a class with a map of its own not
    domain = cast(Interval, OfStep(lambda chain: chain.steps[0].domain))
    codomain = cast(Interval, OfStep(lambda chain: chain.steps[-1].codomain))

    def __init__(self, steps: tuple[Bijector, ...], context_size: int) -> None:
        super().__init__(steps[0].dim, context_size)
        self._join(*steps)
        self.steps = nn.ModuleList(steps)
        self.event_ndim = steps[0].event_ndim
        self.triangular = self.triangular and all(step.triangular for step in steps)
        self.elementwise = not context_size and all(step.elementwise for step in steps)

    def __iter__(self) -> Iterator[Bijector]:
        return iter(cast("Iterator[Bijector]", self.steps))

    def _is_triangular(self) -> bool:
        return self.triangular and all(step._is_triangular() for step in self)

    @abstractmethod
    def _runs(self, context: Tensor | None) -> list[Run]:
        """The steps in runs, with what each reads."""

    @abstractmethod
    def _pairs(self, context: Tensor | None) -> list[Pair]:
        """The steps one by one, with what each reads."""

    def _grouped(self) -> list[list[Bijector]]:
        groups: list[list[Bijector]] = []
        last = None
        for step in self:
            kind = None if wrapped(step) else step._fuses(shared=self.shared)
            if kind is not None and kind == last:
                groups[-1].append(step)
            else:
                groups.append([step])
            last = kind
        return groups

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_dets = []
        for run in self._runs(context):
            z, log_det = run_forward(run, z)
            log_dets.append(log_det)
        return z, summed(log_dets)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return undo(self._runs(context), z, preimage)

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for step, part in self._pairs(context):
            loc, tril = step._push_gaussian(loc, tril, part)
        return loc, tril

    def _line(self, context: Tensor | None) -> Line:
        return reduce(_then, [step._line(part) for step, part in self._pairs(context)])


def _then(first: Line, second: Line) -> Line:
    """The line of one map after the other."""
    return second[0] + second[1] * first[0], second[1] * first[1]


def _check_steps(name: str, steps: tuple[Bijector, ...]) -> None:
    if not steps:
        raise ValueError(f"{name}: expected at least one step, got none")
    for step in steps:
        if not isinstance(step, Bijector):
            raise TypeError(f"{name}: expected Bijector steps, got {type(step).__name__}")
    sizes = [step.dim for step in steps]
    if len(set(sizes)) > 1:
        raise ValueError(f"{name}: expected steps of one dim, got {sizes}")
    if len({step.event_ndim for step in steps}) > 1:
        raise ValueError(f"{name}: expected steps of one event_ndim, got {[step.event_ndim for step in steps]}")
    for before, after in pairwise(steps):
        if before.codomain != after.domain:
            raise ValueError(
                f"{name}: expected steps that start where the one before ends, got {type(before).__name__} onto "
                f"{before.codomain} and {type(after).__name__} from {after.domain}"
            )


class Chain(_Steps):
    """Steps in sequence, each with a context of its own: ``z' = f_K(... f_1(z, c_1) ..., c_K)``.

    Use it to make one flow of several steps. The context is the steps' contexts side by side, in list order, which is
    the order applied when sampling. The log-dets add up, in float64 where z is float32. Invertible because every step
    is; the inverse runs the steps backwards. Cost: the sum of the steps'.

    Args:
        *steps: bijectors of one ``dim``, at least one.

    Raises:
        TypeError: for a step that is no Bijector.
        ValueError: for no step, steps of different ``dim``, or one whose codomain is not the domain of the next.

    Example:
        >>> flow = Chain(Affine(2), Planar(2))
        >>> flow.context_size
        9
        >>> z, log_det = flow(torch.zeros(3, 2), torch.zeros(3, 9))
    """

    shared = False

    def __init__(self, *steps: Bijector) -> None:
        _check_steps("Chain", steps)
        super().__init__(steps, sum(step.context_size for step in steps))

    def _runs(self, context: Tensor | None) -> list[Run]:
        groups = self._grouped()
        return list(zip(groups, self._split(context, groups), strict=True))

    def _pairs(self, context: Tensor | None) -> list[Pair]:
        return list(zip(self, self._split(context, [[step] for step in self]), strict=True))

    def _split(self, context: Tensor | None, groups: Sequence[Sequence[Bijector]]) -> list[Tensor | None]:
        sizes = [sum(step.context_size for step in steps) for steps in groups]
        given = 0 if context is None else context.shape[-self.event_ndim]
        if given != sum(sizes):  # one was replaced
            raise ValueError(
                f"steps: expected ones that read {given} numbers in all, as when the chain was made, got {sum(sizes)}; "
                f"make a new chain of these steps, and a head for it"
            )
        if context is None:
            return [None] * len(groups)
        parts = context.split(sizes, dim=-self.event_ndim)
        return [part if size else None for part, size in zip(parts, sizes, strict=True)]

    def initial_context(self) -> Tensor:
        """The steps' initial contexts, side by side."""
        return torch.cat([step.initial_context() for step in self])

    def head_scale(self) -> Tensor:
        """The steps', side by side."""
        return torch.cat([step.head_scale() for step in self])

    def layout(self) -> str:
        """The steps that read a context, with how many numbers each."""
        return f"Chain({', '.join(f'{step.layout()} {step.context_size}' for step in self if step.context_size)})"


class Shared(_Steps):
    """Steps in sequence that read one and the same context c: ``z' = f_K(... f_1(z, c) ..., c)`` (Kingma et al. 2016).

    Use it for steps with networks of their own, which all read the same numbers. Steps that read no context, such as
    permutations, may stand among them. Otherwise as `Chain`.

    Args:
        *steps: bijectors of one ``dim``; those that read a context read equally many numbers.

    Raises:
        TypeError: for a step that is no Bijector.
        ValueError: for no step, steps of different ``dim``, or of different ``context_size`` other than 0.

    Example:
        >>> flow = Shared(Autoregressive(4, context_size=8), Reverse(4), Autoregressive(4, context_size=8))
        >>> flow.context_size
        8
    """

    shared = True

    def __init__(self, *steps: Bijector) -> None:
        _check_steps("Shared", steps)
        sizes = {step.context_size for step in steps} - {0}
        if len(sizes) > 1:
            raise ValueError(f"Shared: expected steps of one context_size, got {sorted(sizes)}")
        super().__init__(steps, max(sizes, default=0))

    def _runs(self, context: Tensor | None) -> list[Run]:
        return [(steps, context if steps[0].context_size else None) for steps in self._grouped()]

    def _pairs(self, context: Tensor | None) -> list[Pair]:
        return [(step, context if step.context_size else None) for step in self]

    def _reader(self) -> Bijector:
        return max(self, key=lambda step: step.context_size)

    def initial_context(self) -> Tensor:
        """That of the first step that reads one."""
        return self._reader().initial_context()

    def head_scale(self) -> Tensor:
        """That of the first step that reads one."""
        return self._reader().head_scale()

    def layout(self) -> str:
        """Its steps share what they read."""
        return f"Shared({self._reader().layout()}, ...)"
