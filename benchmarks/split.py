"""Which rows train, validate and test: a permutation that is the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPLIT_SEED = 1998  # of every permutation; another number is another benchmark


def permuted_parts(count: int, sizes: Sequence[int]) -> list[np.ndarray]:
    """A fixed permutation of `range(count)`, cut into parts of the given sizes."""
    # numpy keeps the raw stream of PCG64 across versions, but not what Generator.permutation makes of it.
    order = np.random.PCG64(SPLIT_SEED).random_raw(count).argsort(kind="stable")
    return np.split(order, np.cumsum(sizes)[:-1])
