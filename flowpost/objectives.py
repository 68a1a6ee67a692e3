"""What to optimise: functions of a model's log-densities, sample axes first, the batch axis last."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ELBOTerms(NamedTuple):
    """The two terms of the ELBO of each example, to log and to weigh."""

    reconstruction: Tensor
    """``E_q[log p(x|z)]``, ``(B,)``"""
    kl: Tensor
    """``KL(q(z|x) || p(z))``, ``(B,)``"""


def elbo_terms(log_likelihood: Tensor, log_prior: Tensor, log_q: Tensor, kl: Tensor | None = None) -> ELBOTerms:
    """Reconstruction and KL of each example, averaged over samples; arguments as for `elbo`.

    Returns:
        ``ELBOTerms(reconstruction, kl)``, each ``(B,)``. ``(reconstruction - weight * kl).mean()`` is what to maximize.

    Raises:
        ValueError: as `elbo`.

    Example:
        >>> terms = elbo_terms(torch.tensor([-7.0]), torch.tensor([-3.0]), torch.tensor([-1.0]))
        >>> terms.reconstruction, terms.kl
        (tensor([-7.]), tensor([2.]))
    """
    if kl is None:
        _check_axes(log_likelihood, log_prior=log_prior, log_q=log_q)
        return ELBOTerms(over_samples(log_likelihood), over_samples(log_q - log_prior))
    reconstruction = over_samples(log_likelihood)
    _check_axes(reconstruction, kl=kl)
    return ELBOTerms(reconstruction, kl)


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

    Raises:
        ValueError: if the terms do not have equally many axes: a log-density of each token, say, is not one of x.

    Reference:
        Kingma & Welling (2019), eq. 2.10; Kingma & Welling (2014), eq. 7.

    Example:
        >>> elbo(torch.tensor([-7.0]), torch.tensor([-3.0]), torch.tensor([-1.0]), kl_weight=0.5)
        tensor([-8.])
    """
    terms = elbo_terms(log_likelihood, log_prior, log_q, kl)
    return terms.reconstruction - kl_weight * terms.kl


def iwae(log_likelihood: Tensor, log_prior: Tensor, log_q: Tensor, *, kl_weight: float | Tensor = 1.0) -> Tensor:
    """Importance-weighted bound per example, ``log 1/K sum_k w_k``, ``w = p(x|z) p(z) / q(z|x)``, over all samples.

    With K = 1 it is the ELBO. Its expectation never falls as K grows, and tends to log p(x). A `kl_weight` other than 1
    tempers the weights, ``w = p(x|z) (p(z) / q(z|x))^weight``, for a warm-up; the result is then no bound.

    The log-densities decide the gradient: `VAE` makes them for plain reparameterization, for sticking the landing and
    for double reparameterization.

    Args:
        log_likelihood: log p(x|z), ``(*samples, B)``; K is the product of the sample axes.
        log_prior: log p(z), ``(*samples, B)``.
        log_q: log q(z|x), ``(*samples, B)``.
        kl_weight: exponent of p(z) / q(z|x).

    Returns:
        ``(B,)``. Its mean is what to maximize.

    Raises:
        ValueError: if the terms do not have equally many axes: a log-density of each token, say, is not one of x.

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders.

    Example:
        >>> iwae(torch.tensor([[1.0], [3.0]]).log(), torch.zeros(2, 1), torch.zeros(2, 1)).exp()
        tensor([2.])
    """
    _check_axes(log_likelihood, log_prior=log_prior, log_q=log_q)
    log_weight = log_likelihood + kl_weight * (log_prior - log_q)
    if log_weight.ndim < 2:
        return log_weight
    log_weight = log_weight.flatten(0, -2)
    return log_weight.logsumexp(0) - math.log(max(1, len(log_weight)))


def free_bits(kl: Tensor, minimum: float) -> Tensor:
    """The KL of a minibatch with `minimum` nats free in each group, ``sum_g max(minimum, mean_b kl[b, g])``.

    The mean over the minibatch stands inside the max: a group whose mean is below the minimum has no gradient, for any
    example; one above it has the plain mean's. In place of the mean KL in an objective.

    Args:
        kl: KL of each example and group, ``(B, G)``: a group is a latent of a factorized Gaussian, or a layer of
            latents. A flow's log q does not split over latents: there G = 1. `VAEOutput.kl_groups` gives both.
        minimum: in nats, not negative.

    Returns:
        A scalar.

    Raises:
        ValueError: if `kl` has not two axes, or the minimum is negative or not finite.

    Reference:
        Kingma & Welling (2019), eq. 2.69, 2.70; Kingma et al. (2016), appendix C.8.

    Example:
        >>> free_bits(torch.tensor([[0.0, 2.0], [0.2, 4.0]]), minimum=0.5)
        tensor(3.5000)
    """
    if kl.ndim != 2:
        raise ValueError(f"kl: expected shape (B, G), a column for each group, got {tuple(kl.shape)}")
    if not 0 <= minimum < math.inf:
        raise ValueError(f"minimum: expected a finite number >= 0, got {minimum}")
    return kl.mean(0).clamp_min(minimum).sum()


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
    log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.rsub(log_det, -0.5 * loc.shape[-1]).add(square, alpha=0.5)


def latent_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """Closed-form ``KL(N(loc, scale^2) || N(0, 1)) = (scale^2 + loc^2 - 1) / 2 - log scale`` of each latent.

    For a factorized Gaussian they add up to the whole KL. For the marginals of a correlated one they add up to less:
    what is missing is the latents' total correlation.

    Args:
        loc: any shape.
        scale: of the same shape, positive.

    Returns:
        Of the same shape.

    Reference:
        Kingma & Welling (2014), appendix B.

    Example:
        >>> latent_kl(torch.tensor([0.0, 2.0]), torch.ones(2))
        tensor([0., 2.])
    """
    return torch.rsub(scale.log(), -0.5).add(scale.square() + loc.square(), alpha=0.5)


def reweigh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double reparameterization: z whose gradient from `iwae` is that of the squared normalized weights.

    Use the z that it returns in the place of the sample everywhere. Add the first zeros to log p(x|z) and the second to
    log q(z), which must depend on z alone (``posterior.path_log_prob``). The backward pass of `iwae` brings the
    normalized weight v to the zeros. There the gradient through z, ``v dlog w/dz``, is multiplied by
    ``1 - weight + weight v``, which is v at a `kl_weight` of 1. So the posterior gets ``v^2 dlog w/dz`` and the decoder
    the plain v, in one backward pass. This is right for `iwae` over all of z's sample axes, times any factor; it is
    wrong for `elbo`.

    Args:
        z: ``(*samples, B, dim)``.

    Returns:
        z, and zeros ``(*samples, B)`` twice.

    Reference:
        Tucker, Lawson, Gu & Maddison (2018), Doubly Reparameterized Gradient Estimators for Monte
        Carlo Objectives (DReG-IWAE).
    """
    return _Reweigh.apply(z)


class _Reweigh(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return z.clone(), z.new_zeros(z.shape[:-1]), z.new_zeros(z.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ANN401
        """Nothing to keep: the weights come back with the gradient."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401
        through_z, weight, minus_weight = grads
        axes = tuple(range(weight.ndim - 1))
        total = weight.sum(axes, keepdim=True) if axes else weight  # what the loss is scaled by, for each example
        rest = (minus_weight.sum(axes, keepdim=True) if axes else minus_weight) - minus_weight
        factor = 1 + rest / torch.where(total == 0, 1, total)
        return through_z * factor.unsqueeze(-1)


def _check_axes(log_likelihood: Tensor, **terms: Tensor) -> None:
    """Raise for a term that would broadcast against the likelihood into a mix of examples."""
    for name, term in terms.items():
        if term.ndim != log_likelihood.ndim:
            raise ValueError(
                f"{name}: expected a shape like log_likelihood's {tuple(log_likelihood.shape)}, got "
                f"{tuple(term.shape)}; sum over tokens or other parts of an example first"
            )


def over_samples(values: Tensor) -> Tensor:
    """The mean over sample axes, ``(*samples, B)`` to ``(B,)``."""
    return values.flatten(0, -2).mean(0) if values.ndim > 1 else values
