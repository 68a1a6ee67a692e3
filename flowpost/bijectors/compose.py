"""Bijectors made of bijectors: chains, a shared context, the inverse, and where a step's context comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import Bijector, check_int, wide


class _Steps(Bijector):
    """Steps applied one after the other; a subclass says what each of them reads."""

    def __init__(self, steps: tuple[Bijector, ...], context_size: int) -> None:
        super().__init__(steps[0].dim, context_size)
        self.steps = nn.ModuleList(steps)
        self.event_ndim = steps[0].event_ndim
        self.triangular = all(step.triangular for step in steps)
        self.domain, self.codomain = steps[0].domain, steps[-1].codomain

    def __iter__(self) -> Iterator[Bijector]:
        return iter(cast("Iterator[Bijector]", self.steps))

    @abstractmethod
    def _parts(self, context: Tensor | None) -> list[Tensor | None]: ...

    def _pairs(self, context: Tensor | None) -> list[tuple[Bijector, Tensor | None]]:
        return list(zip(self, self._parts(context), strict=True))

    def _runs(self, context: Tensor | None) -> list[tuple[Bijector, int, Tensor | None]]:
        return [(step, 1, part) for step, part in self._pairs(context)]

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_dets = []
        for step, count, part in self._runs(context):
            z, log_det = step._forward(z, part) if count == 1 else step._forward_run(count, z, part)
            log_dets.append(wide(log_det))
        return z, reduce(torch.add, log_dets)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        pairs = self._pairs(context)
        knowns = _preimages(pairs, preimage)
        log_dets = []
        for (step, part), known in zip(reversed(pairs), reversed(knowns), strict=True):
            z, log_det = step._inverse(z, part, known)
            log_dets.append(wide(log_det))
        return z, reduce(torch.add, log_dets)

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for step, part in self._pairs(context):
            loc, tril = step._push_gaussian(loc, tril, part)
        return loc, tril

    def extra_repr(self) -> str:
        """Sizes, for the module's repr."""
        return f"dim={self.dim}, context_size={self.context_size}"


def _preimages(pairs: list[tuple[Bijector, Tensor | None]], preimage: Tensor | None) -> list[Tensor] | list[None]:
    """What each step maps, in order, when the chain's own preimage is known."""
    if preimage is None:
        return [None] * len(pairs)
    knowns = [preimage]
    with torch.no_grad():
        for step, part in pairs[:-1]:
            knowns.append(step._forward(knowns[-1], part)[0])
    return knowns


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

    The context is the steps' contexts side by side, in list order, which is the order applied when sampling. The
    log-dets add up, in float64 where z is float32. Invertible because every step is; the inverse runs the steps
    backwards. Cost: the sum of the steps'.

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

    def __init__(self, *steps: Bijector) -> None:
        _check_steps("Chain", steps)
        super().__init__(steps, sum(step.context_size for step in steps))

    def _parts(self, context: Tensor | None) -> list[Tensor | None]:
        return self._split(context, [step.context_size for step in self])

    def _runs(self, context: Tensor | None) -> list[tuple[Bijector, int, Tensor | None]]:
        runs: list[tuple[Bijector, int]] = []
        for step in self:
            if runs and step.fuses and type(step) is type(runs[-1][0]):
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((step, 1))
        parts = self._split(context, [count * step.context_size for step, count in runs])
        return [(step, count, part) for (step, count), part in zip(runs, parts, strict=True)]

    def _split(self, context: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
        if context is None:
            return [None] * len(sizes)
        parts = context.split(sizes, dim=-self.event_ndim)
        return [part if size else None for part, size in zip(parts, sizes, strict=True)]

    def initial_context(self) -> Tensor:
        """The steps' initial contexts, side by side."""
        return torch.cat([step.initial_context() for step in self])

    def head_scale(self) -> Tensor:
        """The steps' gains, side by side."""
        return torch.cat([step.head_scale() for step in self])


class Shared(_Steps):
    """Steps in sequence that read one and the same context h: ``z' = f_K(... f_1(z, h) ..., h)`` (Kingma et al. 2016).

    Steps that read no context (permutations) may stand among them. Otherwise as `Chain`.

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

    def __init__(self, *steps: Bijector) -> None:
        _check_steps("Shared", steps)
        sizes = {step.context_size for step in steps} - {0}
        if len(sizes) > 1:
            raise ValueError(f"Shared: expected steps of one context_size, got {sorted(sizes)}")
        super().__init__(steps, max(sizes, default=0))

    def _parts(self, context: Tensor | None) -> list[Tensor | None]:
        return [context if step.context_size else None for step in self]

    def _reader(self) -> Bijector:
        return max(self, key=lambda step: step.context_size)

    def initial_context(self) -> Tensor:
        """That of the first step that reads one."""
        return self._reader().initial_context()

    def head_scale(self) -> Tensor:
        """That of the first step that reads one."""
        return self._reader().head_scale()


class _Wrapper(Bijector):
    """One step whose context comes from elsewhere; a subclass says from where."""

    def __init__(self, step: Bijector, context_size: int) -> None:
        if not isinstance(step, Bijector):
            raise TypeError(f"step: expected a Bijector, got {type(step).__name__}")
        super().__init__(step.dim, context_size)
        self.step = step
        self.event_ndim = step.event_ndim
        self.triangular = step.triangular
        self.domain, self.codomain = step.domain, step.codomain

    @abstractmethod
    def _read(self, context: Tensor | None) -> Tensor | None: ...

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step._forward(z, self._read(context))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step._inverse(z, self._read(context), preimage)

    def causal_order(self) -> Tensor | None:
        """The step's."""
        return self.step.causal_order()

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.step._push_gaussian(loc, tril, self._read(context))


class Learned(_Wrapper):
    """A step without context: its numbers are a parameter, the non-amortized version of the step.

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
        _check_reads(step)
        self.context = nn.Parameter(step.initial_context())

    def _read(self, context: Tensor | None) -> Tensor | None:
        return self.context.view((-1,) + (1,) * (self.event_ndim - 1))


class Conditioned(_Wrapper):
    """A step whose context is a linear function of any feature vector: ``context = W features + b``.

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
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)

    def head_scale(self) -> Tensor:
        """Ones: the context is features."""
        return torch.ones(self.context_size)


class Inverse(Bijector):
    """A step run the other way: ``forward`` is its inverse, so MAF is ``Inverse(Autoregressive(...))``.

    ``Inverse(Inverse(step))`` is ``step``. Cost: the step's, with the directions swapped.

    Args:
        step: any bijector.

    Example:
        >>> step = Planar(2)
        >>> Inverse(Inverse(step)) is step
        True
    """

    def __new__(cls, step: Bijector | None = None) -> Bijector:
        """The step itself where `step` is an inverse; None comes from pickle and deepcopy."""
        return step.step if isinstance(step, Inverse) else super().__new__(cls)

    def __init__(self, step: Bijector) -> None:
        if not isinstance(step, Bijector):
            raise TypeError(f"step: expected a Bijector, got {type(step).__name__}")
        super().__init__(step.dim, step.context_size)
        self.step = step
        self.event_ndim = step.event_ndim
        self.elementwise = step.elementwise
        self.domain, self.codomain = step.codomain, step.domain

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step._inverse(z, context, None)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step._forward(z, context)

    def causal_order(self) -> Tensor | None:
        """The step's: an inverse is triangular in the same order."""
        return self.step.causal_order()

    def initial_context(self) -> Tensor:
        """The step's."""
        return self.step.initial_context()

    def head_scale(self) -> Tensor:
        """The step's."""
        return self.step.head_scale()


def linear_head(features: int, step: Bijector) -> nn.Linear:
    """A linear layer from features to the step's context that starts at the step's ``initial_context``."""
    _check_reads(step)
    head = nn.Linear(features, step.context_size)
    with torch.no_grad():
        head.bias.copy_(step.initial_context())
        head.weight.mul_(step.head_scale().unsqueeze(-1))
    return head


def _check_reads(step: Bijector) -> None:
    if not step.context_size:
        raise ValueError(f"step: expected one that reads a context, got {type(step).__name__} with context_size=0")
