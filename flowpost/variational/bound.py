"""The ELBO of a posterior, or of a mixture, on a log joint: a loss with its path gradient, and every draw's log p/q."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from flowpost.density import like_of
from flowpost.posterior import FlowPosterior
from flowpost.variational.mixture import Mixture
from flowpost.variational.target import Target

Fitted: TypeAlias = FlowPosterior | Mixture


class Bound(NamedTuple):
    """Of one batch of draws."""

    loss: Tensor
    """Its gradient is that of minus the ELBO, by sticking the landing; its value means nothing."""
    ratio: Tensor
    """log p/q of every draw, ``(S,)``; nan where it is left out, as its value or its slope is not finite."""
    share: Tensor
    """What each draw stands for, ``(S,)``; together 1."""


class Draws(NamedTuple):
    """Independent draws, or for a mixture as many from each component."""

    z: Tensor
    """``(S, dim)``"""
    log_q: Tensor
    """``(S,)``"""
    share: Tensor
    """``(S,)``"""


def noise_for(fitted: Fitted, samples: int, generator: torch.Generator) -> Tensor:
    """Standard normal noise for so many draws, ``(S, dim)``; for a mixture ``(K, S / K, dim)``, rounded up."""
    shape, first = (samples, fitted.dim), fitted
    if isinstance(fitted, Mixture):
        first = cast(FlowPosterior, fitted.posteriors[0])
        shape = (len(fitted.posteriors), -(-samples // len(fitted.posteriors)), fitted.dim)
    like = like_of(cast(FlowPosterior, first).flow, None)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def draw(fitted: Fitted, noise: Tensor, *, path: bool = False) -> Draws:
    """What noise of `noise_for` becomes; with `path` log q follows z alone."""
    if isinstance(fitted, Mixture):
        z, log_q, log_weights = fitted.stratified(noise.shape[1], path=path, noise=noise)
        share = (log_weights.exp() / noise.shape[1]).unsqueeze(-1).expand_as(log_q)
        return Draws(z.flatten(0, 1), log_q.flatten(), share.flatten())
    sample = fitted(sample_shape=(len(noise),), noise=noise)
    log_q = fitted.path_log_prob(sample) if path else sample.log_prob
    return Draws(sample.z, log_q, torch.full_like(log_q, 1 / len(noise)))


def bound(fitted: Fitted, target: Target, noise: Tensor, weight: Tensor | float = 1.0) -> Bound:
    """The ELBO from one batch of draws.

    The log joint's graph ends at z: each draw's slope is taken first, so that one that is not finite is left out whole.
    No value is read on the host.

    Args:
        fitted: q.
        target: p.
        noise: as `noise_for` gives it.
        weight: of log p, below 1 for a tempered one; `ratio` is of p itself.
    """
    z, log_q, share = draw(fitted, noise, path=True)
    value, slope = target.gradient(z)
    fine = value.isfinite() & slope.isfinite().all(-1) & log_q.isfinite()
    ratio = torch.where(fine, value - log_q.detach(), math.nan)
    share = torch.where(fine, share, 0.0)
    share = share / share.detach().sum()
    path = weight * (torch.where(fine.unsqueeze(-1), slope, 0.0) * z).sum(-1) - torch.where(fine, log_q, 0.0)
    # A component's weight moves by the ELBO of its own draws; a single posterior's share is a constant.
    through_weights = share * torch.where(fine, ratio, 0.0) if share.requires_grad else 0.0
    loss = -(share.detach() * path + through_weights).sum()
    return Bound(loss, ratio, share.detach())
