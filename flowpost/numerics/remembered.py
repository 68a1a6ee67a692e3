"""A result that is given again while nothing that it was made of has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.numerics.watchers import watched


class Remembered(NamedTuple):
    """A result, and the tensors it was made of as they were: who holds one asks `fits` before giving it again."""

    result: Tensor
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    grad: bool

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, none changed in place since, gradients wanted or not as they were then."""
        return (
            self.grad == torch.is_grad_enabled()
            and not watched()
            and len(self.tensors) == len(tensors)
            and all(one is other for one, other in zip(self.tensors, tensors, strict=True))
            and self.versions == tuple(tensor._version for tensor in tensors)
        )


def remember(result: Tensor, tensors: Sequence[Tensor]) -> Remembered | None:
    """The result to keep; None where nobody could tell whether a tensor has changed.

    A tensor of inference mode counts no changes, and whoever watches the operations hands out tensors of his own.
    """
    if watched() or any(tensor.is_inference() for tensor in tensors):
        return None
    return Remembered(result, tuple(tensors), tuple(tensor._version for tensor in tensors), torch.is_grad_enabled())
