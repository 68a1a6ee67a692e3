"""Properties of the inverse: it undoes the map, the map undoes it, and a preimage that is known changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpost.testing.cases import (
    Case,
    condition,
    eps,
    in_float64,
    jacobian,
    leaves,
    same,
    size,
    slopes,
    weighed,
    within,
)
from flowpost.testing.maths import sensitivity


def round_trip(case: Case) -> float:
    """B3: ``f(f^-1(y)) = y`` up to rounding, that of a context which the map amplifies included."""
    step, y, context = case.images()
    x = step.inverse(y, context)[0].detach()
    back, _ = step(x, context)
    bound = 64 * eps(case) * (size(step) * (1 + y.abs() + x.abs().amax(-1, keepdim=True))).amin(-1)
    error = (back - y).abs().detach().amax(-1)
    rows = (error > bound).nonzero().flatten()
    bound[rows] += 64 * eps(case) * sensitivity(step, step, x, context, rows, output=0)
    return within("residual", error, bound, case)


def undone(case: Case) -> float:
    """B3 the other way about: ``f^-1(f(z)) = z``; a rounding of the image moves its preimage by ``|J^-1|`` as much."""
    if case.dtype != torch.float64:
        return 0.0
    step, z, context = case.points()
    matrix = jacobian(step, z, context)
    fair = condition(matrix) < 1e8
    image, log_det = (t.detach() for t in step(z, context))
    back, inverse = (t.detach() for t in step.inverse(image, context))
    growth = torch.linalg.matrix_norm(torch.linalg.inv(matrix[fair]), 2).clamp_min(1)
    bound = 8 * eps(case) * size(step) * (1 + image[fair].abs().amax(-1)) * growth
    within("undone: log-dets", (log_det + inverse)[fair].abs(), 100 * bound, case)
    return within("undone", (back - z)[fair].abs().amax(-1), bound, case)


def cancel(case: Case) -> float:
    """B4: the inverse's log-det is minus the forward's at the preimage, up to what rounding that preimage does."""
    step, y, context = case.images()
    x, inverse = step.inverse(y, context)
    x = x.detach().requires_grad_()
    _, forward = step(x, context)
    moved = (slopes(forward.sum(), [x])[0] * x).abs().sum(-1).detach()
    n = size(step)
    kappa = condition(jacobian(in_float64(step), x.double(), None if context is None else context.double()))
    fair = kappa < 1 / (100 * eps(case) * n)
    error = (forward + inverse).abs().detach()[fair]
    bound = 512 * eps(case) * n * (1 + forward.abs().detach()) + 8 * eps(case) * moved
    return within("log-dets cancel", error, bound[fair], case)


def preimage(case: Case) -> float:
    """``inverse(preimage=x)`` gives what the search gives, with the same gradient."""
    step, x, context = case.points(2)
    y = step(x, context)[0].detach().requires_grad_()
    found = [step.inverse(y, context), step.inverse(y, context, preimage=x)]
    grads = [torch.autograd.grad(z.sum() + log_det.sum(), y)[0] for z, log_det in found]
    if case.dtype == torch.float32:
        return 0.0
    kappa = condition(jacobian(step, x, context))
    fair = kappa < 1e6
    bound = 1e3 * eps(case) * size(step) * (1 + kappa[fair]) ** 2
    scale = 1 + grads[0][fair].abs().amax(-1)
    values = within("known preimage", (found[0][0] - found[1][0])[fair].abs().amax(-1).detach(), bound * 10, case)
    return max(values, within("its gradient", (grads[0] - grads[1])[fair].abs().amax(-1), bound * scale, case))


def preimage_derivatives(case: Case) -> float:
    """B12: where the preimage is known, first and second derivatives are the search's, in y, context and parameters."""
    if case.dtype != torch.float64:
        return 0.0
    step, x, context = case.step(), case.z(2), case.context(2)
    image = step(x, context)[0].detach()

    def derivatives(known: Tensor | None) -> list[Tensor]:
        y, c, inputs = leaves(step, image, context)
        back, log_det = step.inverse(y, c, preimage=known)
        first = slopes(weighed(back, log_det), inputs, create_graph=True)
        total = torch.stack([(slope * slope).sum() for slope in first]).sum()
        return [back, log_det, *first, *slopes(total, inputs)]

    return same("known preimage", derivatives(x), derivatives(None), 1e-9, case)
