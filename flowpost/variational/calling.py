"""How a user's log joint takes many draws: all at once, through `torch.func.vmap`, or one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowpost.variational.parameters import Parameters, Values

LogJoint: TypeAlias = Callable[[Any], Tensor]
Calls: TypeAlias = Literal["vectorised", "vmap", "loop"]
_FEWEST, _SHOWN = 7, 6
"""On how many draws a log joint is tried at least, and how many numbers of a parameter a message shows."""
_ATOL, _RTOL = 1e-3, {torch.float32: 1e-4, torch.float64: 1e-6}
"""How near two ways of calling agree: what rounding, or a solver of differential equations, leaves between them."""


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
    before = Distribution._validate_args
    Distribution.set_default_validate_args(validate)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@_validating(validate=False)
def call(log_joint: LogJoint, values: Values, calls: Calls) -> Tensor:
    """The log joint ``(S,)`` of S draws of the parameters; its distributions do not validate values."""
    if calls == "vectorised":
        return log_joint(_own(values))
    if calls == "vmap":
        return torch.func.vmap(log_joint)(values)
    return torch.stack([log_joint(one) for one in _draws(values)])


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
    if isinstance(batch, Tensor) and batch.ndim == 1 and agree(batch, _slices(log_joint, values)):
        return Found("vectorised", _checked(batch, free), "")
    singles = torch.stack([_single(log_joint, one, batch) for one in _draws(values)])
    mapped = _try(torch.func.vmap(log_joint), values)
    if agree(mapped, singles):
        return Found("vmap", _checked(singles, free), "")
    again = call(log_joint, values, "loop")
    if not agree(again, singles):
        raise ValueError(
            f"log_joint: expected one value for one theta, got {singles[0].item()} and then {again[0].item()} at "
            f"{described(next(_draws(values)))}; draw no random numbers in it"
        )
    return Found("loop", _checked(singles, free), _got(mapped))


@torch.no_grad()
@_validating(validate=True)
def beyond(log_joint: LogJoint, values: Values, calls: Calls, found: Tensor) -> str:
    """Where a distribution refuses a draw that has a finite value without its validation; empty where none does.

    So is an exponential prior of a parameter that may be negative: its formula goes on beyond its support.
    """
    for one, part, value in zip(_draws(values), _parts(values), found, strict=True):
        refused = _try(log_joint, part if calls == "vectorised" else one)
        if isinstance(refused, ValueError) and value.isfinite():
            said = line(refused).removesuffix(", but found invalid values:")
            return f"{described(one)}, where a distribution refuses it ({said})"
    return ""


def described(values: Values) -> str:
    """The parameters of one draw, in short."""
    parts = values if isinstance(values, dict) else {"theta": values}
    return ", ".join(f"{name} = {short(value)}" for name, value in parts.items())


def short(value: Tensor) -> str:
    """A tensor's first numbers, to four digits."""
    flat = [f"{number:.4g}" for number in value.detach().flatten()[: _SHOWN + 1].tolist()]
    if not value.ndim:
        return flat[0]
    return f"[{', '.join(flat[:_SHOWN])}{', ...' if len(flat) > _SHOWN else ''}]"


def line(error: BaseException) -> str:
    """The kind of an error, and its first line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _draws(values: Values) -> Iterator[Values]:
    """One draw after the other, without an axis of draws."""
    if isinstance(values, Tensor):
        yield from values.unbind()
    else:
        for row in zip(*(value.unbind() for value in values.values()), strict=True):
            yield dict(zip(values, row, strict=True))


def _parts(values: Values) -> Iterator[Values]:
    """One draw after the other, each a batch of its own."""
    size = len(values if isinstance(values, Tensor) else next(iter(values.values())))
    for i in range(size):
        yield values[i : i + 1] if isinstance(values, Tensor) else {k: v[i : i + 1] for k, v in values.items()}


def _own(values: Values) -> Values:
    """Parameters in a mapping of their own, that a log joint may add to and take from."""
    return values if isinstance(values, Tensor) else dict(values)


def _slices(log_joint: LogJoint, values: Values) -> object:
    """What a vectorised log joint makes of each draw in a batch of its own, ``(S,)``; else what it did instead."""
    found = []
    for part in _parts(values):
        found.append(_try(log_joint, part))
        if not (isinstance(found[-1], Tensor) and tuple(found[-1].shape) == (1,)):
            return found[-1]
    return torch.cat(found)


def _try(function: Callable[[Any], object], values: Values) -> object:
    """The result, or the error: any that a user's function may raise."""
    try:
        return function(_own(values))
    except Exception as error:  # noqa: BLE001
        return error


def agree(one: object, other: object) -> bool:
    """Whether two ways of calling, or two calls, give the same values, but for rounding."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape):
        return False
    rtol = _RTOL[torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32]
    return bool(torch.isclose(one.double(), other.double(), rtol=rtol, atol=_ATOL, equal_nan=True).all())


def _single(log_joint: LogJoint, values: Values, batch: object) -> Tensor:
    """The log joint of one draw, a scalar; else an error that says what came of a batch and of one draw."""
    value = _try(log_joint, values)
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
