"""What to optimise: functions of a model's log-densities, sample axes first, the batch axis last."""

from __future__ import annotations

from torch import Tensor


def elbo(
    log_likelihood: Tensor,
    log_prior: Tensor,
    log_q: Tensor,
    kl: Tensor | None = None,
    *,
    kl_weight: float | Tensor = 1.0,
) -> Tensor:
    """Evidence lower bound per example, ``E_q[log p(x|z)] - weight * KL(q(z|x) || p(z))``, averaged over samples.

    With `kl` given the KL is in closed form; else it is the Monte Carlo estimate ``log q(z|x) - log p(z)``.

    Args:
        log_likelihood: log p(x|z), ``(*samples, B)``.
        log_prior: log p(z), ``(*samples, B)``.
        log_q: log q(z|x), ``(*samples, B)``.
        kl: closed-form KL, ``(B,)``, where there is one.
        kl_weight: weight of the KL: below 1 while it warms up, another constant for a beta-VAE.

    Returns:
        ``(B,)``. Its mean is what to maximize.

    Reference:
        Kingma & Welling (2019), eq. 2.10; Kingma & Welling (2014), eq. 7.
    """
    divergence = log_q - log_prior if kl is None else kl
    return _over_samples(log_likelihood) - kl_weight * _over_samples(divergence)


def gaussian_kl(loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Closed-form ``KL(N(loc, L L^T) || N(0, I)) = (|L|^2 + |loc|^2 - dim) / 2 - sum(log diag L)``.

    Args:
        loc: ``(*batch, dim)``.
        scale_tril: L ``(*batch, dim, dim)``, lower-triangular with a positive diagonal.

    Returns:
        ``(*batch)``.

    Reference:
        Kingma & Welling (2014), appendix B, for a full covariance.
    """
    square = scale_tril.square().sum((-2, -1)) + loc.square().sum(-1)
    return 0.5 * (square - loc.shape[-1]) - scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _over_samples(values: Tensor) -> Tensor:
    return values.flatten(0, -2).mean(0) if values.ndim > 1 else values
