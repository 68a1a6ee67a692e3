"""A `torch.distributions.Transform`, or what makes one of a context, as a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import _InverseTransform

from flowpost.bijectors._fit_for_steps import check_transform, interval_of, only_in, point_in
from flowpost.bijectors.base import Bijector
from flowpost.numerics.constants import Constant
from flowpost.numerics.owners import check_owned, modules_of
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.watchers import first_parameter, full_precision

Maker = Callable[..., Transform]
_OWN = ("_inv", "_cached_x_y")
"""What a transform keeps of what it has seen."""


class TransformStep(Bijector):
    """``z' = t(z)``, t a `Transform`; `Bijector.from_transform` makes it.

    Args:
        transform: a `Transform`, or what makes one of a context.
        dim: size of z.
        context_size: how many numbers per example it reads.
        start: the ``initial_context``.
    """

    def __init__(
        self, transform: Transform | Maker, dim: int, context_size: int = 0, start: Tensor | None = None
    ) -> None:
        super().__init__(dim, context_size, start)
        self.transform = _held(transform, self.context_size)
        if isinstance(transform, nn.Module):
            like = first_parameter(transform)
            self._like = self._like if like is None else like.new_empty(0)
        with torch.no_grad():
            sample = self._make(None if not context_size else self.initial_context().to(self._like), self._like)
            self.domain, self.codomain = interval_of("domain", sample.domain), interval_of("codomain", sample.codomain)
            self.event_dim = check_transform(sample, self._like.new_full((dim,), point_in(self.domain)))

    def head_scale(self) -> Tensor:
        """Ones where a module with parameters reads the context, as features."""
        return super().head_scale() if first_parameter(self) is None else self._like.new_ones(self.context_size)

    def settings(self) -> dict[str, object]:
        """What a file says of the transform beside the tensors, where its numbers are constants."""
        return {"transform": _told(self.transform.kept)} if isinstance(self.transform, _Constants) else {}

    def extra_repr(self) -> str:
        """The sizes, and the transform where it is no module."""
        return super().extra_repr() + ("" if isinstance(self.transform, nn.Module) else f", {self.transform}")

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            z, transform = self._over(z, context), self._make(context, z)
            image, log_det = _image_and_log_det(transform, z)
            return image, only_in(self.domain, z, self._summed(log_det, image))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            z, transform = self._over(z, context), self._make(context, z)
            found = cast(Tensor, transform.inv(z))
            if preimage is not None:  # the value that is known, the gradient of the transform's own inverse
                found = preimage + (found - found.detach())
            log_det = -self._summed(transform.log_abs_det_jacobian(found, z), found)  # z may have fewer axes
            return found, only_in(self.codomain, z, log_det)

    def _over(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Z over the context's batch too: not every transform broadcasts its own numbers."""
        return z if context is None else z.expand(*torch.broadcast_shapes(z.shape[:-1], context.shape[:-1]), -1)

    def _make(self, context: Tensor | None, like: Tensor) -> Transform:
        """The transform at a context, on the device and of the dtype of `like`; nobody else has seen it."""
        if isinstance(self.transform, _Constants):
            return self.transform.on(like)
        made = self.transform  # a module that is one
        if not isinstance(made, Transform):
            made = made() if context is None else made(context)
        if not isinstance(made, Transform):
            raise TypeError(f"transform: expected what makes a Transform, got one that makes a {type(made).__name__}")
        return cast(Transform, _unseen(made))

    def _summed(self, log_det: Tensor, z: Tensor) -> Tensor:
        """The log-det of the vectors, of a transform that may act on each variable by itself."""
        return log_det if self.event_dim else log_det.expand_as(z).sum(-1, dtype=wide_dtype(z))

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> TransformStep:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        if isinstance(self.transform, _Constants):
            self.transform.on(self._like)  # so that no compiled call has to copy it
        return self


class _Constants:
    """A transform whose tensors are constants: it is given on whatever device it is needed, with an empty cache."""

    def __init__(self, transform: Transform) -> None:
        self.kept = _walk(transform, _hold)

    def on(self, like: Tensor) -> Transform:
        return cast(Transform, _walk(self.kept, lambda value: value.on(like)))

    def __repr__(self) -> str:
        return repr(self.kept)


class Inverted(NamedTuple):
    """The inverse of a transform, as it is kept: torch's own loses what it is of when it is copied or pickled."""

    transform: object


def _image_and_log_det(transform: Transform, z: Tensor) -> tuple[Tensor, Tensor]:
    together = getattr(transform, "call_and_ladj", None)
    if together is not None:  # zuko's, whose network then runs once
        return together(z)
    image = cast(Tensor, transform(z))
    return image, transform.log_abs_det_jacobian(z, image)


def _held(transform: object, context_size: int) -> _Constants | nn.Module | Maker:
    """What the step keeps of what it was given."""
    if isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, Transform):
        if context_size:
            raise ValueError(f"context_size: expected 0 for a Transform, which reads no context, got {context_size}")
        return _Constants(transform)
    if isinstance(transform, type) or not callable(transform):
        raise TypeError(f"transform: expected a Transform or what makes one, got {transform!r}")
    if not context_size:
        raise TypeError("transform: expected a Transform or a module that makes one, got a function of no context")
    check_owned("transform", transform, None, "give a module whose forward makes the transform", 4)
    return cast(Maker, transform)


def _walk(value: object, change: Callable[[Any], object]) -> object:
    """A copy of a transform, its parts too, caches empty, with another thing in the place of each tensor."""
    if isinstance(value, (Tensor, Constant)):
        return change(value)
    if isinstance(value, _InverseTransform):
        return Inverted(_walk(value.inv, change))
    if isinstance(value, Inverted):
        return cast(Transform, _walk(value.transform, change)).inv
    if isinstance(value, (list, tuple)):
        return type(value)(_walk(each, change) for each in value)
    if list(modules_of(value)):
        raise ValueError(
            "transform: expected one without modules in it, whose parameters nobody would find; "
            "give a module that makes the transform: from_transform(module, dim)"
        )
    if isinstance(value, Transform):
        new = _fresh(value)
    elif isinstance(value, Distribution):  # whose tensors a transform by its distribution function reads
        new = object.__new__(type(value))
        vars(new).update(vars(value), _validate_args=False)  # which reads values, and fails all rows for one
    else:
        return value
    vars(new).update({name: _walk(each, change) for name, each in vars(new).items()})
    return new


def _told(value: object) -> str:
    """What tells one transform from another, the same in every process: its class and its public attributes."""
    if isinstance(value, Constant):
        return _told_of_numbers(value.value.cpu())
    if isinstance(value, Inverted):
        return f"{_told(value.transform)}.inv"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, (Transform, Distribution)):
        own = value.arg_constraints if isinstance(value, Distribution) else vars(value)  # the first keeps answers too
        public = {name: vars(value).get(name) for name in sorted(own) if not name.startswith("_")}
        return f"{type(value).__name__}({', '.join(f'{name}={_told(each)}' for name, each in public.items())})"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if isinstance(value, (bool, int, str)) else type(value).__name__


def _told_of_numbers(numbers: Tensor) -> str:
    """An order as it is; of numbers, which another machine may round otherwise, their size, in three digits."""
    if not numbers.is_floating_point():
        return str(numbers.tolist())
    weighed = numbers.double().flatten() * torch.arange(1, numbers.numel() + 1, dtype=torch.float64, device="cpu")
    return f"{tuple(numbers.shape)} of {weighed.clamp_min(0).sum():.3g} and {weighed.clamp_max(0).sum():.3g}"


def _fresh(transform: Transform) -> Transform:
    """A shallow copy that has seen no tensor yet."""
    new = object.__new__(type(transform))
    vars(new).update(vars(transform), _inv=None)
    if new._cache_size:
        new._cached_x_y = None, None
    return new


def _unseen(value: object) -> object:
    """A transform as `_fresh` copies it, its parts too: each may have a cache, which notices no change of a tensor."""
    if isinstance(value, _InverseTransform):
        return cast(Transform, _unseen(value.inv)).inv
    if type(value) is list:
        return [_unseen(each) for each in value]
    if type(value) is tuple:
        return tuple(_unseen(each) for each in value)
    if not isinstance(value, Transform):
        return value
    new = _fresh(value)
    vars(new).update({name: _unseen(each) for name, each in vars(value).items() if name not in _OWN})
    return new


def _hold(value: Tensor) -> Constant:
    if value.requires_grad:
        raise ValueError(
            "transform: expected constants, got a tensor that requires grad; "
            "give a module that makes the transform: from_transform(module, dim)"
        )
    return Constant(value)
