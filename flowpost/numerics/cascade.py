"""The cascade of K tanh ridges: each sees what all before it moved, which is one number each, known in turn."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from flowpost.numerics.products import by_columns, by_rows
from flowpost.numerics.ridge import ridge

Ctx = Any  # of an autograd function: torch types it without what it stores


def cascade(start: Tensor, gain: Tensor) -> Tensor:
    """The x with ``x_k = start_k + sum_{j<k} gain_kj tanh(x_j)``. Cost: O(K^2), in K small steps.

    Args:
        start: ``(*batch, K)``.
        gain: ``(*batch, K, K)`` with axes that may be fewer; what is not below its diagonal is not read.
    """
    if torch.compiler.is_compiling():  # which differentiates the plain code, and takes no function with a jvp
        return _Cascade.forward(start, gain)
    return cast(Tensor, _Cascade.apply(start, gain))


class _Cascade(torch.autograd.Function):
    """Its derivative is the same recursion backwards; written out, a third of the calls that autograd would make."""

    generate_vmap_rule = True

    @staticmethod
    def forward(start: Tensor, gain: Tensor) -> Tensor:
        x = start
        for k, column in enumerate(gain.tril(-1).unbind(-1)[:-1]):
            x = torch.addcmul(x, column, torch.tanh(x[..., k : k + 1]))
        return x

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(output, inputs[1])

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        value, slope = ridge(x)
        rows = gain.tril(-1).unbind(-2)
        total = grads[0]
        for k in range(len(rows) - 1, 0, -1):
            total = torch.addcmul(total, rows[k] * slope, total[..., k : k + 1])
        left, right = total.unsqueeze(-1), value.unsqueeze(-2)
        extra = left.ndim - gain.ndim
        if extra > 0:  # samples are summed over by the product, which is never made for each of them
            left, right = total.flatten(0, extra - 1).movedim(0, -1), value.flatten(0, extra - 1).movedim(0, -2)
        return total, (left @ right).tril(-1).sum_to_size(gain.shape)

    @staticmethod
    def jvp(ctx: Ctx, *tangents: Tensor) -> Tensor:
        x, gain = ctx.saved_tensors
        value, slope = ridge(x)
        total = tangents[0] + by_columns(by_rows, tangents[1].tril(-1), value)
        for k, column in enumerate(gain.tril(-1).unbind(-1)[:-1]):
            total = torch.addcmul(total, column * slope[..., k : k + 1], total[..., k : k + 1])
        return total


def gram(a: Tensor, b: Tensor) -> Tensor:
    """The products ``a_k.b_j`` of two lists of K vectors, ``(*batch, K, K)`` from ``(*batch, K, dim)``."""
    if torch.compiler.is_compiling():  # as `cascade`
        return _Gram.forward(a, b)
    return cast(Tensor, _Gram.apply(a, b))


class _Gram(torch.autograd.Function):
    """Its gradients lie as a and b do, where autograd's own for b is transposed and slow to add to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grads[0] @ b, grads[0].mT @ a

    @staticmethod
    def jvp(ctx: Ctx, *tangents: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return tangents[0] @ b.mT + a @ tangents[1].mT
