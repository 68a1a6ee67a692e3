"""The contract of every bijector: checked once, at the outermost call."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from itertools import takewhile
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.bijectors._interchange import Interchange
from flowpost.bijectors._within import undo
from flowpost.checks import active, check_finite, check_inside, check_residual
from flowpost.masked.run import Column
from flowpost.numerics.arguments import (
    check_context,
    check_int,
    check_like,
    check_tensor,
    check_untraced,
    refuse_shards,
)
from flowpost.numerics.constants import Constant, Placed
from flowpost.numerics.watchers import first_parameter, remake

Interval = tuple[float, float]
"""An open one."""
LINE: Interval = (-math.inf, math.inf)
Line = tuple[Tensor | float, Tensor | float]
"""A shift and a positive factor, each for all variables alike, or ``(*batch, dim)``."""


class Bijector(Placed, Interchange, ABC):
    """An invertible map of z, one for every context: ``(z, context) -> (z', log|det dz'/dz|)``.

    ``forward`` runs from noise to posterior and ``inverse`` back. Both are written here once: they check shapes and
    dtypes, cast the context to z's dtype, and call ``_forward`` and ``_inverse``, which a family writes. A chain calls
    its steps' underscored methods, so a check runs once, at the outermost call.

    A subclass gives ``_forward(z, context)`` and ``_inverse(z, context, preimage)``. Both may return a log-det of wider
    dtype than z (a chain sums in float64) or of fewer leading axes (a constant); z' must have the broadcast batch
    shape. It may override ``initial_context`` and ``head_scale``; where it is ``triangular`` ``_push_gaussian``, or
    ``_line`` if it is ``elementwise`` too. A map of one variable at a time says that it is ``elementwise``. Nothing
    checks that ``_inverse`` inverts ``_forward``: ``flowpost.testing.check_bijector`` does.

    Args:
        dim: size of the last axis of z, at least 1.
        context_size: how many numbers per example the step reads; 0 for none.
        start: the ``initial_context``, ``(context_size,)``, made on the CPU; zeros by default.

    Raises:
        TypeError: if a size is not an int.
        ValueError: if a size is out of range.
    """

    event_ndim = 1
    """How many last axes of z make one event; the channel axis, ``dim`` wide, is the first of them."""
    triangular = False
    """Whether ``z' = loc + L z`` for every context, L lower-triangular with a positive diagonal."""
    domain = LINE
    """The open interval ``(low, high)`` in which every variable of z lies; outside, results are not finite."""
    codomain = LINE
    """The open interval onto which each is mapped, and the domain of the inverse."""
    elementwise = False
    """Whether ``z'_i = f(z_i; c_i)``; where there is a context, it is ``(numbers, dim)`` flattened.

    Variable i reads column i alone, and ``_forward`` and ``_inverse`` of a context take any number of variables, with
    as many columns. So a network may give the numbers of one variable after the other (`Masked`), or those of half of
    them (`Coupling`).
    """

    def __init_subclass__(cls, **options: object) -> None:
        """A class with a map of its own is not ``triangular`` because its parent's is: it says so, or how.

        Raises:
            TypeError: for a ``forward`` or ``inverse`` of its own, which whatever holds the step would pass by.
        """
        super().__init_subclass__(**options)
        mixed_in = takewhile(lambda base: not issubclass(base, Bijector), cls.__mro__[1:])
        own = set(vars(cls)).union(*map(vars, mixed_in))
        for name in {"forward", "inverse"} & own:
            raise TypeError(
                f"{cls.__name__}: expected a _{name} of its own, got a {name}, which checks the arguments and which a "
                f"chain or a posterior does not call; write _forward(z, context) and _inverse(z, context, preimage)"
            )
        if "_forward" in own and not {"triangular", "_line", "_push_gaussian"} & own:
            cls.triangular = False

    def __init__(self, dim: int, context_size: int = 0, start: Tensor | None = None) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.context_size = check_int("context_size", context_size, minimum=0)
        self._start = None if start is None else Constant(start)

    @abstractmethod
    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def forward(self, z: Tensor, context: Tensor | None = None, *, checked: bool = False) -> tuple[Tensor, Tensor]:
        """Map noise towards the posterior.

        Args:
            z: ``(*batch, dim)``, float32 or float64, of the parameters' dtype and device.
            context: ``(*batch, context_size)``; leading axes broadcast against z's. None where ``context_size`` is 0.
            checked: for a chain, which has checked and finishes the log-det itself: nothing is done but ``_forward``.

        Returns:
            ``z'`` and ``log|det dz'/dz|``, of the broadcast batch shape and z's dtype.

        Raises:
            TypeError: for a z or context that is no floating tensor, or a z of another dtype than the parameters.
            ValueError: for a wrong shape or device, a missing context, or one that is not read.
        """
        if checked:
            return self._forward(z, context)
        context = self._check(z, context)
        if active():
            check_inside("z", z, self.domain)
        return self._finish(z, *self._forward(z, context))

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, preimage: Tensor | None = None, checked: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Undo ``forward``; the log-det is that of the inverse map, so ``-log|det dz'/dz|`` at the preimage.

        Args:
            z: the image z', ``(*batch, dim)``.
            context: as in ``forward``.
            preimage: where it is known, ``(*batch, dim)``: no search is run, only the gradient is attached.
            checked: as in ``forward``.

        Returns:
            The preimage and ``log|det dz/dz'|``, of the broadcast batch shape and z's dtype.

        Raises:
            TypeError: as ``forward``.
            ValueError: as ``forward``.
            DomainError: under ``flowpost.checking()``, if z' lies outside the codomain.
            InversionError: under ``flowpost.checking()``, if mapping back does not give z'.
        """
        if checked:
            return self._inverse(z, context, preimage)
        refuse_shards(self)
        remake(self)
        context = self._check(z, context)
        if preimage is not None:
            check_tensor("preimage", preimage, self.dim, self.event_ndim)
            preimage = preimage.detach()
        if active():
            check_inside("z", z, self.codomain)
        found, log_det = self._finish(z, *self._inverse(z, context, preimage))
        if active():
            self._check_inverse(z, context, found, log_det)
        return found, log_det

    def initial_context(self) -> Tensor:
        """The context, ``(context_size,)``, where the step is the identity, if there is one; on the step's device.

        Directions that the identity leaves free are drawn at random when the step is built.
        """
        if self._start is None:
            return self._like.new_zeros(self.context_size)
        return self._start.on(self._like).clone()

    def head_scale(self) -> Tensor:
        """How large a head's rows start, ``(context_size,)``, relative to a linear layer's usual initialization.

        Small where the context is the map's own parameters, so that a fresh posterior hardly depends on x; 1 where it
        is features that a network reads.
        """
        return self._like.new_full((self.context_size,), 0.01)

    def causal_order(self) -> Tensor | None:
        """The variables in an order in which the Jacobian is lower-triangular for every context, where there is one."""
        return torch.arange(self.dim, device=self._like.device) if self.triangular or self.elementwise else None

    def leaves(self) -> Iterator[Bijector]:
        """The steps that this one is made of and that are made of no others; itself, where it is one."""
        parts = [module for module in self.children() if isinstance(module, (Bijector, nn.ModuleList))]
        steps = [step for part in parts for step in (part if isinstance(part, nn.ModuleList) else [part])]
        for step in steps:
            yield from cast(Bijector, step).leaves()
        if not steps:
            yield self

    def _is_triangular(self) -> bool:
        """Whether it is ``triangular`` as it stands: one of the steps within may have been replaced since."""
        return self.triangular

    def columns(self) -> tuple[Column | None, Column | None]:
        """Closed forms of an ``elementwise`` map and of its inverse for one variable, where there are such."""
        return None, None

    def has_pull(self) -> bool:
        """Whether the step has a closed form of its gradient too, as `flowpost.masked.run.Pulling` says."""
        return False

    def layout(self) -> str:
        """Who reads a context and how it is laid out, for messages: ``Planar``, ``Chain(Planar 7, Affine 6)``."""
        return type(self).__name__

    def extra_repr(self) -> str:
        """The sizes, for the module's repr; a family adds what else tells two steps apart."""
        return f"{self.dim}" + (f", context_size={self.context_size}" if self.context_size else "")

    def _fuses(self, *, shared: bool) -> Hashable | None:
        """The kind of run that this step may be part of, if any: neighbours of one kind run as one.

        ``_forward_run`` and ``_inverse_run`` run them. With `shared` they read one and the same context, else each its
        own.
        """
        return None

    def _forward_run(self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``_forward`` of steps that fuse, the first of them this one; their contexts side by side, or the shared."""
        raise NotImplementedError(f"{type(self).__name__} does not fuse")

    def _inverse_run(
        self, steps: Sequence[Bijector], z: Tensor, context: Tensor | None, preimage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``_inverse`` of such steps: unless a family has better, of one after the other."""
        parts = [None] * len(steps) if context is None else context.split([step.context_size for step in steps], -1)
        return undo([([step], part) for step, part in zip(steps, parts, strict=True)], z, preimage)

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Push N(loc, tril tril^T) through a ``triangular`` step; tril None is the identity."""
        if not self.elementwise or type(self)._line is Bijector._line:
            raise NotImplementedError(f"{type(self).__name__} is not a triangular linear map")
        shift, factor = self._line(context)
        factor = factor if isinstance(factor, Tensor) else loc.new_full((self.dim,), factor)
        return shift + factor * loc, torch.diag_embed(factor) if tril is None else factor.unsqueeze(-1) * tril

    def _line(self, context: Tensor | None) -> Line:
        """The numbers of ``z' = shift + factor * z``, of a step that is ``triangular`` and ``elementwise``."""
        zeros = (self._like if context is None else context).new_zeros(self.dim)
        loc, tril = self._push_gaussian(zeros, None, context)
        return loc, 1.0 if tril is None else tril.diagonal(dim1=-2, dim2=-1)

    def _check(self, z: Tensor, context: Tensor | None) -> Tensor | None:
        check_untraced()
        check_tensor("z", z, self.dim, self.event_ndim)
        parameter = first_parameter(self)
        if parameter is not None:
            check_like(z, parameter)
        reader = lambda: f"{self.layout()} of dim {self.dim}"  # noqa: E731
        context = check_context(context, z, self.context_size, self.event_ndim, reader)
        if active():
            check_finite("z", z)
            check_finite("context", context)
        return context

    @torch.no_grad()
    def _check_inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor, log_det: Tensor) -> None:
        steps = sum(isinstance(module, Bijector) for module in self.modules())
        size = (1 + z.abs() + preimage.abs().amax(-1, keepdim=True)) * (self.dim * steps + 16)
        residual = (self._forward(preimage, context)[0] - z).abs()
        check_residual(residual, (64 * torch.finfo(z.dtype).eps * size).expand_as(residual), log_det)

    def _finish(self, z: Tensor, image: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        batch = image.shape[: image.ndim - self.event_ndim]
        return image, log_det.to(z.dtype).expand(batch)


def check_step(name: str, step: object) -> None:
    """Raise unless it is a bijector."""
    if not isinstance(step, Bijector):
        raise TypeError(f"{name}: expected a Bijector, got {type(step).__name__}")


def check_reads(step: Bijector) -> None:
    """Raise unless it reads a context."""
    if not step.context_size:
        raise ValueError(f"step: expected one that reads a context, got {type(step).__name__} with context_size=0")
