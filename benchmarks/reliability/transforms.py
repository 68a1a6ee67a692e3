"""Hard uses of torch: gradients of any order, its function transforms, its compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck

from benchmarks.reliability.judge import Direction, Model, Pair, Use, Wrong
from benchmarks.reliability.truth import Subject, agree


class _Call(nn.Module):
    """A direction of a model as a module of its own, for transforms that take modules."""

    def __init__(self, module: nn.Module, direction: Direction) -> None:
        super().__init__()
        self.module, self.direction = module, direction

    def forward(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.direction(self.module, z, context)


def gradients(model: Model, check: Callable[..., bool], *, slow: bool = False) -> None:
    """Autograd against finite differences in float64, at two places: a kink may spoil one."""
    subject = Subject(model)
    direction = subject.slow if slow else model.fast
    failures = []
    for seed in (1, 11):
        module = subject.module(dtype=torch.float64)
        context = subject.context(2)
        inputs = [subject.z(2, seed=seed).double(), *([] if context is None else [context.double()])]

        # A clone for every call: finite differences refill their input in place, which is a use of its own.
        def call(z: Tensor, *rest: Tensor, module: nn.Module = module) -> Pair:
            return direction(module, z.clone(), rest[0].clone() if rest else None)

        try:
            check(call, [t.requires_grad_() for t in inputs])
        except GradcheckError as error:
            failures.append(" ".join(str(error).split())[:150])
    if len(failures) == 2:
        raise Wrong(f"gradient differs from finite differences: {failures[0]}")


def finite_gradients(model: Model) -> None:
    """Gradients of inputs, contexts and weights are finite far out and at 0."""
    subject = Subject(model)
    module, context = subject.module(), subject.context(4)
    z = torch.tensor([0.0, 1e-30, 1e3, -1e3]).unsqueeze(-1).repeat(1, subject.dim)
    inputs = [z.requires_grad_(), *([] if context is None else [context.requires_grad_()])]
    image, log_det = model.fast(module, z, context)
    wanted = [*inputs, *module.parameters()]
    grads = torch.autograd.grad(image.sum() + log_det.sum(), wanted, allow_unused=True)
    if not all(g.isfinite().all() for g in grads if g is not None):
        raise Wrong("a gradient is not finite at x = 0, 1e-30 or ±1e3")


def vmap(model: Model) -> None:
    """`torch.func.vmap` over batches equals a loop."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(3, 2)
    axes = (0, None if context is None else 0)
    found = torch.func.vmap(lambda a, c: model.fast(module, a, c), in_dims=axes)(z, context)
    parts = [model.fast(module, z[i], None if context is None else context[i]) for i in range(3)]
    agree(found, (torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])), bound=1e-5)


def jacrev(model: Model) -> None:
    """Jacobians of all examples at once equal plain reverse mode."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(3)

    def image(a: Tensor, c: Tensor | None) -> Tensor:
        return model.fast(module, a.unsqueeze(0), None if c is None else c.unsqueeze(0))[0][0]

    axes = (0, None if context is None else 0)
    found = torch.func.vmap(torch.func.jacrev(image), in_dims=axes)(z, context)
    leaf = z.clone().requires_grad_()
    plain = model.fast(subject.module(), leaf, context)[0]
    rows = [torch.autograd.grad(plain[:, i].sum(), leaf, retain_graph=True)[0] for i in range(subject.dim)]
    truth = torch.stack(rows, dim=1)
    agree((found, found), (truth, truth), bound=1e-4, hint=" (Jacobian)")


def functional_call(model: Model) -> None:
    """Another seed's weights, handed in from outside, as in an ensemble."""
    subject = Subject(model)
    (z, context), other = subject.inputs(5), subject.module(seed=7)
    state = {f"module.{name}": value for name, value in (*other.named_parameters(), *other.named_buffers())}
    found = torch.func.functional_call(_Call(subject.module(), model.fast), state, (z, context))
    agree(found, model.fast(other, z.clone(), context), bound=1e-5)


def compiles(model: Model, *, slow: bool = False) -> None:
    """`torch.compile(fullgraph=True)`: values and gradients equal eager."""
    subject = Subject(model)
    direction = subject.slow if slow else model.fast
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: torch.compile(f, backend="aot_eager", fullgraph=True), lambda f: f):
        module, (z, context) = subject.module(), subject.inputs(3)
        z.requires_grad_()
        pair = wrap(lambda z, c, module=module: direction(module, z, c))(z, context)
        (slope,) = torch.autograd.grad((pair[0] ** 2).sum() + pair[1].sum(), z)
        results.append((pair, slope))
    (found, slope), (truth, wanted) = results
    agree(found, truth, bound=1e-4, hint=" (eager)")
    agree((slope, slope), (wanted, wanted), bound=1e-4, hint=" (eager gradient)")


COMPILE = "compile fullgraph"
"""How the names of the slow uses begin."""
USES = [
    Use("gradcheck", partial(gradients, check=gradcheck), refusable=False),
    Use("gradgradcheck", partial(gradients, check=gradgradcheck), refusable=False),
    Use("gradient through the slow direction", partial(gradients, check=gradcheck, slow=True), refusable=False),
    Use("gradients finite at 0 and ±1e3", finite_gradients),
    Use("func.vmap", vmap, refusable=False),
    Use("func.jacrev under vmap", jacrev, refusable=False),
    Use("func.functional_call", functional_call, refusable=False),
    Use("compile fullgraph, fast", compiles, refusable=False),
    Use("compile fullgraph, slow", partial(compiles, slow=True), refusable=False),
]
