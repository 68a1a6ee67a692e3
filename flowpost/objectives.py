"""What to optimise: functions of a model's log-densities, sample axes first, the batch axis last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from flowpost.gradients import reweigh as reweigh
from flowpost.kl import gaussian_kl as gaussian_kl
from flowpost.kl import latent_kl as latent_kl
from flowpost.numerics.arguments import check_alpha


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
        _check_terms(log_likelihood, log_prior=log_prior, log_q=log_q)
        return ELBOTerms(over_samples(log_likelihood), over_samples(log_q - log_prior))
    reconstruction = over_samples(log_likelihood)
    _check_terms(reconstruction, kl=kl)
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
        kl_weight: weight of the KL: below 1 while it warms up, another constant for a beta-VAE; one number, or one for
            each example ``(B,)``.

    Returns:
        ``(B,)``. Its mean is what to maximize.

    Raises:
        ValueError: if the terms are not of one shape: they would broadcast, and mix examples. So would a log-density of
            each token, or a `kl_weight` of any other shape.

    Reference:
        Kingma & Welling (2019), eq. 2.10; Kingma & Welling (2014), eq. 7.

    Example:
        >>> elbo(torch.tensor([-7.0]), torch.tensor([-3.0]), torch.tensor([-1.0]), kl_weight=0.5)
        tensor([-8.])
    """
    terms = elbo_terms(log_likelihood, log_prior, log_q, kl)
    _check_weight(kl_weight, terms.kl)
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
        kl_weight: exponent of p(z) / q(z|x); one number, or one for each example ``(B,)``.

    Returns:
        ``(B,)``. Its mean is what to maximize.

    Raises:
        ValueError: as `elbo`.

    Reference:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders.

    Example:
        >>> iwae(torch.tensor([[1.0], [3.0]]).log(), torch.zeros(2, 1), torch.zeros(2, 1)).exp()
        tensor([2.])
    """
    return renyi(log_likelihood, log_prior, log_q, 0.0, kl_weight=kl_weight)


def renyi(
    log_likelihood: Tensor,
    log_prior: Tensor,
    log_q: Tensor,
    alpha: float,
    *,
    kl_weight: float | Tensor = 1.0,
) -> Tensor:
    """Renyi bound per example, ``log(1/K sum_k w_k^(1 - alpha)) / (1 - alpha)``, w as for `iwae`, over all samples.

    For alpha = 0 it is `iwae`; it falls as alpha grows, to the ELBO in the limit of 1. Its expectation never exceeds
    log p(x) and never falls as K grows, but for alpha > 0 the limit is log p(x) only where q is the posterior. The
    gradient is ``sum_k v_k dlog w_k``, v the weights ``w^(1 - alpha)`` over their sum: with a larger alpha more of the
    samples have a part in it. For double reparameterization give the same alpha to `VAE`, or to `reweigh`.

    Args:
        log_likelihood: log p(x|z), ``(*samples, B)``; K is the product of the sample axes.
        log_prior: log p(z), ``(*samples, B)``.
        log_q: log q(z|x), ``(*samples, B)``.
        alpha: order of the divergence, a Python number in [0, 1). Rounding errors of the value, and not of its
            gradient, grow like ``log K / (1 - alpha)``: in float32 they are below 1e-3 nats up to alpha = 0.999.
        kl_weight: exponent of p(z) / q(z|x) in w, as for `iwae`.

    Returns:
        ``(B,)``. Its mean is what to maximize.

    Raises:
        TypeError: if alpha is a tensor: it would be read on the host.
        ValueError: if alpha is not in [0, 1), and as `elbo`.

    Reference:
        Li & Turner (2016), Renyi Divergence Variational Inference; Daudel, Benton, Shi & Doucet (2023),
        Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders, for what it bounds at finite K.

    Example:
        >>> renyi(torch.tensor([[1.0], [9.0]]).log(), torch.zeros(2, 1), torch.zeros(2, 1), alpha=0.5)  # log 4
        tensor([1.3863])
    """
    power = 1 - check_alpha(alpha)
    _check_terms(log_likelihood, log_prior=log_prior, log_q=log_q)
    _check_weight(kl_weight, log_likelihood)
    log_weight = log_likelihood + kl_weight * (log_prior - log_q)
    if log_weight.ndim < 2:
        return log_weight
    log_weight = log_weight.flatten(0, -2)
    return ((power * log_weight).logsumexp(0) - math.log(max(1, len(log_weight)))) / power


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
    if not isinstance(kl, Tensor) or kl.ndim != 2:
        got = f"{tuple(kl.shape)}; write kl.unsqueeze(-1) for one group" if isinstance(kl, Tensor) else f"{kl!r}"
        raise ValueError(f"kl: expected shape (B, G), a column for each group, as out.kl_groups() gives it, got {got}")
    if not 0 <= minimum < math.inf:
        raise ValueError(f"minimum: expected a finite number >= 0, got {minimum}")
    return kl.mean(0).clamp_min(minimum).sum()


def _check_terms(log_likelihood: Tensor, **terms: Tensor) -> None:
    """Raise for a term that would broadcast against the likelihood into a mix of examples."""
    for name, term in terms.items():
        if term.shape != log_likelihood.shape:
            deeper = term.ndim != log_likelihood.ndim
            hint = "sum over tokens or other parts of an example first" if deeper else "expand what examples share"
            raise ValueError(
                f"{name}: expected a shape like log_likelihood's {tuple(log_likelihood.shape)}, got "
                f"{tuple(term.shape)}; {hint}"
            )


def _check_weight(kl_weight: float | Tensor, terms: Tensor) -> None:
    """Raise for weights that are not one number, or one for each example on the last axis of `terms`."""
    if not isinstance(kl_weight, Tensor):
        if isinstance(kl_weight, (str, Sequence)):
            got = type(kl_weight).__name__
            raise TypeError(f"kl_weight: expected a number or a tensor, got {got}; write torch.tensor(kl_weight)")
        return
    if not kl_weight.ndim:
        return
    # One by one, as in `numerics.arguments.expands`.
    if kl_weight.ndim > min(1, terms.ndim) or (kl_weight.shape[0] != terms.shape[-1] and kl_weight.shape[0] != 1):
        raise ValueError(
            f"kl_weight: expected one number or one for each example, {tuple(terms.shape[-1:])}, "
            f"got shape {tuple(kl_weight.shape)}"
        )


def over_samples(values: Tensor) -> Tensor:
    """The mean over sample axes, ``(*samples, B)`` to ``(B,)``."""
    return values.flatten(0, -2).mean(0) if values.ndim > 1 else values
