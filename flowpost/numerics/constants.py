"""Tensors that a module needs and nobody learns: masks, orders, random starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_Copies = dict[tuple[torch.device, torch.dtype], Tensor]


class Constant:
    """A tensor that is neither a parameter nor a buffer, read on whatever device it is needed.

    The value is made once, on the CPU. So nothing that moves, casts, averages, empties or loads a module's buffers can
    spoil it: `torch.nn.Module.to_empty`, a meta device, an average of weights, a load by assignment.

    Args:
        value: numbers, which `on` casts to the dtype that is asked for, or an int64 index, which it never casts.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()
        self._copies: _Copies = {}

    def on(self, like: Tensor) -> Tensor:
        """The tensor on the device, and unless it is an index in the dtype, of `like`: copied there once."""
        key = like.device, self.value.dtype if self.value.dtype == torch.int64 else like.dtype
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = self.value.to(*key)
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {"value": self.value, "_copies": {}}


class Order:
    """A permutation of the variables, and the way back.

    Args:
        order: every int from 0 to dim - 1 once.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self.order = tuple(order)
        self._there = Constant(torch.tensor(self.order, dtype=torch.int64, device="cpu"))
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        self._back = Constant(torch.tensor(places, dtype=torch.int64, device="cpu"))

    def take(self, z: Tensor, axis: int = -1) -> Tensor:
        """``z_{order[i]}`` along an axis."""
        return z.index_select(axis, self._there.on(z))

    def put(self, z: Tensor, axis: int = -1) -> Tensor:
        """Undo `take`."""
        return z.index_select(axis, self._back.on(z))
