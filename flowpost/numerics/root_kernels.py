# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN202 (Triton reads annotations as types)
"""The searches of `tanh_roots` as Triton's kernels, one launch each, in float64 within."""

# Where Triton is installed, its annotations are of what a kernel sees, and not of what is handed to it.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_STEPS = tl.constexpr(24)
"""Of Newton's iteration: for gains from -0.999 to 1e6 it has then stood for a while."""
_BLOCK = 256


@triton.jit
def _tanh(x):
    """Of x that is not negative."""
    small = tl.exp(-2 * x)
    square = x * x
    near = x * (1 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(x < 0.02, near, (1 - small) / (1 + small))


@triton.jit
def _root(gain, target):
    """From an end where ``x + gain tanh(x) - target`` bends away: Newton's steps then never pass the root.

    For a positive gain that is below it, at ``target / (1 + gain)``, for any other above it, at ``target - gain``.
    """
    goal = tl.abs(target)
    x = tl.where(gain > 0, goal / (1 + gain), goal - gain)
    for _ in range(_STEPS):
        value = _tanh(x)
        x = x - (x + gain * value - goal) / (1 + gain * (1 - value * value))
    return x


@triton.jit(do_not_specialize=["count"])
def root_kernel(gain_ptr, target_ptr, found_ptr, count, BLOCK: tl.constexpr):  # noqa: N803
    """One equation an entry."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    target = tl.load(target_ptr + index, mask=inside, other=0.0).to(tl.float64)
    x = _root(tl.load(gain_ptr + index, mask=inside, other=0.0).to(tl.float64), target)
    tl.store(found_ptr + index, tl.where(target < 0, -x, x).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["gains"])
def roots_kernel(gain_ptr, target_ptr, found_ptr, gains, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """A triangle of equations a program, from the last to the first; `gains` matrices in turn serve all programs."""
    row, index = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    matrix = gain_ptr + row % gains * SIZE * SIZE
    rest = tl.load(target_ptr + row * SIZE + index, mask=index < SIZE, other=0.0).to(tl.float64)
    found = tl.zeros([BLOCK], tl.float64)
    for step in range(SIZE):
        i = SIZE - 1 - step
        column = tl.load(matrix + index * SIZE + i, mask=index <= i, other=0.0).to(tl.float64)
        here = index == i
        target = tl.sum(tl.where(here, rest, 0.0), 0)
        x = _root(tl.sum(tl.where(here, column, 0.0), 0), target)
        sign = tl.where(target < 0, -1.0, 1.0)
        rest = rest - column * (sign * _tanh(x))
        found = tl.where(here, sign * x, found)
    tl.store(found_ptr + row * SIZE + index, found.to(tl.float32), mask=index < SIZE)


def root(gain: Tensor, target: Tensor) -> Tensor:
    """As `tanh_root`."""
    gain, target = (each.contiguous() for each in torch.broadcast_tensors(gain, target))
    found = torch.empty_like(target)
    count = target.numel()
    _launch(root_kernel, triton.cdiv(count, _BLOCK), gain, target, found, count, BLOCK=_BLOCK)
    return found


def roots(gain: Tensor, target: Tensor) -> Tensor:
    """As `tanh_roots`."""
    size, batch = target.shape[-1], torch.broadcast_shapes(gain.shape[:-2], target.shape[:-1])
    target = target.expand(*batch, size).contiguous()
    if gain.shape[:-2] != batch[len(batch) - gain.ndim + 2 :]:
        gain = gain.expand(*batch, size, size)
    gain, found = gain.contiguous(), torch.empty_like(target)
    options = {"SIZE": size, "BLOCK": triton.next_power_of_2(size), "num_warps": 1}
    _launch(roots_kernel, batch.numel(), gain, target, found, gain.shape[:-2].numel(), **options)
    return found


def _launch(kernel, programs: int, *inputs, **options) -> None:
    if programs:
        with torch.cuda.device_of(inputs[0]):
            kernel[(programs,)](*inputs, **options)
