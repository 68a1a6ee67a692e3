"""Products with a weight whose zeros form a staircase: they are never read, forward or backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.multiplying import HELPS, add_product, linear, pays, plus_product, product, write_product
from flowpost.numerics.operators import define
from flowpost.numerics.products import whole_is_faster
from flowpost.numerics.watchers import unless_compiled

_ALIGN = 32  # matrix products of odd width run at half the speed
# Weights whose product, at a batch of some hundred, costs what the calls for one more block do.
_GRAIN = 2**17 if HELPS else 2**14
_APART = 256  # columns from which a product of their own costs less than masking them
_FEW = 9 * 2**20  # multiplications up to which two blocks cost more than all of the weight does

Run = tuple[int, int]
"""Columns by their first and their number."""


class Block(NamedTuple):
    """Rows of a weight, and its columns: on the stair's edge, read by all the rows, read by none."""

    rows: Run
    stair: Run
    full: Run
    rest: Run


class Staircase:
    """Where the weight ``(out, in)`` of a layer, whose units read the inputs of at most their own degree, is not zero.

    The rows are cut into blocks. Of each, the columns that all rows read are multiplied as they are, the few on the
    stair's edge are masked on every call, so that no initialization, load or noise can make a unit read what it must
    not, and the rest is never touched. That needs inputs and units that are sorted, up or down; of any other order
    nothing is skipped.

    Args:
        inputs: the inputs' degrees.
        units: the units' degrees.
        groups: how many times the units are repeated.
    """

    def __init__(self, inputs: Sequence[int], units: Sequence[int], groups: int = 1) -> None:
        self.inputs, self.units = list(inputs), [*units] * groups
        # K blocks skip (1 - 1/K) / 2 of the weight, so one more pays until K is about the root of its size.
        count = min(math.isqrt(len(inputs) * len(units) // _GRAIN), len(units) // _ALIGN)
        if count <= 1 or sorted(inputs) not in (self.inputs, self.inputs[::-1]):
            self.blocks = [Block((0, len(self.units)), (0, len(inputs)), (0, 0), (0, 0))]
        else:
            stops = [min(len(units), _round_up(len(units) * i // count)) for i in range(count)] + [len(units)]
            firsts = range(0, len(self.units), len(units))
            rows = [(first + start, stop - start) for first in firsts for start, stop in pairwise(stops)]
            self.blocks = [_block(self.inputs, self.units, run) for run in rows]
        self.mask = self._mask()
        """The whole mask, ``(out, in)``, of bools."""
        self._edges = [Constant(self.mask.value.narrow(0, *b.rows).narrow(1, *b.stair).float()) for b in self.blocks]

    def _mask(self) -> Constant:
        inputs, units = (torch.tensor(degrees, device="cpu") for degrees in (self.inputs, self.units))
        return Constant(inputs <= units.unsqueeze(-1))

    def place(self, weight: Tensor) -> None:
        """Copy the masks to where the weight is, so that no call that somebody watches has to."""
        self.mask.on(weight)
        if whole_is_faster(weight):
            self.factor(weight)
        else:
            self.edges(weight)

    def factor(self, weight: Tensor) -> Tensor:
        """The whole mask in numbers like the weight's: one call multiplies many weights only by their own dtype."""
        return self.mask.on(weight, as_numbers=True)

    def edges(self, weight: Tensor) -> list[Tensor]:
        """The mask's part on each block's edge, in numbers like the weight's."""
        return [edge.on(weight) for edge in self._edges]

    def add_product(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add ``x W^T`` to y ``(N, out)`` for x ``(N, in)``."""
        mask = self._whole(x, weight)
        if mask is not None:
            add_product(y, x, (weight * mask).t())
        else:
            (_add_product if len(self.blocks) == 2 else _add_many)(y, x, weight, self.edges(weight), self.blocks)

    def affine(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The layer, ``b + x W^T``, for x ``(N, in)``."""
        mask = self._whole(x, weight)
        if mask is not None:
            return linear(x, weight * mask, bias)
        y = bias.expand(len(x), -1).clone()
        self.add_product(y, x, weight)
        return y

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The product ``grad W`` for grad ``(N, out)``."""
        mask = self._whole(grad, weight)
        if mask is not None:
            return product(grad, weight * mask)
        find = _input_gradient if len(self.blocks) == 2 else _input_many
        return find(grad, weight, self.edges(weight), self.blocks)

    def add_input_gradient(self, so_far: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """The sum ``so_far + grad W``, ``(N, in)``."""
        mask = self._whole(grad, weight)
        if mask is not None:
            return plus_product(so_far, grad, weight * mask)
        return so_far + self.input_gradient(grad, weight)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """The product ``grad^T x``, zero where the weight is not read."""
        mask = self._whole(grad, x)
        if mask is not None:
            return product(grad.t(), x).mul_(mask)
        find = _weight_gradient if len(self.blocks) == 2 else _weight_many
        return find(grad, x, self.edges(x), self.blocks)

    def _whole(self, rows: Tensor, like: Tensor) -> Tensor | None:
        """The whole mask, where one product takes less time than the blocks'."""
        if len(self.blocks) == 1:
            return self._edges[0].on(like)
        return self.factor(like) if len(self.blocks) == 2 and _are_few(rows, self.mask.value) else None


# For a number of rows on the other side a compiler would start anew.
_are_few = unless_compiled(lambda rows, weights: len(rows) * weights.numel() < _FEW, lambda *_: False)


def _runs(blocks: Sequence[Block]) -> list[int]:
    """Blocks as an operator takes them."""
    return [number for block in blocks for run in block for number in run]


def _blocks(runs: Sequence[int]) -> list[Block]:
    """The inverse of `_runs`."""
    pairs = list(zip(runs[0::2], runs[1::2], strict=True))
    return [Block(*pairs[first : first + 4]) for first in range(0, len(pairs), 4)]


def _add_product(y: Tensor, x: Tensor, weight: Tensor, masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    heights = _heights(blocks)
    for part, weights, mask, (_, stair, full, _) in zip(
        y.split_with_sizes(heights, 1), weight.split_with_sizes(heights), masks, blocks, strict=True
    ):
        add_product(part, x.narrow(1, *stair), (weights.narrow(1, *stair) * mask).t())
        if full[1]:
            add_product(part, x.narrow(1, *full), weights.narrow(1, *full).t())


def _input_gradient(grad: Tensor, weight: Tensor, masks: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    result, heights = grad.new_empty(len(grad), weight.shape[1]), _heights(blocks)
    parts = list(zip(grad.split_with_sizes(heights, 1), weight.split_with_sizes(heights), masks, blocks, strict=True))
    put = write_product  # of the last block, which reads most; those of the others are added
    for part, weights, mask, (_, stair, full, rest) in reversed(parts):
        put(result.narrow(1, *stair), part, weights.narrow(1, *stair) * mask)
        if full[1]:
            put(result.narrow(1, *full), part, weights.narrow(1, *full))
        if rest[1] and put is write_product:
            result.narrow(1, *rest).zero_()
        put = add_product
    return result


def _weight_gradient(grad: Tensor, x: Tensor, masks: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    grad = grad.t()
    whole = pays(grad, x)  # its result is written once, and parts of one would be copied
    result, heights = product(grad, x) if whole else grad.new_empty(len(grad), x.shape[1]), _heights(blocks)
    for weights, grads, mask, (_, stair, full, rest) in zip(
        result.split_with_sizes(heights), grad.split_with_sizes(heights), masks, blocks, strict=True
    ):
        edge = weights.narrow(1, *stair)
        if not whole:
            write_product(edge, grads, x.narrow(1, *stair))
            if full[1]:
                write_product(weights.narrow(1, *full), grads, x.narrow(1, *full))
        edge.mul_(mask)
        if rest[1]:
            weights.narrow(1, *rest).zero_()
    return result


def _heights(blocks: Sequence[Block]) -> list[int]:
    """The blocks' numbers of rows: one call makes the views of all of them."""
    return [block.rows[1] for block in blocks]


# The fakes ask for shapes: `len` would fix the batch's size, and a compiler would start anew for every other.
_add_operator = define(
    "add_product(Tensor(a!) y, Tensor x, Tensor weight, Tensor[] masks, int[] runs) -> ()",
    lambda y, x, weight, masks, runs: _add_product(y, x, weight, masks, _blocks(runs)),
    lambda *_: None,
)
_input_operator = define(
    "input_gradient(Tensor grad, Tensor weight, Tensor[] masks, int[] runs) -> Tensor",
    lambda grad, weight, masks, runs: _input_gradient(grad, weight, masks, _blocks(runs)),
    lambda grad, weight, *_: grad.new_empty(grad.shape[0], weight.shape[1]),
)
_weight_operator = define(
    "weight_gradient(Tensor grad, Tensor x, Tensor[] masks, int[] runs) -> Tensor",
    lambda grad, x, masks, runs: _weight_gradient(grad, x, masks, _blocks(runs)),
    lambda grad, x, *_: grad.new_empty(grad.shape[1], x.shape[1]),
)

# Of many blocks a compiler sees an operator: it copies a whole matrix for each block that is written into it.
_add_many = unless_compiled(
    _add_product, lambda y, x, weight, masks, blocks: _add_operator(y, x, weight, masks, _runs(blocks))
)
_input_many = unless_compiled(
    _input_gradient, lambda grad, weight, masks, blocks: _input_operator(grad, weight, masks, _runs(blocks))
)
_weight_many = unless_compiled(
    _weight_gradient, lambda grad, x, masks, blocks: _weight_operator(grad, x, masks, _runs(blocks))
)


def _block(inputs: Sequence[int], units: Sequence[int], rows: Run) -> Block:
    start, height = rows
    size, degrees = len(inputs), units[start : start + height]
    full = sum(degree <= min(degrees) for degree in inputs) // _ALIGN * _ALIGN
    full = full if full >= _APART else 0
    edge = min(size, _round_up(sum(degree <= max(degrees) for degree in inputs)))
    if inputs[0] > inputs[-1]:
        return Block(rows, (size - edge, edge - full), (size - full, full), (0, size - edge))
    return Block(rows, (full, edge - full), (0, full), (edge, size - edge))


def _round_up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
