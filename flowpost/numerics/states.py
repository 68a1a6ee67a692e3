"""What a saved state says of a module's constants: whether it is of the same map, and with which numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowpost.numerics.arguments import check_positive

_CONSTANT = ".constant_"
"""In the name of a buffer that no call reads: a state without it is of before the constant was."""
_CURES = {
    "constant_centred": ("centred=False", "centred=True"),
    "constant_rate": ("rate=1.0", "the rate that it names"),
    "output_rate": ("rate=1.0", "the rate that it names"),
    "constant_gain": ("gain=1.0", "the gain that it names"),
    "constant_relu": ('activation="elu"', 'activation="relu"'),
    "constant_turned": ('flow="diagonal", which reflections of noise are', 'flow="householder"'),
}
"""By the constant's name: what makes a module for the states without it, and for those with it."""


def keep_constants(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    marks: Mapping[str, object],
    _strict: bool,  # noqa: FBT001 (torch's own signature)
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Before a load: take parameters alone as the module's own, and refuse a whole state of another map.

    Parameters alone, ``dict(module.named_parameters())``, say nothing about a module's constants. A buffer
    ``constant_...`` that a state lacks means that the state is older than the constant. Orders, which every whole state
    has, tell an old state from parameters alone, and so do torch's version marks; where there is neither, nothing does.
    A whole state that lacks a constant, or has one more, is refused also where ``strict=False`` lets names differ.
    """
    with torch.no_grad():
        own = {prefix + name: value for name, value in module.state_dict().items()}
    constants = {name for name in own if _CONSTANT in name}
    parameters = {prefix + name for name, _ in module.named_parameters(remove_duplicate=False)}
    others = own.keys() - constants - parameters
    if others and not others & state.keys():
        state.update({name: own[name] for name in constants - state.keys()})
    if not parameters or not parameters <= state.keys():
        return  # a part of one, or of another module
    whole, marked = bool(others & state.keys()), "version" in marks
    lacking = constants - state.keys() if marked or whole else set[str]()
    if any(getattr(part, "takes_older_states", False) for part in module.modules()):
        lacking = {name for name in lacking if not name.endswith("constant_gain")}
    if whole and not marked:  # with its marks, a state of no rate is the map that it was
        lacking |= {name for name in others - state.keys() if name.endswith(".output_rate")}
    more = {name for name in state if name.startswith(prefix) and _CONSTANT in name} - constants
    errors += [*_refusals(lacking, "without", 0), *_refusals(more, "with", 1)]


def _refusals(names: Set[str], what: str, place: int) -> Iterator[str]:
    """A line for each constant that only the module or only the state has."""
    for name in sorted(names):
        cure = _CURES.get(name.rpartition(".")[2])
        made = f"; it loads into what is made with {cure[place]}" if cure else ""
        yield f"{name}: the state is of another map, {what} this constant{made}"


def _number_in(state: Mapping[str, Any], key: str, own: float, errors: list[str]) -> float:
    """A positive number that a state names; the module's own where it does not, or has it rounded."""
    value = state.get(key)
    if not isinstance(value, Tensor) or value.is_meta or value.numel() != 1:
        return own
    number, exact = float(value), torch.tensor(own, dtype=torch.float64, device="cpu")
    rounded = [float(exact.to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    if number in rounded or math.isclose(number, own, rel_tol=1e-6):
        return own
    if not 0 < number < math.inf:
        errors.append(f"{key}: expected a positive finite number, got {number}")
        return own
    return number


class Numbered(nn.Module):
    """A module one of whose numbers its state names: a load takes it over, and a save writes it as it is used."""

    _number: tuple[str, str]
    """The attribute, and its buffer, which is there unless the number is 1; casts or `to_empty` may spoil it."""

    def _set_number(self, value: float) -> None:
        name, buffer = self._number
        number = check_positive(name, value)
        setattr(self, name, number)
        if number != 1:
            # No call reads it: it tells a state of this module from one that was saved when there was no such number.
            self.register_buffer(buffer, torch.tensor(number))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        name, buffer = self._number
        if buffer in self._buffers:
            setattr(self, name, _number_in(state_dict, prefix + buffer, getattr(self, name), args[-1]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name, buffer = self._number
        if buffer in self._buffers:
            key = prefix + buffer
            destination[key] = torch.full_like(destination[key], getattr(self, name))


def named_once(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by name: a part that comes twice has one name, a parameter of two parts has two.

    To stand others in for them by these names is undone by the same: of a second name for one place, what would be put
    back is what stood in.
    """
    return {
        f"{prefix}.{name}".lstrip("."): each
        for prefix, part in module.named_modules()
        for name, each in part.named_parameters(recurse=False, remove_duplicate=False)
    }


def made(module: nn.Module) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Each part with those of its tensors that are neither parameters nor buffers.

    Such are the weights that a hook of torch's makes before each call, of pruning or of the older weight norm. They
    have a graph, so that nobody can copy them; and where ``vmap`` has made them, nobody can read them when it is over.
    """
    return [
        (part, {name: each for name, each in vars(part).items() if isinstance(each, Tensor)})
        for part in module.modules()
    ]


@contextmanager
def left(module: nn.Module) -> Iterator[None]:
    """A context that puts back what `made` finds: the weights that are made within it do not stay."""
    before = made(module)
    try:
        yield
    finally:
        for part, tensors in before:
            vars(part).update(tensors)
