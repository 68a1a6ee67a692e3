"""The coupling posteriors: half of the variables and the shared context c give the step of the other half, in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flowpost.bijectors.affine import Affine, Shift
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain, Shared
from flowpost.bijectors.coupling import Coupling
from flowpost.bijectors.spline import Spline
from flowpost.numerics.arguments import check_int
from flowpost.posterior import FlowPosterior
from flowpost.recipes.parts import activation_of, evened, exp_affine, marked, orders, slowed
from flowpost.recipes.record import names, recipe


@recipe
def nice(
    features: int, dim: int, steps: int = 4, hidden: Sequence[int] = (320, 320), context_size: int = 64
) -> FlowPosterior:
    """NICE (Dinh et al. 2015): a diagonal Gaussian, then additive couplings, which keep volume, sharing c.

    The Gaussian's scale stands for the paper's. One half of the variables and the other pass unchanged, in turn. At dim
    1 each step is a shift by a function of c. Use it where volume must be kept; `realnvp` costs the same and can do
    more.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of couplings.
        hidden: widths of the hidden layers of each coupling's network.
        context_size: size of c, which every coupling's network reads.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.nice(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    couplings = _coupling_steps(Shift, dim, steps, hidden, context_size)
    return FlowPosterior(features, Chain(Affine(dim), Shared(*couplings)))


@recipe
def realnvp(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    rate: float | None = None,
) -> FlowPosterior:
    """RealNVP (Dinh et al. 2017): a diagonal Gaussian, then affine couplings ``z' = t + exp(s) z`` sharing c.

    Use it where both directions must be fast: samples, and log q of any z. s is softly bounded, by `exp_scale`. One
    half of the variables and the other pass unchanged, in turn. At dim 1 each step is an affine map by functions of c.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of couplings.
        hidden: widths of the hidden layers of each coupling's network.
        context_size: size of c, which every coupling's network reads.
        rate: a positive factor on the networks' outputs, as in `Coupling`; ``1 / sqrt(hidden[-1])`` by default.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.realnvp(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    couplings = _coupling_steps(exp_affine, dim, steps, hidden, context_size, slowed(rate, hidden))
    return FlowPosterior(features, Chain(Affine(dim), Shared(*couplings)))


@recipe
def spline_coupling(
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
    """Coupling neural spline flow, RQ-NSF (C) (Durkan et al. 2019): `realnvp` with a `Spline` in each step.

    Use it as `spline_autoregressive`, where log q of any z must be fast too. The splines act on the noise, which lies
    where their bins are; a diagonal Gaussian's loc and scale come last. One half of the variables and the other pass
    unchanged, in turn. At dim 1 each step is a spline by functions of c.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of couplings.
        hidden: widths of the hidden layers of each coupling's network.
        context_size: size of c, which every coupling's network reads.
        bins: of each spline, from 2 to 50.
        bound: where the splines end and the identity begins.
        rate: a positive factor on the networks' outputs, as in `Coupling`; ``32 / hidden[-1]``, at most 1, by default.
        activation: of the networks, as in `spline_autoregressive`.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> posterior = flowpost.spline_coupling(16, dim=2, hidden=(32, 32), bins=4)
        >>> z, log_prob, noise = posterior(torch.randn(8, 16), sample_shape=(50,))
    """
    spline = functools.partial(Spline, bins=bins, bound=bound)
    couplings = _coupling_steps(spline, dim, steps, hidden, context_size, evened(rate, hidden), activation)
    return FlowPosterior(features, Chain(Shared(*couplings), Affine(dim)))


def _coupling_steps(
    step: Callable[[int], Bijector],
    dim: int,
    steps: int,
    hidden: Sequence[int],
    context_size: int,
    rate: float = 1.0,
    activation: str = "elu",
) -> list[Coupling]:
    """`steps` couplings of what `step` makes of a number of variables: those that pass in one move in the next."""
    moving = [check_int("dim", dim, minimum=1) - dim // 2, max(dim // 2, 1)]
    make = functools.partial(
        Coupling, dim, context_size=context_size, hidden=hidden, activation=activation_of(activation), rate=rate
    )
    made = [make(step(moving[index % 2]), order=order) for index, order in enumerate(orders(dim, steps))]
    return marked(made, activation)


if not TYPE_CHECKING:  # a type checker reads the functions themselves
    __all__ = names(__name__)
