"""Counts of the operations that a use launches, on the meta device: what bounds a small step on a GPU, without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowpost.numerics import fusing

_KNOWN: dict[object, Callable[[], object]] = {}
"""What makes anew what an operation gives, by the operation and what it is given."""


class Launches(TorchDispatchMode):
    """Counts what would run on the device: a view does not, and an operator of flowpost's own is one kernel of Triton.

    On the meta device torch works out in Python, in up to a millisecond, what an operation gives. Of like tensors it
    gives like tensors, so that is done once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.kernels = 0, 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Count the operation, and give what it gives."""
        kwargs = kwargs or {}
        if func.is_view or func.namespace == "profiler":
            return func(*args, **kwargs)
        self.kernels += func.namespace == "flowpost"
        key = func, _like(args), _like(tuple(kwargs.items()))
        if key in _KNOWN:
            self.count += 1
            return _KNOWN[key]()
        found = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        # An optimizer keeps its own count of steps on the CPU.
        self.count += any(each.is_meta for each in tensors)
        if not func._schema.is_mutable and all(each.is_meta for each in tensors):
            _KNOWN[key] = _maker(found)
        return found


def _like(given: Any) -> tuple:  # noqa: ANN401
    """What of an argument decides what an operation gives."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype, given.is_meta
    return (type(given), *map(_like, given)) if isinstance(given, (list, tuple)) else (type(given), given)


def _maker(found: Any) -> Callable[[], object]:  # noqa: ANN401
    if isinstance(found, Tensor):
        return partial(torch.empty_strided, found.shape, found.stride(), dtype=found.dtype, device="meta")
    if not isinstance(found, (list, tuple)):
        return lambda: found
    parts, kind = [_maker(each) for each in found], type(found)
    return lambda: kind(part() for part in parts)


def launches(call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], *, kernels: bool) -> tuple[int, int]:
    """The operations of a call, and of the same with the gradients at its inputs, with kernels of Triton or without."""
    with _engine(kernels=kernels), Launches() as counted:
        values = call()
    there = counted.count
    grads = [torch.empty_like(value) for value in values]
    with _engine(kernels=kernels), counted:
        torch.autograd.grad(values, inputs, grads, allow_unused=True)
    return there, counted.count


def launched(call: Callable[[], object], *, kernels: bool) -> int:
    """The operations of a call's second run: in the first an optimizer makes its state."""
    with _engine(kernels=kernels):
        call()
        with Launches() as counted:
            call()
    return counted.count


def _engine(*, kernels: bool) -> Any:  # noqa: ANN401
    return nullcontext() if kernels else patch.object(fusing, "on_device", lambda z: False)
