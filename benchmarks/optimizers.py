"""How weights follow gradients: the optimizer, its learning rate over the epochs, clipping, averaging, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks.errors import ConfigError

CLIP_NORM = 100.0  # a longer gradient is shortened to this: rare, it tames a step gone wild
BURDA_STAGES = 8  # the i-th of them lasts 3^i epochs (Burda et al. 2016)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Kind(NamedTuple):
    """An optimizer of torch, and what its state of one parameter is made of; all of it starts as zeros."""

    make: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    state: tuple[str, ...]
    fused: bool = False
    """Whether a fused one looks by itself whether a step is finite."""


OPTIMIZERS: dict[str, Kind] = {
    "adam": Kind(torch.optim.Adam, {}, ("step", "exp_avg", "exp_avg_sq"), fused=True),
    "adamax": Kind(torch.optim.Adamax, {}, ("step", "exp_avg", "exp_inf")),
    "rmsprop": Kind(torch.optim.RMSprop, {"centered": True}, ("step", "square_avg", "grad_avg")),
}


def linear(epoch: int, epochs: int) -> float:
    """A line from 1 to 0 at the last epoch's end."""
    return 1 - epoch / epochs


def constant(epoch: int, epochs: int) -> float:
    """Always 1."""
    del epoch, epochs
    return 1.0


def burda(epoch: int, epochs: int) -> float:
    """``10^(-i/7)`` for 3^i epochs, i = 0 to 7: 3,280 epochs in all (Burda et al. 2016, section 5)."""
    del epochs
    ends = [(3 ** (i + 1) - 1) // 2 for i in range(BURDA_STAGES - 1)]
    return 10 ** (-sum(epoch >= end for end in ends) / 7)


RATES: dict[str, Callable[[int, int], float]] = {"linear": linear, "constant": constant, "burda": burda}


@dataclass(frozen=True)
class Optimization:
    """What turns gradients into weights, besides the learning rate.

    Raises:
        ConfigError: a value is out of range, said in one line.
    """

    optimizer: str = "adam"
    eps: float = 1e-8  # of the optimizer
    decay: str = "linear"  # of the learning rate over the epochs
    clip: float = CLIP_NORM  # longer gradients, all parameters' together, are shortened to this
    averaging: float = 0.0  # Polyak's: the averaged weights keep this share in every step, and are what is validated
    precision: str = "float32"  # that networks compute in while they train; weights and flows stay float32

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", OPTIMIZERS), ("decay", RATES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("eps", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.averaging < 1:
            raise ConfigError(f"averaging: expected a share in [0, 1), got {self.averaging}")

    @property
    def kind(self) -> Kind:
        """The optimizer."""
        return OPTIMIZERS[self.optimizer]

    def build(self, model: nn.Module, lr: float, graph: str = "") -> torch.optim.Optimizer:
        """The optimizer of a model's parameters.

        Args:
            model: whose parameters follow.
            lr: the learning rate at the start.
            graph: the device, where the step is one CUDA graph: then the learning rate is a tensor there, and nothing
                of a step is decided on the host.
        """
        kind, options = self.kind, {**self.kind.options, "eps": self.eps}
        if not graph:
            return kind.make(model.parameters(), lr=lr, **options)
        options |= {"capturable": True, "fused" if kind.fused else "foreach": True}
        return kind.make(model.parameters(), lr=torch.tensor(lr, device=graph), **options)

    def follow(self, average: nn.Module, model: nn.Module) -> None:
        """Move averaged weights a step towards the model's."""
        if average is not model and self.averaging:
            get_ema_multi_avg_fn(self.averaging)(list(average.parameters()), list(model.parameters()), 0)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Where a training pass computes in the chosen precision; a graph must not keep casts from step to step."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, PRECISIONS[self.precision], cache_enabled=False)
