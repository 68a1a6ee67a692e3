"""Properties of the map: its log-det, its orientation, its structure, its density, its composition."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import LINE, Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.wrappers import Inverse
from flowpost.posterior import FlowPosterior
from flowpost.testing.cases import Case, Map, condition, eps, in_float64, jacobian, learned, require, size, within


def log_det(case: Case) -> float:
    """B1: in both directions the log-det is slogdet of the autodiff Jacobian; in float32, that of the float64 weights.

    Without a judge, autodiff's own rounding is allowed for. With one, B1 holds as it stands, and the determinant has
    one sign in all rows, whatever their contexts (B2).
    """
    step, z, context = case.points(2 if case.judge else 8)
    if case.dtype != torch.float64:
        return _narrow_error(step, z, context, case)
    error = log_det_error(step, step, z, context, case)
    image = step(z, context)[0].detach()
    return max(error, log_det_error(step.inverse, step, image, context, case))


def log_det_error(direction: Map, step: Bijector, z: Tensor, context: Tensor | None, case: Case) -> float:
    """The largest error of a float64 log-det, to ``8 eps (N + cond)`` where cond is below 1e8."""
    matrix = jacobian(direction, z, context)
    kappa = condition(matrix)
    sign, slope = torch.linalg.slogdet(matrix)
    error = (direction(z, context)[1].detach() - slope).abs()
    bound = 8 * eps(case) * (size(step) + kappa)
    rows = ((kappa < 1e8) & (error > bound)).nonzero().flatten()
    if case.judge is None:
        bound[rows] += 8 * eps(case) * sensitivity(direction, step, z, context, rows, output=1)
    elif len(rows) or len(sign.unique()) > 1:
        sign, slope = case.judge(direction, z, context)
        error = (direction(z, context)[1].detach() - slope).abs()
    if case.judge is not None:
        require(len(sign.unique()) == 1 and bool((sign != 0).all()), case, f"signs of det: {sign.tolist()}")
    return within("error", error[kappa < 1e8], bound[kappa < 1e8], case)


def _narrow_error(step: Bijector, z: Tensor, context: Tensor | None, case: Case) -> float:
    """The largest error of a float32 log-det, to ``64 eps N (1 + |log-det|)`` of the same weights in float64."""
    exact, z64, context64 = in_float64(step), z.double(), None if context is None else context.double()
    fair = condition(jacobian(exact, z64, context64)) < 1e8
    reference = exact(z64, context64)[1].detach()
    error = (step(z, context)[1].detach().double() - reference).abs()
    bound = 64 * eps(case) * size(step) * (1 + reference.abs())
    rows = (fair & (error > bound)).nonzero().flatten()
    bound[rows] += 8 * eps(case) * sensitivity(exact, exact, z64, context64, rows, output=1)
    return within("error", error[fair], bound[fair], case)


def sensitivity(direction: Map, step: Bijector, z: Tensor, context: Tensor | None, rows: Tensor, output: int) -> Tensor:
    """``max_i sum_v |d out_i / d v| |v|`` over z, context and parameters: how far their rounding alone moves a row.

    No code can be more exact than its inputs are: a step that amplifies its context a thousandfold is entitled to a
    thousand roundings. Worked out only for the rows that need it.
    """
    found = torch.zeros(len(rows), dtype=z.dtype, device=z.device)
    for place, row in enumerate(rows.tolist()):
        inputs = [z[row].detach().requires_grad_()]
        inputs += [] if context is None else [context[row].detach().requires_grad_()]
        values = [*inputs, *learned(step)]
        outputs = direction(*inputs)[output].reshape(-1)
        for out in outputs if outputs.requires_grad else ():
            slopes = torch.autograd.grad(out, values, retain_graph=True, allow_unused=True)
            moved = [(s * v).abs().sum() for s, v in zip(slopes, values, strict=True) if s is not None]
            found[place] = torch.maximum(found[place], sum(moved, found.new_zeros(())).detach())
    return found


def orientation(case: Case) -> float:
    """B2: det J has one sign everywhere and is never 0."""
    step, z, context = case.points()
    context = None if context is None else context[:1].expand(len(z), -1)
    matrix = jacobian(in_float64(step), z.double(), None if context is None else context.double())
    sign = torch.linalg.slogdet(matrix[condition(matrix) < 1e8])[0]
    require(len(sign.unique()) <= 1 and bool((sign != 0).all()), case, f"orientation: signs {sign.unique().tolist()}")
    return 0.0


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


def identity(case: Case) -> float:
    """B14: at its initial context a fresh step is the identity, both ways; to be skipped for a step that has none."""
    step = dataclasses.replace(case, push=0.0).step()
    z, bound = case.z(16, scale=3.0), 1e-12 if case.dtype == torch.float64 else 1e-6
    context = step.initial_context().to(z) if step.context_size else None
    worst = 0.0
    for direction in (step, step.inverse):
        image, log_det = (t.detach() for t in direction(z, context))
        worst = max(worst, within("identity", (image - z).abs(), bound * z.abs().clamp_min(1), case))
        worst = max(worst, within("identity: log-det", log_det.abs(), bound, case))
    return worst


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


def mass(case: Case) -> float:
    """B15: the density integrates to 1, over the image of a grid of noise, in one and two dimensions."""
    if case.dim > 2 or case.dtype != torch.float64 or (case.dim == 2 and case.push > 0.3):
        return 0.0
    # Sharper two-dimensional densities defeat the grid, not the flow.
    step, context = case.step(), case.context(1, scale=case.context_scale if case.dim == 1 else 0.3)
    if step.domain != LINE:
        return 0.0
    return within("mass - 1", (total_mass(step, context, case.device) - 1).abs(), 1e-3 if case.dim == 1 else 1e-2, case)


@torch.no_grad()
def total_mass(step: Bijector, context: Tensor | None = None, device: str = "cpu") -> Tensor:
    """Integral of a float64 step's density at one context, by quadrature, at dim 1 or 2.

    The density is the inverse's, and the cells are the images of a grid of noise, so they lie where the mass is, and
    their lengths and areas owe nothing to the log-det.
    """
    return _mass_1d(step, context, device) if step.dim == 1 else _mass_2d(step, context, device)


def _density(step: Bijector, y: Tensor, context: Tensor | None) -> Tensor:
    noise, log_det = step.inverse(y, context)
    return torch.exp(log_det - 0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1))


def _mass_1d(step: Bijector, context: Tensor | None, device: str) -> Tensor:
    noise = torch.linspace(-9, 9, 40001, dtype=torch.float64, device=device).unsqueeze(-1)
    y = step(noise, context)[0]
    return torch.trapezoid(_density(step, y, context), y.squeeze(-1)).abs()


def _mass_2d(step: Bijector, context: Tensor | None, device: str, cells: int = 200) -> Tensor:
    """Density at the image of each cell's middle, times the area of the image of the cell."""
    edge = torch.linspace(-7, 7, cells + 1, dtype=torch.float64, device=device)
    middle = 0.5 * (edge[1:] + edge[:-1])
    corners = step(torch.cartesian_prod(edge, edge), context)[0].view(cells + 1, cells + 1, 2)
    centers = step(torch.cartesian_prod(middle, middle), context)[0]
    a, b = corners[1:, 1:] - corners[:-1, :-1], corners[:-1, 1:] - corners[1:, :-1]
    area = 0.5 * (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).abs()
    return (_density(step, centers, context) * area.flatten()).sum()


def composition(case: Case) -> float:
    """B21: Chain and Inverse of the step have exact log-dets; ``Inverse(Inverse(step))`` is the step; log-dets add."""
    first, second = case.step(), case.step(case.seed + 1)
    once = Inverse(first)
    right = once is first.step if isinstance(first, Inverse) else isinstance(once, Inverse) and Inverse(once) is first
    require(right, case, "composition: Inverse(Inverse(step)) is not the step")
    if first.codomain != second.domain:
        second = Inverse(second)
    z, parts = case.z(8), [case.context(8), case.context(8)]
    context = None if parts[0] is None else torch.cat([part for part in parts if part is not None], dim=-1)
    chain = Chain(first, second)
    middle, one = first(z, parts[0])
    image, two = second(middle, parts[1])
    _adds(case, chain(z, context), (image, middle, one, two))
    return _chain_error(chain, z, context, case)


def _adds(case: Case, found: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    image, middle, one, two = (t.detach() for t in parts)
    scale = 1 + image.abs() + middle.abs().amax(-1, keepdim=True)
    within("Chain: steps in sequence", (found[0] - image).abs().detach(), 1e4 * eps(case) * scale, case)
    scale = 1 + one.abs() + two.abs()
    within("Chain: log-dets add", (found[1] - one - two).abs().detach(), 1e3 * eps(case) * scale, case)


def _chain_error(chain: Bijector, z: Tensor, context: Tensor | None, case: Case) -> float:
    if case.dtype == torch.float64:
        return log_det_error(chain, chain, z, context, case)
    return _narrow_error(chain, z, context, case)
