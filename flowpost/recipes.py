"""The named posteriors of the literature: plain functions that assemble steps into a `FlowPosterior`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec

from flowpost.bijectors.affine import Affine, Shift, exp_scale
from flowpost.bijectors.autoregressive import Autoregressive
from flowpost.bijectors.base import Bijector, check_int
from flowpost.bijectors.compose import Chain, Inverse, Shared
from flowpost.bijectors.convex import ConvexCombination
from flowpost.bijectors.coupling import Coupling
from flowpost.bijectors.deep_sigmoid import DeepSigmoid
from flowpost.bijectors.householder import Householder
from flowpost.bijectors.masked import Masked
from flowpost.bijectors.permute import Reverse
from flowpost.bijectors.planar import Planar
from flowpost.bijectors.radial import Radial
from flowpost.bijectors.spline import Spline
from flowpost.bijectors.sylvester import Sylvester
from flowpost.bijectors.triangular import UnitLowerTriangular
from flowpost.posterior import FlowPosterior

P = ParamSpec("P")


def recorded(recipe: Callable[P, FlowPosterior]) -> Callable[P, FlowPosterior]:
    """Write a recipe's name and arguments on the posterior it returns, so that `flowpost.load` can build it again."""
    signature = inspect.signature(recipe)

    @functools.wraps(recipe)
    def build(*args: P.args, **kwargs: P.kwargs) -> FlowPosterior:
        posterior = recipe(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        vars(posterior)["recipe"] = {
            "name": recipe.__name__,
            "arguments": {key: _plain(value) for key, value in bound.arguments.items()},
        }
        return posterior

    return build


def _plain(value: object) -> object:
    return [*value] if isinstance(value, Sequence) and not isinstance(value, str) else value


@recorded
def diagonal(features: int, dim: int) -> FlowPosterior:
    """Factorized Gaussian posterior, ``z = loc + scale * noise`` (Kingma & Welling 2014, eq. 9).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.diagonal(16, dim=2)(torch.randn(8, 16))
    """
    return FlowPosterior(features, Affine(dim))


@recorded
def full_covariance(features: int, dim: int) -> FlowPosterior:
    """Full-covariance Gaussian posterior, ``z = loc + diag(scale) L noise``, ``diag(scale) L`` its Cholesky factor.

    The one-step linear case of inverse autoregressive flow (Kingma & Welling 2019, sections 2.5.1 and 3.4).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``dim^2 / 2``.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> loc, scale_tril = flowpost.full_covariance(16, dim=2).gaussian(torch.randn(8, 16))
    """
    return FlowPosterior(features, Chain(UnitLowerTriangular(dim), Affine(dim)))


@recorded
def planar(features: int, dim: int, steps: int = 8) -> FlowPosterior:
    """Diagonal Gaussian followed by planar steps, all amortized (Rezende & Mohamed 2015, eq. 10).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of planar steps.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.planar(16, dim=2, steps=8)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), *planar_steps(dim, steps)))


@recorded
def radial(features: int, dim: int, steps: int = 8) -> FlowPosterior:
    """Diagonal Gaussian followed by radial steps, all amortized (Rezende & Mohamed 2015, eq. 14).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of radial steps.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.radial(16, dim=2, steps=8)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), *radial_steps(dim, steps)))


@recorded
def cc_lin_iaf(features: int, dim: int, combinations: int = 5) -> FlowPosterior:
    """Convex combination linear IAF (Tomczak & Welling 2017): a diagonal Gaussian, then ``sum_k y_k L_k``, amortized.

    The posterior is Gaussian, with a full covariance.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``combinations * dim^2 / 2``.
        combinations: number of lower-triangular matrices.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> loc, scale_tril = flowpost.cc_lin_iaf(16, dim=2, combinations=3).gaussian(torch.randn(8, 16))
    """
    return FlowPosterior(features, Chain(Affine(dim), ConvexCombination(dim, combinations)))


@recorded
def householder(features: int, dim: int, steps: int = 8) -> FlowPosterior:
    """Householder flow (Tomczak & Welling 2016): a diagonal Gaussian, then reflections, all amortized.

    It is a Gaussian of covariance ``Q diag(scale^2) Q^T``; dim - 1 reflections make any orthogonal Q up to a sign.
    Every direction comes from the features by a linear layer, where the paper has one from the other.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of reflections; an even number starts as the identity, two by two.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.householder(16, dim=2, steps=2)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), *householder_steps(dim, steps)))


@recorded
def orthogonal_sylvester(features: int, dim: int, steps: int = 4, rank: int | None = None) -> FlowPosterior:
    """Diagonal Gaussian followed by orthogonal Sylvester steps, all amortized (van den Berg et al. 2018, section 3).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of Sylvester steps; the paper's tables take 16.
        rank: M, ridges a step, at most dim; None for half of dim, as the paper's 32 of 64. The head grows with
            ``steps (rank dim + rank^2)``.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.orthogonal_sylvester(16, dim=4)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), *orthogonal_sylvester_steps(dim, steps, rank)))


@recorded
def householder_sylvester(features: int, dim: int, steps: int = 4, reflections: int = 8) -> FlowPosterior:
    """Diagonal Gaussian followed by Sylvester steps of full rank, Q a few reflections (van den Berg et al. 2018).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``steps dim^2``.
        steps: number of Sylvester steps; the paper's tables take 16.
        reflections: H, Householder reflections a step.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.householder_sylvester(16, dim=4)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), *householder_sylvester_steps(dim, steps, reflections)))


@recorded
def triangular_sylvester(features: int, dim: int, steps: int = 4) -> FlowPosterior:
    """Diagonal Gaussian followed by triangular Sylvester steps, of which every other one sees the variables reversed.

    They are of full rank, and Q is the identity and the reversal in turn (van den Berg et al. 2018, section 3).

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z; the head grows with ``steps dim^2``.
        steps: number of Sylvester steps; the paper's tables take 16.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.triangular_sylvester(16, dim=4)(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), *triangular_sylvester_steps(dim, steps)))


@recorded
def iaf(
    features: int, dim: int, steps: int = 4, hidden: Sequence[int] = (320, 320), context_size: int = 64
) -> FlowPosterior:
    """Inverse autoregressive flow (Kingma et al. 2016): a diagonal Gaussian, then gated autoregressive steps sharing h.

    The variables' order is reversed from one step to the next.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of h, which every step's network reads.

    Returns:
        A posterior that starts near N(0, I) times ``sigmoid(2)`` per step, the gates' start.

    Example:
        >>> z, log_prob, noise = flowpost.iaf(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), Shared(*iaf_steps(dim, steps, hidden, context_size))))


@recorded
def affine_iaf(
    features: int, dim: int, steps: int = 4, hidden: Sequence[int] = (320, 320), context_size: int = 64
) -> FlowPosterior:
    """Inverse autoregressive flow in its plain form ``z' = mu + sigma z`` (Kingma et al. 2016, eq. 9, 10).

    As `iaf`, which has the gate that the paper trains with; sigma is `exp_scale`.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of h, which every step's network reads.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.affine_iaf(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(
        features, Chain(Affine(dim), Shared(*masked_steps(_exp_affine, dim, steps, hidden, context_size)))
    )


@recorded
def maf(
    features: int, dim: int, steps: int = 4, hidden: Sequence[int] = (320, 320), context_size: int = 64
) -> FlowPosterior:
    """Masked autoregressive flow (Papamakarios et al. 2017): each variable is ``mu + sigma noise``, of the z before it.

    The density of any z is fast, a sample takes dim steps one after another: the flow for a z that something else
    draws. Otherwise as `affine_iaf`, whose steps run the other way.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of h, which every step's network reads.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> log_prob = flowpost.maf(16, dim=2, hidden=(32, 32)).log_prob(torch.randn(8, 2), torch.randn(8, 16))
    """
    masked = masked_steps(lambda size: Inverse(_exp_affine(size)), dim, steps, hidden, context_size)
    return FlowPosterior(features, Chain(Affine(dim), Shared(*(Inverse(step) for step in masked))))


@recorded
def nice(
    features: int, dim: int, steps: int = 4, hidden: Sequence[int] = (320, 320), context_size: int = 64
) -> FlowPosterior:
    """NICE (Dinh et al. 2015): a diagonal Gaussian, then additive couplings, which keep volume, sharing h.

    The Gaussian's scale is the paper's. One half of the variables and the other pass in turn. At dim 1 each step is a
    shift by a function of h.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of couplings.
        hidden: widths of the hidden layers of each coupling's network.
        context_size: size of h, which every coupling's network reads.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.nice(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(features, Chain(Affine(dim), Shared(*coupling_steps(Shift, dim, steps, hidden, context_size))))


@recorded
def realnvp(
    features: int, dim: int, steps: int = 4, hidden: Sequence[int] = (320, 320), context_size: int = 64
) -> FlowPosterior:
    """RealNVP (Dinh et al. 2017): a diagonal Gaussian, then affine couplings ``z' = t + exp(s) z`` sharing h.

    s is softly bounded, by `exp_scale`. One half of the variables and the other pass in turn. At dim 1 each step is an
    affine map by functions of h.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of couplings.
        hidden: widths of the hidden layers of each coupling's network.
        context_size: size of h, which every coupling's network reads.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> z, log_prob, noise = flowpost.realnvp(16, dim=2, hidden=(32, 32))(torch.randn(8, 16), sample_shape=(50,))
    """
    return FlowPosterior(
        features, Chain(Affine(dim), Shared(*coupling_steps(_exp_affine, dim, steps, hidden, context_size)))
    )


@recorded
def spline_autoregressive(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    bins: int = 8,
    bound: float = 3.0,
) -> FlowPosterior:
    """Autoregressive neural spline flow, RQ-NSF (AR) (Durkan et al. 2019), fast to sample: `Spline` for the affine map.

    The splines act on the noise, which lies where their bins are; a diagonal Gaussian's loc and scale come last.
    Otherwise as `affine_iaf`. The paper's linear layers between the steps are orders reversed in turn.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of h, which every step's network reads.
        bins: of each spline, from 2 to 50.
        bound: where the splines end and the identity begins.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> posterior = flowpost.spline_autoregressive(16, dim=2, hidden=(32, 32), bins=4)
        >>> z, log_prob, noise = posterior(torch.randn(8, 16), sample_shape=(50,))
    """
    spline = functools.partial(Spline, bins=bins, bound=bound)
    return FlowPosterior(features, Chain(Shared(*masked_steps(spline, dim, steps, hidden, context_size)), Affine(dim)))


@recorded
def spline_coupling(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    bins: int = 8,
    bound: float = 3.0,
) -> FlowPosterior:
    """Coupling neural spline flow, RQ-NSF (C) (Durkan et al. 2019): `realnvp` with splines, fast both ways.

    The splines act on the noise, which lies where their bins are; a diagonal Gaussian's loc and scale come last. One
    half of the variables and the other pass in turn. At dim 1 each step is a spline by functions of h.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of couplings.
        hidden: widths of the hidden layers of each coupling's network.
        context_size: size of h, which every coupling's network reads.
        bins: of each spline, from 2 to 50.
        bound: where the splines end and the identity begins.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> posterior = flowpost.spline_coupling(16, dim=2, hidden=(32, 32), bins=4)
        >>> z, log_prob, noise = posterior(torch.randn(8, 16), sample_shape=(50,))
    """
    spline = functools.partial(Spline, bins=bins, bound=bound)
    couplings = coupling_steps(spline, dim, steps, hidden, context_size)
    return FlowPosterior(features, Chain(Shared(*couplings), Affine(dim)))


@recorded
def naf(
    features: int,
    dim: int,
    steps: int = 4,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
    units: int = 8,
    layers: int = 1,
) -> FlowPosterior:
    """Neural autoregressive flow in its inverse form (Huang et al. 2018): `DeepSigmoid` for the affine map of IAF.

    Otherwise as `affine_iaf`. With `layers` it is deep sigmoids of one number between them, not the paper's dense ones.

    Args:
        features: size of the encoder's features; 0 for a posterior without an encoder.
        dim: size of z.
        steps: number of autoregressive steps.
        hidden: widths of each step's hidden layers.
        context_size: size of h, which every step's network reads.
        units: sigmoids in a layer.
        layers: deep sigmoids in sequence in each step.

    Returns:
        A posterior that starts near N(0, I).

    Example:
        >>> posterior = flowpost.naf(16, dim=2, hidden=(32, 32), units=4)
        >>> z, log_prob, noise = posterior(torch.randn(8, 16), sample_shape=(50,))
    """
    sigmoids = functools.partial(DeepSigmoid, units=units, layers=layers)
    masked = masked_steps(sigmoids, dim, steps, hidden, context_size)
    return FlowPosterior(features, Chain(Affine(dim), Shared(*masked)))


def planar_steps(dim: int, steps: int) -> list[Planar]:
    """`steps` planar steps, each with a direction of its own."""
    return [Planar(dim) for _ in range(check_int("steps", steps, minimum=1))]


def radial_steps(dim: int, steps: int) -> list[Radial]:
    """`steps` radial steps, each with a point of its own."""
    return [Radial(dim) for _ in range(check_int("steps", steps, minimum=1))]


def householder_steps(dim: int, steps: int) -> list[Householder]:
    """`steps` reflections, two by two in a direction of their own: two equal ones are the identity."""
    pairs = [Householder(dim) for _ in range((check_int("steps", steps, minimum=1) + 1) // 2)]
    return [copy.deepcopy(pairs[index // 2]) for index in range(steps)]


def orthogonal_sylvester_steps(dim: int, steps: int = 4, rank: int | None = None) -> list[Sylvester]:
    """`steps` Sylvester steps of orthogonal columns of their own, half as many as there are variables."""
    rank = (check_int("dim", dim, minimum=1) + 1) // 2 if rank is None else rank
    return [Sylvester(dim, rank) for _ in range(check_int("steps", steps, minimum=1))]


def householder_sylvester_steps(dim: int, steps: int = 4, reflections: int = 8) -> list[Sylvester]:
    """`steps` Sylvester steps of full rank, each of as many reflections."""
    check_int("reflections", reflections, minimum=1)
    return [Sylvester(dim, dim, reflections) for _ in range(check_int("steps", steps, minimum=1))]


def triangular_sylvester_steps(dim: int, steps: int = 4) -> list[Bijector]:
    """`steps` Sylvester steps with ``Q = I``, every other one between two reversals: the variables stay in place."""
    parts: list[Bijector] = []
    for _ in range(check_int("steps", steps, minimum=1)):
        parts += [Sylvester(dim, dim, 0), Reverse(dim)]
    return parts if steps % 2 == 0 else parts[:-1]


def iaf_steps(dim: int, steps: int, hidden: Sequence[int] = (320, 320), context_size: int = 64) -> list[Autoregressive]:
    """`steps` autoregressive steps, every other one in the reverse order: the variables stay where they are."""
    return [Autoregressive(dim, context_size, hidden, order=order) for order in _orders(dim, steps)]


def masked_steps(
    step: Callable[[int], Bijector],
    dim: int,
    steps: int,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
) -> list[Masked]:
    """`steps` autoregressive steps of what `step` makes of `dim`, every other one in the reverse order."""
    return [Masked(step(dim), context_size, hidden, order=order) for order in _orders(dim, steps)]


def coupling_steps(
    step: Callable[[int], Bijector],
    dim: int,
    steps: int,
    hidden: Sequence[int] = (320, 320),
    context_size: int = 64,
) -> list[Coupling]:
    """`steps` couplings of what `step` makes of a number of variables: those that pass in one move in the next."""
    moving = [dim - dim // 2, max(dim // 2, 1)]
    orders = enumerate(_orders(dim, steps))
    return [Coupling(dim, step(moving[index % 2]), context_size, hidden, order=order) for index, order in orders]


def _exp_affine(dim: int) -> Affine:
    return Affine(dim, exp_scale)


def _orders(dim: int, steps: int) -> list[Sequence[int] | None]:
    """An order for each step: the variables as they come and reversed, in turn."""
    orders = [None, range(check_int("dim", dim, minimum=1))[::-1]]
    return [orders[index % 2] for index in range(check_int("steps", steps, minimum=1))]


RECIPES: Mapping[str, Callable[..., FlowPosterior]] = {
    "diagonal": diagonal,
    "full_covariance": full_covariance,
    "planar": planar,
    "radial": radial,
    "householder": householder,
    "cc_lin_iaf": cc_lin_iaf,
    "orthogonal_sylvester": orthogonal_sylvester,
    "householder_sylvester": householder_sylvester,
    "triangular_sylvester": triangular_sylvester,
    "iaf": iaf,
    "affine_iaf": affine_iaf,
    "maf": maf,
    "nice": nice,
    "realnvp": realnvp,
    "spline_autoregressive": spline_autoregressive,
    "spline_coupling": spline_coupling,
    "naf": naf,
}
"""Every recipe by its name; each takes ``(features, dim, **options)``."""
