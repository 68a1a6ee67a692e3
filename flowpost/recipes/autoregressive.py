"""The autoregressive posteriors: a masked network of each step reads the variables before and the shared context c."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flowpost.bijectors.affine import Affine
from flowpost.bijectors.autoregressive import Autoregressive, Masked
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain, Shared
from flowpost.bijectors.deep_sigmoid import DeepSigmoid
from flowpost.bijectors.spline import Spline
from flowpost.bijectors.wrappers import Inverse
from flowpost.posterior import FlowPosterior
from flowpost.recipes.parts import activation_of, evened, exp_affine, marked, orders, slowed
from flowpost.recipes.record import names, recipe

_FORGET_BIAS = 2.0
_GAIN = 1 + math.exp(-_FORGET_BIAS)  # 1 / sigmoid(forget_bias)


@recipe
def iaf(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    gain: float = _GAIN,
) -> FlowPosterior:
    """Inverse autoregressive flow (Kingma et al. 2016): a diagonal Gaussian, then gated autoregressive steps.

    The default for a posterior that is drawn from and scored at its own samples: one pass, whatever its shape. The
    steps share one context c. The variables' order is reversed from one step to the next.

    A fresh one is a diagonal Gaussian: every gate starts as the identity. The paper's gate has ``gain=1`` and shrinks
    volume at every z. Posteriors that flowpost saved before the gates had a gain are of ``gain=1``: `flowpost.load`
    knows that of a file, and a ``state_dict`` of then makes the gates those of then.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of c, which every step's network reads.
        gain: constant factor of every gate, as in `Autoregressive`; by default ``1 / sigmoid(2)``, of the gates' start.

    Returns:
        A posterior that starts near N(0, I); with another gain, times ``gain * sigmoid(2)`` per step.

    Example:
        >>> z, log_prob, noise = flowpost.iaf(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    gated = [
        Autoregressive(dim, context_size, hidden, order=order, forget_bias=_FORGET_BIAS, gain=gain)
        for order in orders(dim, steps)
    ]
    return FlowPosterior(features, Chain(Affine(dim), Shared(*gated)))


@recipe
def affine_iaf(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    rate: float | None = None,
) -> FlowPosterior:
    """Inverse autoregressive flow in its plain form ``z' = mu + sigma z`` (Kingma et al. 2016, eq. 9, 10).

    `iaf` has the gate that the paper trains with; here sigma is `exp_scale`. Use it where the gates, which widen z by
    at most 14 % each, are too narrow.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of c, which every step's network reads.
        rate: a positive factor on the networks' outputs, as in `Masked`; ``1 / sqrt(hidden[-1])`` by default.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.affine_iaf(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    masked = _masked_steps(exp_affine, dim, steps, hidden, context_size, slowed(rate, hidden))
    return FlowPosterior(features, Chain(Affine(dim), Shared(*masked)))


@recipe
def maf(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    rate: float | None = None,
) -> FlowPosterior:
    """Masked autoregressive flow (Papamakarios et al. 2017): each variable is ``mu + sigma noise``, of the z before it.

    Use it to score z that something else draws: log q of any z takes one pass. A sample takes dim steps, one after
    another. Otherwise as `affine_iaf`, whose steps run the other way.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of c, which every step's network reads.
        rate: a positive factor on the networks' outputs, as in `Masked`; ``1 / sqrt(hidden[-1])`` by default.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> log_prob = flowpost.maf(16, dim=2, hidden=(32, 32)).log_prob(torch.randn(8, 2), torch.randn(8, 16))
    """
    masked = _masked_steps(
        lambda size: Inverse(exp_affine(size)), dim, steps, hidden, context_size, slowed(rate, hidden)
    )
    return FlowPosterior(features, Chain(Affine(dim), Shared(*(Inverse(step) for step in masked))))


@recipe
def spline_autoregressive(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    bins: int = 8,
    bound: float = 5.0,
    rate: float | None = None,
    activation: str = "relu",
) -> FlowPosterior:
    """Autoregressive neural spline flow, RQ-NSF (AR) (Durkan et al. 2019): `affine_iaf` with a `Spline` in each step.

    Use it where q is far from Gaussian in single variables, and samples must be fast. The splines act on the noise,
    which lies where their bins are; a diagonal Gaussian's loc and scale come last. Where the paper has linear layers
    between the steps, the order of the variables is reversed.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of c, which every step's network reads.
        bins: of each spline, from 2 to 50.
        bound: where the splines end and the identity begins.
        rate: a positive factor on the networks' outputs, as in `Masked`; ``32 / hidden[-1]``, at most 1, by default.
        activation: of the networks, "relu", "elu" or "tanh". Splines of relu networks train faster.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> posterior = flowpost.spline_autoregressive(16, dim=2, hidden=(32, 32), bins=4)
        >>> z, log_prob, noise = posterior(torch.randn(8, 16), sample_shape=(50,))
    """
    spline = functools.partial(Spline, bins=bins, bound=bound)
    masked = _masked_steps(spline, dim, steps, hidden, context_size, evened(rate, hidden), activation)
    return FlowPosterior(features, Chain(Shared(*masked), Affine(dim)))


@recipe
def naf(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    units: int = 8,
    layers: int = 1,
    rate: float | None = None,
) -> FlowPosterior:
    """Neural autoregressive flow in its inverse form (Huang et al. 2018): `affine_iaf` with a `DeepSigmoid` a step.

    Use it where affine maps of single variables are too simple. Samples take one pass; log q of a z that it never drew
    takes a root search for each variable. Between two of the `layers` one number passes; in the paper's dense ones,
    many.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of c, which every step's network reads.
        units: sigmoids in a layer.
        layers: deep sigmoids in sequence in each step.
        rate: a positive factor on the networks' outputs, as in `Masked`; ``1 / sqrt(hidden[-1])`` by default.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> posterior = flowpost.naf(16, dim=2, hidden=(32, 32), units=4)
        >>> z, log_prob, noise = posterior(torch.randn(8, 16), sample_shape=(50,))
    """
    sigmoids = functools.partial(DeepSigmoid, units=units, layers=layers)
    masked = _masked_steps(sigmoids, dim, steps, hidden, context_size, slowed(rate, hidden))
    return FlowPosterior(features, Chain(Affine(dim), Shared(*masked)))


def _masked_steps(
    step: Callable[[int], Bijector],
    dim: int,
    steps: int,
    hidden: Sequence[int],
    context_size: int,
    rate: float,
    activation: str = "elu",
) -> list[Masked]:
    """`steps` autoregressive steps of what `step` makes of `dim`, every other one in the reverse order."""
    made = [
        Masked(step(dim), context_size, hidden, order=order, activation=activation_of(activation), rate=rate)
        for order in orders(dim, steps)
    ]
    return marked(made, activation)


if not TYPE_CHECKING:  # a type checker reads the functions themselves
    __all__ = names(__name__)
