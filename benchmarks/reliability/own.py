"""flowpost's models on the scoreboard: one for every family and wrapper, and every recipe, amortized and learned."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from benchmarks.reliability.judge import CONTEXT, Model, Pair, forward, inverse

if TYPE_CHECKING:
    from flowpost import Bijector, FlowPosterior

HIDDEN = 16
SMALL = {"steps": 2, "hidden": (HIDDEN,), "context_size": 6}
"""Options for recipes that take them: the scoreboard is about faults, not capacity."""


def flowpost_models() -> list[Model]:
    """One for every family and wrapper, then the recipes."""
    import flowpost as fp  # not at the top: importing it is watched

    def ar(dim: int, context: int = 0) -> fp.Autoregressive:
        return fp.Autoregressive(dim, context, (HIDDEN,))

    def masked(dim: int, context: int) -> fp.Masked:
        return fp.Masked(fp.Affine(dim), context, (HIDDEN,))

    steps: dict[str, Callable[[int], fp.Bijector]] = {
        "Affine": fp.Affine,
        "Scale": lambda dim: fp.Scale(dim, 0.3),
        "UnitLowerTriangular": fp.UnitLowerTriangular,
        "Planar ×2": lambda dim: fp.Chain(fp.Planar(dim), fp.Planar(dim)),
        "Radial ×2": lambda dim: fp.Chain(fp.Radial(dim), fp.Radial(dim)),
        "ConvexCombination": lambda dim: fp.ConvexCombination(dim, 3),
        "Householder ×2": lambda dim: fp.Chain(fp.Householder(dim), fp.Householder(dim)),
        "LULinear": fp.LULinear,
        "ActNorm": fp.ActNorm,
        "Sigmoid": fp.Sigmoid,
        "Softplus": fp.Softplus,
        "Tanh": fp.Tanh,
        "Sylvester ×2": lambda dim: fp.Chain(fp.Sylvester(dim, (dim + 1) // 2), fp.Sylvester(dim, dim, 2)),
        "Gate ×2": lambda dim: fp.Chain(fp.Gate(dim), fp.Gate(dim, gain=1.1)),
        "Autoregressive ×2": lambda dim: fp.Chain(ar(dim), ar(dim)),
        "Autoregressive ×2, amortized": lambda dim: fp.Shared(ar(dim, CONTEXT), ar(dim, CONTEXT)),
        "Masked(Affine) ×2, amortized": lambda dim: fp.Shared(masked(dim, CONTEXT), masked(dim, CONTEXT)),
        "Coupling ×2": lambda dim: fp.Chain(
            fp.Coupling(dim, fp.Affine(dim - dim // 2), 0, (HIDDEN,)),
            fp.Coupling(dim, fp.Shift(dim - dim // 2), 0, (HIDDEN,), order=range(dim)[::-1]),
        ),
        "Spline ×2": lambda dim: fp.Chain(fp.Spline(dim), fp.Spline(dim)),
        "DeepSigmoid ×2": lambda dim: fp.Chain(fp.DeepSigmoid(dim, 4), fp.DeepSigmoid(dim, 4)),
        "Reverse": fp.Reverse,
        "Permute": lambda dim: fp.Permute([*range(1, dim), 0]),  # an order is the architecture, not a weight
        "Learned(Planar) ×2": lambda dim: fp.Chain(*(fp.Learned(fp.Planar(dim)) for _ in range(2))),
        "Conditioned(Planar) ×2": lambda dim: fp.Shared(*(fp.Conditioned(fp.Planar(dim), CONTEXT) for _ in range(2))),
        "Inverse(Affine)": lambda dim: fp.Inverse(fp.Affine(dim)),
        "Inverse(Planar) ×2": lambda dim: fp.Inverse(fp.Chain(fp.Planar(dim), fp.Planar(dim))),
        "Inverse(Sylvester)": lambda dim: fp.Inverse(fp.Sylvester(dim)),
        "Inverse(Autoregressive) ×2": lambda dim: fp.Chain(*(fp.Inverse(ar(dim, 2)) for _ in range(2))),
        "Shared(Autoregressive, Reverse, Autoregressive)": lambda dim: fp.Shared(
            ar(dim, CONTEXT), fp.Reverse(dim), ar(dim, CONTEXT)
        ),
    }
    recipes = importlib.import_module("flowpost.recipes").RECIPES
    return [
        *(_step(name, build) for name, build in steps.items()),
        *(_recipe(name, recipe) for name, recipe in recipes.items()),
        *(_step(f"{name}(), learned", _learned(recipe)) for name, recipe in recipes.items()),
    ]


def _step(name: str, build: Callable[[int], Bijector]) -> Model:
    """A flowpost bijector, which says itself how much context it reads."""

    def width(dim: int) -> int:
        return build(dim).context_size

    # The uses draw points of the line: an inverse that is defined elsewhere is not asked.
    slow = inverse if build(2).codomain == (-math.inf, math.inf) else None
    return Model(name, lambda dim, _: build(dim), forward, slow, width, lambda dim: width(dim) or None,
                 reload=_flowpost_files())  # fmt: skip


def _recipe(name: str, recipe: Callable[..., FlowPosterior]) -> Model:
    """A named posterior with an encoder's features: the context goes through its head."""

    def fast(module: nn.Module, z: Tensor, h: Tensor | None) -> Pair:
        posterior = cast("FlowPosterior", module)
        return posterior.flow(z, posterior.context(h))

    def slow(module: nn.Module, z: Tensor, h: Tensor | None) -> Pair:
        posterior = cast("FlowPosterior", module)
        return posterior.flow.inverse(z, posterior.context(h))

    def build(dim: int, width: int) -> nn.Module:
        return recipe(width, dim, **_options(recipe))

    return Model(f"{name}(), amortized", build, fast, slow, lambda dim: CONTEXT, reload=_flowpost_files())


def _learned(recipe: Callable[..., FlowPosterior]) -> Callable[[int], Bijector]:
    return lambda dim: recipe(0, dim, **_options(recipe)).flow


def _options(recipe: Callable[..., FlowPosterior]) -> dict[str, Any]:
    return {name: SMALL[name] for name in inspect.signature(recipe).parameters if name in SMALL}


def _flowpost_files() -> Callable[[nn.Module, nn.Module, Path], None] | None:
    fp = importlib.import_module("flowpost")
    if not hasattr(fp, "load") or importlib.util.find_spec("safetensors") is None:
        return None

    def reload(module: nn.Module, fresh: nn.Module, path: Path) -> None:
        fp.save(module, path)
        fp.load(path, into=fresh)

    return reload
