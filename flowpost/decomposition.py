"""The ELBO's decomposition: what z tells about the example, and how far all z together are from the prior."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.conditions import Data, reads, split
from flowpost.distribution import FlowDistribution
from flowpost.marginals import gaussian_marginals, log_product_of_marginals
from flowpost.numerics.arguments import check_int
from flowpost.vae import VAE
from flowpost.weights import EXAMPLES


class ELBODecomposition(NamedTuple):
    """The ELBO's terms over a set of examples, each ``(N,)``, float64: the terms are their means.

    ``ELBO = reconstruction - mutual_information - marginal_kl``, for every example and sample exactly, and
    ``marginal_kl = total_correlation + dimension_kl``, where the latents' marginals have a closed form.
    """

    reconstruction: Tensor
    """``E_q(z|x_n)[log p(x_n|z)]``"""
    mutual_information: Tensor
    """``KL(q(z|x_n) || q(z))``; its mean is that of the code z and the example's index, at most log N."""
    marginal_kl: Tensor
    """``E_q(z|x_n)[log q(z) / p(z)]``; its mean is KL(q(z) || p(z))."""
    total_correlation: Tensor | None = None
    """``E_q(z|x_n)[log q(z) / prod_j q(z_j)]``; its mean is the latents' total correlation in q(z), 0 where they are
    independent. None where the posterior is not Gaussian."""
    dimension_kl: Tensor | None = None
    """``E_q(z|x_n)[sum_j log q(z_j) / p(z_j)]``; its mean is ``sum_j KL(q(z_j) || p(z_j))``. None also where the model
    has a prior of its own, whose latents need not be independent."""


def decompose_elbo(
    vae: VAE, x: Tensor, samples: int = 1, *, pairs: int = 100_000, y: Tensor | None = None
) -> ELBODecomposition:
    """Split the KL into what z tells about the example and how far all z together are from the prior.

    ``q(z) = 1/N sum_n q(z|x_n)``, the aggregate over the N examples given, is evaluated exactly at samples from it: for
    these N examples the estimate is unbiased. So are the q(z_j) of Gaussian posteriors, which split the second part
    into the latents' total correlation in q(z) and how far each of them is from its prior. As an estimate for the data
    they come from, mutual information is biased low, and the marginal KL high by the same amount, for N examples tell
    at most log N: little where it is well below that, everything where it is close.

    Args:
        vae: the model.
        x: ``(N, *event)``, as many examples as there are to be had.
        samples: of z for each example; N of them are enough where N is large.
        pairs: how many log q(z|x_n) are computed at once, of ``samples * N^2`` in all, each by the flow's inverse; and
            how many log q(z_j|x_n).
        y: the condition, a row for each x, where the model has one; q(z) is then the aggregate of q(z|x_n, y_n).

    Returns:
        ``ELBODecomposition(reconstruction, mutual_information, marginal_kl, total_correlation, dimension_kl)``; the
        last two are None where `ELBODecomposition` says so.

    Raises:
        TypeError: if q(z|x) is not what the posterior's flow makes of noise, but a subclass with a log_prob of its own.
        ValueError: if `samples` or `pairs` is below 1, there is no example, or the prior is a p(z|y), which is another
            for each example.

    Reference:
        Hoffman & Johnson (2016), ELBO Surgery: Yet Another Way to Carve Up the Variational Evidence Lower Bound; Chen,
        Li, Grosse & Duvenaud (2018), Isolating Sources of Disentanglement in VAEs, eq. 2, for the latents' part.

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> terms = decompose_elbo(vae, torch.rand(50, 9).round(), samples=4)
        >>> bool(terms.mutual_information.mean() < math.log(50))
        True
    """
    samples, pairs = check_int("samples", samples, minimum=1), check_int("pairs", pairs, minimum=1)
    check_int("len(x)", len(x), minimum=1)
    if reads(vae.prior):
        raise ValueError("prior: expected one p(z) for all examples, to which q(z) is compared, got one of p(z|y)")
    with torch.no_grad():
        found = [vae.encode(*part) for part in split(x, y, EXAMPLES)]  # a head may give one row for all
        for q in found:
            q._require_of_flow(vae.posterior.flow)
        contexts = torch.cat([cast(Tensor, q.context).expand(*q.batch_shape, -1) for q in found])
        marginals, size = _marginals(vae, contexts), max(1, min(EXAMPLES, pairs // samples))
        pieces = zip(split(x, y, size), torch.arange(len(x), device=x.device).split(size), strict=True)
        parts = [_decompose(vae, piece, row, contexts, marginals, samples, pairs) for piece, row in pieces]
    return ELBODecomposition(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _marginals(vae: VAE, contexts: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each latent, ``(N, dim)``, of Gaussian posteriors."""
    if not vae.posterior.is_gaussian:
        return None
    parts = [gaussian_marginals(_at(vae, part)) for part in contexts.split(EXAMPLES)]
    loc, scale = (torch.cat(column) for column in zip(*parts, strict=True))
    return loc, scale


def _decompose(
    vae: VAE,
    data: Data,
    row: Tensor,
    contexts: Tensor,
    marginals: tuple[Tensor, Tensor] | None,
    samples: int,
    pairs: int,
) -> list[Tensor]:
    """The terms that there are, of the examples `row` of all those whose contexts are given."""
    x, y = data
    out = vae.evaluate(x, _at(vae, contexts[row]), (samples,), y=y)
    z, own = out.sample.z.unsqueeze(-2), out.log_q.double()
    total = torch.full_like(own, -math.inf)
    for columns in torch.arange(len(contexts), device=row.device).split(max(1, pairs // max(1, own.numel()))):
        log_q = _at(vae, contexts[columns]).log_prob(z).double()  # (samples, B, columns)
        log_q = torch.where(log_q.isnan(), -math.inf, log_q)  # overflowed on the way back: there is no density there
        log_q = torch.where(row.unsqueeze(-1) == columns, own.unsqueeze(-1), log_q)  # known without an inverse
        total = torch.logaddexp(total, log_q.logsumexp(-1))
    aggregate = total - math.log(len(contexts))
    log_prior = out.log_prior.double()
    terms = [out.log_likelihood.double(), own - aggregate, aggregate - log_prior]
    if marginals is not None:
        independent = vae.prior is None and vae._has_given_prior()
        product = log_product_of_marginals(out.sample.z.double(), *marginals, pairs)
        terms += [aggregate - product] + ([product - log_prior] if independent else [])
    return [term.mean(0) for term in terms]


def _at(vae: VAE, context: Tensor) -> FlowDistribution:
    """The q(.|x) of a context that is known."""
    return FlowDistribution(vae.posterior.flow, context, context.shape[:-1])
