"""What to report: log p(x) by importance sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowpost.bijectors.base import check_int
from flowpost.vae import VAE

_EXAMPLES = 100


def log_marginal(vae: VAE, x: Tensor, samples: int = 1000, *, pairs: int = 1000) -> Tensor:
    """Importance-sampled ``log p(x) ~ log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x)``, z_s from q(z|x), per example.

    A lower bound in expectation, tighter with more samples: report how many. Samples stream through in chunks and are
    accumulated by a float64 logsumexp, so memory does not grow with `samples`; the encoder runs once. The model is used
    in the mode it is in: call ``vae.eval()`` first where that matters.

    Args:
        vae: the model.
        x: ``(B, *event)``.
        samples: number of samples for each example.
        pairs: how many (sample, example) pairs are decoded at once; memory grows with it, and dispatch costs fall.

    Returns:
        ``(B,)``, float64, without gradient.

    Raises:
        ValueError: if `samples` or `pairs` is below 1.

    Reference:
        Kingma & Welling (2019), section 2.6; Rezende et al. (2014), appendix E.
    """
    check_int("samples", samples, minimum=1)
    check_int("pairs", pairs, minimum=1)
    with torch.no_grad():
        return torch.cat([_log_marginal(vae, part, samples, pairs) for part in x.split(min(_EXAMPLES, pairs))])


def _log_marginal(vae: VAE, x: Tensor, samples: int, pairs: int) -> Tensor:
    context = vae.context(x)
    chunk = max(1, pairs // max(1, len(x)))
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for start in range(0, samples, chunk):
        out = vae.evaluate(x, context, (min(chunk, samples - start),))
        weights = out.log_likelihood.double() + out.log_prior.double() - out.log_q.double()
        total = torch.logaddexp(total, weights.logsumexp(0))
    return total - math.log(samples)
