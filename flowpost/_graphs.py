"""What captures and replays operations on a device: CUDA's graphs, behind two methods that a test can stand in for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
        with torch.cuda.stream(self.stream), _no_waits() if strict else nullcontext():
            found = call()
        outside.wait_stream(self.stream)
        return found

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """The replay of a graph of its own memory; the tensors that it returns live there."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # The outer `stream` brings the current one back where a capture fails. Other threads may go on pinning memory.
        with torch.cuda.stream(self.stream):
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                found = call()

        def replay() -> T:
            graph.replay()
            return found

        return replay


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
