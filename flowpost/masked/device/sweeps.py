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

from flowpost.masked.device import solves
from flowpost.masked.device.fused import IN_PARTS, SOLVED
from flowpost.masked.device.kernels import ACTIVATIONS, activation_slope, launch, power
from flowpost.masked.device.tiles import activate, product, tile, variable


@triton.jit(do_not_specialize=["count"])
def sweep_kernel(
    image_ptr, start_ptr, start_row, weights, biases, states, found_ptr, order_ptr, count, first_constant,
    second_constant, DIM: tl.constexpr, OUTPUTS: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr,
    KIND: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``x_i = f^-1(y_i; n_i(x_{<i}))`` for i in order."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_here = rows < count
    which = tl.arange(0, COLUMNS)
    for k in range(0, DIM):
        i = variable(order_ptr, k)
        seen_ptr, seen, stop = found_ptr, DIM, k
        for layer in tl.static_range(HIDDEN):
            first, last = (k * WIDTHS[layer] + DIM - 1) // DIM, ((k + 1) * WIDTHS[layer] + DIM - 1) // DIM
            units = first + tl.arange(0, UNITS)
            unit_here = units < last
            sums = product(seen_ptr, seen, weights[layer], seen, rows, row_here, units, unit_here, 0, stop,
                           order_ptr if layer == 0 else None, ROWS, UNITS, BLOCK, DOT)  # fmt: skip
            here = row_here[:, None] & unit_here[None, :]
            if layer == 0:
                sums += tl.load(start_ptr + rows[:, None] * start_row + units[None, :], mask=here, other=0.0)
            else:
                sums += tl.load(biases[layer - 1] + units, mask=unit_here, other=0.0)[None, :]
            at = states[layer] + rows[:, None] * WIDTHS[layer] + units[None, :]
            tl.store(at, activate(sums, ACTIVATION), mask=here)
            tl.debug_barrier()
            seen_ptr, seen, stop = states[layer], WIDTHS[layer], last
        outputs, out_here = which * DIM + i, which < OUTPUTS
        numbers = product(seen_ptr, seen, weights[HIDDEN], seen, rows, row_here, outputs, out_here, 0, stop,
                          order_ptr if HIDDEN == 0 else None, ROWS, COLUMNS, COLUMN_BLOCK, DOT)  # fmt: skip
        if HIDDEN == 0:
            here = row_here[:, None] & out_here[None, :]
            numbers += tl.load(start_ptr + rows[:, None] * start_row + outputs[None, :], mask=here, other=0.0)
        else:
            numbers += tl.load(biases[HIDDEN - 1] + outputs, mask=out_here, other=0.0)[None, :]
        if ROWS == 1:
            at, here = tl.program_id(0).to(tl.int64) * DIM + i, True
            of_row, place = tl.reshape(numbers, [COLUMNS]), which
        else:
            at, here = rows[:, None] * DIM + i, row_here[:, None]
            of_row, place = numbers, which[None, :]
        y = tl.load(image_ptr + at, mask=here, other=0.0)
        x = solves.solve(y, of_row, place, first_constant, second_constant, KIND, PARTS, OUTPUTS)
        tl.store(found_ptr + at, x, mask=here)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["count"])
def transposed_kernel(
    grad_ptr, fixed_ptr, moved_ptr, weights, hidden, hidden_rows, total_ptr, out_ptr, sums, order_ptr, count,
    DIM: tl.constexpr, OUTPUTS: tl.constexpr, NUMBERS: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``v_j = g_j + sum_{i > j} (fixed_i + v_i moved_i) dn_i/dx_j`` for j from the last in order to the first."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_here = rows < count
    one, which = tl.arange(0, COLUMNS), tl.arange(0, NUMBERS)
    for step in range(0, DIM):
        k = DIM - 1 - step
        j = variable(order_ptr, k)
        alone, alone_here = one + j, one < 1
        if HIDDEN == 0:
            found = product(out_ptr, OUTPUTS * DIM, weights[0], OUTPUTS * DIM, rows, row_here, alone, alone_here,
                            k + 1, DIM, order_ptr, ROWS, COLUMNS, COLUMN_BLOCK, DOT, OUTPUTS)  # fmt: skip
        else:
            first = ((k + 1) * WIDTHS[0] + DIM - 1) // DIM
            found = product(sums[0], WIDTHS[0], weights[0], WIDTHS[0], rows, row_here, alone, alone_here,
                            first, WIDTHS[0], None, ROWS, COLUMNS, COLUMN_BLOCK, DOT)  # fmt: skip
        total = tl.sum(found, 1) + tl.load(grad_ptr + rows * DIM + j, mask=row_here, other=0.0)
        tl.store(total_ptr + rows * DIM + j, total, mask=row_here)
        at = rows[:, None] * (OUTPUTS * DIM) + which[None, :] * DIM + j
        here = row_here[:, None] & (which < OUTPUTS)[None, :]
        moved = total[:, None] * tl.load(moved_ptr + at, mask=here, other=0.0)
        tl.store(out_ptr + at, tl.load(fixed_ptr + at, mask=here, other=0.0) + moved, mask=here)
        tl.debug_barrier()
        for layer in tl.static_range(HIDDEN - 1, -1, -1):
            first, last = (k * WIDTHS[layer] + DIM - 1) // DIM, ((k + 1) * WIDTHS[layer] + DIM - 1) // DIM
            units = first + tl.arange(0, UNITS)
            unit_here = units < last
            if layer == HIDDEN - 1:
                found = product(out_ptr, OUTPUTS * DIM, weights[layer + 1], OUTPUTS * DIM, rows, row_here, units,
                                unit_here, k, DIM, order_ptr, ROWS, UNITS, BLOCK, DOT, OUTPUTS)  # fmt: skip
            else:
                found = product(sums[layer + 1], WIDTHS[layer + 1], weights[layer + 1], WIDTHS[layer + 1], rows,
                                row_here, units, unit_here, (k * WIDTHS[layer + 1] + DIM - 1) // DIM,
                                WIDTHS[layer + 1], None, ROWS, UNITS, BLOCK, DOT)  # fmt: skip
            here = row_here[:, None] & unit_here[None, :]
            at = hidden[layer] + rows[:, None] * hidden_rows[layer] + units[None, :]
            slope = activation_slope(tl.load(at, mask=here, other=0.0).to(tl.float32), ACTIVATION)
            at = sums[layer] + rows[:, None] * WIDTHS[layer] + units[None, :]
            tl.store(at, tl.where(slope == 0, 0.0, found * slope), mask=here)
            tl.debug_barrier()


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
    # A parameter may lie column by column, as one from another library does, and a mask leaves it so. Without a context
    # a start is such a parameter, expanded over the rows.
    weights, biases = ([each.contiguous() for each in group] for group in (weights, biases))
    start = start if start.stride(1) == 1 else start.contiguous()
    (count, dim), widths = images.shape, tuple(len(weight) for weight in weights[:-1])
    outputs = len(weights[-1]) // dim
    states = tuple(images.new_empty(count, width) for width in widths)
    programs, options = tile(count, dim, widths, outputs)
    launch(
        sweep_kernel, (programs,), images, start, start.stride(0), tuple(weights), tuple(biases), states, found, index,
        count, *(constants or (0.0, 1.0)), OUTPUTS=outputs, WIDTHS=widths, KIND=SOLVED.index(name),
        PARTS=int(constants[0]) if name in IN_PARTS else 1, ACTIVATION=ACTIVATIONS.index(activation), **options,
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
    (count, dim), widths = grad.shape, tuple(value.shape[1] for value in hidden)
    sums = tuple(grad.new_empty(value.shape) for value in hidden)
    total, outs, outputs = torch.empty_like(grad), torch.empty_like(fixed), fixed.shape[1] // dim
    programs, options = tile(count, dim, widths)
    launch(
        transposed_kernel, (programs,), grad, fixed, moved, tuple(weights), tuple(hidden),
        tuple(each.stride(0) for each in hidden), total, outs, sums, index, count, OUTPUTS=outputs,
        NUMBERS=power(outputs), WIDTHS=widths, ACTIVATION=ACTIVATIONS.index(activation), **options,
    )  # fmt: skip
    return [total, outs, *sums[::-1]]
