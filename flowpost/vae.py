"""The reference VAE: likelihoods, and the model in one class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors.affine import Affine, Scale
from flowpost.bijectors.base import Bijector
from flowpost.numerics.arguments import check_int
from flowpost.objectives import elbo_terms, gaussian_kl, latent_kl, reweigh
from flowpost.posterior import FlowPosterior, Sample, standard_normal_log_prob

_GRADIENTS = ("standard", "stl", "dreg")


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
    """What an objective needs, each ``(*sample_shape, B)`` but for the closed-form KLs."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor
    kl: Tensor | None
    """Closed-form KL(q(z|x) || p(z)), ``(B,)``; None where q is not Gaussian or the gradient not standard."""
    sample: Sample
    latent_kl: Tensor | None = None
    """The same for each latent, ``(B, dim)``; None also where the Gaussian is not factorized."""

    def kl_groups(self, groups: int = 1) -> Tensor:
        """The KL in groups, ``(B, groups)``, for `free_bits`: 1, or for a factorized Gaussian also one per latent.

        Raises:
            ValueError: for any other number of groups; log q of a flow, and of a correlated Gaussian, does not split.
        """
        if groups == 1:
            return elbo_terms(self.log_likelihood, self.log_prior, self.log_q, self.kl).kl.unsqueeze(-1)
        if self.latent_kl is None:
            raise ValueError(f"groups: expected 1, for this posterior's KL does not split over latents, got {groups}")
        if groups != self.latent_kl.shape[-1]:
            raise ValueError(f"groups: expected 1 or {self.latent_kl.shape[-1]}, the number of latents, got {groups}")
        return self.latent_kl


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

    def forward(self, x: Tensor, sample_shape: tuple[int, ...] = (), gradient: str = "standard") -> VAEOutput:
        """Everything that a training step needs, in one pass.

        `gradient` says what autodiff makes of the objective; the values are the same:

        - ``"standard"``: plain reparameterization, with the closed-form KL where there is one.
        - ``"stl"``: sticking the landing, log q's dependence on z alone; unbiased for `elbo`, and for `iwae` of one
          sample. Its variance is 0 where q is the posterior.
        - ``"dreg"``: double reparameterization, for `iwae` over all of `sample_shape` and nothing else; unbiased.

        Args:
            x: ``(B, *event)``.
            sample_shape: leading axes of samples of z for each x.
            gradient: the estimator.

        Returns:
            ``VAEOutput(log_likelihood, log_prior, log_q, kl, sample, latent_kl)``.

        Raises:
            ValueError: if the decoder's output does not have ``likelihood.numbers`` for each element of x, or for an
                unknown `gradient`.

        Reference:
            Kingma & Welling (2014); Roeder et al. (2017); Tucker et al. (2018).
        """
        context = self.context(x)
        out = self.evaluate(x, context, sample_shape, gradient)
        if gradient != "standard" or not self.posterior.is_gaussian:
            return out
        loc, tril = self.posterior.gaussian_at(context)
        if not _factorized(self.posterior):
            return out._replace(kl=gaussian_kl(loc, tril))
        latents = latent_kl(loc, tril.diagonal(dim1=-2, dim2=-1))
        return out._replace(kl=latents.sum(-1), latent_kl=latents)

    def context(self, x: Tensor) -> Tensor:
        """What the posterior's flow reads for x: all of q(z|x) that does not depend on the sample."""
        context = self.posterior.context(self.encoder(x))
        if context is None:
            raise ValueError("posterior: expected one that reads features, got one whose flow takes no context")
        return context

    def evaluate(
        self, x: Tensor, context: Tensor, sample_shape: tuple[int, ...] = (), gradient: str = "standard"
    ) -> VAEOutput:
        """As `forward`, for a context that is known, and without the closed-form KL."""
        if gradient not in _GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(_GRADIENTS)}, got {gradient!r}")
        sample = self.posterior.sample_at(context, sample_shape)
        if gradient != "dreg":
            log_q = sample.log_prob if gradient == "standard" else self.posterior.path_log_prob_at(sample, context)
            return VAEOutput(*self.log_joint(x, sample.z), log_q, None, sample)
        z, zeros, more_zeros = reweigh(sample.z)
        log_likelihood, log_prior = self.log_joint(x, z)
        log_q = self.posterior.path_log_prob_at(sample._replace(z=z), context)
        return VAEOutput(log_likelihood + zeros, log_prior, log_q + more_zeros, None, sample)

    def log_joint(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log p(x|z) and log p(z), each ``(*samples, B)``, for x ``(B, *event)`` and z ``(*samples, B, dim)``."""
        log_likelihood = self.likelihood.log_prob(self.decode(z, math.prod(x.shape[1:])), x.flatten(1))
        return log_likelihood, standard_normal_log_prob(z)

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


def _factorized(posterior: FlowPosterior) -> bool:
    """Whether every step acts on each latent alone."""
    steps = [module for module in posterior.flow.modules() if isinstance(module, Bijector)]
    leaves = [step for step in steps if sum(isinstance(part, Bijector) for part in step.modules()) == 1]
    return all(isinstance(leaf, (Affine, Scale)) for leaf in leaves)
