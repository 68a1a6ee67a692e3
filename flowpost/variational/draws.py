"""Draws of parameters: one by one, in parts, and in words."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from flowpost.variational.parameters import Values

_SHOWN = 6
"""How many numbers of a parameter a message shows."""


def described(values: Values) -> str:
    """The parameters of one draw, in short."""
    return ", ".join(f"{name} = {short(value)}" for name, value in named(values).items())


def short(value: Tensor) -> str:
    """A tensor's first numbers, to four digits."""
    flat = [f"{number:.4g}" for number in value.detach().flatten()[: _SHOWN + 1].tolist()]
    if not value.ndim:
        return flat[0]
    return f"[{', '.join(flat[:_SHOWN])}{', ...' if len(flat) > _SHOWN else ''}]"


def draws(values: Values) -> Iterator[Values]:
    """One draw after the other, without an axis of draws."""
    if isinstance(values, Tensor):
        yield from values.unbind()
    else:
        for row in zip(*(value.unbind() for value in values.values()), strict=True):
            yield dict(zip(values, row, strict=True))


def parts(values: Values, size: int) -> Iterator[Values]:
    """So many draws after the other, in batches of their own."""
    if isinstance(values, Tensor):
        yield from values.split(size)
    else:
        for part in zip(*(value.split(size) for value in values.values()), strict=True):
            yield dict(zip(values, part, strict=True))


def named(values: Values) -> dict[str, Tensor]:
    """By their names; a bare tensor is theta."""
    return values if isinstance(values, dict) else {"theta": values}
