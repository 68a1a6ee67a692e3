"""pyro: transform modules and their conditional kinds."""

# ruff: noqa: ANN401 - the library is imported by name where it is installed, so it has no types here.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Family, Pair, Sizes, module

TRANSFORMS = "pyro.distributions.transforms"


def call(flow: Any, z: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Pair:
    """The map, which keeps its log-det for who asks next; a conditional one is conditioned anew at each call."""
    step = flow.condition(context) if hasattr(flow, "condition") else flow
    step = step.inv if inverse else step
    image = step(z)
    return image, step.log_abs_det_jacobian(z, image)


def families() -> list[Family]:
    """IAF (two kinds), spline, planar, radial, Sylvester; IAF's orders are reversed from one step to the next."""
    t = module(TRANSFORMS)

    def kind(name: str, build: Callable[[Sizes], nn.Module], **options: Any) -> Family:
        # `.condition` is the only way in for a context, and a transform without one has no such method.
        return Family(name, build, call, optional_context=False, **options)

    return [
        kind("IAF", lambda sizes: iaf(sizes, stable=False), activations=activations),
        kind("IAF, stable", lambda sizes: iaf(sizes, stable=True), activations=activations),
        kind("Spline-AR", lambda sizes: _repeated("spline_autoregressive", sizes, hidden=2, bound=3.0)),
        kind("Planar", lambda sizes: _repeated("planar", sizes, hidden=2 * bool(sizes.context)), invertible=False),
        kind("Radial", lambda sizes: _repeated("radial", sizes, hidden=2 * bool(sizes.context)), invertible=False),
        kind("Sylvester", lambda sizes: chain([t.sylvester(sizes.dim) for _ in range(sizes.steps)]),
             invertible=False, amortized=False),
    ]  # fmt: skip


def chain(steps: Sequence[Any]) -> nn.Module:
    """Steps one after the other, which keep what the log-det needs again."""
    conditional = module("pyro.distributions.conditional")
    if isinstance(steps[0], conditional.ConditionalTransform):
        return conditional.ConditionalComposeTransformModule(list(steps), cache_size=1)
    return module("pyro.distributions.torch_transform").ComposeTransformModule(list(steps), cache_size=1)


def network(dim: int, context: int, widths: Sequence[int], **options: Any) -> Any:
    """The masked network, conditional where it reads a context."""
    nets = module("pyro.nn")
    if context:
        return nets.ConditionalAutoRegressiveNN(dim, context, list(widths), **options)
    return nets.AutoRegressiveNN(dim, list(widths), **options)


def iaf(sizes: Sizes, *, stable: bool) -> nn.Module:
    """With `stable`, the gate of the paper."""
    kind = getattr(module(TRANSFORMS), f"{'Conditional' if sizes.context else ''}AffineAutoregressive")
    order, widths = torch.arange(sizes.dim), [sizes.hidden, sizes.hidden]
    orders = [order if step % 2 == 0 else order.flip(0) for step in range(sizes.steps)]
    nets = [network(sizes.dim, sizes.context, widths, permutation=p, nonlinearity=nn.ReLU()) for p in orders]
    return chain([kind(net, stable=stable) for net in nets])


def _repeated(name: str, sizes: Sizes, *, hidden: int, **options: Any) -> nn.Module:
    """By the library's own helper, which makes the networks."""
    make = getattr(module(TRANSFORMS), f"{'conditional_' if sizes.context else ''}{name}")
    given = [sizes.dim, sizes.context] if sizes.context else [sizes.dim]
    networks = {"hidden_dims": [sizes.hidden] * hidden} if hidden else {}
    return chain([make(*given, **networks, **options) for _ in range(sizes.steps)])


def activations(flow: Any) -> list[object]:
    """Each network's, after all but its last layer."""
    nets = [step.nn if hasattr(step, "nn") else step.arn for step in flow]
    return [net.f for net in nets for _ in net.layers[:-1]]
