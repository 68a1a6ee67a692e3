"""CPU threads, and work that several processes share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import starmap
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar, cast

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
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (torch.get_num_threads(),)) as pool:
        waiting = [pool.submit(work, *task) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(waiting))
        except BaseException:  # an interrupt of this process alone: the others would finish what they have in hand
            for process in active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(threads: int) -> None:
    """In a new process: it has so many threads, and ends with the one that began it, however that ended."""
    set_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    cast(BaseProcess, parent_process()).join()
    os._exit(1)  # else it would work on, for nobody, and beside the job that goes on
