"""`check_bijector` builds all that it tries on the device that it is given."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from registry import BY_NAME
from test_placement import tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowpost
from flowpost import Bijector
from flowpost.testing import check_bijector

NO_NUMBERS = {"gradients", "rows", "autocast", "unchanged", "meta", "compiles", "batch_sizes"}
"""What compares numbers where any answer will not do, asks the device for autocast, or goes elsewhere by itself."""


class Answers(TorchDispatchMode):
    """Lets who reads a number back from the meta device go on, by yes, 0, and no rows: mixing devices still raises."""

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        there = [t for t in tensors(args) if t.is_meta]
        name = str(func).removeprefix("aten.").partition(".")[0]
        answer = getattr(self, name, None) if there else None
        found = None if answer is None else answer(there[0], *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found

    def _local_scalar_dense(self, x: Tensor) -> bool | int | float:
        return {torch.bool: True, torch.int64: 0}.get(x.dtype, 0.0)

    def equal(self, *_: Tensor) -> bool:
        return True

    def nonzero(self, x: Tensor) -> Tensor:
        return x.new_empty(0, x.ndim, dtype=torch.int64)

    def _unique2(self, x: Tensor, *_: bool, **__: bool) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(0, dtype=dtype) for dtype in (x.dtype, torch.int64, torch.int64))

    def index(self, x: Tensor, indices: list[Tensor | None]) -> Tensor | None:
        mask = indices[0]
        return x.new_empty(0, *x.shape[mask.ndim :]) if mask is not None and mask.dtype == torch.bool else None

    def _to_copy(self, x: Tensor, *, device: torch.device | None = None, **options: object) -> Tensor | None:
        leaves = device is not None and torch.device(device).type == "cpu"
        return torch.zeros(x.shape, dtype=cast(torch.dtype, options.get("dtype") or x.dtype)) if leaves else None


def make(*, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
    """It has parameters, so that points from another device are refused, and costs nothing."""
    del context_size
    return flowpost.testing.push(BY_NAME["learned_affine"].make(dim, seed).to(dtype), push, seed)


def test_everything_is_built_on_the_device() -> None:
    with Answers():
        check_bijector(make, dims=(2,), dtypes=(torch.float64,), examples=1, skip=sorted(NO_NUMBERS), device="meta")


def test_nothing_is_built_on_the_default_device() -> None:
    """But by torch, of an average of weights."""
    skip = ["averaged", "compiles", "batch_sizes"]
    with torch.device("meta"):
        check_bijector(make, dims=(2,), dtypes=(torch.float64,), examples=1, skip=skip)
