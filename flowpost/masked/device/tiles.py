# ruff: noqa: ANN001, ANN201, RET505 (Triton reads annotations as types, and compiles branches by their else)
"""What a sweep's kernels are made of: a tile's product with a weight, an activation, and how large the tiles are."""

# Where Triton is installed, its annotations are of what a kernel sees, and not of what is handed to it.
# pyright: reportReturnType=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from flowpost.masked.device import maps
from flowpost.masked.device.kernels import blocks, power

_TILE = 8192  # elements of a product's tile
_LARGEST = 16384  # those of any: larger ones spill the registers of 8 warps, and take minutes to compile
_NEIGHBOURS = 16  # in memory, of a weight, that are read together where the largest tile holds so many
_MANY = 1024  # rows from which a program owns several
_SMALLEST = 16  # axis of a product on tensor cores
_WIDEST = 64  # numbers of a variable whose column is solved on 16 rows at once without spilling registers


@triton.jit
def product(
    x_ptr, x_row, weight_ptr, weight_row, rows, row_here, units, unit_here, first, stop, order_ptr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, GROUPS: tl.constexpr = 1,
):  # fmt: skip
    """The sums ``(ROWS, UNITS)`` of ``weight[unit, i] x[row, i]`` over i from `first` to `stop`, i in an order.

    Where x has several groups of columns, over these of each.
    """
    if DOT:
        found = tl.zeros([ROWS, UNITS], tl.float32)
    else:
        parts = tl.zeros([ROWS, UNITS, BLOCK], tl.float32)
    span = stop - first
    for start in tl.range(0, GROUPS * span, BLOCK, num_stages=1 if GROUPS > 1 else None):
        place = start + tl.arange(0, BLOCK)
        here = place < GROUPS * span
        group = place // span if GROUPS > 1 else 0
        column = first + place - group * span
        if order_ptr is not None:
            column = tl.load(order_ptr + column, mask=here, other=0)
        column += group * (x_row // GROUPS)
        x = tl.load(x_ptr + rows[:, None] * x_row + column[None, :], mask=row_here[:, None] & here[None, :], other=0.0)
        if DOT:
            at = weight_ptr + units[None, :] * weight_row + column[:, None]
            found = tl.dot(
                x, tl.load(at, mask=unit_here[None, :] & here[:, None], other=0.0), found, input_precision="ieee"
            )
        else:
            at = weight_ptr + units[:, None] * weight_row + column[None, :]
            parts += x[:, None, :] * tl.load(at, mask=unit_here[:, None] & here[None, :], other=0.0)[None, :, :]
    if DOT:
        return found
    else:
        return tl.sum(parts, 2)


@triton.jit
def variable(order_ptr, k):
    """The k-th variable in an order."""
    if order_ptr is not None:
        return tl.load(order_ptr + k)
    else:
        return k


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation's value; that of nan is nan, which a GPU's maximum would drop."""
    if ACTIVATION == 0:
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 1:
        small = tl.where(x > 0, 0.0, x)
        series = small * (1 + small * (1 / 2 + small * (1 / 6 + small / 24)))
        return tl.where(x > 0, x, tl.where(small > -0.05, series, tl.exp(small) - 1))
    else:
        return maps.tanh(x)


def tile(count: int, dim: int, widths: Sequence[int], numbers: int = 1) -> tuple[int, dict[str, int | bool]]:
    """The number of programs, and how a program's products are cut; the choices are those that were fastest on an H100.

    Of few rows each has a program, of many 4, unless a degree has hundreds of units; or 16, whose products tensor cores
    run, where a degree's units are few, and so are the outputs that a product gives of one variable, `numbers`.
    """
    units = power(max((-(-width // dim) for width in widths), default=1))
    dot = count >= _MANY and units <= _SMALLEST and power(numbers) <= _WIDEST
    several = 4 * _NEIGHBOURS * max(units, power(numbers)) <= _LARGEST
    rows = _SMALLEST if dot else 4 if count >= _MANY and several else 1
    least = _SMALLEST if dot else 2
    block = 64 if dot else _block(power(max([dim, *widths])), rows * units)
    columns = max(power(numbers), least)
    column_block = 64 if dot else _block(block, rows * columns)
    sizes = {"ROWS": rows, "UNITS": max(units, least), "BLOCK": block, "COLUMNS": columns, "COLUMN_BLOCK": column_block}
    return blocks(count, rows), {"DIM": dim, "HIDDEN": len(widths), **sizes, "DOT": dot, "num_warps": 8}


def _block(width: int, sums: int) -> int:
    """How many columns of a weight a product of so many sums reads together."""
    return max(1, min(_NEIGHBOURS, _LARGEST // sums), min(width, _TILE // sums))
