"""Numbers that come times a constant rate, so that an optimizer moves them less fast: a network's, or a context's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowpost.numerics.states import Numbered


class Rated(Numbered):
    """A network of `layers`, with an activation between them, whose outputs come times a positive constant, `rate`.

    Adam moves every weight by as much a step, whatever the gradient's size: a layer of n inputs then moves its outputs
    n times as fast as a single number. A rate of ``1 / sqrt(n)`` holds that back. A state that was saved when outputs
    had no rate is loaded as the map that it was.
    """

    _version = 2
    """1 was when outputs had no rate. What carries no version, such as parameters alone, is loaded as it is."""
    _number = ("rate", "output_rate")
    rate: float
    layers: nn.ModuleList
    activation: Callable[[Tensor], Tensor]

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._set_number(rate)

    def extra_repr(self) -> str:
        """Activation and rate, for the module's repr."""
        rate = "" if self.rate == 1 else f", rate={self.rate:.4g}"
        return f"activation={getattr(self.activation, '__name__', repr(self.activation))}{rate}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        key, last = f"{prefix}output_rate", f"{prefix}layers.{len(self.layers) - 1}."
        if key not in state_dict and self.rate != 1 and args[0].get("version", 2) < 2:
            names = [f"{last}weight", f"{last}bias", *([f"{prefix}project.weight"] if len(self.layers) == 1 else [])]
            state_dict.update({name: state_dict[name] / self.rate for name in names if name in state_dict})
            state_dict[key] = torch.full_like(self.get_buffer("output_rate"), self.rate)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RatedNumbers(Numbered):
    """A step whose numbers, or some of them, come times a positive constant, `rate`.

    A state of another rate makes the step one of that rate. One of no rate is refused: it would be another map.
    """

    _number = ("rate", "constant_rate")
    rate: float

    def _rated(self, numbers: Tensor) -> Tensor:
        """``rate * numbers``."""
        return numbers if self.rate == 1 else self.rate * numbers

    def extra_repr(self) -> str:
        """Sizes and rate, for the module's repr."""
        return super().extra_repr() + ("" if self.rate == 1 else f", rate={self.rate:.4g}")
