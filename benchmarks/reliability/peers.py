"""The public libraries' models: two layers of each kind, called as the library's documentation calls them."""

# ruff: noqa: ANN401 - the libraries are imported by name where they are installed, so they have no types here.

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reliability.judge import Model, Pair, forward, inverse

HIDDEN, BOUND = 16, 3.0


def zuko() -> list[Model]:
    """MAF, NSF, LU."""
    flows, lazy, transforms = (importlib.import_module(f"zuko.{part}") for part in ("flows", "lazy", "transforms"))

    def fast(module: Any, z: Tensor, context: Tensor | None) -> Pair:
        flow = module(context)
        return getattr(flow, "transform", flow).call_and_ladj(z)

    def slow(module: Any, z: Tensor, context: Tensor | None) -> Pair:
        flow = module(context)
        return getattr(flow, "transform", flow).inv.call_and_ladj(z)

    def autoregressive(kind: Any) -> Callable[[int, int], nn.Module]:
        return lambda dim, width: kind(dim, width, transforms=2, hidden_features=(HIDDEN, HIDDEN))

    def lu(dim: int, width: int) -> nn.Module:
        parts = [lazy.UnconditionalTransform(transforms.LULinearTransform, torch.eye(dim)) for _ in range(2)]
        return lazy.LazyComposedTransform(*parts)

    return [
        Model("MAF", autoregressive(flows.MAF), fast, slow),
        Model("NSF", autoregressive(flows.NSF), fast, slow),
        # `UnconditionalTransform` is documented to ignore a context, so handing it one is no misuse.
        Model("LU", lu, fast, slow, conditional=lambda dim: None, optional_context=False),
    ]


def nflows() -> list[Model]:
    """MAF, RQS-AR, LU."""
    ar = importlib.import_module("nflows.transforms.autoregressive")
    base = importlib.import_module("nflows.transforms.base")
    lu = importlib.import_module("nflows.transforms.lu")

    def twice(kind: Any, **options: Any) -> Callable[[int, int], nn.Module]:
        def build(dim: int, width: int) -> nn.Module:
            parts = [kind(dim, HIDDEN, context_features=width or None, num_blocks=1, **options) for _ in range(2)]
            return base.CompositeTransform(parts)

        return build

    spline = twice(
        ar.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, tails="linear", tail_bound=BOUND, num_bins=8
    )
    linear = Model(
        "LU",
        lambda dim, width: base.CompositeTransform([lu.LULinear(dim) for _ in range(2)]),
        forward,
        inverse,
        conditional=lambda dim: None,
        optional_context=False,  # linear layers take and ignore one by design
    )
    return [
        Model("MAF", twice(ar.MaskedAffineAutoregressiveTransform), forward, inverse),
        Model("RQS-AR", spline, forward, inverse),
        linear,
    ]


class _Layers(nn.Module):
    """Layers with (z, context) -> (z', log_det) and their inverses, log-dets added in the layers' own dtype."""

    def __init__(self, layers: list[Any], *, reverse: bool = False) -> None:
        super().__init__()
        self.layers, self.reverse = nn.ModuleList(layers), reverse

    def forward(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._run([layer.inverse if self.reverse else layer for layer in self.layers], z, context)

    def inverse(self, z: Tensor, context: Tensor | None) -> Pair:
        layers = list(self.layers)[::-1]
        return self._run([layer if self.reverse else layer.inverse for layer in layers], z, context)

    def _run(self, calls: list[Any], z: Tensor, context: Tensor | None) -> Pair:
        # normflows' own NormalizingFlow sums in float32 always; layers by hand give it the benefit of the doubt.
        given = {} if context is None else {"context": context}
        z, total = calls[0](z, **given)
        for call in calls[1:]:
            z, log_det = call(z, **given)
            total = total + log_det
        return z, total


def normflows() -> list[Model]:
    """IAF, RQS-AR, planar (two kinds), radial, LU."""
    flows = importlib.import_module("normflows.flows")

    def twice(make: Callable[[int, int], Any], *, reverse: bool = False) -> Callable[[int, int], nn.Module]:
        return lambda dim, width: _Layers([make(dim, width) for _ in range(2)], reverse=reverse)

    def iaf(dim: int, width: int) -> Any:
        return flows.MaskedAffineAutoregressive(dim, HIDDEN, context_features=width or None, num_blocks=1)

    def spline(dim: int, width: int) -> Any:
        return flows.AutoregressiveRationalQuadraticSpline(dim, 1, HIDDEN, width or None, tail_bound=BOUND)

    def shared(name: str, make: Callable[[int], Any], slow: Any = None, **options: Any) -> Model:
        build = twice(lambda dim, _: make(dim))
        return Model(name, build, forward, slow, conditional=lambda dim: None, **options)

    return [
        Model("IAF", twice(iaf), forward, inverse),
        Model("RQS-AR", twice(spline, reverse=True), forward, inverse),
        shared("Planar", lambda dim: flows.Planar((dim,))),
        shared("Planar, leaky ReLU", lambda dim: flows.Planar((dim,), act="leaky_relu"), inverse),
        shared("Radial", lambda dim: flows.Radial((dim,))),
        shared("LU", flows.LULinearPermute, inverse, optional_context=False),
    ]


def pyro() -> list[Model]:
    """IAF (two kinds), spline, planar, radial, Sylvester."""
    t = importlib.import_module("pyro.distributions.transforms")
    compose = importlib.import_module("pyro.distributions.torch_transform").ComposeTransformModule
    conditional = importlib.import_module("pyro.distributions.conditional")

    def transform(module: Any, context: Tensor | None) -> Any:
        return module if isinstance(module, compose) else module.condition(context)

    def fast(module: Any, z: Tensor, context: Tensor | None) -> Pair:
        step = transform(module, context)
        image = step(z)
        return image, step.log_abs_det_jacobian(z, image)

    def slow(module: Any, z: Tensor, context: Tensor | None) -> Pair:
        step = transform(module, context).inv
        image = step(z)
        return image, step.log_abs_det_jacobian(z, image)

    def twice(make: Callable[..., Any], make_conditional: Callable[..., Any]) -> Callable[[int, int], nn.Module]:
        def build(dim: int, width: int) -> nn.Module:
            if width:
                return conditional.ConditionalComposeTransformModule([make_conditional(dim, width) for _ in range(2)])
            return compose([make(dim) for _ in range(2)])

        return build

    def hidden(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *sizes: make(*sizes, hidden_dims=[HIDDEN, HIDDEN], **options)

    splines = t.spline_autoregressive, t.conditional_spline_autoregressive
    iaf, conditional_iaf = t.affine_autoregressive, t.conditional_affine_autoregressive
    # `.condition` is the only way in for a context, and a transform without one has no such method.
    common: dict[str, Any] = {"fast": fast, "optional_context": False}
    return [
        Model("IAF", twice(hidden(iaf), hidden(conditional_iaf)), slow=slow, **common),
        Model("IAF, stable", twice(*(hidden(f, stable=True) for f in (iaf, conditional_iaf))), slow=slow, **common),
        Model("Spline-AR", twice(*(hidden(f, bound=BOUND) for f in splines)), slow=slow, **common),
        Model("Planar", twice(t.planar, hidden(t.conditional_planar)), **common),
        Model("Radial", twice(t.radial, hidden(t.conditional_radial)), **common),
        Model("Sylvester", twice(t.sylvester, t.sylvester), conditional=lambda dim: None, **common),
    ]
