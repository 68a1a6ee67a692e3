"""What to report: log p(x), its bounds and whether to trust it, KL per latent, active units, ELBO terms."""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.conditions import split
from flowpost.decomposition import ELBODecomposition as ELBODecomposition
from flowpost.decomposition import decompose_elbo as decompose_elbo
from flowpost.importance import ImportanceEstimate, summarize, warn_unreliable
from flowpost.kl import latent_kl
from flowpost.marginals import gaussian_marginals
from flowpost.numerics.arguments import check_int
from flowpost.refining import refine as refine
from flowpost.sandwich import AnnealedEstimate as AnnealedEstimate
from flowpost.sandwich import Sandwich as Sandwich
from flowpost.sandwich import annealed_estimate as annealed_estimate
from flowpost.sandwich import sandwich as sandwich
from flowpost.vae import VAE
from flowpost.weights import EXAMPLES, log_weights


def log_marginal(vae: VAE, x: Tensor, samples: int = 1000, *, pairs: int = 1000, y: Tensor | None = None) -> Tensor:
    """Importance-sampled ``log p(x) ~ log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x)``, z_s from q(z|x), per example.

    A lower bound in expectation, tighter with more samples: report how many. Samples stream through in chunks and are
    accumulated by a float64 logsumexp, so memory does not grow with `samples`; the encoder runs once. The model is used
    in the mode it is in: call ``vae.eval()`` first where that matters. `importance_estimate` says whether to trust it.

    Args:
        vae: the model.
        x: ``(B, *event)``.
        samples: number of samples for each example.
        pairs: how many (sample, example) pairs are decoded at once; memory grows with it, and dispatch costs fall.
        y: the condition, a row for each x, where the model has one: then it is log p(x|y).

    Returns:
        ``(B,)``, float64, without gradient.

    Raises:
        ValueError: if `samples` or `pairs` is below 1.

    Reference:
        Kingma & Welling (2019), section 2.6; Rezende et al. (2014), appendix E.
    """
    parts = log_weights(vae, x, y, samples, pairs)
    sums = [reduce(torch.logaddexp, (chunk.logsumexp(0) for chunk in chunks)) for chunks in parts]
    return torch.cat(sums) - math.log(samples)


def importance_estimate(
    vae: VAE, x: Tensor, samples: int = 1000, *, refine: int = 0, pairs: int = 1000, y: Tensor | None = None
) -> ImportanceEstimate:
    """`log_marginal` with its standard error, effective sample size and Pareto k-hat, for each x.

    The same samples, and the tail of about ``3 sqrt(samples)`` weights for each example besides. Where k-hat is above
    0.7 for any of them it says so in an `UnreliableEstimateWarning`. Posterior mass that no sample has reached shows
    in none of these numbers.

    Where k-hat is large, try ``refine=25`` first: short Hamiltonian chains of each example, 32 from q(z|x) and 32
    from p(z), for modes that q misses. A Student's t is fitted to either; the samples are then fresh draws of these,
    one in ten of q, so that the estimate is a lower bound in expectation as before. It takes `refine` times 400
    gradients of log p(x|z) for each x. The model must be in eval mode for it. `annealed_estimate` costs more, and
    needs no better q.

    Args:
        vae: the model.
        x: ``(B, *event)``.
        samples: number of samples for each example; k-hat needs 21.
        refine: steps of the chains behind a proposal fitted to each x; 0 takes q(z|x) itself.
        pairs: how many (sample, example) pairs are decoded at once.
        y: as in `log_marginal`.

    Returns:
        ``ImportanceEstimate(log_p, standard_error, ess, k_hat)``.

    Raises:
        ValueError: if `samples` or `pairs` is below 1, or `refine` is below 0.

    Reference:
        Vehtari et al. (2024), Pareto Smoothed Importance Sampling; Yao et al. (2018), Yes, but Did It Work?

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> log_p, standard_error, ess, k_hat = importance_estimate(vae, torch.ones(5, 9), samples=100)
        >>> k_hat.shape
        torch.Size([5])
    """
    parts = [summarize(chunks, samples) for chunks in log_weights(vae, x, y, samples, pairs, refine)]
    estimate = ImportanceEstimate(*(torch.cat(column) for column in zip(*parts, strict=True)))
    warn_unreliable(estimate, samples)
    return estimate


def kl_per_latent(vae: VAE, x: Tensor, *, y: Tensor | None = None) -> Tensor:
    """KL(q(z_i|x) || N(0, 1)) of each latent, from the closed-form marginals of a Gaussian posterior.

    For a factorized posterior they add up to the whole KL; for any other to less, by the latents' total correlation.

    Args:
        vae: the model, with a Gaussian posterior.
        x: ``(B, *event)``.
        y: the condition, a row for each x, where the model has one.

    Returns:
        ``(B, dim)``, float64, without gradient.

    Raises:
        TypeError: if the posterior is not Gaussian: a flow's marginals have no closed form.
        ValueError: if the model has a prior of its own.

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> kl_per_latent(vae, torch.ones(5, 9)).shape
        torch.Size([5, 2])
    """
    if vae.prior is not None or not vae._has_given_prior():
        raise ValueError("prior: expected N(0, I), whose latents are independent, got a prior of the model's own")
    with torch.no_grad():
        parts = [latent_kl(*gaussian_marginals(vae.encode(*part))) for part in split(x, y, EXAMPLES)]
        return torch.cat(parts)


class ActiveUnits(NamedTuple):
    """How much each latent's posterior mean varies over data, each ``(dim,)``."""

    variance: Tensor
    """``Var_x(E_q(z|x)[z_i])``, float64"""
    active: Tensor
    """Whether it exceeds the threshold."""


def active_units(
    vae: VAE,
    x: Tensor,
    samples: int = 64,
    *,
    threshold: float = 0.01,
    pairs: int = 1000,
    y: Tensor | None = None,
) -> ActiveUnits:
    """Burda et al.'s rule: latent i is active where ``Var_x(E_q(z|x)[z_i]) > threshold``, 0.01 in the paper.

    The mean of a Gaussian posterior is exact. Any other is estimated from `samples`; the variance of that estimate,
    which alone can exceed the threshold, is subtracted. The difference is unbiased, and can be below 0.

    Args:
        vae: the model.
        x: ``(N, *event)``, at least 2 examples, as many as there are to be had.
        samples: number of samples for each example, at least 2, where the posterior is not Gaussian.
        threshold: above which a latent is active.
        pairs: how many (sample, example) pairs are drawn at once.
        y: the condition, a row for each x, where the model has one.

    Returns:
        ``ActiveUnits(variance, active)``; ``active.sum()`` is the number to report.

    Raises:
        ValueError: if `samples` or the examples are below 2, or `pairs` below 1.

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders.

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.planar(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> active_units(vae, torch.rand(50, 9).round()).active.shape
        torch.Size([2])
    """
    samples, pairs = check_int("samples", samples, minimum=2), check_int("pairs", pairs, minimum=1)
    check_int("len(x)", len(x), minimum=2)
    with torch.no_grad():
        parts = [_means(vae, *part, samples) for part in split(x, y, max(1, pairs // samples))]
    means, noise = (torch.cat(column) for column in zip(*parts, strict=True))
    variance = means.var(0) - noise.mean(0)
    return ActiveUnits(variance, variance > threshold)


def _means(vae: VAE, x: Tensor, y: Tensor | None, samples: int) -> tuple[Tensor, Tensor]:
    """E_q[z] and the variance of its estimate, each ``(B, dim)``."""
    q = vae.encode(x, y)
    if q.is_gaussian:
        mean = q.mean.double()
        return mean, torch.zeros_like(mean)
    z = q.draw((samples,)).z.double()
    return z.mean(0), z.var(0) / samples
