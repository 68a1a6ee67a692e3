"""Put a flexible posterior on an encoder that somebody already has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from flowpost.bijectors.affine import Affine, Shift
from flowpost.bijectors.autoregressive import Autoregressive
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.gate import Gate
from flowpost.bijectors.householder import Householder
from flowpost.bijectors.permute import Permute, Reverse
from flowpost.bijectors.scale import Scale, Scaling
from flowpost.bijectors.wrappers import linear_head
from flowpost.numerics.arguments import check_int, check_module
from flowpost.numerics.owners import check_owned
from flowpost.numerics.scales import log_var_scale
from flowpost.outputs import Read, as_features, check_diagonal, check_example, check_pair, cure_of, kind
from flowpost.posterior import FlowPosterior
from flowpost.recipes import RECIPES
from flowpost.recipes.parts import steadied
from flowpost.recipes.record import check_recipe
from flowpost.wrapped import WrappedPosterior


def wrap(
    encoder: nn.Module,
    dim: int,
    *,
    read: Read | None = None,
    features: int | None = None,
    example: object = None,
    flow: str | Bijector = "iaf",
    **flow_options: object,
) -> WrappedPosterior:
    """Make ``q(z|x)`` of an encoder: its output, on the last axis, becomes the features of a flow posterior.

    An encoder that returns the VAE's pair ``(loc, log_var)``, or a diagonal Gaussian of `torch.distributions`, keeps
    it. The flow's steps act on the noise; a linear head on the pair gives their context. An affine map then gives
    ``loc + exp(log_var / 2) * z``, log_var softly bounded at +-20. It takes the place of the diagonal Gaussian of the
    recipe, whatever its ``centred`` says. Reflections leave standard normal noise as it is, so they act on
    ``exp(log_var / 2) * z`` instead. With a named flow the posterior starts at the encoder's own Gaussian, so a trained
    VAE loses nothing.

    For every other encoder, `read` says what to take of its output:

    - ``(mu, std)``: ``read=lambda out: Normal(*out)``;
    - both in one tensor: ``read=lambda out: out.chunk(2, -1)``;
    - an object with names: ``read=lambda out: (out.embedding, out.log_covariance)``;
    - a feature map ``(B, channels, H, W)``: ``read=lambda out: out.flatten(1)``;
    - the first token of a transformer: ``read=lambda out: out.last_hidden_state[:, 0]``;
    - the last state of a GRU: ``read=lambda out: out[1][-1]``.

    A function with a name pickles with the model; a lambda does not.

    A frozen encoder is left alone: one in eval mode none of whose parameters wants a gradient stays in eval mode when
    the whole goes to train mode, so that its BatchNorm keeps its statistics. A pair's ``flow="iaf"`` that was saved
    before the gates had a gain loads into ``wrap(..., gain=1.0)``. The state of the encoder alone, from before it was
    wrapped, loads too: the posterior then stays as it is.

    Args:
        encoder: any module.
        dim: size of z.
        read: from what the encoder returns to features ``(*batch, features)``, to the pair ``(loc, log_var)``, each
            ``(*batch, dim)``, or to a `Normal`, an ``Independent`` one, or a diagonal `MultivariateNormal`. By default
            one of these is what it returns.
        features: width of the encoder's last axis, for an encoder that returns one tensor.
        example: an input to learn the rest from (a tuple for several inputs, a dict for keywords). The encoder runs
            once on it, in eval mode and without gradient, and is left as it was.
        flow: a recipe's name (``"diagonal"``, ``"iaf"``, or another key of ``flowpost.recipes.RECIPES``) or a bijector.
        **flow_options: the recipe's options, such as ``steps=2``; none with a bijector.

    Returns:
        A module with ``forward(*inputs, sample_shape=(), noise=None, **kwargs) -> Sample`` and
        ``log_prob(z, *inputs, **kwargs)``, on the encoder's device and of its dtype (float32 for half precision).

    Raises:
        TypeError: if the encoder is no module, or returns none of the above; for a `flow` of another kind, or options
            that it does not take; for a `read` that is no function, or a module with parameters of its own, which would
            not be trained.
        ValueError: if neither `features` nor `example` is given, they disagree, the flow's name is unknown, or the
            example shows what cannot be meant: shapes that do not fit, or more than one axis between batch and
            features without a `read`.

    Warns:
        UserWarning: without a `read`, if the example's log_var is positive throughout, as a standard deviation is, or
            if one tensor is twice as wide as z and its width was not given; for a `read` that names a module whose
            parameters the encoder has not.

    Example:
        >>> encoder = nn.Linear(784, 256)
        >>> posterior = flowpost.wrap(encoder, dim=8, features=256, flow="planar", steps=4)
        >>> posterior(torch.rand(16, 784), sample_shape=(5,)).z.shape
        torch.Size([5, 16, 8])
    """
    check_module("encoder", encoder)
    check_int("dim", dim, minimum=1)
    if read is not None:
        if not callable(read):
            raise TypeError(
                f"read: expected a function of what the encoder returns, got {read!r}; write read=lambda out: out[...]"
            )
        check_owned("read", read, encoder, "put it into the encoder, as nn.Sequential(encoder, module)", 2)
    _check_flow(flow, dim, flow_options)
    width = _width(encoder, dim, read, features, example)
    if width is None:
        posterior = _around_pair(flow, dim, flow_options)
    elif isinstance(flow, str):
        posterior = RECIPES[flow](width, dim, **flow_options)
    else:
        posterior = FlowPosterior(width, flow)
    return WrappedPosterior(encoder, _like(encoder, posterior), pair=width is None, read=read)


def _check_flow(flow: str | Bijector, dim: int, options: Mapping[str, object]) -> None:
    if isinstance(flow, str):
        check_recipe(flow, options)
        return
    if not isinstance(flow, Bijector):
        got = getattr(flow, "__name__", type(flow).__name__)
        raise TypeError(
            f"flow: expected a recipe's name, as flow='iaf', or a Bijector, as flow=Planar(dim), got {got}; the "
            f"posterior, and its head, are made here"
        )
    if options:
        raise TypeError(f"flow_options: expected none with a bijector, got {', '.join(options)}; make it with them")
    if flow.dim != dim:
        raise ValueError(f"flow: expected a bijector of dim={dim}, got dim={flow.dim}")


def _around_pair(flow: str | Bijector, dim: int, options: Mapping[str, object]) -> FlowPosterior:
    """A posterior on ``(loc, log_var)`` whose steps act on the noise before ``loc + exp(log_var / 2) * z``."""
    steps = _steps(flow, dim, options) if isinstance(flow, str) else [flow]
    turned = _only_turn(steps)
    chain = (
        Chain(Scaling(dim, log_var_scale), *steps, Shift(dim)) if turned else Chain(*steps, Affine(dim, log_var_scale))
    )
    return FlowPosterior(2 * dim, chain, head=_PairHead(dim, Chain(*steps) if steps else None, turned=turned))


def _only_turn(steps: Sequence[Bijector]) -> bool:
    """Whether the steps are orthogonal: of the noise they would make the same noise, so they turn the scaled one."""
    leaves = [leaf for step in steps for leaf in step.leaves()]
    turning = any(isinstance(leaf, Householder) for leaf in leaves)
    return turning and all(isinstance(leaf, (Householder, Permute, Reverse)) for leaf in leaves)


class _PairHead(nn.Module):
    """From ``(loc, log_var)`` to the context of the steps, then the pair itself; or the scale, the steps', and loc."""

    def __init__(self, dim: int, steps: Bijector | None, *, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.linear = linear_head(2 * dim, steps) if steps is not None and steps.context_size else None
        if self.linear is not None and steps is not None:
            # Rows that set a map's parameters start at 0, so that the map starts exactly at its identity.
            with torch.no_grad():
                self.linear.weight[steps.head_scale() < 1] = 0
        if turned and self.linear is not None:
            # No call reads it: what was saved when reflections turned the noise alone has the same names and shapes.
            self.register_buffer("constant_turned", torch.ones(()))

    def forward(self, pair: Tensor) -> Tensor:
        own = [] if self.linear is None else [self.linear(pair)]
        if not self.turned:
            return torch.cat([*own, pair], dim=-1) if own else pair
        loc, log_var = pair.chunk(2, dim=-1)
        return torch.cat([log_var, *own, loc], dim=-1)


def _steps(flow: str, dim: int, options: Mapping[str, object]) -> list[Bijector]:
    """A recipe's steps without its diagonal Gaussian, whose place the encoder's own Gaussian takes."""
    if flow in ("full_covariance", "cc_lin_iaf"):
        options = {"rate": steadied(None, 2 * dim, dim), **options}
    whole = RECIPES[flow](1, dim, **options).flow  # the head that comes with it is of no use, and so the smallest
    steps = (
        [step for step in whole if not isinstance(step, (Affine, Scaling, Shift))] if isinstance(whole, Chain) else []
    )
    gates = [leaf for step in steps for leaf in step.leaves() if isinstance(leaf, Gate)]
    start = math.prod(gate.gain / (1 + math.exp(-gate.forget_bias)) for gate in gates)
    for step in (part for whole in steps for part in whole.modules() if isinstance(part, Autoregressive)):
        step.takes_older_states = False  # of when a scale after the steps made their start the identity
    # Gates of the recipe's own gain start as the identity; with another they would widen or narrow the Gaussian.
    return steps if math.isclose(start, 1) else [*steps, Scale(dim, 1 / start)]


def _width(encoder: nn.Module, dim: int, read: Read | None, features: int | None, example: object) -> int | None:
    """Width of the encoder's last axis, or None for a pair."""
    if example is None:
        if features is None:
            raise ValueError(
                "features: expected the width of the encoder's last axis, or an example= input, got neither"
            )
        return check_int("features", features, minimum=1)
    out = _run(encoder, example)
    out = out if read is None else read(out)
    parts = as_features(out)
    if parts is None:
        of = "encoder" if read is None else "read"
        cure = cure_of(out) if read is None else ""
        raise TypeError(f"{of}: expected a tensor, the pair (loc, log_var) or a Normal, got {kind(out)}{cure}")
    check_diagonal(out)
    if read is None:
        check_example(out, parts, dim, told=features is not None)
    if isinstance(parts, tuple):
        check_pair(parts, dim)
        if features is not None:
            raise ValueError(f"features: expected none with the pair (loc, log_var), got {features}; leave it out")
        return None
    if features is not None and features != parts.shape[-1]:
        raise ValueError(f"features: expected {parts.shape[-1]}, the width of the encoder's output, got {features}")
    return parts.shape[-1]


def _run(encoder: nn.Module, example: object) -> object:
    """The encoder's output for an example, its modes and statistics untouched."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                return encoder(**example)
            if isinstance(example, tuple) and not isinstance(example, PackedSequence):
                return encoder(*example)
            return encoder(example)
    finally:
        for module, training in modes.items():
            module.training = training


def _like(encoder: nn.Module, posterior: FlowPosterior) -> FlowPosterior:
    parameter = next((p for p in encoder.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return posterior
    dtype = parameter.dtype if parameter.dtype in (torch.float32, torch.float64) else None
    return posterior.to(device=parameter.device, dtype=dtype)
