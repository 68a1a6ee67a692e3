"""What one pass of a VAE gives to an objective, and the KL where it is in closed form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributions import kl_divergence

from flowpost.density import Sample
from flowpost.distribution import FlowDistribution
from flowpost.objectives import elbo_terms, gaussian_kl, latent_kl


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


def closed_kl(q: FlowDistribution, p: FlowDistribution | None = None) -> tuple[Tensor, Tensor | None]:
    """KL(q || p) of Gaussians, ``(B,)``, and of each latent where both are factorized; p is N(0, I) by default."""
    if q._is_factorized and (p is None or p._is_factorized):
        loc, scale = q._loc_scale()
        if p is not None:  # both in the units of p
            origin, unit = p._loc_scale()
            loc, scale = (loc - origin) / unit, scale / unit
        latents = latent_kl(loc, scale)
        return latents.sum(-1), latents
    return (gaussian_kl(*q.gaussian()) if p is None else kl_divergence(q, p)), None
