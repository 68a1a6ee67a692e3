"""What a Triton kernel computes in one launch, as operators that a compiler and the meta device know.

The kernels are in `kernels` and `sweeps`, imported when the first of them runs. Triton comes with torch where there is
a GPU. Without it, and in float64, torch's own operations run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowpost.masked.activations import Known
from flowpost.masked.device import loops
from flowpost.masked.run import COLUMNS, Column, ElementWise
from flowpost.numerics import fusing
from flowpost.numerics.operators import define
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.watchers import unless_compiled, watched

MAPS = (
    "gate",
    "inverse affine by exp_scale",
    "inverse affine by softplus_scale",
    "affine by exp_scale",
    "affine by softplus_scale",
)
"""The element-wise maps of two numbers that the kernels know, by the closed form of their inverse."""
IN_PARTS = ("spline", "deep sigmoid")
"""Those of bins or of units, whose number is their first constant."""
SOLVED = (*MAPS, "inverse shift", "shift", *IN_PARTS)
"""What a sweep's kernel solves."""
_ops = torch.ops.flowpost


def closed(step: ElementWise, z: Tensor) -> Column | None:
    """The name by which the kernels know a step, that of its inverse's closed form, if they do and run there."""
    column = step.columns()[1]
    return column if column is not None and column.name in MAPS and fusing.available(z) else None


def swept(column: Column, z: Tensor) -> bool:
    """Whether a sweep's kernel knows how a column is solved, and runs there."""
    return column.name in SOLVED and fusing.available(z)


def activation_pull(known: Known, grad: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient ``(N, width)`` at a layer's sums from that at its values, and in a kernel its sum over the rows."""
    if grad.dtype != torch.float64 and fusing.on_device(grad):
        return _run(grad, "activation_pull", grad, value, known.name)
    return known.gradient(grad, value), None


def element(
    z: Tensor, numbers: Tensor, total: Tensor | None, column: Column, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The image of z ``(*batch, dim)`` under a map or its inverse, and the log-det ``(*batch)`` added to a total."""
    return _run(z, "element", z, numbers, total, column.name, column.constants, inverse)


def element_pull(
    z: Tensor, numbers: Tensor, grad: Tensor, grad_log_det: Tensor, column: Column
) -> tuple[Tensor, Tensor]:
    """The gradients of a map at z and at the numbers, from those at the image and at the log-det."""
    return _run(z, "element_pull", z, numbers, grad, grad_log_det, column.name, column.constants)


def element_slopes(x: Tensor, numbers: Tensor, grad_log_det: Tensor, column: Column) -> tuple[Tensor, Tensor, Tensor]:
    """Of a map's inverse ``x = f^-1(y; n)``: dx/dy, dx/dn, and the log-det's gradient at n."""
    return _run(x, "element_slopes", x, numbers, grad_log_det, column.name, column.constants)


def sweep(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    index: Tensor | None,
    order: Sequence[int],
    activation: str,
    column: Column,
) -> Tensor:
    """As `loops.solve`, of a solve by its name; `index` is the order as a tensor, None as the variables come."""
    run = _ops.sweep if swept(column, images) else _sweep_in_loops
    return run(images, start, weights, biases, index, order, activation, column.name, column.constants)


def transposed_sweep(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    index: Tensor | None,
    order: Sequence[int],
    activation: str,
) -> list[Tensor]:
    """As `loops.pull`; `index` is as in `sweep`."""
    run = _turned_sweep if fusing.available(grad) else _transposed_in_loops
    return run(grad, fixed, moved, weights, hidden, index, order, activation)


def _turned_sweep(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    *others: Any,  # noqa: ANN401
) -> list[Tensor]:
    """By the operator, whose weights are ``(in, out)``: what a kernel reads together is neighbours in memory."""
    return _ops.transposed_sweep(grad, fixed, moved, [weight.t().contiguous() for weight in weights], *others)


def _sweep(
    images: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    index: Tensor | None,
    order: Sequence[int],
    activation: str,
    name: str,
    constants: Sequence[float],
) -> Tensor:
    if swept(Column(name), images):
        from flowpost.masked.device import sweeps

        return sweeps.solve(images, start, weights, biases, index, activation, name, constants)
    return loops.solve(images, start, weights, biases, order, activation, COLUMNS[name](images, constants))


def _transposed_sweep(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    index: Tensor | None,
    order: Sequence[int],
    activation: str,
) -> list[Tensor]:
    if fusing.available(grad):
        from flowpost.masked.device import sweeps

        return sweeps.pull(grad, fixed, moved, weights, hidden, index, activation)
    return loops.pull(grad, fixed, moved, [weight.t() for weight in weights], hidden, order, activation)


def _loops_pull(
    grad: Tensor,
    fixed: Tensor,
    moved: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    _: Tensor | None,
    *others: Any,  # noqa: ANN401
) -> list[Tensor]:
    return loops.pull(grad, fixed, moved, weights, hidden, *others)


def _run(like: Tensor, name: str, *inputs: Any) -> Any:  # noqa: ANN401
    """By the operator, or past it: where nobody watches the operations, it costs as much as the launch itself."""
    return _launcher(name)(*inputs) if _past_operators(like) else getattr(_ops, name)(*inputs)


def _past_operators(like: Tensor) -> bool:
    """On a GPU, of a tensor that is no other library's, or a planner's without numbers."""
    return type(like) is Tensor and like.is_cuda and not watched()


@functools.cache
def _launcher(name: str) -> Callable[..., Any]:
    from flowpost.masked.device import kernels

    return getattr(kernels, name)


def _kernel(name: str) -> Callable[..., Any]:
    return lambda *inputs: _launcher(name)(*inputs)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


define(
    "element(Tensor z, Tensor numbers, Tensor? total, str name, float[] constants, bool inverse) -> (Tensor, Tensor)",
    _kernel("element"),
    lambda z, *_: (_like(z), z.new_empty(z.shape[:-1], dtype=wide_dtype(z))),
)
define(
    "element_pull(Tensor z, Tensor numbers, Tensor grad, Tensor grad_log_det, str name, float[] constants)"
    " -> (Tensor, Tensor)",
    _kernel("element_pull"),
    lambda z, numbers, *_: (_like(z), _like(numbers)),
)
define(
    "element_slopes(Tensor x, Tensor numbers, Tensor grad_log_det, str name, float[] constants)"
    " -> (Tensor, Tensor, Tensor)",
    _kernel("element_slopes"),
    lambda x, numbers, *_: (_like(x), x.new_empty(numbers.shape), x.new_empty(numbers.shape)),
)
define(
    "activation_pull(Tensor grad, Tensor value, str activation) -> (Tensor, Tensor)",
    _kernel("activation_pull"),
    lambda grad, *_: (_like(grad), grad.new_empty(grad.shape[1], dtype=torch.float32)),
)
define(
    "sweep(Tensor images, Tensor start, Tensor[] weights, Tensor[] biases, Tensor? index, int[] order, str activation,"
    " str name, float[] constants) -> Tensor",
    _sweep,
    lambda images, *_: _like(images),
)
define(
    "transposed_sweep(Tensor grad, Tensor fixed, Tensor moved, Tensor[] weights, Tensor[] hidden, Tensor? index,"
    " int[] order, str activation) -> Tensor[]",
    _transposed_sweep,
    lambda grad, fixed, moved, weights, hidden, *_: [
        grad.new_empty(each.shape) for each in (grad, fixed, *hidden[::-1])
    ],
)

# A compiler, which would unroll the loops, sees the operators.
_sweep_in_loops = unless_compiled(_sweep, _ops.sweep)
_transposed_in_loops = unless_compiled(_loops_pull, _turned_sweep)
