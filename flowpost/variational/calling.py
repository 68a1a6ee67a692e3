"""How a user's log joint takes many draws: all at once, through `torch.func.vmap`, or one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowpost.numerics.alone import ALONE
from flowpost.variational.draws import described, draws, named, parts
from flowpost.variational.parameters import Parameters, Values

LogJoint: TypeAlias = Callable[[Any], Tensor]
Calls: TypeAlias = Literal["vectorised", "vmap", "loop"]
_FEWEST = 7
"""On how many draws a log joint is tried at least."""
REFUSALS = (torch.linalg.LinAlgError, ArithmeticError, AssertionError, ValueError)  # pyright: ignore[reportPrivateImportUsage]
"""What a log joint raises at draws that it has no value for, as at a matrix that is not positive definite."""
_ATOL, _RTOL = 1e-3, {torch.float32: 1e-4, torch.float64: 1e-6}
"""How near two ways of calling agree: what rounding, or a solver of differential equations, leaves between them."""
_SHARED = 100
"""Roundings of a slope: what a number may leave that all draws share and that cancels, as a largest logarithm does."""


class Found(NamedTuple):
    """How a log joint is called, its values ``(S,)`` on the trial's draws, and what stood against vmap."""

    calls: Calls
    values: Tensor
    reason: str


def trial(parameters: Parameters, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Coordinates to try a log joint on, from near 0 outwards, as many as no axis of a parameter has entries."""
    taken = {parameters.dim, *itertools.chain(*parameters.shapes.values())}
    size = next(n for n in itertools.count(_FEWEST) if n not in taken)
    generator = torch.Generator("cpu").manual_seed(0)
    draws = torch.randn(size, parameters.dim, generator=generator, dtype=torch.float64, device="cpu")
    scale = torch.linspace(0.1, 1, size, dtype=torch.float64, device="cpu").unsqueeze(-1)
    return (scale * draws).to(device, dtype)


@contextmanager
def _validating(*, validate: bool) -> Iterator[None]:
    """Within it distributions read values, or unless told to do not: neither vmap nor a CUDA graph can.

    Where they do not, a draw that one would refuse has the value nan, or -inf, and does not end a fit; of some it has
    a finite value, which `beyond` finds.
    """
    with ALONE:  # else of two fits at once one restores what the other has set
        before = Distribution._validate_args
        Distribution.set_default_validate_args(validate)
        try:
            yield
        finally:
            Distribution.set_default_validate_args(before)


@_validating(validate=False)
def call(log_joint: LogJoint, values: Values, calls: Calls) -> Tensor:
    """The log joint ``(S,)`` of S draws of the parameters; its distributions do not validate values.

    A draw at which it raises one of `REFUSALS` has the value nan. Such draws are found by halves.
    """
    try:
        return _called(log_joint, values, calls)
    except REFUSALS:
        size = len(next(iter(named(values).values())))
    if size == 1:
        return math.nan * torch.stack([part.sum() for part in named(values).values()]).sum(0, keepdim=True)
    fewer = 1 if calls == "loop" else -(-size // 2)
    return torch.cat([call(log_joint, part, calls) for part in parts(values, fewer)])


@torch.no_grad()
@_validating(validate=False)
def refusal(log_joint: LogJoint, values: Values, calls: Calls) -> str:
    """What a log joint raises at one draw, in a batch of its own; empty where it has a value."""
    found = _try(lambda given: _called(log_joint, given, calls), values)
    return line(found) if isinstance(found, Exception) else ""


@torch.no_grad()
@_validating(validate=False)
def find(log_joint: LogJoint, parameters: Parameters, free: Tensor) -> Found:
    """How a log joint is called: the first way in which each draw has the value that it has alone.

    Raises:
        TypeError: for values that are no floating tensors.
        ValueError: for values of another shape or device, or that change from call to call.
    """
    values = parameters.constrain(free)[0]
    batch = _try(log_joint, values)
    many = isinstance(batch, REFUSALS) or (isinstance(batch, Tensor) and batch.ndim == 1)
    slices = _slices(log_joint, values) if many else None
    if slices is not None and _same(log_joint, values, "vectorised", batch, slices):
        if not _mixes(log_joint, _kept(values, slices.isfinite())):
            return Found("vectorised", _checked(slices, free), "")
    singles = _singles(log_joint, values, batch)
    mapped = _try(torch.func.vmap(log_joint), values)
    if _same(log_joint, values, "vmap", mapped, singles):
        return Found("vmap", _checked(singles, free), "")
    again = call(log_joint, values, "loop")
    if not agree(again, singles):
        raise ValueError(
            f"log_joint: expected one value for one theta, got {singles[0].item()} and then {again[0].item()} at "
            f"{described(next(draws(values)))}; draw no random numbers in it, "
            f"and change no parameter in place"
        )
    return Found("loop", _checked(singles, free), _got(mapped))


@torch.no_grad()
@_validating(validate=True)
def beyond(log_joint: LogJoint, values: Values, calls: Calls, found: Tensor) -> str:
    """Where a distribution refuses a draw that has a finite value without its validation; empty where none does.

    So is an exponential prior of a parameter that may be negative: its formula goes on beyond its support.
    """
    for one, part, value in zip(draws(values), parts(values, 1), found, strict=True):
        refused = _try(log_joint, part if calls == "vectorised" else one)
        if isinstance(refused, ValueError) and value.isfinite():
            said = line(refused).removesuffix(", but found invalid values:")
            return f"{described(one)}, where a distribution refuses it ({said})"
    return ""


def line(error: BaseException) -> str:
    """The kind of an error, and its first line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _own(values: Values) -> Values:
    """Parameters in a mapping of their own, that a log joint may add to and take from."""
    return values if isinstance(values, Tensor) else dict(values)


def _called(log_joint: LogJoint, values: Values, calls: Calls) -> Tensor:
    if calls == "vectorised":
        return log_joint(_own(values))
    if calls == "vmap":
        return torch.func.vmap(log_joint)(values)
    return torch.stack([log_joint(one) for one in draws(values)])


def _same(log_joint: LogJoint, values: Values, calls: Calls, got: object, alone: Tensor) -> bool:
    """Whether draws have together the values that they have alone; those that are refused are left out."""
    if isinstance(got, REFUSALS):
        kept = ~alone.isnan()
        got, alone = _try(lambda given: _called(log_joint, given, calls), _kept(values, kept)), alone[kept]
    return agree(got, alone)


def _kept(values: Values, kept: Tensor) -> Values:
    return values[kept] if isinstance(values, Tensor) else {name: part[kept] for name, part in values.items()}


@torch.enable_grad()
def _mixes(log_joint: LogJoint, values: Values) -> bool:
    """Whether the value of the last draw has a slope at another one, as where a term is summed over all draws.

    Beside a value of a million such a term passes for rounding, and its slope in a sum over S draws is S times its own.
    """
    leaves = {name: part.detach().clone().requires_grad_() for name, part in named(values).items()}
    got = _try(log_joint, leaves if isinstance(values, dict) else leaves["theta"])
    if not (isinstance(got, Tensor) and got.requires_grad and len(got) > 1):
        return False
    try:
        slopes = torch.autograd.grad(got[-1], list(leaves.values()), allow_unused=True)
    except RuntimeError:  # it has no gradient, which is told elsewhere
        return False
    sizes = [slope.nan_to_num(0.0, 0.0, 0.0).abs() for slope in slopes if slope is not None]
    return any(bool((size[:-1] > _SHARED * torch.finfo(size.dtype).eps * size.max()).any()) for size in sizes)


def _each(log_joint: LogJoint, batches: Iterator[Values]) -> list[object]:
    """What a log joint makes of one draw after the other: nan where it refuses one, if it takes another."""
    found = [_try(log_joint, one) for one in batches]
    taken = next((each for each in found if isinstance(each, Tensor)), None)
    return [math.nan * taken if isinstance(each, REFUSALS) and taken is not None else each for each in found]


def _slices(log_joint: LogJoint, values: Values) -> Tensor | None:
    """What a vectorised log joint makes of each draw in a batch of its own, ``(S,)``; None of one that is not."""
    found = _each(log_joint, parts(values, 1))
    rows = [each for each in found if isinstance(each, Tensor) and tuple(each.shape) == (1,)]
    return torch.cat(rows) if len(rows) == len(found) else None


def _try(function: Callable[[Any], object], values: Values) -> object:
    """The result, or the error: any that a user's function may raise."""
    try:
        return function(_own(values))
    except Exception as error:  # noqa: BLE001
        return error


def agree(one: object, other: object, rtol: float | None = None) -> bool:
    """Whether two ways of calling give the same values, but for rounding; or two calls, within a given `rtol`."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape):
        return False
    if rtol is None:
        rtol = _RTOL[torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32]
    return bool(torch.isclose(one.double(), other.double(), rtol=rtol, atol=_ATOL, equal_nan=True).all())


def _singles(log_joint: LogJoint, values: Values, batch: object) -> Tensor:
    """The log joint of each draw alone, ``(S,)``."""
    found = _each(log_joint, draws(values))
    return torch.stack([_scalar(value, one, batch) for value, one in zip(found, draws(values), strict=True)])


def _scalar(value: object, values: Values, batch: object) -> Tensor:
    """A log joint's value of one draw; else an error that says what came of a batch and of one draw."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    if isinstance(value, Exception) and isinstance(batch, Exception):  # its own fault, and not that of a shape
        both = "" if _got(batch) == _got(value) else f", and {_got(batch)} of many draws at once"
        raise ValueError(
            f"log_joint: expected a value of one draw, got {_got(value)} at {described(values)}{both}"
        ) from value
    kind = TypeError if not isinstance(value, (Tensor, Exception)) else ValueError
    raise kind(
        f"log_joint: expected a tensor (S,) of parameters with a leading axis of S draws, each the value of its draw, "
        f"or a scalar tensor of one draw; got {_got(batch)} and {_got(value)} at {described(values)}; write a sum over "
        f"all axes but the first, as .flatten(1).sum(1)"
    ) from (value if isinstance(value, Exception) else None)


def _got(value: object) -> str:
    if isinstance(value, Exception):
        return line(value)
    if isinstance(value, Tensor):
        return f"other values in shape {tuple(value.shape)}"
    return type(value).__name__


def _checked(values: Tensor, free: Tensor) -> Tensor:
    if not values.is_floating_point():
        raise TypeError(f"log_joint: expected a floating dtype, got {values.dtype}")
    if values.device != free.device:
        raise ValueError(f"log_joint: expected device {free.device} like its parameters, got {values.device}")
    return values
