"""The reference VAE: a model to read in one sitting, and to train posteriors in; its likelihoods stand here too."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple, overload

from torch import Tensor, nn

from flowpost.density import Sample, standard_normal_log_prob
from flowpost.distribution import FlowDistribution
from flowpost.likelihoods import Bernoulli as Bernoulli
from flowpost.likelihoods import Binomial as Binomial
from flowpost.likelihoods import Categorical as Categorical
from flowpost.likelihoods import Gaussian as Gaussian
from flowpost.likelihoods import Likelihood
from flowpost.objectives import ELBOTerms, elbo_terms, gaussian_kl, latent_kl, over_samples, reweigh
from flowpost.posterior import FlowPosterior
from flowpost.wrapped import Encoding, WrappedPosterior

_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD
_PARTS = inspect.Signature([inspect.Parameter(name, _KEYWORD) for name in ("posterior", "decoder", "likelihood")])
_PARTS_OF_WRAPPED = inspect.Signature([inspect.Parameter(name, _KEYWORD) for name in ("decoder", "likelihood")])
_GRADIENTS = ("standard", "stl", "dreg")


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


class VAE(Encoding):
    """A variational autoencoder with prior N(0, I): ``log p(x|z)``, ``log p(z)``, ``log q(z|x)`` for z ~ q(z|x).

    What `flowpost.wrap` made of an encoder is both encoder and posterior: ``VAE(wrapped, decoder, likelihood)``. Either
    way the keys of the state are ``encoder.*``, ``posterior.*`` and ``decoder.*``. A frozen encoder in eval mode stays
    in it, as `wrap` says.

    Args:
        encoder: from x ``(B, *event)`` to features ``(B, features)``; or what `wrap` made of one.
        posterior: q(z|x) from the features; left out where the encoder is wrapped.
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

    @overload
    def __init__(
        self, encoder: nn.Module, posterior: FlowPosterior, decoder: nn.Module, likelihood: Likelihood
    ) -> None: ...
    @overload
    def __init__(self, encoder: WrappedPosterior, decoder: nn.Module, likelihood: Likelihood) -> None: ...
    def __init__(self, encoder: nn.Module, *parts: Any, **named: Any) -> None:
        wrapped = encoder if isinstance(encoder, WrappedPosterior) else None
        found = (_PARTS if wrapped is None else _PARTS_OF_WRAPPED).bind(*parts, **named).arguments
        super().__init__(encoder if wrapped is None else wrapped.encoder)
        self.posterior: FlowPosterior = found["posterior"] if wrapped is None else wrapped.posterior
        self.reading = None if wrapped is None else wrapped.reading
        self.decoder, self.likelihood = found["decoder"], found["likelihood"]

    def forward(self, x: Tensor, sample_shape: tuple[int, ...] = (), gradient: str = "standard") -> VAEOutput:
        """Everything that a training step needs, in one pass.

        `gradient` says what autodiff makes of the objective; the values are the same:

        - ``"standard"``: plain reparameterization, with the closed-form KL where there is one.
        - ``"stl"``: sticking the landing, log q's dependence on z alone; unbiased for `elbo`, and for `iwae` of one
          sample. Its variance is 0 where q is the posterior.
        - ``"dreg"``: double reparameterization, for `iwae` over all of `sample_shape` and nothing else; unbiased.

        Args:
            x: ``(B, *event)``, of any real dtype: the encoder gets it as it is, the likelihood converts integers.
            sample_shape: leading axes of samples of z for each x.
            gradient: the estimator.

        Returns:
            ``VAEOutput(log_likelihood, log_prior, log_q, kl, sample, latent_kl)``.

        Raises:
            TypeError: if x is no real tensor.
            ValueError: if the encoder does not give one row of features for each x, the decoder not
                ``likelihood.numbers`` for each of its elements, or for an unknown `gradient`.

        Reference:
            Kingma & Welling (2014); Roeder et al. (2017); Tucker et al. (2018).
        """
        q = self.encode(x)
        out = self.evaluate(x, q, sample_shape, gradient)
        if gradient != "standard" or not q.is_gaussian:
            return out
        kl, latents = closed_kl(q)
        return out._replace(kl=kl, latent_kl=latents)

    def elbo_terms(self, x: Tensor, sample_shape: tuple[int, ...] = ()) -> ELBOTerms:
        """The two terms of the ELBO of each x, and nothing that they do not need.

        As `flowpost.objectives.elbo_terms` of ``forward``. Where the KL is in closed form, z is drawn and decoded but
        not scored: neither log q(z|x) nor log p(z) is worked out. `DistributedDataParallel` sees ``forward`` alone.

        Args:
            x: as in ``forward``.
            sample_shape: leading axes of samples of z for each x.

        Returns:
            ``ELBOTerms(reconstruction, kl)``, each ``(B,)``.

        Raises:
            TypeError: as ``forward``.
            ValueError: as ``forward``.

        Example:
            >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
            >>> terms = vae.elbo_terms(torch.ones(5, 9))
            >>> loss = -(terms.reconstruction - 0.5 * terms.kl).mean()
        """
        q = self.encode(x)
        if not q.is_gaussian:
            return elbo_terms(*self.evaluate(x, q, sample_shape)[:3])
        log_likelihood = self._log_likelihood(x, q.rsample(sample_shape))
        return ELBOTerms(over_samples(log_likelihood), closed_kl(q)[0])

    def encode(self, x: Tensor) -> FlowDistribution:
        """The q(z|x), of batch shape ``(B,)``."""
        if not isinstance(x, Tensor) or x.is_complex():
            raise TypeError(f"x: expected a real tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        h = self.encoder(x)
        h = h if self.reading is None else self.reading(h)
        if isinstance(h, Tensor) and (h.ndim != 2 or h.shape[0] != x.shape[0]):
            raise ValueError(
                f"encoder: expected features ({x.shape[0]}, features), one row for each x, got shape {tuple(h.shape)}; "
                f"sum or average over tokens or pixels in the encoder first"
            )
        q = self.posterior.at(h)
        if q.context is None:
            raise ValueError("posterior: expected one that reads features, got one whose flow takes no context")
        return q

    def evaluate(
        self, x: Tensor, q: FlowDistribution, sample_shape: tuple[int, ...] = (), gradient: str = "standard"
    ) -> VAEOutput:
        """As `forward`, for a q(z|x) that is known, and without the closed-form KL."""
        if gradient not in _GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(_GRADIENTS)}, got {gradient!r}")
        sample = q.draw(sample_shape)
        if gradient != "dreg":
            log_q = sample.log_prob if gradient == "standard" else q.path_log_prob(sample)
            return VAEOutput(*self.log_joint(x, sample.z), log_q, None, sample)
        z, zeros, more_zeros = reweigh(sample.z)
        log_likelihood, log_prior = self.log_joint(x, z)
        log_q = q.path_log_prob(sample._replace(z=z))
        return VAEOutput(log_likelihood + zeros, log_prior, log_q + more_zeros, None, sample)

    def log_joint(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log p(x|z) and log p(z), each ``(*samples, B)``, for x ``(B, *event)`` and z ``(*samples, B, dim)``."""
        return self._log_likelihood(x, z), standard_normal_log_prob(z)

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return self.likelihood.log_prob(self.decode(z, math.prod(x.shape[1:])), x.flatten(1))

    def decode(self, z: Tensor, elements: int) -> Tensor:
        """The likelihood's numbers ``(*batch, numbers, elements)`` for z ``(*batch, dim)``."""
        outputs = self.decoder(z.flatten(0, -2)).flatten(1).to(z.dtype)
        numbers = self.likelihood.numbers
        if outputs.shape[1] != numbers * elements:
            name = type(self.likelihood).__name__
            raise ValueError(
                f"decoder: expected {numbers} x {elements} outputs per example for {name}, got {outputs.shape[1]}"
            )
        return outputs.view(*z.shape[:-1], numbers, elements)


def closed_kl(q: FlowDistribution) -> tuple[Tensor, Tensor | None]:
    """KL(q(z|x) || N(0, I)) of a Gaussian q, ``(B,)``, and of each latent where they are independent."""
    if not q._is_factorized:
        return gaussian_kl(*q.gaussian()), None
    latents = latent_kl(*q._loc_scale())
    return latents.sum(-1), latents
