"""Roots of ``x + gain tanh(x) = target``, alone or in a triangle; the search for them carries no gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics import fusing
from flowpost.numerics.operators import define
from flowpost.numerics.products import by_columns, by_rows
from flowpost.numerics.ridge import ridge
from flowpost.numerics.watchers import unwatched


def tanh_root(gain: Tensor, target: Tensor) -> Tensor:
    """The x with ``x + gain tanh(x) = target``, for ``gain > -1``; carries no gradient.

    Two steps of Halley's iteration and one of Newton's, from a start so near that no gain needs more: a fixed number,
    so that nothing waits for a device, and 40 operations in all.

    Args:
        gain: above -1, any shape.
        target: of a shape that broadcasts with it.

    Returns:
        The root to rounding for gains from -0.999 to 1e12, in float32 and float64.
    """
    gain, target = gain.detach(), target.detach()  # forward-mode derivatives mind no `no_grad`
    if _by_kernel(target):
        return _root_operator(gain, target)
    with torch.no_grad():
        return _tanh_root(target, *_of_gain(gain))


def _of_gain(gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the search reads of a gain alone, the gain first."""
    many = 4 * gain
    return gain, 1 + gain, many, many.log()


def _tanh_root(target: Tensor, gain: Tensor, room: Tensor, many: Tensor, log_many: Tensor) -> Tensor:
    goal, one = target.abs(), target.new_ones(())  # the left side is odd: x has the target's sign
    x = _near_root(gain, room, many, log_many, goal)
    for order in (3, 3, 2):
        value = torch.tanh(x)
        slope = torch.addcmul(one, gain, torch.addcmul(one, value, value, value=-1))
        residual = torch.addcmul(x - goal, gain, value)
        if order == 2:
            x = torch.addcdiv(x, residual, slope, value=-1)
        else:  # less 1 / (slope / residual + value (1 - 1 / slope)), which is 0 at a root
            pull = torch.addcdiv(torch.addcdiv(value, value, slope, value=-1), slope, residual)
            x = torch.addcdiv(x, one, pull, value=-1)
    return torch.copysign(x, target)


def _near_root(gain: Tensor, room: Tensor, many: Tensor, log_many: Tensor, goal: Tensor) -> Tensor:
    """A start within 1e-9 of whose root two steps of Halley's iteration come, relative to the terms of the equation.

    `low` is below the root: ``goal / (1 + gain)``, less where the slope soon grows. ``goal - gain tanh(low)`` is then
    above it for a positive gain, and close to it for a negative one. Where gain and root are large,
    ``y = x + gain - goal`` has ``2 y e^(2 y) = 4 gain e^(2 (gain - goal))``, nearly, and a softplus is near the
    logarithm of that; ``e^(2 x) + 1 = 2 gain / y`` makes x of it to the precision of x, not of the gain. For a gain
    that is not positive there is no such y: it is nan, which `fmin` passes over.
    """
    low = goal / torch.add(room, goal.pow(2 / 3), alpha=0.6)
    double = F.softplus(torch.sub(log_many, goal - gain, alpha=2))
    far = -0.5 * torch.logit(double / many, 1e-30)
    return torch.fmin(torch.maximum(low, far), torch.addcmul(goal, gain, torch.tanh(low), value=-1))


def tanh_roots(gain: Tensor, target: Tensor) -> Tensor:
    """The y with ``y + gain tanh(y) = target``, `gain` upper triangular, its diagonal above -1; carries no gradient.

    The last row is an equation of its own, and each before it one more where those after it are known. Cost: M scalar
    roots, one after the other.

    Args:
        gain: ``(*batch, M, M)`` with axes that may be fewer or more than target's.
        target: ``(*batch, M)``.
    """
    # A compiler, which would unroll every row's search, sees an operator; an exported program has torch's own alone.
    run = _roots_operator if torch.compiler.is_dynamo_compiling() or _by_kernel(target) else _tanh_roots
    return run(gain.detach(), target.detach())


def solve_ridges(gain: Tensor, target: Tensor, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``tanh(y)`` and its slope at the y of `tanh_roots`, with exact first and second derivatives.

    Args:
        gain: as in `tanh_roots`.
        target: as in `tanh_roots`.
        root: y, where it is known: no search is run.
    """
    y = tanh_roots(gain, target) if root is None else root.detach()
    eye = torch.eye(target.shape[-1], dtype=target.dtype, device=target.device)
    for _ in range(2):  # Newton steps: the first attaches the implicit gradient, the second makes another exact too
        value, slope = ridge(y)
        residual = y + by_columns(by_rows, gain, value) - target
        jacobian = eye + gain * slope.unsqueeze(-2)
        y = y - torch.linalg.solve_triangular(jacobian, residual.unsqueeze(-1), upper=True).squeeze(-1)
    return ridge(y)


def _by_kernel(target: Tensor) -> bool:
    """Whether one launch does it. A compiler fuses the operations of a single root by itself."""
    return fusing.available(target) and unwatched(target) and not torch.compiler.is_compiling()


def _tanh_roots(gain: Tensor, target: Tensor) -> Tensor:
    roots, rest = [], target
    with torch.no_grad():
        diagonals = [each.unbind(-1) for each in _of_gain(gain.diagonal(dim1=-2, dim2=-1))]
        for i in reversed(range(target.shape[-1])):
            y = _tanh_root(rest[..., i], *[each[i] for each in diagonals])
            if i:
                rest = torch.addcmul(rest[..., :i], gain[..., :i, i], torch.tanh(y).unsqueeze(-1), value=-1)
            roots.append(y)
        return torch.stack(roots[::-1], -1)


def _root(gain: Tensor, target: Tensor) -> Tensor:
    from flowpost.numerics import root_kernels

    return root_kernels.root(gain, target)


def _roots(gain: Tensor, target: Tensor) -> Tensor:
    if not fusing.available(target):
        return _tanh_roots(gain, target)
    from flowpost.numerics import root_kernels

    return root_kernels.roots(gain, target)


_root_operator = define(
    "tanh_root(Tensor gain, Tensor target) -> Tensor",
    _root,
    lambda gain, target: target.new_empty(torch.broadcast_shapes(gain.shape, target.shape)),
)
_roots_operator = define(
    "tanh_roots(Tensor gain, Tensor target) -> Tensor",
    _roots,
    lambda gain, target: target.new_empty(torch.broadcast_shapes(gain.shape[:-1], target.shape)),
)


def _tanh_roots_batched(
    _: object, axes: tuple[int | None, int | None], gain: Tensor, target: Tensor
) -> tuple[Tensor, int]:
    batch = max(gain.ndim - 1 - (axes[0] is not None), target.ndim - (axes[1] is not None))
    sizes = zip((gain, target), axes, (batch + 1, batch), strict=True)
    aligned = [x if axis is None else _outermost(x.movedim(axis, 0), ndim) for x, axis, ndim in sizes]
    return _roots_operator(*aligned), 0


torch.library.register_vmap("flowpost::tanh_roots", _tanh_roots_batched)


def _outermost(x: Tensor, ndim: int) -> Tensor:
    """The first axis of x before `ndim` others."""
    return x.reshape(x.shape[0], *[1] * (ndim + 1 - x.ndim), *x.shape[1:])
