"""What a file of log joints gives for each posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from flowpost.variational.parameters import Entry

Arrays: TypeAlias = Mapping[str, np.ndarray]
Tensors: TypeAlias = Mapping[str, Tensor]
Spec: TypeAlias = Mapping[str, Entry]


class Model(NamedTuple):
    """A log joint without its data.

    Attributes:
        spec: shape and support of each parameter, in the order of the columns of the reference draws.
        prepare: from the data as published, in float64, to what the log joint reads. It runs once.
        log_joint: of parameters ``(S, *shape)`` and that data, ``(S,)``.
    """

    spec: Spec
    prepare: Callable[[Arrays], Arrays]
    log_joint: Callable[[Tensors, Tensors], Tensor]
