"""The reference VAE: likelihoods, and the model in one class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors.base import check_int
from flowpost.objectives import gaussian_kl
from flowpost.posterior import FlowPosterior, Sample, standard_normal_log_prob


class Likelihood(nn.Module, ABC):
    """p(x|z), independent over the elements of x, from `numbers` decoder outputs for each of them.

    ``log_prob`` takes the decoder's outputs as ``(*batch, numbers, elements)`` and x as ``(*batch, elements)``, leading
    axes broadcasting, and sums over the elements; ``mean`` gives E[x|z], ``(*batch, elements)``.
    """

    numbers = 1

    @abstractmethod
    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""

    @abstractmethod
    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""


class Binomial(Likelihood):
    """Counts from 0 to n, ``log p(x) = log C(n, x) + x a - n softplus(a)`` with the logit a; one output an element.

    Args:
        n: number of trials, at least 1.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = check_int("n", n, minimum=1)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        logit = outputs.squeeze(-2)
        ways = math.lgamma(self.n + 1) - torch.lgamma(x + 1) - torch.lgamma(self.n - x + 1)
        return (x * logit - self.n * F.softplus(logit)).sum(-1) + ways.sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        return self.n * torch.sigmoid(outputs.squeeze(-2))


class Bernoulli(Binomial):
    """Binary x, ``log p(x) = x a - softplus(a)`` with the logit a; one output an element."""

    def __init__(self) -> None:
        super().__init__(1)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        logit = outputs.squeeze(-2)
        return (x * logit - F.softplus(logit)).sum(-1)


class Gaussian(Likelihood):
    """Real x, ``N(x; loc, exp(s)^2)``; two outputs an element, loc and s, softly bounded at +-10."""

    numbers = 2

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        loc, raw = outputs.unbind(-2)
        log_scale = 10 * torch.tanh(raw / 10)
        return standard_normal_log_prob((x - loc) * torch.exp(-log_scale)) - log_scale.sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        return outputs.select(-2, 0)


class Categorical(Likelihood):
    """One of the levels 0 to ``levels - 1``, by a softmax over ``levels`` outputs an element.

    Args:
        levels: number of levels, at least 2.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.numbers = check_int("levels", levels, minimum=2)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        index = x.long().unsqueeze(-2)
        batch = torch.broadcast_shapes(outputs.shape[:-2], index.shape[:-2])
        chosen = outputs.expand(*batch, -1, -1).gather(-2, index.expand(*batch, -1, -1)).squeeze(-2)
        return (chosen - outputs.logsumexp(-2)).sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        levels = torch.arange(self.numbers, dtype=outputs.dtype, device=outputs.device)
        return (outputs.softmax(-2) * levels.unsqueeze(-1)).sum(-2)


class VAEOutput(NamedTuple):
    """What an objective needs, each ``(*sample_shape, B)`` but for `kl`, which is ``(B,)``."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor
    kl: Tensor | None
    """Closed-form KL(q(z|x) || p(z)) where the posterior is Gaussian, else None."""
    sample: Sample


class VAE(nn.Module):
    """A variational autoencoder with prior N(0, I): ``log p(x|z)``, ``log p(z)``, ``log q(z|x)`` for z ~ q(z|x).

    Args:
        encoder: from x ``(B, *event)`` to features ``(B, features)``.
        posterior: q(z|x) from the features.
        decoder: from z ``(N, dim)`` to the likelihood's numbers, ``likelihood.numbers`` for each element of x, as
            ``(N, numbers, *event)`` or anything that flattens to that.
        likelihood: p(x|z).

    Reference:
        Kingma & Welling (2014); (2019), section 2.

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> vae(torch.ones(5, 9), sample_shape=(3,)).log_q.shape
        torch.Size([3, 5])
    """

    def __init__(
        self, encoder: nn.Module, posterior: FlowPosterior, decoder: nn.Module, likelihood: Likelihood
    ) -> None:
        super().__init__()
        self.encoder, self.posterior, self.decoder, self.likelihood = encoder, posterior, decoder, likelihood

    def forward(self, x: Tensor, sample_shape: tuple[int, ...] = ()) -> VAEOutput:
        """Everything that a training step needs, in one pass.

        Args:
            x: ``(B, *event)``.
            sample_shape: leading axes of samples of z for each x.

        Returns:
            ``VAEOutput(log_likelihood, log_prior, log_q, kl, sample)``.

        Raises:
            ValueError: if the decoder's output does not have ``likelihood.numbers`` for each element of x.
        """
        context = self.context(x)
        kl = gaussian_kl(*self.posterior.gaussian_at(context)) if self.posterior.is_gaussian else None
        return self.evaluate(x, context, sample_shape)._replace(kl=kl)

    def context(self, x: Tensor) -> Tensor:
        """What the posterior's flow reads for x: all of q(z|x) that does not depend on the sample."""
        context = self.posterior.context(self.encoder(x))
        if context is None:
            raise ValueError("posterior: expected one that reads features, got one whose flow takes no context")
        return context

    def evaluate(self, x: Tensor, context: Tensor, sample_shape: tuple[int, ...] = ()) -> VAEOutput:
        """As `forward`, for a context that is known, and without the closed-form KL."""
        sample = self.posterior.sample_at(context, sample_shape)
        log_likelihood = self.likelihood.log_prob(self.decode(sample.z, math.prod(x.shape[1:])), x.flatten(1))
        return VAEOutput(log_likelihood, standard_normal_log_prob(sample.z), sample.log_prob, None, sample)

    def decode(self, z: Tensor, elements: int) -> Tensor:
        """The likelihood's numbers ``(*batch, numbers, elements)`` for z ``(*batch, dim)``."""
        outputs = self.decoder(z.flatten(0, -2)).flatten(1)
        numbers = self.likelihood.numbers
        if outputs.shape[1] != numbers * elements:
            name = type(self.likelihood).__name__
            raise ValueError(
                f"decoder: expected {numbers} x {elements} outputs per example for {name}, got {outputs.shape[1]}"
            )
        return outputs.view(*z.shape[:-1], numbers, elements)
