"""Permutations of the variables."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_order
from flowpost.numerics.constants import Order, Ordered


class Permute(Ordered, Bijector):
    """A fixed permutation ``z'_i = z_{order[i]}``, ``log_det = 0``; it reads no context.

    Use it between autoregressive steps or couplings, so that each sees the variables in another order. Cost: O(dim).

    Args:
        order: every int from 0 to dim - 1 once; saved with the weights.

    Raises:
        ValueError: if `order` is no permutation.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))[0]
        tensor([30., 10., 20.])
    """

    _order: Order
    _saved = ("order", "back")

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__(len(order))
        self._set_order(check_order(order, self.dim))

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._order.take(z), z.new_zeros(())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._order.put(z), z.new_zeros(())


class Reverse(Bijector):
    """The variables in reverse order, ``z'_i = z_{dim-1-i}``, ``log_det = 0``; it reads no context.

    Use it as `Permute`. Cost: O(dim).

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
