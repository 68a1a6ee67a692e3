"""Put a flexible posterior on an encoder that somebody already has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.bijectors.affine import Affine, Scale
from flowpost.bijectors.autoregressive import Autoregressive
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.gate import Gate
from flowpost.bijectors.wrappers import Learned, linear_head
from flowpost.checks import active, check_finite
from flowpost.numerics.arguments import check_int
from flowpost.numerics.scales import log_var_scale
from flowpost.posterior import FlowPosterior, Sample
from flowpost.recipes import RECIPES


def wrap(
    encoder: nn.Module,
    dim: int,
    *,
    features: int | None = None,
    example: object = None,
    flow: str | Bijector = "iaf",
    **flow_options: object,
) -> WrappedPosterior:
    """Make ``q(z|x)`` of an encoder: its output, on the last axis, becomes the features of a flow posterior.

    An encoder that returns the VAE's pair ``(loc, log_var)`` keeps it. The flow's steps act on the noise; a linear head
    on the pair gives their context. An affine map then gives ``loc + exp(log_var / 2) * z``, log_var softly bounded
    at +-20. It takes the place of the diagonal Gaussian of the recipe. With a named flow the posterior starts at the
    encoder's own Gaussian, so a trained VAE loses nothing.

    A pair's ``flow="iaf"`` that was saved before the gates had a gain loads into ``wrap(..., gain=1.0)``.

    Args:
        encoder: any module.
        dim: size of z.
        features: width of the encoder's last axis, for an encoder that returns one tensor.
        example: an input to learn the width from (a tuple for several inputs, a dict for keywords). The encoder runs
            once on it, in eval mode and without gradient, and is left as it was.
        flow: a recipe's name (``"diagonal"``, ``"iaf"``, or another key of ``flowpost.recipes.RECIPES``) or a bijector.
        **flow_options: the recipe's options, such as ``steps=2``; none with a bijector.

    Returns:
        A module with ``forward(*inputs, sample_shape=(), noise=None, **kwargs) -> Sample`` and
        ``log_prob(z, *inputs, **kwargs)``, on the encoder's device and of its dtype (float32 for half precision).

    Raises:
        TypeError: if the encoder is no module, or returns neither a tensor nor a pair; for options of a bijector.
        ValueError: if neither `features` nor `example` is given, they disagree, or the flow's name is unknown.

    Example:
        >>> encoder = nn.Linear(784, 256)
        >>> posterior = flowpost.wrap(encoder, dim=8, features=256, flow="planar", steps=4)
        >>> posterior(torch.rand(16, 784), sample_shape=(5,)).z.shape
        torch.Size([5, 16, 8])
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
    check_int("dim", dim, minimum=1)
    if isinstance(flow, str) and flow not in RECIPES:
        raise ValueError(f"flow: expected one of {', '.join(RECIPES)}, got {flow!r}")
    if flow_options and not isinstance(flow, str):
        raise TypeError(f"flow_options: expected none with a bijector, got {', '.join(flow_options)}")
    width = _width(encoder, features, example)
    if width is None:
        posterior = _around_pair(dim, flow, flow_options)
    elif isinstance(flow, str):
        posterior = RECIPES[flow](width, dim, **flow_options)
    else:
        posterior = FlowPosterior(width, flow)
    if posterior.dim != dim:
        raise ValueError(f"flow: expected a bijector of dim={dim}, got dim={posterior.dim}")
    return WrappedPosterior(encoder, _like(encoder, posterior), pair=width is None)


class WrappedPosterior(nn.Module):
    """An encoder and the posterior on its output, as one module; made by `wrap`.

    What else a `FlowPosterior` has needs the features of one and the same pass of the encoder (with dropout, a second
    pass would give others): ``h = wrapped.features(x)``, ``sample = wrapped.posterior(h)``, and then
    ``wrapped.posterior.path_log_prob(sample, h)``.
    """

    def __init__(self, encoder: nn.Module, posterior: FlowPosterior, *, pair: bool) -> None:
        super().__init__()
        self.encoder, self.posterior, self.pair = encoder, posterior, pair

    def forward(
        self, *inputs: object, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None, **kwargs: object
    ) -> Sample:
        """Draw z ~ q(z|x) with its log-density; inputs and keywords go to the encoder."""
        return self.posterior(self.features(*inputs, **kwargs), sample_shape, noise)

    def log_prob(self, z: Tensor, *inputs: object, **kwargs: object) -> Tensor:
        """The log q(z|x) of any z."""
        return self.posterior.log_prob(z, self.features(*inputs, **kwargs))

    def features(self, *inputs: object, **kwargs: object) -> Tensor:
        """The encoder's output; a pair ``(loc, log_var)`` side by side."""
        h = self._features(self.encoder(*inputs, **kwargs))
        if active() and all(bool(x.isfinite().all()) for x in inputs if isinstance(x, Tensor)):
            check_finite("context", h, "; the encoder output is not finite, its input was finite")
        return h

    def _features(self, out: object) -> Tensor:
        if not self.pair:
            if not isinstance(out, Tensor):
                raise TypeError(f"encoder: expected a tensor, got {_kind(out)}; pass wrap an example= of its input")
            return out
        if not isinstance(out, (tuple, list)) or not _is_pair(out):
            raise TypeError(f"encoder: expected the pair (loc, log_var), as for the example, got {_kind(out)}")
        dim = self.posterior.dim
        if any(part.shape[-1] != dim for part in out):
            raise ValueError(f"encoder: expected loc and log_var of shape (*, {dim}), got {_kind(out)}")
        return torch.cat(tuple(out), dim=-1)


def _around_pair(dim: int, flow: str | Bijector, options: Mapping[str, object]) -> FlowPosterior:
    """A posterior on ``(loc, log_var)`` whose steps act on the noise before ``loc + exp(log_var / 2) * z``."""
    steps = _steps(flow, dim, options) if isinstance(flow, str) else [flow]
    chain = Chain(*steps, Affine(dim, log_var_scale))
    return FlowPosterior(2 * dim, chain, head=_PairHead(dim, Chain(*steps) if steps else None))


class _PairHead(nn.Module):
    """From ``(loc, log_var)`` to the context of the steps, then the pair itself."""

    def __init__(self, dim: int, steps: Bijector | None) -> None:
        super().__init__()
        self.linear = linear_head(2 * dim, steps) if steps is not None and steps.context_size else None
        if self.linear is not None and steps is not None:
            # Rows that set a map's parameters start at 0, so that the map starts exactly at its identity.
            with torch.no_grad():
                self.linear.weight[steps.head_scale() < 1] = 0

    def forward(self, pair: Tensor) -> Tensor:
        return pair if self.linear is None else torch.cat([self.linear(pair), pair], dim=-1)


def _steps(flow: str, dim: int, options: Mapping[str, object]) -> list[Bijector]:
    """A recipe's steps without its diagonal Gaussian, whose place the encoder's own Gaussian takes."""
    whole = cast(Learned, RECIPES[flow](0, dim, **options).flow).step
    steps = [step for step in whole if not isinstance(step, Affine)] if isinstance(whole, Chain) else []
    gates = [leaf for step in steps for leaf in step.leaves() if isinstance(leaf, Gate)]
    start = math.prod(gate.gain / (1 + math.exp(-gate.forget_bias)) for gate in gates)
    for step in (part for whole in steps for part in whole.modules() if isinstance(part, Autoregressive)):
        step.takes_older_states = False  # of when a scale after the steps made their start the identity
    # Gates of the recipe's own gain start as the identity; with another they would widen or narrow the Gaussian.
    return steps if math.isclose(start, 1) else [*steps, Scale(dim, 1 / start)]


def _width(encoder: nn.Module, features: int | None, example: object) -> int | None:
    """Width of the encoder's last axis, or None for a pair."""
    if example is None:
        if features is None:
            raise ValueError(
                "features: expected the width of the encoder's last axis, or an example= input, got neither"
            )
        return check_int("features", features, minimum=1)
    out = _run(encoder, example)
    if _is_pair(out):
        return None
    if not isinstance(out, Tensor) or out.ndim < 1:
        raise TypeError(f"encoder: expected a tensor or the pair (loc, log_var), got {_kind(out)}")
    if features is not None and features != out.shape[-1]:
        raise ValueError(f"features: expected {out.shape[-1]}, the width of the encoder's output, got {features}")
    return out.shape[-1]


def _run(encoder: nn.Module, example: object) -> object:
    """The encoder's output for an example, its modes and statistics untouched."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                return encoder(**example)
            return encoder(*example) if isinstance(example, tuple) else encoder(example)
    finally:
        for module, training in modes.items():
            module.training = training


def _like(encoder: nn.Module, posterior: FlowPosterior) -> FlowPosterior:
    parameter = next((p for p in encoder.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return posterior
    dtype = parameter.dtype if parameter.dtype in (torch.float32, torch.float64) else None
    return posterior.to(device=parameter.device, dtype=dtype)


def _is_pair(out: object) -> bool:
    return isinstance(out, (tuple, list)) and len(out) == 2 and all(isinstance(part, Tensor) for part in out)


def _kind(out: object) -> str:
    if isinstance(out, Tensor):
        return f"a tensor of shape {tuple(out.shape)}"
    if isinstance(out, (tuple, list)):
        return f"a {type(out).__name__} of {', '.join(_kind(part) for part in out)}"
    return type(out).__name__
