"""Properties of the derivatives: right, of first and second order, whatever the inputs depend on, and never lost."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import LINE, Bijector
from flowpost.bijectors.chain import Chain
from flowpost.posterior import FlowPosterior
from flowpost.testing.cases import Case, Direction, Map, Pair, eps, leaves, place, require, same, sides, slopes, weighed

MANY = 4000
"""Parameters above which the contract's derivatives are tried in z and context alone."""


def gradients(case: Case) -> float:
    """B12: gradcheck and gradgradcheck of both directions, in z, context and parameters; every parameter is reached."""
    step = case.step()
    _reached(case, step)
    if case.dtype != torch.float64:
        return 0.0
    z, context = case.z(2).requires_grad_(), case.context(2)
    inputs = (z,) if context is None else (z, context.requires_grad_())
    torch.autograd.gradcheck(lambda *args: _attached(step(*args), args), inputs)
    if sum(p.numel() for p in step.parameters()) <= MANY:
        for name, _, points in sides(case, step, 2):
            _of_everything(step, name, points, context)
    else:
        torch.autograd.gradgradcheck(lambda *args: _attached(step(*args), args), inputs, atol=1e-4)
        images = (case.y(2).requires_grad_(), *inputs[1:])
        torch.autograd.gradcheck(lambda *args: _attached(step.inverse(*args), args), images, atol=1e-4, rtol=1e-2)
    return 0.0


def _attached(outputs: Pair, inputs: Sequence[Tensor | None]) -> Pair:
    """The same outputs, each with a gradient: gradcheck looks at no output without one, as a detached log-det is."""
    nothing = torch.stack([0 * t.sum() for t in inputs if t is not None]).sum()
    return outputs[0] + nothing, outputs[1] + nothing


def _reached(case: Case, step: Bijector) -> None:
    total = sum(t.sum() for t in step(case.z(2).requires_grad_(), case.context(2)))
    parameters = {name: each for name, each in step.named_parameters() if each.requires_grad}
    reached = torch.autograd.grad(cast(Tensor, total), [*parameters.values()], allow_unused=True) if parameters else ()
    names = [name for name, slope in zip(parameters, reached, strict=True) if slope is None]
    require(not names, case, f"gradients: none reaches {names}")


def _of_everything(step: Bijector, name: str, z: Tensor, context: Tensor | None) -> None:
    """Along random directions in the space of all numbers, which costs two evaluations whatever their count is."""
    names = [f"step.{name}" for name, _ in step.named_parameters()]
    caller = Direction(copy.deepcopy(step), name)

    def function(z: Tensor, context: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.func.functional_call(caller, dict(zip(names, parameters, strict=True)), (z, context))
        return _attached(outputs, (z, context, *parameters))

    z, context, inputs = leaves(step, z, context)
    parameters = [p.detach().clone().requires_grad_() for p in step.parameters()]
    inputs = cast("tuple[Tensor, ...]", (z, context, *parameters))  # gradcheck passes None on
    torch.autograd.gradcheck(function, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


def dependent(case: Case) -> float:
    """B25: where z, contexts and steps depend on one another, ``create_graph=True`` changes no first gradient.

    A step runs, another, and the first again; all contexts are functions of one number per feature, and so is z; every
    other parameter is frozen. Second derivatives are central differences of the first.
    """
    first, second = case.step(), case.step(case.seed + 1)
    flow = (Chain(first, second, first) if first.codomain == first.domain else Chain(first)).to(case.dtype)
    for parameter in [*flow.parameters()][1::2]:
        parameter.requires_grad_(False)  # noqa: FBT003
    leaf = 0.3 * case.z(2).clamp(-1, 1)
    inputs = [leaf.requires_grad_(), *(p for p in flow.parameters() if p.requires_grad)]
    worst = 0.0
    for name, loss in _losses(case, flow, leaf).items():
        plain, twice = slopes(loss(), inputs), slopes(loss(), inputs, create_graph=True)
        bound = 1e-9 if case.dtype == torch.float64 else 1e-4
        worst = max(worst, same(f"{name}: with create_graph", twice, plain, bound * _scale(plain), case))
        if case.dtype == torch.float64 and name != "path":  # whose gradient, by what it stops, is that of no function
            _second(case, name, loss, inputs)
    return worst


def _losses(case: Case, flow: Bijector, leaf: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A loss a direction, of a z and a context that are functions of `leaf`."""
    z, y, part = case.z(2), case.y(2), case.context(2)
    repeats = flow.context_size // max(0 if part is None else part.shape[-1], 1)

    def moved(start: Tensor, ends: tuple[float, float]) -> Tensor:
        return start + leaf if ends == LINE else place(start + leaf, ends)

    def context() -> Tensor | None:
        return None if part is None else (part + leaf.sum(-1, keepdim=True).tanh()).repeat(1, repeats)

    losses = {
        "forward": lambda: weighed(*flow(moved(z, flow.domain), context())),
        "inverse": lambda: weighed(*flow.inverse(moved(y, flow.codomain), context())),
    }
    if flow.domain == LINE:
        losses["path"] = lambda: _path(flow, moved(z, LINE), context())
    return losses


def _path(flow: Bijector, noise: Tensor, context: Tensor | None) -> Tensor:
    posterior = FlowPosterior(flow.context_size, flow, head=nn.Identity())
    if context is None:
        sample = posterior(sample_shape=(len(noise),), noise=noise)
        return posterior.path_log_prob(sample).sum()
    return posterior.path_log_prob(posterior(context, noise=noise), context).sum()


def _scale(grads: Sequence[Tensor]) -> float:
    return 1 + max(float(grad.abs().max()) for grad in grads if grad.numel())


def _second(case: Case, name: str, loss: Callable[[], Tensor], inputs: Sequence[Tensor], size: float = 1e-6) -> None:
    """A Hessian times a random direction against central differences: short ones, for slopes may have corners."""
    generator = torch.Generator("cpu").manual_seed(case.seed)
    ways = [torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device) for t in inputs]

    def along(amount: float) -> tuple[Tensor, ...]:
        before = [t.detach().clone() for t in inputs]
        with torch.no_grad():
            for t, way in zip(inputs, ways, strict=True):
                t.add_(amount * way)
        found = slopes(loss(), inputs)
        with torch.no_grad():
            for t, old in zip(inputs, before, strict=True):
                t.copy_(old)
        return found

    first = slopes(loss(), inputs, create_graph=True)
    total = torch.stack([(slope * way).sum() for slope, way in zip(first, ways, strict=True)]).sum()
    found = slopes(total, inputs)
    wanted = [(up - down) / (2 * size) for up, down in zip(along(size), along(-size), strict=True)]
    same(f"{name}: second derivatives", found, wanted, 1e-5 * _scale(wanted), case)


def context_matters(case: Case) -> float:
    """B9: the outputs' gradient reaches every number of the context."""
    step, z, context = case.step(), case.z(16), case.context(16)
    if context is None or case.push == 0:
        return 0.0
    image, log_det = step(z, context.requires_grad_())
    weights = torch.linspace(1, 2, image.numel(), dtype=z.dtype, device=z.device).view_as(image)
    (gradient,) = torch.autograd.grad((weights * image).sum() + log_det.sum(), context)
    unread = (gradient == 0).all(0).nonzero().flatten().tolist()
    require(not unread, case, f"context: numbers {unread} are never read")
    return 0.0


def context_everywhere(case: Case) -> float:
    """B9: in both directions, every number of every example's context moves value and gradient at every point.

    To be skipped by a step whose numbers act on some points alone, as a spline's do.
    """
    step, context = case.step(), case.context(5)
    if context is None or case.dtype != torch.float64:
        return 0.0
    for name, direction, z in sides(case, step, 5):
        context_acts(case, name, direction, z.unsqueeze(0), context)
    return 0.0


def context_acts(case: Case, name: str, direction: Map, z: Tensor, context: Tensor) -> None:
    """Every number of every example's context acts on some of the points that are stacked along z's first axis.

    Where a gradient says that the change is less than a rounding, as in a saturated tanh, nothing has to move.
    """
    c = context.detach().clone().requires_grad_()
    image, log_det = direction(z, c)
    weights = torch.linspace(0.5, 1.5, z.shape[-1], dtype=z.dtype, device=z.device)
    (gradient,) = torch.autograd.grad((weights * image).sum() + 0.7 * log_det.sum(), c)
    require(bool((gradient != 0).all()), case, f"context: a gradient is 0 ({name})")
    moved = 0.1 * gradient.abs()
    seen = moved > 64 * eps(case) * (1 + image.abs().amax((0, -1)) + log_det.abs().amax(0)).detach().unsqueeze(-1)
    for number in range(context.shape[-1]):
        changed = context.clone()
        changed[:, number] += 0.1
        other = direction(z, changed)
        differs = (other[0] != image).any(-1) | (other[1] != log_det)
        nothing = seen[:, number] & ~differs.any(0)
        require(not nothing.any(), case, f"context: number {number} changes nothing ({name})")


def extremes(case: Case) -> float:
    """B11: finite values and gradients, both ways: z from 1e-30 to 1e6, zero and large contexts, far-pushed weights."""
    values = torch.tensor([0.0, 1e-30, 1.0, -1.0, 1e3, -1e3, 1e6, -1e6], dtype=case.dtype, device=case.device)
    z = values.unsqueeze(-1).repeat(1, case.dim)
    for amount in (0.0, 1.0, 20.0, 100.0):
        pushed = dataclasses.replace(case, push=amount)
        step = pushed.step()
        for scale in (0.0, 1.0, 1e2, 1e4):
            context = case.context(len(values), scale=scale)
            if context is not None and scale == 0:
                context = torch.zeros_like(context)
            for direction, interval in ((step.forward, step.domain), (step.inverse, step.codomain)):
                results = with_gradients(direction, step, place(z, interval), context)
                finite = all(bool(t.isfinite().all()) for t in results)
                found = f"{direction.__name__} has values or gradients that are not finite"
                require(finite, dataclasses.replace(pushed, context_scale=scale), found)
    return 0.0


def with_gradients(direction: Map, step: Bijector, z: Tensor, context: Tensor | None) -> list[Tensor]:
    """Value, log-det, and what gradients there are of their sum."""
    z, context, inputs = leaves(step, z, context)
    image, log_det = direction(z, context)
    grads = torch.autograd.grad(image.sum() + log_det.sum(), inputs, allow_unused=True)
    return [image.detach(), log_det.detach(), *(g for g in grads if g is not None)]
