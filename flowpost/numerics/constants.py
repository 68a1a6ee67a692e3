"""Tensors that a module needs and nobody learns: masks, orders, random starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowpost.numerics.arguments import check_order
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.watchers import first_parameter, watched

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
        if value.is_inference():  # autograd could not save it
            with torch.inference_mode(mode=False):
                self.value = value.clone()
        self._copies: _Copies = {}

    def on(self, like: Tensor, *, as_numbers: bool = False) -> Tensor:
        """The tensor on the device, and where it is of numbers in the dtype, of `like`: copied there once.

        With `as_numbers` a mask or an index is cast too.

        Whoever watches the operations, as a compiler or ``torch.func`` does, would leave a tensor of his own behind:
        then the copy is not kept.
        """
        value, device, dtype = self.value, like.device, self.value.dtype
        if dtype == like.dtype and value.device == device and not self.wide:  # what is asked for most, so first
            return value
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

    def __deepcopy__(self, _: dict[int, object]) -> Constant:
        """Of the same tensors, which nobody changes: a copied module has them at hand where the module has."""
        other = Constant(self.value, wide=self.wide)
        other._copies.update(self._copies)
        return other


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
    def order(self, order: Tensor | Sequence[int]) -> None:  # `functional_call` sets whatever a state dict names
        if self._order is None or order is None:
            had = "none" if self._order is None else "one"
            raise ValueError(
                f"order: expected an order in the place of the one that the step was made with, got {order} where it "
                f"was made with {had}; make a new step with order="
            )
        given = order.tolist() if isinstance(order, Tensor) else order
        self._set_order(check_order(given, len(self._order.order)))

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
        """Take a permutation, or None, as the order; a subclass whose weights lie in it does more.

        The order that is here already keeps its tensors: a CUDA graph, which sees weights that are loaded, reads them.
        """
        before = getattr(self, "_order", None)
        if order is None or before is None or before.order != tuple(order):
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
