"""A Sylvester step's pass and its way back, written out.

With many variables such a step is bound by the squares that its operations write. Here one is kept, the bounded numbers
of both R1 and R2, and on a CPU all others are made and used up a few examples at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.reflections import Reflected, Turned, collect, size_of, spread
from flowpost.numerics.ridge import bounded_gain, bounded_slope, log_slope, log_slope_pull, positive, ridge
from flowpost.numerics.squares import bounded, pull, times


class Form(NamedTuple):
    """What a step of sizes is, and what it keeps."""

    dim: int
    rank: int
    reflections: int
    reach: float
    """Within which R1 and R2 are."""
    halves: Constant
    """Of `reach`, as `numerics.squares` has them."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the vectors' numbers, of those that are bounded, and of b."""
        return self.reflections * (self.dim - 1), self.rank * (self.rank + 1), self.rank

    @property
    def turns(self) -> bool:
        """Whether Q is not I."""
        return self.reflections > 0 or self.rank < self.dim

    def split(self, context: Tensor) -> tuple[Tensor, ...]:
        """The vectors' numbers, those that are bounded, and b."""
        return context.split(self.sizes, -1)

    def squares(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Of the numbers that are bounded, R1 beside R2^T, and what makes R2's diagonal."""
        square, raw = numbers.split([self.rank**2, self.rank], -1)
        return square.unflatten(-1, (self.rank, self.rank)), raw

    def values(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``z' = z + Q R1 tanh(R2 Q^T z + b)``, its log-det, and what `gradients` needs."""
        image, log_det, numbers, turns = _values(self, z, context)
        return image, log_det, [*numbers, *(() if turns is None else turns.tensors())]

    def gradients(
        self, z: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_log_det: Tensor, *, of_context: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients at z and at the context."""
        count = len(_Numbers._fields)
        numbers, turns = _Numbers(*kept[:count]), _Turns.of(self.rank, kept[count:])
        return _gradients(self, numbers, turns, grad, grad_log_det, of_context=of_context)


class _Numbers(NamedTuple):
    """What a pass has worked out, each ``(N, M)`` but for the first."""

    bounded: Tensor
    """``(N, M (M + 1))``, over the reach."""
    raw: Tensor
    """What makes R2's diagonal,"""
    scale: Tensor
    """and that diagonal."""
    diagonal: Tensor
    """What makes R1's, over `scale`."""
    gain: Tensor
    """``r1_ii r2_ii``"""
    room: Tensor
    """``1 + r1_ii r2_ii``"""
    first: Tensor
    """R1's diagonal."""
    along: Tensor
    """``Q^T z``"""
    value: Tensor
    slope: Tensor


class _Turns(NamedTuple):
    """Q, as reflections, and what they have turned."""

    q: Reflected
    size: Tensor
    """``(N, K, 1)``: the vectors were divided by it."""
    there: Sequence[Turned] = ()
    back: Sequence[Turned] = ()

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in a row."""
        yield self.size
        for pair in (*self.q.runs, *self.there, *self.back):
            yield from pair

    @classmethod
    def of(cls, rank: int, tensors: Sequence[Tensor]) -> _Turns | None:
        """What ``tensors`` gave."""
        if not tensors:
            return None
        pairs = [*zip(tensors[1::2], tensors[2::2], strict=True)]
        count = len(pairs) // 3
        there, back = ([Turned(*pair) for pair in pairs[k * count : (k + 1) * count]] for k in (1, 2))
        return cls(Reflected(pairs[:count], rank), tensors[0], there, back)


def _values(form: Form, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, _Numbers, _Turns | None]:
    """The image, the log-det, and what the way back needs."""
    vectors, numbers, b = form.split(context)
    numbers = bounded(numbers, form.reach, form.rank)
    square, raw = form.squares(numbers)
    above, below = form.halves.on(z)
    diagonal, raw = form.reach * square.diagonal(dim1=-2, dim2=-1), form.reach * raw
    scale = positive(raw)
    _, gain, room = bounded_gain(diagonal * scale)
    first = gain / scale

    turns = _reflected(form, vectors) if form.turns else None
    along, there = (z, []) if turns is None else turns.q.turn(z)
    value, slope = ridge(torch.addcmul(times(along, square, below), scale, along) + b)
    move = torch.addcmul(times(value, square, above, transposed=True), first, value)
    move, back = (move, []) if turns is None else turns.q.turn_back(move)
    turns = None if turns is None else turns._replace(there=there, back=back)
    log_det = log_slope(gain, room, value, slope).sum(-1)
    return z + move, log_det, _Numbers(numbers, raw, scale, diagonal, gain, room, first, along, value, slope), turns


def _reflected(form: Form, vectors: Tensor) -> _Turns:
    v = spread(vectors, form.reflections, form.dim)
    size = size_of(v)
    return _Turns(Reflected.of_sized(v.div_(size), form.rank), size)


def _gradients(
    form: Form, numbers: _Numbers, turns: _Turns | None, grad: Tensor, grad_log_det: Tensor, *, of_context: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients at z and at the context."""
    kept, raw, scale, diagonal, gain, room, first, along, value, slope = numbers
    square, bounded_raw = form.squares(kept)
    above, below = form.halves.on(grad)
    at_move, there = (grad, []) if turns is None else turns.q.turn(grad)
    by_gain, by_x = log_slope_pull(gain, room, value, slope)
    at_log_det = grad_log_det.unsqueeze(-1)
    at_value = torch.addcmul(times(at_move, square, above), first, at_move)
    at_x = torch.addcmul(at_log_det * by_x, at_value, slope)
    at_along = torch.addcmul(times(at_x, square, below, transposed=True), scale, at_x)
    at_z, back = (at_along, []) if turns is None else turns.q.turn_back(at_along)
    if not of_context:
        return grad + at_z, None

    at_first = at_move * value / scale
    at_made = torch.addcmul(at_first, at_log_det, by_gain) * bounded_slope(diagonal * scale)
    at_scale = torch.addcmul(at_x * along - at_first * first, at_made, diagonal)
    found = grad.new_empty(len(grad), sum(form.sizes))
    at_vectors, at_numbers, at_b = form.split(found)
    at_square, at_raw = form.squares(at_numbers)
    at_b.copy_(at_x)
    torch.ops.aten.tanh_backward.grad_input(at_scale * bounded_slope(raw), bounded_raw, grad_input=at_raw)
    reach = form.reach
    pull((at_move / reach, value), at_made * scale, (along / reach, at_x), square, form.halves, at_square)
    if turns is not None:
        at_v = turns.q.pull((turns.there, there), (back, turns.back))
        collect(at_v.div_(turns.size), at_vectors)
    return grad + at_z, found
