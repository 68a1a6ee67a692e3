"""Householder reflections, and orthonormal columns made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.watchers import full_precision

Product = Callable[[Tensor, Tensor], Tensor]


def reflect(z: Tensor, v: Tensor) -> Tensor:
    """The mirror image of z in the plane across v, ``z - 2 v (v.z) / |v|^2``; the length of v does not matter.

    Args:
        z: ``(*batch, dim)``.
        v: ``(*batch, dim)``, any numbers; where there is no direction in them (zeros), the first axis stands in.

    Returns:
        z' ``(*batch, dim)``.
    """
    return reflect_all(z, v.unsqueeze(-2))


def reflect_all(z: Tensor, v: Tensor) -> Tensor:
    """K reflections one after the other, as K calls of `reflect`; but for three operations each, all at once.

    Args:
        z: ``(*batch, dim)``.
        v: ``(*batch, K, dim)``, any numbers, as in `reflect`.

    Returns:
        z' ``(*batch, dim)``.
    """
    v = _sized(v)
    doubles = 2 * v / v.square().sum(-1, keepdim=True)
    for each, double in zip(v.unbind(-2), doubles.unbind(-2), strict=True):
        z = torch.addcmul(z, (each * z).sum(-1, keepdim=True), double, value=-1)
    return z


_RUN = 32
"""Reflections that `Reflected` takes together: more would cost more in the triangle, fewer more calls."""


class Turned(NamedTuple):
    """What a run of reflections has made of a row, ``row - move V``."""

    row: Tensor
    """``(*batch, 1, dim)``"""
    move: Tensor
    """``(*batch, 1, at most 32)``"""


class Reflected(NamedTuple):
    """``H_1 ... H_K``, as `orthonormal` has it, as a product of runs ``I - V^T S^-1 V``; it turns single vectors.

    For one vector each way that costs O(K dim), where the matrix would cost O(K dim (K + rank)).
    """

    runs: Sequence[tuple[Tensor, Tensor]]
    """V ``(*batch, at most 32, dim)`` and its triangle S; the first is the one that is applied last."""
    rank: int
    """Columns of the product that count."""

    @classmethod
    def of(cls, v: Tensor, rank: int, *, long: bool = False) -> Reflected:
        """Of vectors ``(*batch, K, dim)``, any numbers, as in `orthonormal`."""
        with full_precision(v.device.type):
            return cls.of_sized(_sized(v, long=long), rank)

    @classmethod
    def of_sized(cls, v: Tensor, rank: int) -> Reflected:
        """Of vectors whose squares neither overflow nor underflow."""
        return cls([(part, _triangle(part)) for part in v.split(_RUN, -2)], rank)

    def along(self, z: Tensor) -> Tensor:
        """``Q^T z``, ``(*batch, rank)``."""
        return self.turn(z, torch.matmul)[0]

    def out_of(self, y: Tensor) -> Tensor:
        """``Q y``, ``(*batch, dim)``."""
        return self.turn_back(y, torch.matmul)[0]

    def turn(self, z: Tensor, multiply: Product = torch.bmm) -> tuple[Tensor, list[Turned]]:
        """`along`, and what each run has done; of z ``(N, dim)`` and N examples by a product that costs less."""
        z, kept = _turn(z, [(v, s, True) for v, s in self.runs], multiply)
        return z[..., : self.rank], kept

    def turn_back(self, y: Tensor, multiply: Product = torch.bmm) -> tuple[Tensor, list[Turned]]:
        """`out_of`, and what each run has done."""
        dim = self.runs[0][0].shape[-1]
        y = y if self.rank == dim else F.pad(y, (0, dim - self.rank))
        z, kept = _turn(y, [(v, s.mT, False) for v, s in reversed(self.runs)], multiply)
        return z, kept[::-1]

    def pull(self, along: Sequence[Sequence[Turned]], out_of: Sequence[Sequence[Turned]]) -> Tensor:
        """The gradient at the vectors, as `of_sized` has them, of ``Q^T z`` and ``Q y``.

        Args:
            along: `turn` of z, and of the gradient at ``Q y``.
            out_of: `turn_back` of the gradient at ``Q^T z``, and of y.
        """
        found = []
        for (v, _), of_z, of_grad, of_grad_along, of_y in zip(self.runs, *along, *out_of, strict=True):
            moves = torch.cat([of_z.move, of_grad.move, of_grad_along.move, of_y.move], -2)
            rows = torch.cat([of_grad_along.row, of_y.row, of_z.row, of_grad.row], -2)
            # S is a half of V V^T, where each vector comes twice: its gradient and the transposed of it, put together.
            of_s, of_inverse, halved = moves[:, :2], moves[:, 2:], _halved(v).triu_()
            twice = torch.bmm(of_s.mT, of_inverse).mul_(halved)
            twice.addcmul_(torch.bmm(of_inverse.mT, of_s), halved.mT.contiguous())
            found.append(torch.bmm(twice, v).baddbmm_(moves.mT, rows, alpha=-1))
        return torch.cat(found, -2) if len(found) > 1 else found[0]


def _turn(z: Tensor, runs: Sequence[tuple[Tensor, Tensor, bool]], multiply: Product) -> tuple[Tensor, list[Turned]]:
    """``z - z V^T S^-1 V`` of each run's V and S in turn, and whether S is an upper triangle; z as rows."""
    row, kept = z.unsqueeze(-2), []
    for v, s, upper in runs:
        move = torch.linalg.solve_triangular(s, multiply(row, v.mT), upper=upper, left=False)
        kept.append(Turned(row, move))
        row = row - multiply(move, v)
    return row.squeeze(-2), kept


def orthonormal(v: Tensor, rank: int, *, long: bool = False) -> Tensor:
    """The first `rank` columns of the product ``H_1 ... H_K`` of reflections ``H_k = I - 2 v_k v_k^T / |v_k|^2``.

    The product is ``I - V^T S^-1 V`` with V the rows v_k and S the triangle of ``V V^T`` from its halved diagonal up
    (the compact WY form): one triangular solve, whose inverse has no entry above 4. Cost: O(K dim (K + rank)).

    Args:
        v: ``(*batch, K, dim)``, any numbers, as in `reflect`.
        rank: from 1 to dim.
        long: whether every vector has an entry of at least 1, as those of `pivoted`; it costs less then.

    Returns:
        Q ``(*batch, dim, rank)`` with ``Q^T Q = I``.
    """
    v = _sized(v, long=long)
    eye = torch.eye(v.shape[-1], rank, dtype=v.dtype, device=v.device)
    with full_precision(v.device.type):
        return eye - v.mT @ torch.linalg.solve_triangular(_triangle(v), v[..., :rank], upper=True)


def _triangle(v: Tensor) -> Tensor:
    """S on and above its diagonal; a solve does not read what is below."""
    return v @ v.mT * _halved(v)


def _halved(v: Tensor) -> Tensor:
    """1 for each pair of vectors, and 1/2 for a vector and itself."""
    return torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).mul_(-0.5).add_(1)


def pivoted(numbers: Tensor, kept: Constant | None = None) -> Tensor:
    """Vectors ``(*batch, K, dim)``, none of them short, from ``(*batch, K, dim - 1)`` numbers.

    The k-th has a 1 as its entry k (modulo dim): as its length does not matter, one entry is free. Numbers of variance
    ``1 / dim`` make directions that are nearly uniform.

    Args:
        numbers: of the other entries, in order.
        kept: ``free_entries(K, dim)``, where a step keeps them; by default they are made anew.
    """
    count, dim = numbers.shape[-2], numbers.shape[-1] + 1
    index = _free_entries(count, dim, numbers.device) if kept is None else kept.on(numbers)
    ones = numbers.new_ones(*numbers.shape[:-1], dim)
    return ones.scatter(-1, index.expand(numbers.shape), numbers)


def spread(numbers: Tensor, count: int, dim: int) -> Tensor:
    """`pivoted` of rows of numbers, ``(N, K (dim - 1))`` for K of `count`, by a few copies; not recorded."""
    v = numbers.new_ones(len(numbers), count * dim)
    for entries, given in _free_stretches(v, numbers, count, dim):
        entries.copy_(given)
    return v.unflatten(-1, (count, dim))


def collect(v: Tensor, out: Tensor) -> None:
    """Write the entries of vectors ``(N, K, dim)`` that are no pivots as rows: what `spread` has the gradient of."""
    for entries, given in _free_stretches(v.flatten(-2), out, *v.shape[-2:]):
        given.copy_(entries)


def _free_stretches(v: Tensor, numbers: Tensor, count: int, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of vectors one after the other, less their pivots, and of what belongs there.

    Of dim vectors every ``(dim + 1)``-th number is a pivot, from the first to the last.
    """
    for first in range(0, count, dim):
        last = min(count - first, dim) - 1
        v_here, numbers_here = v[:, first * dim :], numbers[:, first * (dim - 1) :]
        if last:
            between = v_here[:, : last * (dim + 1)].unflatten(-1, (last, dim + 1))[..., 1:]
            yield between, numbers_here[:, : last * dim].unflatten(-1, (last, dim))
        after = slice(last * (dim + 1) + 1, (last + 1) * dim)
        yield v_here[:, after], numbers_here[:, last * dim : (last + 1) * (dim - 1)]


def free_entries(count: int, dim: int) -> Constant:
    """Which entries of `count` vectors `pivoted` sets; for a step to keep."""
    return Constant(_free_entries(count, dim, "cpu"))


def _free_entries(count: int, dim: int, device: torch.device | str) -> Tensor:
    pivot = (torch.arange(count, device=device) % dim).unsqueeze(-1)
    entry = torch.arange(dim - 1, device=device)
    return entry + (entry >= pivot)


def _sized(v: Tensor, *, long: bool = False) -> Tensor:
    """Give v a largest entry of 1, so that its square neither overflows nor underflows.

    The divisor carries no gradient: what is made of a direction does not depend on it, so its gradient is zero.
    """
    size = size_of(v)
    if long:
        return v / size
    limits = torch.finfo(v.dtype)
    least = limits.tiny / limits.eps**2  # of what is shorter the derivative, of the order of 1 / |v|, leaves the range
    first = torch.eye(1, v.shape[-1], dtype=v.dtype, device=v.device).squeeze(0)
    return torch.where(size < least, first, v / size.clamp_min(least))


def size_of(v: Tensor) -> Tensor:
    """The largest entry of each vector, ``(*batch, K, 1)``, without a gradient."""
    return v.detach().abs().amax(-1, keepdim=True)
