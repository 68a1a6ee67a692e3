"""Torch's global state, which all threads of a process have in common: whoever needs another keeps it to himself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ALONE = RLock()
"""Held by the thread that has changed a global, until it is as it was."""
_DRAWS = {
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial),
    *(Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.bernoulli_, Tensor.exponential_),
}


class DrawsApart(TorchFunctionMode):
    """Within it this thread's draws on the host come from a generator of their own, those of a seed.

    To restore torch's own afterwards would let other threads draw again what they have drawn in the meantime.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Hand the generator to what draws; the functions of `torch.nn.init` say that they do."""
        given = dict(kwargs or {})
        if (func in _DRAWS or "generator" in given) and given.get("generator") is None:
            given["generator"] = self.generator
        return func(*args, **given)
