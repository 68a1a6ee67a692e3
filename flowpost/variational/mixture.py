"""A mixture of posteriors without an encoder, for targets with several modes; its draws are stratified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from flowpost.density import Sample, like_of
from flowpost.directions import slow_steps
from flowpost.numerics.along import first_along
from flowpost.numerics.arguments import check_int
from flowpost.posterior import FlowPosterior


class Stratified(NamedTuple):
    """As many draws from each component; a draw of component k stands for ``exp(log_weights[k]) / n`` of the whole."""

    z: Tensor
    """``(K, n, dim)``"""
    log_q: Tensor
    """The log density of the whole mixture, ``(K, n)``."""
    log_weights: Tensor
    """``(K,)``"""


class Mixture(nn.Module):
    """``q(z) = sum_k w_k q_k(z)`` of K posteriors, whose weights ``w = softmax(logits)`` are learned too.

    The ELBO is ``sum_k w_k E_{q_k}[log p - log q]``: every component is drawn from, so that no sampled index stands
    between it and a gradient. A draw has its own component's log q from the pass that made it, and the others' from
    their inverses; so a density has to be fast in every component. Cost: K passes and K (K - 1) densities of n draws.

    Where another component's inverse overflows at a draw its density there counts as 0.

    Args:
        posteriors: of one dim, without features, as ``flowpost.realnvp(0, dim)``: Gaussian, or of couplings, or as
            `maf` autoregressive from z to noise.

    Raises:
        TypeError: for what is no FlowPosterior.
        ValueError: for none at all, different dims, dtypes or devices, one that reads features, or one whose density
            takes a search or a sweep.

    Reference:
        Morningstar et al. (2021), Automatic Differentiation Variational Inference with Mixtures, for the stratified
        ELBO; Roeder, Wu & Duvenaud (2017), Sticking the Landing, for the path gradient.

    Example:
        >>> mixture = Mixture([flowpost.realnvp(0, dim=2, hidden=(16, 16)) for _ in range(3)])
        >>> z, log_q, log_weights = mixture.stratified(50, path=True)
        >>> z.shape, log_q.shape, log_weights.shape
        (torch.Size([3, 50, 2]), torch.Size([3, 50]), torch.Size([3]))
        >>> elbo = (log_weights.exp() * (-z.square().sum(-1) - log_q).mean(1)).sum()
    """

    def __init__(self, posteriors: Sequence[FlowPosterior]) -> None:
        super().__init__()
        _check(posteriors)
        self.posteriors = nn.ModuleList(posteriors)
        like = like_of(posteriors[0].flow, None)
        self.logits = nn.Parameter(torch.zeros(len(posteriors), dtype=like.dtype, device=like.device))

    @property
    def dim(self) -> int:
        """Size of the last axis of z."""
        return self._components()[0].dim

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the weights, ``(K,)``."""
        return self.logits.log_softmax(0)

    def stratified(self, n: int, *, path: bool = False, noise: Tensor | None = None) -> Stratified:
        """Draw n times from every component, reparameterized.

        Args:
            n: draws from each.
            path: whether log q follows z alone, every parameter and weight held fixed: in the ELBO it leaves out the
                score, whose mean is 0 (sticking the landing).
            noise: the standard normal draws to map, ``(K, n, dim)``, instead of fresh ones.

        Returns:
            ``Stratified(z, log_q, log_weights)``.

        Raises:
            ValueError: if n is below 1.
        """
        count, parts = check_int("n", n, minimum=1), self._components()
        noises = [None] * len(parts) if noise is None else list(noise)
        samples = [part(sample_shape=(count,), noise=own) for part, own in zip(parts, noises, strict=True)]
        terms = torch.stack([self._terms(k, samples, path=path) for k in range(len(parts))])
        z = torch.stack([sample.z for sample in samples])
        weights = self.log_weights.detach() if path else self.log_weights
        return Stratified(z, _mixed(terms, weights), self.log_weights)

    def log_prob(self, z: Tensor) -> Tensor:
        """The log q of any z ``(*batch, dim)``, ``(*batch)``; nan where no component's inverse is finite."""
        return _mixed(torch.stack([part.log_prob(z) for part in self._components()]), self.log_weights)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Independent draws ``(n, dim)``, without gradient; the host waits for how many are whose."""
        parts, weights = self._components(), self.log_weights.exp()
        owner = torch.multinomial(weights, check_int("n", n, minimum=1), replacement=True)
        counts = owner.bincount(minlength=len(parts)).tolist()
        z = torch.cat([part(sample_shape=(count,)).z for part, count in zip(parts, counts, strict=True)])
        return z[owner.argsort().argsort()]  # the order in which the owners were drawn

    def _components(self) -> list[FlowPosterior]:
        return [cast(FlowPosterior, part) for part in self.posteriors]

    def _terms(self, k: int, samples: list[Sample], *, path: bool) -> Tensor:
        """The log density that component k gives to every draw, ``(K, n)``; its own draws are not inverted."""
        part, own = self._components()[k], samples[k]
        log_own = part.path_log_prob(own) if path else own.log_prob
        others = [sample.z for j, sample in enumerate(samples) if j != k]
        if not others:
            return log_own.unsqueeze(0)
        z = torch.stack(others)
        rows = list(_path_log_prob(part, z) if path else part.log_prob(z))
        return torch.stack([*rows[:k], log_own, *rows[k:]])


def _path_log_prob(posterior: FlowPosterior, z: Tensor) -> Tensor:
    """The log q of any z as a function of z alone, nan where it is not finite."""
    if not torch.is_grad_enabled():
        return posterior.log_prob(z)
    leaf = z.detach().requires_grad_()
    value = posterior.log_prob(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    slope = torch.where(value.isfinite().unsqueeze(-1), slope, 0)
    return first_along(value, z, slope)


def _mixed(terms: Tensor, log_weights: Tensor) -> Tensor:
    """``log sum_k w_k exp(terms_k)`` over the first axis; a nan counts as no density, unless there are only nans."""
    lost = terms.isnan()
    terms = torch.where(lost & ~lost.all(0), -math.inf, terms)
    return (terms + log_weights.view(-1, *(1,) * (terms.ndim - 1))).logsumexp(0)


def _check(posteriors: Sequence[FlowPosterior]) -> None:
    if not len(posteriors):
        raise ValueError("posteriors: expected at least one, got none")
    for part in posteriors:
        if not isinstance(part, FlowPosterior):
            raise TypeError(f"posteriors: expected FlowPosteriors, got {type(part).__name__}")
        if part.features:
            raise ValueError(f"posteriors: expected ones without features, got {part.features}; write features=0")
        if slow := {type(step).__name__ for step in slow_steps(part.flow, inverse=True)}:
            raise ValueError(
                f"posteriors: expected densities of one pass, got steps that are searched or swept over for it: "
                f"{', '.join(sorted(slow))}; write full_covariance, realnvp, spline_coupling or maf"
            )
    for name, found in _likes(posteriors).items():
        if len(found) > 1:
            raise ValueError(f"posteriors: expected one {name}, got {', '.join(sorted(map(str, found)))}")


def _likes(posteriors: Sequence[FlowPosterior]) -> dict[str, set]:
    likes = [like_of(part.flow, None) for part in posteriors]
    return {
        "dim": {part.dim for part in posteriors},
        "dtype": {like.dtype for like in likes},
        "device": {like.device for like in likes},
    }
