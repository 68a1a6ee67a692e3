"""The posteriors whose numbers come from the features by one linear layer: Gaussians, and flows of small steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from flowpost.bijectors.affine import Affine, Scaling, Shift
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.convex import ConvexCombination
from flowpost.bijectors.householder import Householder
from flowpost.bijectors.permute import Reverse
from flowpost.bijectors.planar import Planar
from flowpost.bijectors.radial import Radial
from flowpost.bijectors.sylvester import Sylvester
from flowpost.bijectors.triangular import UnitLowerTriangular
from flowpost.numerics.arguments import check_int
from flowpost.posterior import FlowPosterior
from flowpost.recipes.record import names, recipe


@recipe
def diagonal(features: int, dim: int) -> FlowPosterior:
    """Factorized Gaussian posterior, ``z = loc + scale * noise`` (Kingma & Welling 2014, eq. 9).

    The usual posterior of a VAE. Use it as the baseline, and where nothing may cost more.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.diagonal(16, dim=2)(torch.randn(8, 16))
    """
    return FlowPosterior(features, Affine(dim))


@recipe
def full_covariance(features: int, dim: int, rate: float | None = None) -> FlowPosterior:
    """Full-covariance Gaussian posterior, ``z = loc + diag(scale) L noise``, ``diag(scale) L`` its Cholesky factor.

    Use it first where the diagonal is too poor, up to some tens of variables: its head has ``dim^2 / 2`` outputs. Its
    KL to a Gaussian is closed. It is the one-step linear case of inverse autoregressive flow (Kingma & Welling 2019,
    sections 2.5.1 and 3.4).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``dim^2 / 2``.
        rate: times which L's numbers come, as in `UnitLowerTriangular`; by default ``1 / dim``, and 1 without features.
            Adam moves each number as far in a step as it moves the mean, and a row of L adds up to dim of them.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> loc, scale_tril = flowpost.full_covariance(16, dim=2).gaussian(torch.randn(8, 16))
    """
    return FlowPosterior(features, Chain(UnitLowerTriangular(dim, _by_rows(rate, features, dim)), Affine(dim)))


@recipe
def planar(features: int, dim: int, steps: int = 8, *, centred: bool = True) -> FlowPosterior:
    """Diagonal Gaussian bent by planar steps, all amortized (Rezende & Mohamed 2015, eq. 10).

    A step bends z along one direction. Use it for few variables. The head has ``2 dim + 1`` outputs for each step, so
    with 8 steps it is smaller than that of `full_covariance` from 34 variables on.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of planar steps.
        centred: whether the steps bend noise around 0 and the mean comes last. False is the paper's order: the same
            family, whose offsets have to follow the mean as it moves with x, so that it trains worse.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.planar(16, dim=2, steps=8)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, _around(dim, _times(steps, Planar, dim), centred=centred))


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
def householder(features: int, dim: int, steps: int = 8, *, centred: bool = True) -> FlowPosterior:
    """Householder flow (Tomczak & Welling 2016): a diagonal Gaussian, then reflections, all amortized.

    It is a Gaussian of covariance ``Q diag(scale^2) Q^T``; dim - 1 reflections make any orthogonal Q up to a sign. Use
    it where the head of `full_covariance` is too large: this one grows with ``steps * dim``. Every direction comes from
    the features by a linear layer; in the paper each comes from the one before.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of reflections; an even number starts as the identity, two by two.
        centred: whether the mean comes last, as in `planar`.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.householder(16, dim=2, steps=2)(torch.randn(8, 16), sample_shape=(50,))
    """
    pairs = range((check_int("steps", steps, minimum=1) + 1) // 2)
    # Of the length of most: a short one would turn far as soon as x moves it.
    drawn = [F.normalize(torch.randn(check_int("dim", dim, minimum=1), device="cpu"), dim=0) for _ in pairs]
    directions = [math.sqrt(dim) * direction for direction in drawn]
    if steps % 2:  # one without a partner changes a variable's sign, and no covariance of independent ones
        directions[-1] = torch.eye(dim, device="cpu")[0]
    reflections = [Householder(dim, directions[index // 2]) for index in range(steps)]
    return FlowPosterior(features, _around(dim, reflections, centred=centred))


@recipe
def cc_lin_iaf(
    features: int, dim: int, combinations: int = 5, rate: float | None = None, *, centred: bool = True
) -> FlowPosterior:
    """Convex combination linear IAF (Tomczak & Welling 2017): a diagonal Gaussian and ``sum_k y_k L_k``, amortized.

    The posterior is Gaussian, with a full covariance. `full_covariance` can be every such Gaussian with fewer numbers:
    use this one to compare with the paper.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``combinations * dim^2 / 2``.
        combinations: number of lower-triangular matrices.
        rate: times which the matrices' numbers come, as in `full_covariance`.
        centred: whether the mean comes last, as in `planar`.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> loc, scale_tril = flowpost.cc_lin_iaf(16, dim=2, combinations=3).gaussian(torch.randn(8, 16))
    """
    combination = ConvexCombination(dim, combinations, _by_rows(rate, features, dim))
    return FlowPosterior(features, _around(dim, [combination], centred=centred))


@recipe
def orthogonal_sylvester(
    features: int, dim: int, steps: int = 4, rank: int | None = None, *, centred: bool = True
) -> FlowPosterior:
    """Diagonal Gaussian bent by orthogonal Sylvester steps, all amortized (van den Berg et al. 2018, section 3).

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
    return FlowPosterior(features, _around(dim, _times(steps, Sylvester, dim, rank), centred=centred))


@recipe
def householder_sylvester(
    features: int, dim: int, steps: int = 4, reflections: int = 8, *, centred: bool = True
) -> FlowPosterior:
    """Diagonal Gaussian bent by Sylvester steps of full rank, Q a few reflections (van den Berg et al. 2018).

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
    return FlowPosterior(features, _around(dim, _times(steps, Sylvester, dim, dim, reflections), centred=centred))


@recipe
def triangular_sylvester(features: int, dim: int, steps: int = 4, *, centred: bool = True) -> FlowPosterior:
    """Diagonal Gaussian bent by triangular Sylvester steps, of which every other one sees the variables reversed.

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
    return FlowPosterior(features, _around(dim, whole, centred=centred))


def _around(dim: int, steps: Sequence[Bijector], *, centred: bool) -> Chain:
    """Between a diagonal Gaussian's scale and its mean, the steps; or after both.

    As the mean moves with x, steps after it have to move their offsets along, each by a linear layer of its own.
    """
    if not centred:
        return Chain(Affine(dim), *steps)
    chain = Chain(Scaling(dim), *steps, Shift(dim))
    # No call reads it: what was saved when the mean came first has the same names and shapes, and is another map.
    chain.register_buffer("constant_centred", torch.ones(()))
    return chain


def _by_rows(rate: float | None, features: int, dim: int) -> float:
    """The rate of a triangular matrix's numbers: what is given, or ``1 / dim`` where features give them."""
    if rate is not None:
        return rate
    return 1 / check_int("dim", dim, minimum=1) if features else 1.0


def _times(steps: int, make: Callable[..., Bijector], *sizes: int) -> list[Bijector]:
    """`steps` steps of the same sizes, each with numbers of its own."""
    return [make(*sizes) for _ in range(check_int("steps", steps, minimum=1))]


if not TYPE_CHECKING:  # a type checker reads the functions themselves
    __all__ = names(__name__)
