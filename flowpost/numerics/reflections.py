"""Householder reflections, and orthonormal columns made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.products import by_rows
from flowpost.numerics.watchers import full_precision


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
            return cls([(part, _triangle(part)) for part in _sized(v, long=long).split(_RUN, -2)], rank)

    def along(self, z: Tensor) -> Tensor:
        """``Q^T z``, ``(*batch, rank)``."""
        z = z.unsqueeze(-1)
        for v, s in self.runs:
            z = z - by_rows(v.mT, torch.linalg.solve_triangular(s.mT, by_rows(v, z), upper=False))
        return z.squeeze(-1)[..., : self.rank]

    def out_of(self, y: Tensor) -> Tensor:
        """``Q y``, ``(*batch, dim)``."""
        z = F.pad(y, (0, self.runs[0][0].shape[-1] - self.rank)).unsqueeze(-1)
        for v, s in reversed(self.runs):
            z = z - by_rows(v.mT, torch.linalg.solve_triangular(s, by_rows(v, z), upper=True))
        return z.squeeze(-1)


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
    halved = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).mul_(-0.5).add_(1)
    return v @ v.mT * halved


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
    size = v.detach().abs().amax(-1, keepdim=True)
    if long:
        return v / size
    limits = torch.finfo(v.dtype)
    least = limits.tiny / limits.eps**2  # of what is shorter the derivative, of the order of 1 / |v|, leaves the range
    first = torch.eye(1, v.shape[-1], dtype=v.dtype, device=v.device).squeeze(0)
    return torch.where(size < least, first, v / size.clamp_min(least))
