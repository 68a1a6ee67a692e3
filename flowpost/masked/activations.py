"""The activations whose derivative follows from their own value: what a pass by hand needs to keep is the values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


@torch.no_grad()
def check_elementwise(activation: Activation) -> None:
    """Refuse an activation that mixes the units: each variable's numbers would follow those after it.

    One that draws anew, or whose parameters stand elsewhere, cannot be asked.
    """
    if activation in KNOWN:
        return
    x = torch.linspace(-2.0, 2.0, 12, device="cpu").view(2, 6)
    moved = x.clone()
    moved[:, 1:] += 1.0
    moved[1, 0] += 1.0
    try:
        first, again, other = (activation(each.clone())[0, 0] for each in (x, x, moved))
        mixes = torch.equal(first, again) and not torch.equal(first, other)
    except (RuntimeError, IndexError):  # it says what it wants where it is called
        return
    if mixes:
        name = getattr(activation, "__name__", type(activation).__name__)
        raise ValueError(f"activation: expected an element-wise function, got {name}, which mixes the units")


# By the overload: to find it among them takes torch as long as the operation.
_relu_backward, _elu_backward, _tanh_backward = (
    getattr(torch.ops.aten, name).default for name in ("threshold_backward", "elu_backward", "tanh_backward")
)
_relu_backward_, _elu_backward_, _tanh_backward_ = (
    getattr(torch.ops.aten, name).grad_input for name in ("threshold_backward", "elu_backward", "tanh_backward")
)
_OF_ITSELF = True  # the derivative from the value and not from its argument


class Known(NamedTuple):
    """An activation whose derivative follows from its own value."""

    name: str
    run: Activation
    """In place."""
    gradient: Callable[[Tensor, Tensor], Tensor]
    """From the gradient at the value, and the value, to the gradient at the input."""
    gradient_: Callable[[Tensor, Tensor], Tensor]
    """The same, written over the first."""


_RELU = Known(
    "relu",
    torch.relu_,
    lambda grad, value: _relu_backward(grad, value, 0),
    lambda grad, value: _relu_backward_(grad, value, 0, grad_input=grad),
)
_ELU = Known(
    "elu",
    partial(F.elu, inplace=True),
    lambda grad, value: _elu_backward(grad, 1, 1, 1, _OF_ITSELF, value),
    lambda grad, value: _elu_backward_(grad, 1, 1, 1, _OF_ITSELF, value, grad_input=grad),
)
_TANH = Known("tanh", torch.tanh_, _tanh_backward, lambda grad, value: _tanh_backward_(grad, value, grad_input=grad))
KNOWN: dict[Activation, Known] = {F.relu: _RELU, torch.relu: _RELU, F.elu: _ELU, torch.tanh: _TANH}
NAMED = {known.name: known for known in KNOWN.values()}
