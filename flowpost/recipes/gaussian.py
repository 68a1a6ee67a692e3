"""The Gaussian posteriors: the features give their numbers by one linear layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from flowpost.bijectors.affine import Affine
from flowpost.bijectors.chain import Chain
from flowpost.bijectors.convex import ConvexCombination
from flowpost.bijectors.householder import Householder
from flowpost.bijectors.triangular import UnitLowerTriangular
from flowpost.numerics.arguments import check_int
from flowpost.posterior import FlowPosterior
from flowpost.recipes.parts import around, steadied
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
        rate: a positive factor on L's numbers, as in `UnitLowerTriangular`; ``256 / (features * dim)``, at most 1, by
            default.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> loc, scale_tril = flowpost.full_covariance(16, dim=2).gaussian(torch.randn(8, 16))
    """
    return FlowPosterior(features, Chain(UnitLowerTriangular(dim, steadied(rate, features, dim)), Affine(dim)))


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
        centred: whether the mean comes last, as it does in `full_covariance`. False is the paper's order: the same
            family, in which the steps have to turn a mean that moves with x.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.householder(16, dim=2, steps=2)(torch.randn(8, 16), sample_shape=(50,))
    """
    pairs = range((check_int("steps", steps, minimum=1) + 1) // 2)
    # Four times as long as N(0, I)'s: an optimizer that moves all numbers alike would turn short ones too far at once.
    drawn = [F.normalize(torch.randn(check_int("dim", dim, minimum=1), device="cpu"), dim=0) for _ in pairs]
    directions = [4 * math.sqrt(dim) * direction for direction in drawn]
    if steps % 2:  # one without a partner changes a variable's sign, and no covariance of independent ones
        directions[-1] = torch.eye(dim, device="cpu")[0]
    reflections = [Householder(dim, directions[index // 2]) for index in range(steps)]
    return FlowPosterior(features, around(dim, reflections, centred=centred))


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
        rate: a positive factor on the matrices' numbers, as in `full_covariance`.
        centred: whether the mean comes last, as it does in `full_covariance`. False is the paper's order: the same
            family, in which the steps have to turn a mean that moves with x.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> loc, scale_tril = flowpost.cc_lin_iaf(16, dim=2, combinations=3).gaussian(torch.randn(8, 16))
    """
    combination = ConvexCombination(dim, combinations, steadied(rate, features, dim))
    return FlowPosterior(features, around(dim, [combination], centred=centred))


if not TYPE_CHECKING:  # a type checker reads the functions themselves
    __all__ = names(__name__)
