"""Permutations of the variables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_order


class Permute(Bijector):
    """A fixed permutation ``z'_i = z_{order[i]}``, ``log_det = 0``; it reads no context.

    Args:
        order: every int from 0 to dim - 1 once; a buffer, so it is saved with the weights.

    Raises:
        ValueError: if `order` is no permutation.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))[0]
        tensor([30., 10., 20.])
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__(len(order))
        self.register_buffer("order", torch.tensor(check_order(order, self.dim)))
        self.register_buffer("back", torch.argsort(self.order))

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.index_select(-1, self.order), z.new_zeros(())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.index_select(-1, self.back), z.new_zeros(())


class Reverse(Bijector):
    """The variables in reverse order, ``z'_i = z_{dim-1-i}``, ``log_det = 0``; it reads no context.

    Args:
        dim: size of z.

    Example:
        >>> Reverse(3)(torch.tensor([1.0, 2.0, 3.0]))[0]
        tensor([3., 2., 1.])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.flip(-1), z.new_zeros(())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.flip(-1), z.new_zeros(())
