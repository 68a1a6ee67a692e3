"""Flows of small steps, whose numbers the features give by one linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flowpost.bijectors.affine import Affine
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.permute import Reverse
from flowpost.bijectors.planar import Planar
from flowpost.bijectors.radial import Radial
from flowpost.bijectors.sylvester import Sylvester
from flowpost.numerics.arguments import check_int
from flowpost.posterior import FlowPosterior
from flowpost.recipes.parts import around
from flowpost.recipes.record import names, recipe


@recipe
def planar(features: int, dim: int, steps: int = 8, *, centred: bool = False) -> FlowPosterior:
    """Diagonal Gaussian followed by planar steps, all amortized (Rezende & Mohamed 2015, eq. 10).

    A step bends z along one direction. Use it for few variables. The head has ``2 dim + 1`` outputs for each step, so
    with 8 steps it is smaller than that of `full_covariance` from 34 variables on.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of planar steps.
        centred: whether the steps bend noise around 0 and the mean comes last. The family is the same. It trained
            better with 16 variables, worse with two, and did not bear ``gradient="stl"``.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.planar(16, dim=2, steps=8)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, around(dim, _times(steps, Planar, dim), centred=centred))


@recipe
def radial(features: int, dim: int, steps: int = 8) -> FlowPosterior:
    """Diagonal Gaussian followed by radial steps, all amortized (Rezende & Mohamed 2015, eq. 14).

    A step stretches or squeezes z around one point. Use it where q is too peaked or too flat. The head has ``dim + 2``
    outputs for each step: no flow has a smaller one, and with 8 steps it is smaller than that of `full_covariance` from
    19 variables on.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of radial steps.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.radial(16, dim=2, steps=8)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), *_times(steps, Radial, dim)))


@recipe
def orthogonal_sylvester(
    features: int, dim: int, steps: int = 4, rank: int | None = None, *, centred: bool = False
) -> FlowPosterior:
    """Diagonal Gaussian followed by orthogonal Sylvester steps, all amortized (van den Berg et al. 2018, section 3).

    A step bends z along `rank` directions at once. Use it where planar steps are too weak.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of Sylvester steps; the paper's tables take 16.
        rank: M, ridges a step, at most dim; None for half of dim, as the paper's 32 of 64. The head grows with
            ``steps (rank dim + rank^2)``.
        centred: whether the mean comes last, as in `planar`.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.orthogonal_sylvester(16, dim=4)(torch.randn(8, 16), sample_shape=(50,))
    """
    rank = (check_int("dim", dim, minimum=1) + 1) // 2 if rank is None else rank
    return FlowPosterior(features, around(dim, _times(steps, Sylvester, dim, rank), centred=centred))


@recipe
def householder_sylvester(
    features: int, dim: int, steps: int = 4, reflections: int = 8, *, centred: bool = False
) -> FlowPosterior:
    """Diagonal Gaussian followed by Sylvester steps of full rank, Q a few reflections (van den Berg et al. 2018).

    Use it as `orthogonal_sylvester`, where a step should bend z along every direction.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``steps dim^2``.
        steps: number of Sylvester steps; the paper's tables take 16.
        reflections: H, Householder reflections a step.
        centred: whether the mean comes last, as in `planar`.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.householder_sylvester(16, dim=4)(torch.randn(8, 16), sample_shape=(50,))
    """
    check_int("reflections", reflections, minimum=1)
    return FlowPosterior(features, around(dim, _times(steps, Sylvester, dim, dim, reflections), centred=centred))


@recipe
def triangular_sylvester(features: int, dim: int, steps: int = 4, *, centred: bool = False) -> FlowPosterior:
    """Diagonal Gaussian followed by triangular Sylvester steps, of which every other one sees the variables reversed.

    They are of full rank, and Q is the identity and the reversal in turn (van den Berg et al. 2018, section 3). Use it
    as `householder_sylvester`; it is cheaper, since there is no Q to work out.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``steps dim^2``.
        steps: number of Sylvester steps; the paper's tables take 16.
        centred: whether the mean comes last, as in `planar`.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.triangular_sylvester(16, dim=4)(torch.randn(8, 16), sample_shape=(50,))
    """
    parts = [part for step in _times(steps, Sylvester, dim, dim, 0) for part in (step, Reverse(dim))]
    whole = parts if steps % 2 == 0 else parts[:-1]  # an even number of reversals leaves the variables in place
    return FlowPosterior(features, around(dim, whole, centred=centred))


def _times(steps: int, make: Callable[..., Bijector], *sizes: int) -> list[Bijector]:
    """`steps` steps of the same sizes, each with numbers of its own."""
    return [make(*sizes) for _ in range(check_int("steps", steps, minimum=1))]


if not TYPE_CHECKING:  # a type checker reads the functions themselves
    __all__ = names(__name__)
