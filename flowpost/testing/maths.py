"""Properties of the map: its log-det, its inverse, its density."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import LINE, Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.wrappers import Inverse
from flowpost.posterior import FlowPosterior
from flowpost.testing.cases import Case, eps, in_float64, jacobian, require, size, within


def _condition(matrix: Tensor) -> Tensor:
    return torch.linalg.cond(matrix).nan_to_num(nan=math.inf)


def log_det(case: Case) -> float:
    """B1: the log-det is slogdet of the autodiff Jacobian; in float32, that of the same weights in float64."""
    step, z, context = case.points()
    return _log_det_error(step, z, context, case)


def _log_det_error(step: Bijector, z: Tensor, context: Tensor | None, case: Case) -> float:
    exact = in_float64(step)
    z64, context64 = z.double(), None if context is None else context.double()
    matrix = jacobian(exact, z64, context64)
    kappa = _condition(matrix)
    fair = kappa < 1e8
    found = step(z, context)[1].detach()[fair].double()
    slope = torch.linalg.slogdet(matrix[fair])[1]
    n = size(step, case.dim)
    reference = slope if case.dtype == torch.float64 else exact(z64, context64)[1].detach()[fair]
    bound = 8 * eps(case) * (n + kappa[fair] if case.dtype == torch.float64 else 8 * n * (1 + reference.abs()))
    error = (found - reference).abs()
    over = error > bound
    bound[over] += 8 * eps(case) * _sensitivity(exact, z64, context64, fair.nonzero().flatten()[over], output=1)
    return within("error", error, bound, case)


def orientation(case: Case) -> float:
    """B2: det J has one sign everywhere and is never 0."""
    step, z, context = case.points()
    context = None if context is None else context[:1].expand(len(z), -1)
    matrix = jacobian(in_float64(step), z.double(), None if context is None else context.double())
    sign = torch.linalg.slogdet(matrix[_condition(matrix) < 1e8])[0]
    require(len(sign.unique()) <= 1 and bool((sign != 0).all()), case, f"orientation: signs {sign.unique().tolist()}")
    return 0.0


def round_trip(case: Case) -> float:
    """B3: ``f(f^-1(y)) = y`` up to rounding, that of a context which the map amplifies included."""
    step, y, context = case.images()
    x = step.inverse(y, context)[0].detach()
    back, _ = step(x, context)
    bound = 64 * eps(case) * (size(step, case.dim) * (1 + y.abs() + x.abs().amax(-1, keepdim=True))).amin(-1)
    error = (back - y).abs().detach().amax(-1)
    rows = (error > bound).nonzero().flatten()
    bound[rows] += 64 * eps(case) * _sensitivity(step, x, context, rows, output=0)
    return within("residual", error, bound, case)


def _sensitivity(step: Bijector, z: Tensor, context: Tensor | None, rows: Tensor, output: int) -> Tensor:
    """``max_i sum_v |d out_i / d v| |v|`` over z, context and parameters: how far their rounding alone moves a row.

    No code can be more exact than its inputs are: a step that amplifies its context a thousandfold is entitled to a
    thousand roundings. Worked out only for the rows that need it.
    """
    found = torch.zeros(len(rows), dtype=z.dtype, device=z.device)
    for place, row in enumerate(rows.tolist()):
        inputs = [z[row].detach().requires_grad_()]
        inputs += [] if context is None else [context[row].detach().requires_grad_()]
        values = [*inputs, *step.parameters()]
        for out in step(*inputs)[output].reshape(-1):
            slopes = torch.autograd.grad(out, values, retain_graph=True, allow_unused=True)
            moved = sum((s * v).abs().sum() for s, v in zip(slopes, values, strict=True) if s is not None)
            found[place] = torch.maximum(found[place], torch.as_tensor(moved).detach())
    return found


def cancel(case: Case) -> float:
    """B4: the inverse's log-det is minus the forward's at the preimage."""
    step, y, context = case.images()
    x, inverse = step.inverse(y, context)
    _, forward = step(x, context)
    n = size(step, case.dim)
    kappa = _condition(jacobian(in_float64(step), x.double(), None if context is None else context.double()))
    fair = kappa < 1 / (100 * eps(case) * n)
    error = (forward + inverse).abs().detach()[fair]
    return within("log-dets cancel", error, 512 * eps(case) * n * (1 + forward.abs().detach()[fair]), case)


def known(case: Case) -> float:
    """``inverse(preimage=x)`` gives what the search gives, with the same gradient."""
    step, x, context = case.points(2)
    y = step(x, context)[0].detach().requires_grad_()
    found = [step.inverse(y, context), step.inverse(y, context, preimage=x)]
    grads = [torch.autograd.grad(z.sum() + log_det.sum(), y)[0] for z, log_det in found]
    if case.dtype == torch.float32:
        return 0.0
    kappa = _condition(jacobian(step, x, context))
    fair = kappa < 1e6
    bound = 1e3 * eps(case) * size(step, case.dim) * (1 + kappa[fair]) ** 2
    scale = 1 + grads[0][fair].abs().amax(-1)
    values = within("known preimage", (found[0][0] - found[1][0])[fair].abs().amax(-1).detach(), bound * 10, case)
    return max(values, within("its gradient", (grads[0] - grads[1])[fair].abs().amax(-1), bound * scale, case))


def structure(case: Case) -> float:
    """B10: in the causal order that a step declares, the Jacobian is exactly 0 above a positive diagonal."""
    step, z, context = case.points(2)
    order = step.causal_order()
    if order is not None:
        matrix = jacobian(step, z, context)[:, order][:, :, order]
        above = matrix.triu(1).abs().max().item()
        require(above == 0, case, f"structure: {above} above the diagonal")
        require(bool((matrix.diagonal(dim1=-2, dim2=-1) > 0).all()), case, "structure: the diagonal is not positive")
    return 0.0


def sampling(case: Case) -> float:
    """B16: the log q that comes with a sample is the one that inverting the sample gives, in the median."""
    step = case.step()
    if step.domain != LINE:
        return 0.0
    posterior = FlowPosterior(step.context_size, step, head=nn.Identity())
    context, noise = case.context(64), case.z(64)
    sample = posterior(context, noise=noise) if context is not None else posterior(sample_shape=(64,), noise=noise)
    error = (posterior.log_prob(sample.z, context) - sample.log_prob).detach().abs().median()
    scale = 1 + sample.log_prob.detach().abs().median()
    return within("median of log q", error.view(1), scale * (1e-9 if case.dtype == torch.float64 else 1e-4), case)


def gradients(case: Case) -> float:
    """B12: gradcheck and gradgradcheck of value and log-det, gradcheck of the inverse; every parameter is reached."""
    step = case.step()
    total = sum(t.sum() for t in step(case.z(2).requires_grad_(), case.context(2)))
    parameters = dict(step.named_parameters())
    reached = torch.autograd.grad(total, [*parameters.values()], allow_unused=True) if parameters else ()  # pyright: ignore
    names = [name for name, slope in zip(parameters, reached, strict=True) if slope is None]
    require(not names, case, f"gradients: none reaches {names}")
    if case.dtype != torch.float64:
        return 0.0
    z, context = case.z(2).requires_grad_(), case.context(2)
    inputs = (z,) if context is None else (z, context.requires_grad_())
    torch.autograd.gradcheck(lambda *args: step(*args), inputs)
    torch.autograd.gradgradcheck(lambda *args: step(*args), inputs, atol=1e-4)
    images = (case.y(2).requires_grad_(), *inputs[1:])
    torch.autograd.gradcheck(lambda *args: step.inverse(*args), images, atol=1e-4, rtol=1e-2)
    return 0.0


def identity(case: Case) -> float:
    """B14: at its initial context a fresh step is the identity; to be skipped for a step that has none."""
    step = Case(case.make, case.dim, case.context_size, case.dtype, case.seed, push=0.0).step()
    z = case.z(16)
    image, log_det = step(z, step.initial_context().to(z) if step.context_size else None)
    error = torch.cat([(image - z).detach().abs(), log_det.detach().abs().unsqueeze(-1)], dim=-1)
    return within("identity", error, 1e-12 if case.dtype == torch.float64 else 1e-6, case)


def mass(case: Case) -> float:
    """B15: the density integrates to 1, over the image of a grid of noise, in one and two dimensions."""
    if case.dim > 2 or case.dtype != torch.float64 or (case.dim == 2 and case.push > 0.3):
        return 0.0
    # Sharper two-dimensional densities defeat the grid, not the flow.
    step, context = case.step(), case.context(1, scale=case.context_scale if case.dim == 1 else 0.3)
    if step.domain != LINE:
        return 0.0
    return within("mass - 1", (total_mass(step, context, case.device) - 1).abs(), 1e-3 if case.dim == 1 else 1e-2, case)


def total_mass(step: Bijector, context: Tensor | None = None, device: str = "cpu") -> Tensor:
    """Integral of a float64 step's density at one context, by quadrature, at dim 1 or 2.

    The density is the inverse's, and the cells are the images of a grid of noise, so they lie where the mass is, and
    their lengths and areas owe nothing to the log-det.
    """
    return _mass_1d(step, context, device) if step.dim == 1 else _mass_2d(step, context, device)


def _density(step: Bijector, y: Tensor, context: Tensor | None) -> Tensor:
    noise, log_det = step.inverse(y, context)
    return torch.exp(log_det - 0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1)).detach()


def _mass_1d(step: Bijector, context: Tensor | None, device: str) -> Tensor:
    noise = torch.linspace(-9, 9, 40001, dtype=torch.float64, device=device).unsqueeze(-1)
    y = step(noise, context)[0].detach()
    return torch.trapezoid(_density(step, y, context), y.squeeze(-1)).abs()


def _mass_2d(step: Bijector, context: Tensor | None, device: str, cells: int = 200) -> Tensor:
    """Density at the image of each cell's middle, times the area of the image of the cell."""
    edge = torch.linspace(-7, 7, cells + 1, dtype=torch.float64, device=device)
    middle = 0.5 * (edge[1:] + edge[:-1])
    corners = step(torch.cartesian_prod(edge, edge), context)[0].detach().view(cells + 1, cells + 1, 2)
    centers = step(torch.cartesian_prod(middle, middle), context)[0].detach()
    a, b = corners[1:, 1:] - corners[:-1, :-1], corners[:-1, 1:] - corners[1:, :-1]
    area = 0.5 * (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).abs()
    return (_density(step, centers, context) * area.flatten()).sum()


def composition(case: Case) -> float:
    """B21: Chain and Inverse of the step hold B1 too; ``Inverse(Inverse(step))`` is the step; log-dets add."""
    first, second = case.step(), case.step(case.seed + 1)
    if first.codomain != second.domain:
        second = Inverse(second)
    twice = Inverse(Inverse(first))
    require(twice is first or isinstance(first, Inverse), case, "Inverse(Inverse(step)) is not the step")
    z = case.z(8)
    parts = [case.context(8), case.context(8)]
    context = None if parts[0] is None else torch.cat([part for part in parts if part is not None], dim=-1)
    chain = Chain(first, second)
    middle, one = first(z, parts[0])
    image, two = second(middle, parts[1])
    found, total = chain(z, context)
    scale = (1 + image.abs() + middle.abs().amax(-1, keepdim=True)).detach()
    within("Chain: steps in sequence", (found - image).abs().detach(), 1e4 * eps(case) * scale, case)
    scale = (1 + one.abs() + two.abs()).detach()
    within("Chain: log-dets add", (total - one - two).abs().detach(), 1e3 * eps(case) * scale, case)
    return _log_det_error(chain, z, context, case)
