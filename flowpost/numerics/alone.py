"""Torch's global state, which all threads of a process have in common: one of them at a time may change it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

ALONE = RLock()
"""Held by the thread that has changed a global, until it is as it was."""


@contextmanager
def draws_apart() -> Iterator[None]:
    """Within it torch's own generator of the host may be drawn from, or seeded; afterwards it is as it was."""
    with ALONE, torch.random.fork_rng(devices=[]):
        yield
