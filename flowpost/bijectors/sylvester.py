"""The Sylvester flow: M tanh ridges in orthogonal directions in one step, each seeing those after it."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.bijectors import _by_hand
from flowpost.bijectors._sylvester_pass import Form
from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import by_columns, by_rows
from flowpost.numerics.reflections import Reflected, free_entries, orthonormal, pivoted
from flowpost.numerics.ridge import bounded_gain, log_slope, positive, ridge
from flowpost.numerics.squares import apart, halves
from flowpost.numerics.tanh_roots import solve_ridges
from flowpost.numerics.watchers import full_precision

_REACH = 1e3  # of R1 and R2: where they were larger, the inverse would be a matter of rounding


class Triangle(NamedTuple):
    """An upper triangular matrix, not put together: to set its diagonal costs more than two products."""

    strict: Tensor
    """``(*batch, M, M)``, zero on and below its diagonal."""
    diagonal: Tensor
    """``(*batch, M)``"""

    def times(self, x: Tensor) -> Tensor:
        """The product with points ``(*batch, M)``."""
        return torch.addcmul(by_columns(by_rows, self.strict, x), self.diagonal, x)

    def whole(self) -> Tensor:
        """The matrix itself."""
        return torch.diagonal_scatter(self.strict, self.diagonal, dim1=-2, dim2=-1)


_Basis = Tensor | Reflected | None
_Upper = Tensor | Triangle


def sylvester(
    z: Tensor,
    q: _Basis,
    r1: _Upper,
    r2: _Upper,
    b: Tensor,
    room: Tensor | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sylvester map ``z' = z + Q R1 tanh(R2 Q^T z + b)``, ``log_det = sum_i log(1 + r1_ii r2_ii tanh'(.)_i)``.

    The Jacobian's determinant is, by Sylvester's identity, that of the triangular ``I + diag(tanh') R2 R1`` (van den
    Berg et al. 2018, section 3). Invertible where every ``r1_ii r2_ii > -1``.

    Args:
        z: ``(*batch, dim)``.
        q: ``(*batch, dim, M)`` with ``Q^T Q = I``; None for the identity, and ``M = dim``.
        r1: ``(*batch, M, M)``, upper triangular.
        r2: ``(*batch, M, M)``, upper triangular.
        b: ``(*batch, M)``.
        room: ``1 + r1_ii r2_ii``, ``(*batch, M)``, where it is known more exactly than the product gives it.
        gain: ``r1_ii r2_ii``, ``(*batch, M)``, where it is at hand.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``.
    """
    with full_precision(z.device.type):
        value, slope = ridge(_inner(z, q, r2, b))
        return z + _outer(q, r1, value), _log_det(_gain(r1, r2) if gain is None else gain, room, value, slope)


def sylvester_inverse(
    z: Tensor,
    q: _Basis,
    r1: _Upper,
    r2: _Upper,
    b: Tensor,
    room: Tensor | None = None,
    preimage: Tensor | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Undo `sylvester`: ``y = R2 Q^T z + b`` is the solution of ``y + R2 R1 tanh(y) = R2 Q^T z' + b``.

    That is M increasing scalar equations, the last of which has one unknown, and each before it one more.

    Args:
        z: the image z', ``(*batch, dim)``.
        q: as in `sylvester`, like r1, r2, b, room and gain.
        r1: ``(*batch, M, M)``.
        r2: ``(*batch, M, M)``.
        b: ``(*batch, M)``.
        room: ``(*batch, M)``.
        preimage: where it is known, ``(*batch, dim)``: no search is run.
        gain: ``(*batch, M)``.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``, first and second derivatives exact.
    """
    with full_precision(z.device.type):
        gain = _gain(r1, r2) if gain is None else gain
        r1, r2 = _whole(r1), _whole(r2)
        root = None if preimage is None else _inner(preimage, q, r2, b)
        value, slope = solve_ridges(r2 @ r1, _inner(z, q, r2, b), root)
        return z - _outer(q, r1, value), -_log_det(gain, room, value, slope)


def _inner(z: Tensor, q: _Basis, r2: _Upper, b: Tensor) -> Tensor:
    if isinstance(q, Reflected):
        along = q.along(z)
    else:
        along = z if q is None else by_columns(by_rows, q.mT, z)
    return _times(r2, along) + b


def _outer(q: _Basis, r1: _Upper, value: Tensor) -> Tensor:
    move = _times(r1, value)
    if isinstance(q, Reflected):
        return q.out_of(move)
    return move if q is None else by_columns(by_rows, q, move)


def _gain(r1: _Upper, r2: _Upper) -> Tensor:
    return _diagonal(r1) * _diagonal(r2)


def _log_det(gain: Tensor, room: Tensor | None, value: Tensor, slope: Tensor) -> Tensor:
    return log_slope(gain, 1 + gain if room is None else room, value, slope).sum(-1)


def _times(matrix: _Upper, x: Tensor) -> Tensor:
    return matrix.times(x) if isinstance(matrix, Triangle) else by_columns(by_rows, matrix, x)


def _diagonal(matrix: _Upper) -> Tensor:
    return matrix.diagonal if isinstance(matrix, Triangle) else matrix.diagonal(dim1=-2, dim2=-1)


def _whole(matrix: _Upper) -> Tensor:
    return matrix.whole() if isinstance(matrix, Triangle) else matrix


class Sylvester(Bijector):
    """Sylvester flow ``z' = z + Q R1 tanh(R2 Q^T z + b)``: M ridges in one step, in orthogonal directions.

    Use a few after an `Affine` where planar steps are too weak: at rank M, one step moves z along M directions.

    Q is the first `rank` columns of a product of Householder reflections, so orthonormal for every context. The three
    forms of the paper are ``Sylvester(dim, rank)``, **orthogonal**, of M reflections, whose columns can be any;
    ``Sylvester(dim, dim, reflections)``, **Householder**; and ``Sylvester(dim, dim, 0)``, **triangular**, where Q is I,
    to be alternated with `Reverse`.

    Invertible for every context: R1's diagonal is moved as `Planar` moves u, so that ``r1_ii r2_ii > -1``, and R2's is
    made positive, which loses no map, as tanh is odd. Both are softly bounded at +-1e3. Identity where ``R1 = 0``, for
    any Q and R2, which are drawn at random when the step is built. Rank 1 is a planar step with u along w.

    With K reflections, Q costs ``O(K dim (K + M))`` an example; where an example has one point it is not made, and the
    reflections turn the point at ``O(K dim)``, in runs of 32. Else a point costs ``O(dim M)``. The log-det costs O(M).
    The inverse finds M scalar roots, one row after the other in a fixed number of steps each, with exact first and
    second derivatives.

    Args:
        dim: size of z.
        rank: M, the number of ridges, from 1 to dim; None for dim.
        reflections: K; None for as many as `rank`, which reach every Q but for the signs of its columns, and those do
            not matter.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, K (dim - 1) + M^2 + 2 M)``: a vector for each reflection, whose entry k
        (modulo dim) is 1 and left out in the k-th; a square with R1 on and above its diagonal, and R2^T below it; what
        makes R2's diagonal; b.

    Raises:
        TypeError: if a size is not an int.
        ValueError: if a size is out of range.

    Reference:
        van den Berg, Hasenclever, Tomczak & Welling (2018), Sylvester Normalizing Flows for Variational Inference,
        section 3.

    Example:
        >>> step = Sylvester(4, rank=2)
        >>> image, log_det = step(torch.randn(5, 4), torch.randn(5, step.context_size))
    """

    def __init__(self, dim: int, rank: int | None = None, reflections: int | None = None) -> None:
        check_int("dim", dim, minimum=1)
        rank = dim if rank is None else check_int("rank", rank, minimum=1)
        if rank > dim:
            raise ValueError(f"rank: expected an int <= {dim}, the size of z, got {rank}")
        reflections = rank if reflections is None else check_int("reflections", reflections, minimum=0)
        super().__init__(dim, reflections * (dim - 1) + rank * (rank + 2), start=_start(dim, rank, reflections))
        self.rank, self.reflections = rank, reflections
        self._entries, self._halves = free_entries(reflections, dim), halves(rank, _REACH)

    def causal_order(self) -> Tensor | None:
        """From the last variable to the first where ``Q = I``: there the Jacobian is upper triangular."""
        return None if self.reflections else torch.arange(self.dim, device=self._like.device).flip(0)

    def _numbers(self, z: Tensor, context: Tensor | None) -> tuple[_Basis, Triangle, Triangle, Tensor, Tensor, Tensor]:
        """Q, R1, R2, b, ``1 + r1_ii r2_ii`` and ``r1_ii r2_ii``."""
        rank = self.rank
        sizes = [self.reflections * (self.dim - 1), rank * (rank + 1), rank]
        vectors, numbers, b = cast(Tensor, context).split(sizes, dim=-1)
        square, raw = torch.tanh(numbers / _REACH).split([rank**2, rank], dim=-1)
        above, diagonal, below = apart(square.unflatten(-1, (rank, rank)), self._halves)
        scale = positive(_REACH * raw)
        _, gain, room = bounded_gain(_REACH * diagonal * scale)
        return self._basis(z, vectors), Triangle(above, gain / scale), Triangle(below.mT, scale), b, room, gain

    def _basis(self, z: Tensor, vectors: Tensor) -> _Basis:
        """Q itself where an example has several points, which then share its making."""
        if self.reflections == 0 and self.rank == self.dim:
            return None
        make = orthonormal if z.ndim > vectors.ndim else Reflected.of
        v = pivoted(vectors.unflatten(-1, (self.reflections, self.dim - 1)), self._entries)
        return make(v, self.rank, long=True)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        form = Form(self.dim, self.rank, self.reflections, _REACH, self._halves)
        hand = form if type(self) is Sylvester else None  # a subclass may have numbers of its own
        return _by_hand.forward(hand, self._plain_forward, z, cast(Tensor, context))

    def _plain_forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return sylvester(z, *self._numbers(z, context))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        q, r1, r2, b, room, gain = self._numbers(z, context)
        return sylvester_inverse(z, q, r1, r2, b, room, preimage, gain)

    def extra_repr(self) -> str:
        """Sizes, for the module's repr."""
        return f"{super().extra_repr()}, rank={self.rank}, reflections={self.reflections}"


def _start(dim: int, rank: int, reflections: int) -> Tensor:
    """No move, ``R1 = 0``, along random directions Q and with a random R2; b is 0."""
    vectors = torch.randn(reflections * (dim - 1), device="cpu") / math.sqrt(dim)
    below = (torch.randn(rank, rank, device="cpu") / math.sqrt(rank)).tril(-1)
    raw = torch.randn(rank, device="cpu") / math.sqrt(rank)
    return torch.cat([vectors, below.flatten(), raw, raw.new_zeros(rank)])
