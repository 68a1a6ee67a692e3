"""Tensors that a module needs and nobody learns: masks, orders, random starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowpost.numerics.arguments import check_order
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.watchers import first_parameter, watched

CONSTANT = ".constant_"
"""In the name of a buffer that no call reads: a state without it is of before the constant was."""
_Copies = dict[tuple[torch.device, torch.dtype], Tensor]


class Constant:
    """A tensor that is neither a parameter nor a buffer, read on whatever device it is needed.

    The value is made once, on the CPU. So nothing that moves, casts, averages, empties or loads a module's buffers can
    spoil it: `torch.nn.Module.to_empty`, a meta device, an average of weights, a load by assignment.

    Args:
        value: numbers, which `on` casts to the dtype that is asked for; or an index of int64 or a mask of bools, which
            it casts only where it is told to.
        wide: of numbers, whether they are read in the dtype in which log-densities are summed.
    """

    def __init__(self, value: Tensor, *, wide: bool = False) -> None:
        self.value, self.wide = value.detach(), wide
        self._copies: _Copies = {}

    def on(self, like: Tensor, *, as_numbers: bool = False) -> Tensor:
        """The tensor on the device, and where it is of numbers in the dtype, of `like`: copied there once.

        With `as_numbers` a mask or an index is cast too.

        Whoever watches the operations, as a compiler or ``torch.func`` does, would leave a tensor of his own behind:
        then the copy is not kept.
        """
        value, device, dtype = self.value, like.device, self.value.dtype
        if as_numbers or value.is_floating_point():
            dtype = wide_dtype(like) if self.wide else like.dtype
        if value.device == device and value.dtype == dtype:
            return value
        copy = self._copies.get((device, dtype))
        if copy is None:
            if watched():
                return value.to(device, dtype)
            with torch.inference_mode(mode=False):
                copy = self._copies[device, dtype] = value.to(device, dtype)
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {"value": self.value, "wide": self.wide, "_copies": {}}


class Order:
    """A permutation of the variables, and the way back.

    Args:
        order: every int from 0 to dim - 1 once.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self.order = tuple(order)
        self.back = tuple(sorted(range(len(self.order)), key=self.order.__getitem__))
        self._there = Constant(torch.tensor(self.order, dtype=torch.int64, device="cpu"))
        self._back = Constant(torch.tensor(self.back, dtype=torch.int64, device="cpu"))

    def on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The two indices on the device of `like`: there, and back."""
        return self._there.on(like), self._back.on(like)

    def take(self, z: Tensor, axis: int = -1) -> Tensor:
        """``z_{order[i]}`` along an axis."""
        return z.index_select(axis, self._there.on(z))

    def put(self, z: Tensor, axis: int = -1) -> Tensor:
        """Undo `take`."""
        return z.index_select(axis, self._back.on(z))


class Placed(nn.Module):
    """A module that knows on which device it is, and of what dtype, though it may have no parameter.

    An empty buffer says so: there is nothing in it to save or spoil.
    """

    _like: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_like", torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(follow)

    def _join(self, *parts: Placed) -> None:
        """Be where parts are that were made before: those with parameters, if any have."""
        like = next((each for part in parts for each in part.parameters()), parts[0]._like)
        self._like = like.new_empty(0)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Placed:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        for value in vars(self).values():
            if isinstance(value, (Constant, Order)):
                value.on(self._like)  # so that no compiled call has to copy it
        return self


def follow(module: nn.Module, _: object = None) -> None:
    """Tell the parts of a module where a load has put it: one by assignment moves parameters and nothing else."""
    parameter = first_parameter(module)
    if parameter is None or parameter.is_meta:
        return
    for part in module.modules():
        if isinstance(part, Placed) and (part is module or part._like.is_meta):
            part._like = parameter.new_empty(0)


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
    constants = {name for name in own if CONSTANT in name}
    parameters = {prefix + name for name, _ in module.named_parameters(remove_duplicate=False)}
    others = own.keys() - constants - parameters
    if others and not others & state.keys():
        state.update({name: own[name] for name in constants - state.keys()})
    if not parameters or not parameters <= state.keys():
        return  # a part of one, or of another module
    lacking = constants - state.keys() if "version" in marks or others & state.keys() else set[str]()
    if any(getattr(part, "takes_older_states", False) for part in module.modules()):
        lacking = {name for name in lacking if not name.endswith("constant_gain")}
    if "version" not in marks and others & state.keys():  # with its marks, a state of no rate is the map that it was
        lacking |= {name for name in others - state.keys() if name.endswith(".output_rate")}
    more = {name for name in state if name.startswith(prefix) and CONSTANT in name} - constants
    for names, what, place in ((lacking, "without", 0), (more, "with", 1)):
        for name in sorted(names):
            cure = _CURES.get(name.rpartition(".")[2])
            made = f"; it loads into what is made with {cure[place]}" if cure else ""
            errors.append(f"{name}: the state is of another map, {what} this constant{made}")


def number_in(state: Mapping[str, Any], key: str, own: float, errors: list[str]) -> float:
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


def save_number(destination: dict[str, Any], key: str, number: float) -> None:
    """Write a module's number where its state has the buffer of it, which casts or `to_empty` may have spoilt."""
    if key in destination:
        destination[key] = torch.full_like(destination[key], number)


class Ordered(Placed):
    """What a bijector with an order of its variables inherits: the order is saved with the weights, and is no buffer.

    The state dict has it as an int64 tensor, as if it were one. A load takes the order of the state over, whatever the
    order was for which the module was built; one that is no permutation, as an average of two is none, is refused.
    """

    _order: Order | None
    _saved = ("order",)
    """The attributes, `order` and perhaps `back`, that the state dict has."""

    @property
    def order(self) -> Tensor | None:
        """The variables in their order, ``(dim,)``; None as they come."""
        return None if self._order is None else torch.tensor(self._order.order, device=self._like.device)

    @order.setter
    def order(self, order: Tensor) -> None:  # `torch.func.functional_call` sets whatever a state dict names
        self._set_order(check_order(order.tolist(), len(cast(Order, self._order).order)))

    @property
    def back(self) -> Tensor | None:
        """Each variable's place in the order, ``(dim,)``; None as they come."""
        return None if self._order is None else torch.tensor(self._order.back, device=self._like.device)

    @back.setter
    def back(self, back: Tensor) -> None:
        pass  # it follows from the order

    def extra_repr(self) -> str:
        """Sizes and order, for the module's repr."""
        return super().extra_repr() + ("" if self._order is None else f", order={list(self._order.order)}")

    def _set_order(self, order: Sequence[int] | None) -> None:
        """Take a permutation, or None, as the order; a subclass whose weights lie in it does more."""
        self._order = None if order is None else Order(order)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._order is not None:
            destination.update({prefix + name: getattr(self, name) for name in self._saved})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001 (torch's own signature)
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._order is not None:
            given = {name: state_dict.pop(prefix + name, None) for name in self._saved}
            missing_keys += [prefix + name for name, value in given.items() if strict and value is None]
            order = given["order"]
            if order is not None and not order.is_meta:  # a state without values has no order to tell
                try:
                    self._set_order(check_order(order.tolist(), len(self._order.order)))
                except (TypeError, ValueError) as error:
                    error_msgs.append(f"{prefix}{error}; an order can be neither averaged nor scaled")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
