"""CPU threads, and work that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import starmap
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

try:
    from threadpoolctl import threadpool_limits
except ImportError:  # numpy keeps the threads it has: an environment of before can still measure
    threadpool_limits = None

T = TypeVar("T")


def set_threads(count: int) -> AbstractContextManager:
    """So many threads of PyTorch and, for the sweeps of an inverse, of numpy's products from now on."""
    torch.set_num_threads(count)
    return nullcontext() if threadpool_limits is None else threadpool_limits(count, "blas")


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """As `set_threads` inside, and as many as before afterwards."""
    before = torch.get_num_threads()
    try:
        with set_threads(count):
            yield
    finally:
        torch.set_num_threads(before)


def side_by_side(work: Callable[..., T], tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """What `work` makes of each task, as it comes: from this process, or from so many others of as many threads.

    Args:
        work: a function of a module's, of what a task has in it.
        tasks: in the order in which they are begun.
        jobs: processes; 1 is this one.
    """
    if jobs == 1:
        yield from starmap(work, tasks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), set_threads, (torch.get_num_threads(),)) as pool:
        waiting = [pool.submit(work, *task) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(waiting))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
