"""Properties under torch's tools: torch.func, compilation, export, the meta device; and how often a network runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowpost.bijectors.base import Bijector
from flowpost.bijectors.wrappers import Inverse
from flowpost.testing.cases import Case, Direction, Map, equal, jacobian, leaves, require, same, sides, weighed, within
from flowpost.testing.derivatives import with_gradients


def transforms(case: Case) -> float:
    """B17: vmap of points, jacrev, jacfwd, a vectorized jacobian, stacked parameters and functional_call, all equal."""
    step, context = case.step(), case.context(3)
    axes = (0, None if context is None else 0)
    bound, worst = 1e-8 if case.dtype == torch.float64 else 1e-4, 0.0
    for name, direction, z in sides(case, step, 3):
        wanted = direction(z, context)
        mapped = torch.func.vmap(lambda *args, f=direction: f(*args), in_dims=axes)(z, context)
        worst = max(worst, same(f"vmap, {name}", mapped, wanted, bound, case))
        matrix = jacobian(direction, z, context)
        require(bool((torch.linalg.slogdet(matrix)[0] != 0).all()), case, "jacobian: singular")
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            found = torch.func.vmap(transform(lambda *args, f=direction: f(*args)[0]), in_dims=axes)(z, context)
            worst = max(worst, same(f"{transform.__name__}, {name}", (found,), (matrix,), bound, case))
        found = torch.autograd.functional.jacobian(lambda z, f=direction: f(z, context)[0].sum(0), z, vectorize=True)
        worst = max(worst, same(f"vectorized, {name}", (found.movedim(0, 1),), (matrix,), bound, case))
    z = case.z(3)
    parameters: dict[str, Tensor] = dict(step.named_parameters())
    called = torch.func.functional_call(step, parameters, (z, context))
    require(equal(called, step(z, context)), case, "functional_call: another answer")
    return max(worst, _stacked(case, step, bound)) if parameters else worst


def _stacked(case: Case, step: Bijector, bound: float) -> float:
    """Two steps of equal layout as one call, in both directions."""
    other = copy.deepcopy(step)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    worst, context = 0.0, case.context(3)
    for name, _, z in sides(case, step, 3):
        models = [Direction(each, name) for each in (step, other)]
        called = copy.deepcopy(models[0])  # where a step comes twice, torch leaves in it what stood in for its weights
        state = torch.func.stack_module_state(models)  # pyright: ignore[reportArgumentType]
        call = lambda *s, m=called, z=z: torch.func.functional_call(m, s, (z, context))  # noqa: E731
        found = torch.func.vmap(call)(*state) if state[1] else torch.func.vmap(call)(state[0])
        for i, model in enumerate(models):
            worst = max(worst, same(f"stacked, {name}", [t[i] for t in found], model(z, context), bound, case))
    return worst


def compiles(case: Case) -> float:
    """B18: fullgraph compile of both directions: values and all gradients equal eager."""
    step, worst = case.step(), 0.0
    context, bound = case.context(3), 1e-10 if case.dtype == torch.float64 else 1e-4
    for _, direction, z in sides(case, step, 3):
        torch._dynamo.reset()
        compiled = torch.compile(direction, backend="aot_eager", fullgraph=True)
        results = [with_gradients(f, step, z, context) for f in (compiled, direction)]
        for found, wanted in zip(*results, strict=True):
            scale = 1 + wanted.abs().max() if wanted.numel() else 1.0
            worst = max(worst, within("compile", (found - wanted).abs().flatten(), bound * scale, case))
    return worst


def batch_sizes(case: Case) -> float:
    """B30: one size is compiled, and once more all others, in both directions; each exports with a dynamic batch."""
    if case.dtype != torch.float64:  # a shape has none
        return 0.0
    step, context, worst, bound = case.step(), case.context(13), 0.0, 1e-10
    for name, direction, z in sides(case, step, 13):
        function, graphs = _counted(direction)
        for size in range(2, 14):
            part = None if context is None else context[:size]
            worst = max(
                worst, same(f"{name} of {size}", function(z[:size], part), direction(z[:size], part), bound, case)
            )
        require(len(graphs) <= 2, case, f"batch sizes: {name} was compiled {len(graphs)} times for 12 sizes")
        program = _exported(Direction(step, name), z[:3], None if context is None else context[:3])
        found = program.module()(z, context)
        worst = max(worst, same(f"{name}, exported", found, direction(z, context), bound, case))
    return worst


def _counted(direction: Map) -> tuple[Map, list[object]]:
    graphs: list[object] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    return torch.compile(direction, backend=backend, fullgraph=True), graphs


def _exported(module: nn.Module, z: Tensor, context: Tensor | None) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch", min=2, max=4096)}
    shapes = (batch, None if context is None else batch)
    return torch.export.export(module, (z, context), dynamic_shapes=shapes, strict=False)


class _Operations(TorchDispatchMode):
    """Counts the operations, and notes those that leave the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.strays = 0, []

    def __torch_dispatch__(  # noqa: D105
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        self.count += 1
        self.strays += [str(func) for t in tensors if not t.is_meta]
        return out


def meta(case: Case) -> float:
    """B31: on the meta device both directions, their gradients and the start run there alone, and read nothing back.

    The number returned is how many operations a call and its gradient dispatch, the longer direction's: what a device
    that is bound by launches pays.
    """
    if case.dtype != torch.float32:  # which has every operation of float64, and casts
        return 0.0
    step, context, most = case.step().to("meta"), case.context(3), 0
    context = None if context is None else context.to("meta")
    for name, z in (("forward", case.z(3).to("meta")), ("inverse", case.y(3).to("meta"))):
        getattr(step, name)(z, context)  # which may copy a constant there
        operations = _Operations()
        with operations:
            _gradient(step, name, z, context)
            start = step.initial_context()
        require(start.is_meta, case, f"meta: initial_context is on {start.device}")
        require(not operations.strays, case, f"meta: {name} leaves it in {operations.strays}")
        most = max(most, operations.count)
    return float(most)


def _gradient(step: Bijector, name: str, z: Tensor, context: Tensor | None) -> None:
    z, context, inputs = leaves(step, z, context)
    torch.autograd.grad(weighed(*getattr(step, name)(z, context)), inputs, allow_unused=True)


def passes(case: Case) -> float:
    """B24: forward calls no inner network more than once; with an `Inverse` in it at most dim times."""
    step, z, context = case.step(), case.z(3), case.context(3)
    counts: dict[nn.Module, int] = {}
    networks = [m for m in step.modules() if not isinstance(m, Bijector)]
    hooks = [m.register_forward_hook(lambda m, *_: counts.update({m: counts.get(m, 0) + 1})) for m in networks]
    step(z, context)
    for hook in hooks:
        hook.remove()
    most = max(counts.values(), default=0)
    limit = case.dim if any(isinstance(module, Inverse) for module in step.modules()) else 1
    require(most <= limit, case, f"passes: forward runs one network {most} times")
    return float(most)
