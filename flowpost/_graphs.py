"""What captures and replays operations on a device: CUDA's graphs, behind two methods that a test can stand in for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Backend(Protocol):
    """The work of one device."""

    def run(self, call: Callable[[], T], *, strict: bool) -> T:
        """Call it; if `strict`, raise a RuntimeError about a synchronizing operation where it waits for the device."""
        ...

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """Record its operations without running them; the replay, which returns the same tensors every time."""
        ...


class CUDAGraphs:
    """CUDA's. Everything before the replays runs on one side stream, as a capture must.

    Autograd remembers on which stream it first met a weight, and a capture refuses work that was met on another one.

    Args:
        device: of all tensors.
        generators: those drawn from, besides the device's own one: a replay moves them on.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.device, self.generators, self.stream = device, generators, torch.cuda.Stream(device)

    def run(self, call: Callable[[], T], *, strict: bool) -> T:
        """Call it on the side stream, after what was launched before and before what comes next."""
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream), _no_waits() if strict else nullcontext():
                return call()
        finally:  # after an error too: who goes on without a graph has the same weights and inputs
            outside.wait_stream(self.stream)

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """The replay of a graph of its own memory; the tensors that it returns live there."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # The outer `stream` brings the current one back where a capture fails. Other threads may go on pinning memory.
        with cleaned_up(self.device, pool, self.generators), torch.cuda.stream(self.stream):
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                found = call()

        def replay() -> T:
            graph.replay()
            return found

        return replay


@contextmanager
def cleaned_up(
    device: torch.device, pool: tuple[int, int], generators: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """Where a capture inside fails, torch ends neither its stream, nor its counting of random numbers, nor its pool.

    Args:
        device: of the capture.
        pool: of its memory.
        generators: that it drew from, besides the device's own one.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index)
    try:
        yield
    except RuntimeError:
        torch.cuda.set_stream(stream)
        for generator in (torch.cuda.default_generators[index], *generators):
            if not _draws(generator):
                generator.graphsafe_set_state(generator.clone_state())  # one that counts for no graph
        with suppress(RuntimeError):  # a torch that has ended it says so
            torch._C._cuda_endAllocateToPool(index, pool)  # pyright: ignore[reportAttributeAccessIssue]
        raise


def _draws(generator: torch.Generator) -> bool:
    """Whether numbers can be drawn from it, as they cannot while it counts for a graph that was not ended."""
    try:
        torch.rand(1, generator=generator, device=generator.device)
    except RuntimeError:
        return False
    return True


@contextmanager
def _no_waits() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode(2)
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():  # that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
