# ruff: noqa: ANN001, ANN201, ANN202, RET505 (Triton reads annotations as types, and compiles branches by their else)
"""Triton's kernels of a pass: an element-wise map, its gradients, and an activation's gradient with the bias's.

Each function launches one. Everything is computed in float32 but log-dets, which are summed in float64; what a network
gives and gets back may be in half precision. No kernel is made for some numbers of rows alone: a last short batch of an
epoch would wait for its compilation.
"""

# Where Triton is installed, its annotations are of what a kernel sees, and not of what is handed to it.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from flowpost.masked.device import maps
from flowpost.masked.device.fused import MAPS

ACTIVATIONS = ("relu", "elu", "tanh")
_COLUMNS = 1024  # of a tile, at most
_TILE = 512  # elements
_UNITS = 32  # of a program's, by 128 bytes of a row
_SHARE = 512  # rows of a program's; of many more the few programs that there are units for would keep a GPU waiting
_ROWS = 64  # of them at once


@triton.jit(do_not_specialize=["count"])
def element_kernel(
    z_ptr, numbers_ptr, numbers_row, total_ptr, image_ptr, log_det_ptr, count, forget_bias, gain,
    DIM: tl.constexpr, KIND: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Map ROWS rows, and sum each one's log-slopes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    log_det = tl.zeros([ROWS], tl.float64)
    if total_ptr is not None:
        log_det += tl.load(total_ptr + rows, mask=rows < count, other=0.0)
    for first in range(0, DIM, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        here = (rows[:, None] < count) & (columns < DIM)
        z = tl.load(z_ptr + rows[:, None] * DIM + columns, mask=here, other=0.0)
        p = tl.load(numbers_ptr + rows[:, None] * numbers_row + columns, mask=here, other=0.0).to(tl.float32)
        q = tl.load(numbers_ptr + rows[:, None] * numbers_row + DIM + columns, mask=here, other=0.0).to(tl.float32)
        if INVERSE:
            image, logs = maps.preimage(z, p, q, forget_bias, gain, KIND)
        else:
            image, logs = maps.image(z, p, q, forget_bias, gain, KIND)
        tl.store(image_ptr + rows[:, None] * DIM + columns, image, mask=here)
        log_det += tl.sum(tl.where(here, logs, 0.0).to(tl.float64), 1)
    tl.store(log_det_ptr + rows, log_det, mask=rows < count)


@triton.jit(do_not_specialize=["count"])
def gradient_kernel(
    z_ptr, numbers_ptr, numbers_row, grad_ptr, grad_row, grad_column, of_log_det_ptr, of_log_det_row,
    at_z_ptr, at_numbers_ptr, fixed_ptr, count, forget_bias, gain,
    DIM: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With a gradient at the image, those at z and at the numbers; without, the slopes of the inverse that gave z."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_log_det = tl.load(of_log_det_ptr + rows * of_log_det_row, mask=rows < count, other=0.0).to(tl.float32)[:, None]
    for first in range(0, DIM, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        here = (rows[:, None] < count) & (columns < DIM)
        z = tl.load(z_ptr + rows[:, None] * DIM + columns, mask=here, other=0.0)
        p = tl.load(numbers_ptr + rows[:, None] * numbers_row + columns, mask=here, other=0.0).to(tl.float32)
        q = tl.load(numbers_ptr + rows[:, None] * numbers_row + DIM + columns, mask=here, other=0.0).to(tl.float32)
        slope, move_p, move_q, log_p, log_q = maps.slopes(z, p, q, forget_bias, gain, KIND)
        at_p = rows[:, None] * (2 * DIM) + columns
        if grad_ptr is not None:
            grad = tl.load(grad_ptr + rows[:, None] * grad_row + columns * grad_column, mask=here, other=0.0)
            tl.store(at_z_ptr + rows[:, None] * DIM + columns, grad * slope, mask=here)
            tl.store(at_numbers_ptr + at_p, grad * move_p + of_log_det * log_p, mask=here)
            tl.store(at_numbers_ptr + at_p + DIM, grad * move_q + of_log_det * log_q, mask=here)
        else:
            tl.store(at_z_ptr + rows[:, None] * DIM + columns, 1 / slope, mask=here)
            tl.store(at_numbers_ptr + at_p, -move_p / slope, mask=here)
            tl.store(at_numbers_ptr + at_p + DIM, -move_q / slope, mask=here)
            tl.store(fixed_ptr + at_p, -of_log_det * log_p, mask=here)
            tl.store(fixed_ptr + at_p + DIM, -of_log_det * log_q, mask=here)


@triton.jit
def activation_slope(value, ACTIVATION: tl.constexpr):
    """An activation's slope by its value; that of nan as torch has it."""
    if ACTIVATION == 0:
        return tl.where(value <= 0, 0.0, 1.0)
    elif ACTIVATION == 1:
        return tl.where(value <= 0, value + 1, 1.0)
    else:
        return 1 - value * value


@triton.jit(do_not_specialize=["count"])
def activation_kernel(
    grad_ptr, grad_row, value_ptr, value_row, found_ptr, bias_ptr, count, width,
    ACTIVATION: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient at the sums of COLUMNS units, SHARE rows, and its sum over these rows."""
    # The shares are many of many rows, and a grid's first axis alone has room for more than 65,535.
    share, block = tl.program_id(0), tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([COLUMNS], tl.float32)
    begin = share * SHARE
    for first in range(begin, tl.minimum(begin + SHARE, count), ROWS):
        rows = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        here = (rows < count) & (columns < width)
        value = tl.load(value_ptr + rows * value_row + columns, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows * grad_row + columns, mask=here, other=0.0).to(tl.float32)
        slope = activation_slope(value, ACTIVATION)
        # As a choice and not a product: a gradient that is not finite must not reach a unit that is off.
        grad = tl.where(slope == 0, 0.0, grad * slope)
        tl.store(found_ptr + rows * width + columns, grad, mask=here)
        total += tl.sum(grad, 0)
    units = block * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(bias_ptr + share.to(tl.int64) * width + units, total, mask=units < width)


def element(
    z: Tensor,
    numbers: Tensor,
    total: Tensor | None,
    name: str,
    constants: Sequence[float],
    inverse: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """As `fused.element`."""
    flat, rows = _rows(z).contiguous(), _rows(numbers)
    image = torch.empty_like(flat)
    log_det = flat.new_empty(len(flat), dtype=torch.float64)
    # A shift's log-det has no axes, and a kernel would read on behind it.
    before = None if total is None else total.expand(z.shape[:-1]).reshape(-1).contiguous()
    _by_rows(element_kernel, flat, rows, rows.stride(0), before, image, log_det, len(flat), *_pair(constants),
            DIM=flat.shape[1], KIND=MAPS.index(name), INVERSE=inverse)  # fmt: skip
    return image.view(z.shape), log_det.view(z.shape[:-1])


def element_pull(
    z: Tensor, numbers: Tensor, grad: Tensor, grad_log_det: Tensor, name: str, constants: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """As `fused.element_pull`."""
    at_z, at_numbers, _ = _slopes(z, numbers, _rows(grad), grad_log_det, name, constants)
    return at_z, at_numbers


def element_slopes(
    x: Tensor, numbers: Tensor, grad_log_det: Tensor, name: str, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused.element_slopes`."""
    return _slopes(x, numbers, None, grad_log_det, name, constants)


def activation_pull(grad: Tensor, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As `fused.activation_pull`."""
    count, width = grad.shape
    shares = max(1, blocks(count, _SHARE))
    found, biases = grad.new_empty(count, width), grad.new_empty(shares, width, dtype=torch.float32)
    inputs = grad, grad.stride(0), value, value.stride(0), found, biases, count, width
    options = {"ACTIVATION": ACTIVATIONS.index(activation), "SHARE": _SHARE, "ROWS": _ROWS}
    launch(activation_kernel, (shares, blocks(width, _UNITS)), *inputs, COLUMNS=_UNITS, **options)
    return found, biases[0] if shares == 1 else biases.sum(0)


def launch(kernel, programs: tuple[int, ...], *inputs, **options) -> None:  # noqa: ANN002, ANN003
    """Launch a kernel on the device of its first input, which need not be the current one."""
    if all(programs):
        with torch.cuda.device_of(inputs[0]):
            kernel[programs](*inputs, **options)


def power(size: int) -> int:
    """The least power of 2 that is not below a size."""
    return 1 << max(size - 1, 0).bit_length()


def blocks(size: int, of: int) -> int:
    """How many blocks of so many cover a size; `triton.cdiv` takes a microsecond more, a tenth of a launch."""
    return -(-size // of)


def _slopes(
    z: Tensor,
    numbers: Tensor,
    grad: Tensor | None,
    grad_log_det: Tensor,
    name: str,
    constants: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    flat, rows, of_log_det = _rows(z).contiguous(), _rows(numbers), grad_log_det.reshape(-1)
    dtype = flat.dtype if grad is None else rows.dtype
    at_z, at_numbers = torch.empty_like(flat), flat.new_empty(rows.shape, dtype=dtype)
    fixed = at_numbers if grad is not None else torch.empty_like(at_numbers)
    strides = (0, 0) if grad is None else grad.stride()
    _by_rows(gradient_kernel, flat, rows, rows.stride(0), grad, *strides, of_log_det, of_log_det.stride(0), at_z,
            at_numbers, fixed, len(flat), *_pair(constants), DIM=flat.shape[1], KIND=MAPS.index(name))  # fmt: skip
    return at_z.view(z.shape), at_numbers.view(numbers.shape), fixed.view(numbers.shape)


def _by_rows(kernel, *inputs, DIM: int, **options) -> None:  # noqa: N803, ANN002, ANN003
    columns = min(power(DIM), _COLUMNS)
    rows = max(1, min(16, _TILE // columns))
    launch(kernel, (blocks(len(inputs[0]), rows),), *inputs, DIM=DIM, ROWS=rows, COLUMNS=columns, **options)


def _pair(constants: Sequence[float]) -> Sequence[float]:
    """The gate's bias and gain; what no other map reads."""
    return constants or (0.0, 1.0)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
