"""A stand-in for CUDA's graphs on the CPU: the operations of a call are recorded, undone, and replayed in place.

It has what is particular to a graph: a replay runs no Python and repeats numbers, reads and writes the memory of the
capture, and follows no host read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage for storage in found}


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        name = str(func).removeprefix("aten.").partition(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or by_mask:
            raise RuntimeError(f"called a synchronizing operation: {name}\nand more lines")
        return func(*args, **(kwargs or {}))


class OnMeta(NoReads):
    """Refuses any tensor of another device too. Fused optimizers have no kernel there: their tensors are looked at."""

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        found = None if "_fused_" in str(func) else super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        if not all(tensor.is_meta for tensor in tensors):
            raise RuntimeError(f"{func}: a tensor of another device")
        return found


class Recorder(NoReads):
    """The operations, and what was in the memory that they write and did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, Mapping, object]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        kwargs = kwargs or {}
        schema = func._schema.arguments  # pyright: ignore[reportFunctionMemberAccess]
        values = [args[i] if i < len(args) else kwargs.get(argument.name) for i, argument in enumerate(schema)]
        written = [
            v
            for v, argument in zip(values, schema, strict=True)
            if argument.alias_info and argument.alias_info.is_write
        ]
        for key, storage in storages(written).items():
            if key not in self.made and key not in self.before:
                self.before[key] = (storage, storage.clone())
        found = super().__torch_dispatch__(func, types, args, kwargs)
        self.made |= storages(found).keys() - storages((args, kwargs)).keys()
        self.calls.append((func, args, kwargs, found))
        return found

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)


class Tape:
    """As `flowpost._graphs.CUDAGraphs`; it counts."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.generators = [torch.default_generator, *generators]
        self.runs = self.captures = self.replays = 0

    def run(self, call: Callable[[], T], *, strict: bool) -> T:
        self.runs += 1
        with NoReads() if strict else nullcontext():
            return call()

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        self.captures += 1
        states = [generator.get_state() for generator in self.generators]
        with Recorder() as recorder:
            result = call()
        recorder.undo()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

        @torch.no_grad()
        def replay() -> T:
            self.replays += 1
            for func, args, kwargs, found in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and not storages(old).keys() & storages(new).keys():
                        old.copy_(new)
            return result

        return replay
