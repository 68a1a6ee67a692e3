"""What one pass of a VAE gives to an objective, and the KL where it is in closed form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributions import kl_divergence

from flowpost.density import Sample
from flowpost.distribution import FlowDistribution
from flowpost.objectives import elbo_terms, gaussian_kl, latent_kl
from flowpost.posterior import FlowPosterior


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


def closed_kl(q: FlowDistribution, prior: FlowPosterior | None = None) -> tuple[Tensor, Tensor | None]:
    """KL(q(z|x) || p(z)) of Gaussians, ``(B,)``, and of each latent where q's are independent and p is N(0, I)."""
    if prior is not None:
        return kl_divergence(q, prior.at()), None
    if not q._is_factorized:
        return gaussian_kl(*q.gaussian()), None
    latents = latent_kl(*q._loc_scale())
    return latents.sum(-1), latents
