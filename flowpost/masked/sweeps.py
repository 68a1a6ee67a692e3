# ruff: noqa: ANN001, ANN201, ANN202, RET505 (Triton reads annotations as types, and compiles branches by their else)
"""Triton's kernels of an inverse: the whole sweep over the variables in one launch, and the transposed one.

A program owns ROWS rows. It finds one variable after the other, and reads each weight that the mask leaves once. What
its threads write they read again after a barrier. Hidden layers' units of degree k are those from ``k width / dim`` on.
"""

# Where Triton is installed, its annotations are of what a kernel sees, and not of what is handed to it.
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from flowpost.masked import maps
from flowpost.masked.fused import MAPS
from flowpost.masked.kernels import ACTIVATIONS, activation_slope, launch, power

_TILE = 8192  # elements of a product's tile
_MANY = 1024  # rows from which a program owns several
_SMALLEST = 16  # axis of a product on tensor cores


@triton.jit
def _product(
    x_ptr, x_row, weight_ptr, weight_row, rows, row_here, units, unit_here, first, stop, order_ptr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The sums ``(ROWS, UNITS)`` of ``weight[unit, i] x[row, i]`` over i from `first` to `stop`, i in an order."""
    if DOT:
        found = tl.zeros([ROWS, UNITS], tl.float32)
    else:
        parts = tl.zeros([ROWS, UNITS, BLOCK], tl.float32)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here = place < stop
        column = place
        if order_ptr is not None:
            column = tl.load(order_ptr + place, mask=here, other=0)
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
def _variable(order_ptr, k):
    if order_ptr is not None:
        return tl.load(order_ptr + k)
    else:
        return k


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return tl.maximum(x, 0.0)
    elif ACTIVATION == 1:
        small = tl.minimum(x, 0.0)
        series = small * (1 + small * (1 / 2 + small * (1 / 6 + small / 24)))
        return tl.where(x > 0, x, tl.where(small > -0.05, series, tl.exp(small) - 1))
    else:
        return maps.tanh(x)


@triton.jit
def sweep_kernel(
    image_ptr, start_ptr, start_row, weights, biases, states, found_ptr, order_ptr, count, forget_bias, gain,
    DIM: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``x_i = f^-1(y_i; n_i(x_{<i}))`` for i in order."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_here = rows < count
    for k in range(0, DIM):
        variable = _variable(order_ptr, k)
        seen_ptr, seen, stop = found_ptr, DIM, k
        for layer in tl.static_range(HIDDEN):
            first, last = (k * WIDTHS[layer] + DIM - 1) // DIM, ((k + 1) * WIDTHS[layer] + DIM - 1) // DIM
            units = first + tl.arange(0, UNITS)
            unit_here = units < last
            sums = _product(seen_ptr, seen, weights[layer], seen, rows, row_here, units, unit_here, 0, stop,
                            order_ptr if layer == 0 else None, ROWS, UNITS, BLOCK, DOT)  # fmt: skip
            here = row_here[:, None] & unit_here[None, :]
            if layer == 0:
                sums += tl.load(start_ptr + rows[:, None] * start_row + units[None, :], mask=here, other=0.0)
            else:
                sums += tl.load(biases[layer - 1] + units, mask=unit_here, other=0.0)[None, :]
            at = states[layer] + rows[:, None] * WIDTHS[layer] + units[None, :]
            tl.store(at, _activate(sums, ACTIVATION), mask=here)
            tl.debug_barrier()
            seen_ptr, seen, stop = states[layer], WIDTHS[layer], last
        which = tl.arange(0, PAIR)
        outputs, out_here = which * DIM + variable, which < 2
        numbers = _product(seen_ptr, seen, weights[HIDDEN], seen, rows, row_here, outputs, out_here, 0, stop,
                           order_ptr if HIDDEN == 0 else None, ROWS, PAIR, BLOCK, DOT)  # fmt: skip
        if HIDDEN == 0:
            here = row_here[:, None] & out_here[None, :]
            numbers += tl.load(start_ptr + rows[:, None] * start_row + outputs[None, :], mask=here, other=0.0)
        else:
            numbers += tl.load(biases[HIDDEN - 1] + outputs, mask=out_here, other=0.0)[None, :]
        p = tl.sum(tl.where(which == 0, numbers, 0.0), 1)
        q = tl.sum(tl.where(which == 1, numbers, 0.0), 1)
        y = tl.load(image_ptr + rows * DIM + variable, mask=row_here, other=0.0)
        x, _ = maps.preimage(y, p, q, forget_bias, gain, KIND)
        tl.store(found_ptr + rows * DIM + variable, x, mask=row_here)
        tl.debug_barrier()


@triton.jit
def transposed_kernel(
    grad_ptr, fixed_ptr, moved_ptr, weights, hidden, hidden_rows, total_ptr, out_ptr, sums, order_ptr, count,
    DIM: tl.constexpr, OUTPUTS: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``v_j = g_j + sum_{i > j} (fixed_i + v_i moved_i) dn_i/dx_j`` for j from the last in order to the first."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_here = rows < count
    one = tl.arange(0, PAIR)
    for step in range(0, DIM):
        k = DIM - 1 - step
        variable = _variable(order_ptr, k)
        alone, alone_here = one + variable, one < 1
        if HIDDEN == 0:
            found = _from_outputs(out_ptr, weights[0], rows, row_here, alone, alone_here, k + 1, order_ptr,
                                  DIM, OUTPUTS, ROWS, PAIR, BLOCK, DOT)  # fmt: skip
        else:
            first = ((k + 1) * WIDTHS[0] + DIM - 1) // DIM
            found = _product(sums[0], WIDTHS[0], weights[0], WIDTHS[0], rows, row_here, alone, alone_here,
                             first, WIDTHS[0], None, ROWS, PAIR, BLOCK, DOT)  # fmt: skip
        total = tl.sum(found, 1) + tl.load(grad_ptr + rows * DIM + variable, mask=row_here, other=0.0)
        tl.store(total_ptr + rows * DIM + variable, total, mask=row_here)
        for output in tl.static_range(OUTPUTS):
            at = rows * (OUTPUTS * DIM) + output * DIM + variable
            fixed = tl.load(fixed_ptr + at, mask=row_here, other=0.0)
            tl.store(out_ptr + at, fixed + total * tl.load(moved_ptr + at, mask=row_here, other=0.0), mask=row_here)
        tl.debug_barrier()
        for layer in tl.static_range(HIDDEN - 1, -1, -1):
            first, last = (k * WIDTHS[layer] + DIM - 1) // DIM, ((k + 1) * WIDTHS[layer] + DIM - 1) // DIM
            units = first + tl.arange(0, UNITS)
            unit_here = units < last
            if layer == HIDDEN - 1:
                found = _from_outputs(out_ptr, weights[layer + 1], rows, row_here, units, unit_here, k, order_ptr,
                                      DIM, OUTPUTS, ROWS, UNITS, BLOCK, DOT)  # fmt: skip
            else:
                found = _product(sums[layer + 1], WIDTHS[layer + 1], weights[layer + 1], WIDTHS[layer + 1], rows,
                                 row_here, units, unit_here, (k * WIDTHS[layer + 1] + DIM - 1) // DIM,
                                 WIDTHS[layer + 1], None, ROWS, UNITS, BLOCK, DOT)  # fmt: skip
            here = row_here[:, None] & unit_here[None, :]
            at = hidden[layer] + rows[:, None] * hidden_rows[layer] + units[None, :]
            slope = activation_slope(tl.load(at, mask=here, other=0.0).to(tl.float32), ACTIVATION)
            at = sums[layer] + rows[:, None] * WIDTHS[layer] + units[None, :]
            tl.store(at, tl.where(slope == 0, 0.0, found * slope), mask=here)
            tl.debug_barrier()


@triton.jit
def _from_outputs(
    out_ptr, weight_ptr, rows, row_here, units, unit_here, first, order_ptr,
    DIM: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """What reaches units from the outputs of the variables from place `first` on; the weight ``(in, out)``."""
    found = tl.zeros([ROWS, UNITS], tl.float32)
    for output in tl.static_range(OUTPUTS):
        found += _product(out_ptr + output * DIM, OUTPUTS * DIM, weight_ptr + output * DIM, OUTPUTS * DIM, rows,
                          row_here, units, unit_here, first, DIM, order_ptr, ROWS, UNITS, BLOCK, DOT)  # fmt: skip
    return found


def solve(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    index: Tensor | None,
    activation: str,
    name: str,
    constants: Sequence[float],
) -> Tensor:
    """As `fused.sweep`."""
    images, found = images.contiguous(), torch.empty_like(images, memory_format=torch.contiguous_format)
    widths = tuple(len(weight) for weight in weights[:-1])
    states = tuple(images.new_empty(len(images), width) for width in widths)
    programs, options = _tile(len(images), images.shape[1], widths)
    launch(
        sweep_kernel, programs, images, start, start.stride(0), tuple(weights), tuple(biases), states, found, index,
        len(images), *(constants or (0.0, 1.0)), WIDTHS=widths, KIND=MAPS.index(name),
        ACTIVATION=ACTIVATIONS.index(activation), **options,
    )  # fmt: skip
    return found


def pull(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    index: Tensor | None,
    activation: str,
) -> list[Tensor]:
    """As `fused.transposed_sweep`."""
    grad, fixed, moved = grad.contiguous(), fixed.contiguous(), moved.contiguous()
    widths = tuple(value.shape[1] for value in hidden)
    sums = tuple(grad.new_empty(value.shape) for value in hidden)
    total, outs = torch.empty_like(grad), torch.empty_like(fixed)
    programs, options = _tile(len(grad), grad.shape[1], widths)
    launch(
        transposed_kernel, programs, grad, fixed, moved, tuple(weights), tuple(hidden),
        tuple(each.stride(0) for each in hidden), total, outs, sums, index, len(grad),
        OUTPUTS=fixed.shape[1] // grad.shape[1], WIDTHS=widths, ACTIVATION=ACTIVATIONS.index(activation), **options,
    )  # fmt: skip
    return [total, outs, *sums[::-1]]


def _tile(count: int, dim: int, widths: Sequence[int]) -> tuple[int, dict[str, int | bool]]:
    """The number of programs, and how a program's products are cut; the choices are those that were fastest on an H100.

    Of few rows each has a program, of many 4; or 16, whose products tensor cores run, where a degree's units are few.
    """
    units = power(max((-(-width // dim) for width in widths), default=1))
    dot = count >= _MANY and units <= _SMALLEST
    rows = _SMALLEST if dot else 4 if count >= _MANY else 1
    least = _SMALLEST if dot else 2
    block = 64 if dot else max(16, min(power(max([dim, *widths])), _TILE // (rows * units)))
    options = {"DIM": dim, "HIDDEN": len(widths), "ROWS": rows, "UNITS": max(units, least), "PAIR": least}
    return triton.cdiv(count, rows), {**options, "BLOCK": block, "DOT": dot, "num_warps": 8}
