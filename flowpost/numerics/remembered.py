"""A result that is given again while nothing that it was made of has changed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowpost.numerics.watchers import watched

State = tuple[int, int, bool, int]


class Remembered(NamedTuple):
    """A result, and what it was made of as that was: who holds one asks `fits` before giving it again."""

    result: Tensor
    tensors: tuple[Tensor, ...]
    states: tuple[State, ...]
    grads: tuple[Tensor | None, ...]
    grad: bool
    parts: tuple[object, ...]

    def fits(self, given: Sequence[Tensor], module: nn.Module) -> bool:
        """Whether these are the tensors, none changed since, gradients wanted or not, and the module as it was."""
        tensors = _all(given, module)
        return (
            self.grad == torch.is_grad_enabled()
            and _same(self.parts, _parts(module))
            and not watched()
            and _same(self.tensors, tensors)
            and _same(self.grads, _grads(tensors))
            and self.states == _states(tensors)
        )


def remember(result: Tensor, given: Sequence[Tensor], module: nn.Module) -> Remembered | None:
    """The result that a module made of tensors, to keep; None where nobody could tell whether a tensor has changed.

    A tensor of inference mode counts no changes, and whoever watches the operations hands out tensors of his own.
    """
    tensors = _all(given, module)
    if watched() or any(tensor.is_inference() for tensor in tensors):
        return None
    kept = tuple(tensors), _states(tensors), _grads(tensors), torch.is_grad_enabled(), _parts(module)
    return Remembered(result, *kept)


def _all(given: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    return [*given, *module.parameters(), *module.buffers()]


def _parts(module: nn.Module) -> tuple[object, ...]:
    """Each module within and what stands on it: its mode, its settings, such as a bound or an order, and its hooks."""
    return tuple(
        each
        for part in module.modules()
        for each in (part, *vars(part).values(), *part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )


def _same(ones: Sequence[object], others: Sequence[object]) -> bool:
    """Whether these are the very objects, one for one; a number that was set anew is another."""
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


def _states(tensors: Sequence[Tensor]) -> tuple[State, ...]:
    """Of each its count of changes, where its numbers lie, of which another kind of tensor says nothing, and its wish.

    To have other numbers put in its place (`torch.nn.utils.vector_to_parameters`), or a gradient asked for, is no
    change that a tensor counts. Nor is the step of a fused optimizer, but a backward pass comes before it.
    """
    return tuple(
        (
            each._version,
            each.data_ptr() if type(each) in (Tensor, nn.Parameter) else 0,
            each.requires_grad,
            0 if grad is None else grad._version,
        )
        for each, grad in zip(tensors, _grads(tensors), strict=True)
    )


def _grads(tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(each.grad if each.is_leaf else None for each in tensors)
