"""What is fitted: a flow that starts as the identity, before the map onto the Gaussian of a mode; one for each mode."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch

from flowpost.bijectors.base import LINE, Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.permute import Permute
from flowpost.bijectors.spline import Spline
from flowpost.bijectors.wrappers import Learned
from flowpost.directions import slow_steps
from flowpost.numerics.arguments import check_int
from flowpost.posterior import FlowPosterior
from flowpost.recipes import RECIPES
from flowpost.recipes.record import check_recipe
from flowpost.variational.bound import Fitted
from flowpost.variational.gaussian import Gaussian
from flowpost.variational.mixture import Mixture
from flowpost.variational.standard import Standard

Flow: TypeAlias = str | Bijector | FlowPosterior | None
COUPLINGS = ("nice", "realnvp", "spline_coupling")
"""Recipes whose two halves of the variables are drawn anew after every second step, so that all pairs meet."""
_BOUND = 5.0
"""Where the first splines end: few draws of noise are farther out."""
GAUSSIANS = ("diagonal", "full_covariance")
"""Recipes that the Gaussian of the start is already the best of."""


def build_flow(flow: Flow, dim: int, options: Mapping[str, object]) -> Bijector:
    """The flow, without an encoder, from a recipe's name, a bijector, or a posterior; None is a spline and couplings.

    Raises:
        TypeError: for anything else, or options that it does not take.
        ValueError: for an unknown name, another dim, or a posterior with features.
    """
    if flow is None:
        return _default(dim, options)
    if isinstance(flow, str):
        return _recipe(flow, dim, options)
    if options:
        raise TypeError(f"flow_options: expected none with a {type(flow).__name__}, got {', '.join(options)}")
    if not isinstance(flow, (Bijector, FlowPosterior)):
        raise TypeError(f"flow: expected a recipe's name, a Bijector or a FlowPosterior, got {type(flow).__name__}")
    if isinstance(flow, FlowPosterior) and flow.features:
        raise ValueError(f"flow: expected a posterior of features=0, got features={flow.features}")
    if flow.dim != dim:
        raise ValueError(f"flow: expected dim={dim}, the number of free coordinates, got dim={flow.dim}")
    built = flow if isinstance(flow, FlowPosterior) else FlowPosterior(0, flow)
    if built.flow.codomain != LINE:
        raise ValueError(
            f"flow: expected one onto all real numbers, as the free coordinates are, got codomain "
            f"{built.flow.codomain}; leave its last step out, and give the parameters constraints"
        )
    return copy.deepcopy(built.flow)


def _default(dim: int, options: Mapping[str, object]) -> Bijector:
    """Affine couplings, after a spline of each variable by itself; of one variable, splines alone.

    Each variable of a coupling is an affine map of noise, given others: where they are independent, a Gaussian.
    """
    if dim == 1:
        return _recipe("spline_coupling", dim, options)
    return Chain(Learned(Spline(dim, bound=_BOUND)), _recipe("realnvp", dim, options))


def _recipe(name: str, dim: int, options: Mapping[str, object]) -> Bijector:
    taken, sizes = check_recipe(name, options), _sizes(dim)
    options = {**{option: value for option, value in sizes.items() if option in taken}, **options}
    with torch.device("cpu"):  # the weights that a seed gives are the same for every device
        return _coupled(name, dim, options) if name in COUPLINGS else RECIPES[name](0, dim, **options).flow


def _sizes(dim: int) -> dict[str, object]:
    """Of a recipe's flow, where it takes them and nothing else is said: first depth pays, then width too.

    Without an encoder there is no c to read.
    """
    return {"steps": 8 if dim <= 16 else 12, "hidden": (32, 32) if dim <= 32 else (64, 64), "context_size": 0}


def _coupled(name: str, dim: int, options: dict[str, object]) -> Bijector:
    """Couplings two by two, each pair with halves of its own."""
    steps = check_int("steps", options.pop("steps"), minimum=1)
    pairs = [RECIPES[name](0, dim, steps=min(2, steps - made), **options).flow for made in range(0, steps, 2)]
    return Chain(*(part for pair in pairs for part in (Permute(torch.randperm(dim).tolist()), pair)))


def is_mixable(flow: Bijector) -> bool:
    """Whether log q of any z takes one pass, as it must in a mixture."""
    return not slow_steps(flow, inverse=True)


def assemble(flow: Bijector, gaussians: Sequence[Gaussian], elbos: Sequence[float]) -> Fitted:
    """A posterior for one mode, a mixture for several, whose weights start at the modes' evidence."""
    parts = [component(flow, gaussian) for gaussian in gaussians]
    if len(parts) == 1:
        return parts[0]
    mixture = Mixture(parts)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor(elbos, dtype=torch.float64, device="cpu"))
        mixture.logits.sub_(mixture.logits.max())
    return mixture


def component(flow: Bijector, gaussian: Gaussian) -> FlowPosterior:
    """A copy of the flow, that learns for itself, before the map onto a Gaussian."""
    return FlowPosterior(0, Chain(copy.deepcopy(flow).to(gaussian.loc), Standard(*gaussian)))


def components(fitted: Fitted) -> list[FlowPosterior]:
    """The posteriors of a mixture, or the one."""
    return [cast(FlowPosterior, part) for part in fitted.posteriors] if isinstance(fitted, Mixture) else [fitted]
