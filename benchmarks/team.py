"""The processes that train one model together: each has all data, draws all noise, and works on its own rows.

`accelerate launch -m benchmarks ...` starts them. Accelerate gives the launch, the device, the exchange of gradients
and the sums; the loop, the order of the data, the generators and the checkpoints are the same as of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Team:
    """This process and the others; alone, nothing is exchanged.

    Args:
        accelerator: an `accelerate.Accelerator`, where there are others.
    """

    def __init__(self, accelerator: Any = None) -> None:  # noqa: ANN401 - its library is imported where there are others
        self.accelerator = accelerator
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes

    @classmethod
    def on(cls, device: str) -> Team:
        """The processes that were launched; on GPUs this one's becomes the current device, so "cuda" names it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        return cls(_accelerator(cpu=not device.startswith("cuda")))

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def prepare(self, model: M) -> M:
        """The model whose backward pass takes the mean of all processes' gradients."""
        return model if self.count == 1 else self.accelerator.prepare(model)

    def rows(self, count: int) -> slice:
        """This process's share of so many rows, in their order."""
        if self.count == 1:
            return slice(None)
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def noise(self, *shape: int, device: torch.device) -> Tensor | None:
        """Standard normal numbers ``(*samples, rows, dim)`` of this process's rows, out of one draw for all rows.

        None alone: then whoever needs noise draws it.
        """
        return None if self.count == 1 else torch.randn(shape, device=device)[..., self.rows(shape[-2]), :]

    def mean(self, values: Tensor, count: int) -> Tensor:
        """The mean over `count` values, of which each process has its own."""
        return values.mean() if self.count == 1 else self.accelerator.reduce(values.sum() / count)

    def part(self, mean: Tensor, rows: int, count: int) -> Tensor:
        """What this process minimizes, from the mean over its rows: the processes' gradients are averaged."""
        return mean if self.count == 1 else mean * (self.count * rows / count)

    def agreed(self, number: float, device: torch.device) -> float:
        """The first process's number, for all."""
        if self.count == 1:
            return number
        mine = number if self.leads else 0.0
        return self.accelerator.reduce(torch.tensor(mine, dtype=torch.float64, device=device)).item()

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the block before the others do."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


@cache
def _accelerator(*, cpu: bool) -> Any:  # noqa: ANN401
    """The one of this process."""
    from accelerate import Accelerator  # takes seconds

    return Accelerator(cpu=cpu)
