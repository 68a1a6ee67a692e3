"""Times that can be compared on a machine that is never quiet: rounds, in each of which everyone is timed once."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

Call = Callable[[], object]

BLOCK = 0.01  # seconds: a faster call is repeated until its block takes as long
SLOW = 1.0  # seconds: a slower call needs no warm-up, its first time is that of the first round
MOST_CALLS = 200  # in a block
PATIENCE = 4  # times the budget


@dataclass(frozen=True)
class Rounds:
    """How many rounds: as many as fit into the budget, at most `most`.

    To have `least` of them, a contest may take four times the budget; after that two are enough.
    """

    budget: float  # seconds
    least: int
    most: int

    def enough(self, done: int, seconds: float) -> bool:
        """Whether another round would be one too many."""
        if done >= self.most or done < 2:
            return done >= self.most
        return seconds * (done + 1) / done > self.budget * (1 if done >= self.least else PATIENCE)


class Spread(NamedTuple):
    """A median and its quartiles over rounds."""

    median: float
    low: float
    high: float


def contest(calls: Mapping[str, Call], device: torch.device, rounds: Rounds, seed: int = 0) -> dict[str, list[float]]:
    """Seconds a call, one number for each round and name; in each round everyone has a turn, in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    times: dict[str, int] = {}
    order, shuffle = list(calls), random.Random(seed)
    for name in order if device.type == "cuda" else ():
        timed(calls[name], 1, device)  # which compiles kernels, for seconds that are no round's
    done, start = 0, time.perf_counter()
    while not (done and rounds.enough(done, time.perf_counter() - start)):
        shuffle.shuffle(order)
        for name in order:
            if name not in times:
                first = timed(calls[name], 1, device)
                times[name] = 1 if first > SLOW else repeats(timed(calls[name], 1, device))
                if first > SLOW:
                    seconds[name].append(first)
                    continue
            seconds[name].append(timed(calls[name], times[name], device))
        done += 1
    return seconds


def repeats(seconds: float) -> int:
    """How often to call what takes so long, that a block of calls is long enough to be timed."""
    return max(1, min(MOST_CALLS, math.ceil(BLOCK / max(seconds, 1e-9))))


def timed(call: Call, times: int, device: torch.device) -> float:
    """Seconds a call; on a GPU between two events, so that the queue of launches is waited for."""
    if device.type == "cuda":
        return _timed_by_events(call, times, device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _timed_by_events(call: Call, times: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def ratio(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of the ratios within each round, which a slow spell of the machine leaves alone."""
    return spread([a / b for a, b in zip(values, reference, strict=True)])
