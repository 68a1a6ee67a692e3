"""Loops over time in place: a call of numpy costs a third of one of PyTorch, and the two share names and memory."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def operations(like: Tensor) -> ModuleType:
    """Where to find `add`, `exp` and the rest for `raw` tensors of this device."""
    return np if like.device.type == "cpu" else torch


def raw(tensor: Tensor) -> Any:  # noqa: ANN401 - an array or a tensor
    """The memory of a tensor without a graph, as `operations` takes it."""
    return tensor.detach().numpy() if tensor.device.type == "cpu" else tensor.detach()


def differentiable(plain: Callable[..., Tensor], given: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    """A gradient with a graph, for whoever takes second derivatives, by operations that autograd knows."""
    own = tuple(each.view_as(each) for each in given)  # one of `given` may be made of another
    return torch.autograd.grad(plain(*own), own, gradient, create_graph=True)
