"""The reference VAE: a model to read in one sitting, and to train posteriors in; its likelihoods stand here too."""

from __future__ import annotations

import inspect
from typing import Any, overload

import torch
from torch import Tensor, nn

from flowpost.bounded import ContinuousBernoulli as ContinuousBernoulli
from flowpost.bounded import DiscretizedLogistic as DiscretizedLogistic
from flowpost.conditions import Prior, check_bare, check_part, check_prior, check_rows, encode, prior_at
from flowpost.distribution import FlowDistribution
from flowpost.generative import Generative, check_decoder
from flowpost.gradients import check_gradient, reweigh
from flowpost.likelihoods import Bernoulli as Bernoulli
from flowpost.likelihoods import Binomial as Binomial
from flowpost.likelihoods import Categorical as Categorical
from flowpost.likelihoods import Gaussian as Gaussian
from flowpost.likelihoods import Likelihood
from flowpost.objectives import ELBOTerms, elbo_terms, over_samples
from flowpost.outputs import kind
from flowpost.posterior import FlowPosterior
from flowpost.terms import VAEOutput as VAEOutput
from flowpost.terms import closed_kl
from flowpost.wrapped import Encoding, WrappedPosterior

_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD
_PARTS = inspect.Signature([inspect.Parameter(name, _KEYWORD) for name in ("posterior", "decoder", "likelihood")])
_PARTS_OF_WRAPPED = inspect.Signature([inspect.Parameter(name, _KEYWORD) for name in ("decoder", "likelihood")])


class VAE(Encoding, Generative):
    """A variational autoencoder: ``log p(x|z)``, ``log p(z)`` and ``log q(z|x)`` for z ~ q(z|x).

    What `flowpost.wrap` made of an encoder is both encoder and posterior: ``VAE(wrapped, decoder, likelihood)``. Either
    way the keys of the state are ``encoder.*``, ``posterior.*`` and ``decoder.*``. A frozen encoder in eval mode stays
    in it, as `wrap` says.

    Args:
        encoder: from x ``(B, *event)`` to features ``(B, features)``; or what `wrap` made of one.
        posterior: q(z|x) from the features; left out where the encoder is wrapped.
        decoder: from z ``(N, dim)`` to the likelihood's numbers, ``likelihood.numbers`` for each element of x, as
            ``(N, numbers, *event)`` or anything that flattens to that; not ``(N, *event, numbers)``.
        likelihood: p(x|z).
        prior: p(z), by keyword: a posterior without features, learned with the rest, whose log p(z) is cheap at any z:
            ``realnvp(0, dim)``, ``maf(0, dim)``, ``full_covariance(0, dim)``. Or p(z|y): a posterior whose features
            are the condition y, or what `wrap` made of an encoder of y. By default N(0, I). Every use of p(z) goes
            through `log_prior` and `sample_prior`: a subclass may write both anew, for a mixture say, and has then no
            KL in closed form.

    A condition y, ``(B, *event)`` by the keyword `y` of every method, makes the model one of p(x|y): then the encoder
    is called as ``encoder(x, y)``, the decoder as ``decoder(z, y)`` with a row of y for each z.

    Raises:
        TypeError: if a part is no module, the likelihood none that has a log_prob, or the prior no posterior.
        ValueError: if the prior is of another dim, or of an interval that the posterior's z leaves, or the decoder ends
            in a sigmoid where the likelihood reads logits.

    Warns:
        UserWarning: for a prior that takes a sweep over the variables to score a z, such as ``iaf(0, dim)``.

    Reference:
        Kingma & Welling (2014); (2019), section 2.

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> vae(torch.ones(5, 9), sample_shape=(3,)).log_q.shape
        torch.Size([3, 5])
    """

    @overload
    def __init__(
        self,
        encoder: nn.Module,
        posterior: FlowPosterior,
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        prior: Prior | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        encoder: WrappedPosterior,
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        prior: Prior | None = None,
    ) -> None: ...
    def __init__(self, encoder: nn.Module, *parts: Any, prior: Prior | None = None, **named: Any) -> None:
        wrapped = encoder if isinstance(encoder, WrappedPosterior) else None
        check_bare(encoder, len(parts) + len(named))
        found = (_PARTS if wrapped is None else _PARTS_OF_WRAPPED).bind(*parts, **named).arguments
        for name, part in {"encoder": encoder, **found}.items():
            if name != "likelihood" or isinstance(part, type):
                check_part(name, part)
        super().__init__(encoder if wrapped is None else wrapped.encoder)
        self.posterior: FlowPosterior = found["posterior"] if wrapped is None else wrapped.posterior
        self.reading = None if wrapped is None else wrapped.reading
        self.decoder, self.likelihood, self.prior = found["decoder"], found["likelihood"], prior
        if not callable(getattr(self.likelihood, "log_prob", None)):
            name = type(self.likelihood).__name__
            raise TypeError(
                f"likelihood: expected a Likelihood, such as Bernoulli(), got {name}, which has no log_prob"
            )
        check_decoder(self.decoder, self.likelihood)
        if prior is not None:
            check_prior(prior, self.posterior)

    def forward(
        self,
        x: Tensor,
        sample_shape: tuple[int, ...] = (),
        gradient: str = "standard",
        *,
        alpha: float = 0.0,
        y: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> VAEOutput:
        """Everything that a training step needs, in one pass.

        `gradient` says what autodiff makes of the objective; the values are the same:

        - ``"standard"``: plain reparameterization, with the closed-form KL where there is one.
        - ``"stl"``: sticking the landing, log q's dependence on z alone; unbiased for `elbo`, and for `iwae` of one
          sample. Its variance is 0 where q is the posterior.
        - ``"dreg"``: double reparameterization, for `iwae` over all of `sample_shape` and nothing else, or for `renyi`
          of the same `alpha`; unbiased.

        Args:
            x: ``(B, *event)``, of any real dtype: the encoder gets it as it is, the likelihood converts integers.
            sample_shape: leading axes of samples of z for each x.
            gradient: the estimator.
            alpha: that of the `renyi` that is to be differentiated by ``"dreg"``; no other estimator depends on it.
            y: the condition, a row for each x, where the model has one.
            noise: the standard normal draw to map to z, ``(*sample_shape, B, dim)``, instead of a fresh one.

        Returns:
            ``VAEOutput(log_likelihood, log_prior, log_q, kl, sample, latent_kl)``.

        Raises:
            TypeError: if x is no real tensor, or one of integers at which the encoder fails.
            ValueError: if the encoder does not give one row of features for each x, the decoder not
                ``likelihood.numbers`` for each of its elements, or these behind x's axes, the likelihood not one
                log-density for each sample; for an unknown `gradient`, an `alpha` outside [0, 1), or one for another
                gradient than ``"dreg"``.

        Reference:
            Kingma & Welling (2014); Roeder et al. (2017); Tucker et al. (2018); Daudel et al. (2023).
        """
        q = self.encode(x, y)
        out = self.evaluate(x, q, sample_shape, gradient, alpha=alpha, y=y, noise=noise)
        if gradient != "standard" or not self._has_closed_kl(q):
            return out
        kl, latents = self._closed_kl(q, y)
        return out._replace(kl=kl, latent_kl=latents)

    def elbo_terms(
        self,
        x: Tensor,
        sample_shape: tuple[int, ...] = (),
        *,
        y: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> ELBOTerms:
        """The two terms of the ELBO of each x, and nothing that they do not need.

        As `flowpost.objectives.elbo_terms` of ``forward``. Where the KL is in closed form, z is drawn and decoded but
        not scored: neither log q(z|x) nor log p(z) is worked out. `DistributedDataParallel` sees ``forward`` alone.

        Args:
            x: as in ``forward``.
            sample_shape: leading axes of samples of z for each x.
            y: as in ``forward``.
            noise: as in ``forward``.

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
        q = self.encode(x, y)
        if not self._has_closed_kl(q):
            return elbo_terms(*self.evaluate(x, q, sample_shape, y=y, noise=noise)[:3])
        log_likelihood = self._log_likelihood(x, q.rsample(sample_shape, noise), y)
        return ELBOTerms(over_samples(log_likelihood), self._closed_kl(q, y)[0])

    def encode(self, x: Tensor, y: Tensor | None = None) -> FlowDistribution:
        """The q(z|x), or q(z|x, y), of batch shape ``(B,)``."""
        if not isinstance(x, Tensor) or x.is_complex():
            raise TypeError(f"x: expected a real tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if not x.ndim:
            raise ValueError("x: expected shape (B, *event), got (); write x.unsqueeze(0) for one x")
        if y is not None:
            check_rows(y, len(x), "x")
        h = encode(self.encoder, x, y)
        h = h if self.reading is None else self.reading(h)
        if not isinstance(h, Tensor):
            wrapped = f"flowpost.wrap(encoder, dim={self.posterior.dim}, example=x)"
            raise TypeError(
                f"encoder: expected a tensor of features, got {kind(h)}; write VAE({wrapped}, decoder, likelihood)"
            )
        if h.ndim != 2 or h.shape[0] != x.shape[0]:
            raise ValueError(
                f"encoder: expected features ({x.shape[0]}, features), one row for each x, got shape {tuple(h.shape)}; "
                f"sum or average over tokens or pixels in the encoder, or, for latents with axes of their own, write "
                f"the loss with the posterior itself: log q and log p(z) are then summed over these axes"
            )
        q = self.posterior.at(h)
        if q.context is None:
            raise ValueError("posterior: expected one that reads features, got one whose flow takes no context")
        return q

    def evaluate(
        self,
        x: Tensor,
        q: FlowDistribution,
        sample_shape: tuple[int, ...] = (),
        gradient: str = "standard",
        *,
        alpha: float = 0.0,
        y: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> VAEOutput:
        """As `forward`, for a q(z|x) that is known, and without the closed-form KL."""
        check_gradient(gradient, alpha)
        sample = q.draw(sample_shape, noise)
        if gradient != "dreg":
            log_q = sample.log_prob if gradient == "standard" else q.path_log_prob(sample)
            return VAEOutput(*self.log_joint(x, sample.z, y), log_q, None, sample)
        z, zeros, more_zeros = reweigh(sample.z, alpha)
        log_likelihood, log_prior = self.log_joint(x, z, y)
        log_q = q.path_log_prob(sample._replace(z=z))
        return VAEOutput(log_likelihood + zeros, log_prior, log_q + more_zeros, None, sample)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x|z] at one z drawn from each x's q(z|x), of x's shape."""
        numbers = self._numbers(self.encode(x, y).rsample(), tuple(x.shape[1:]), y)
        return self.likelihood.mean(numbers).view(x.shape)

    def _has_closed_kl(self, q: FlowDistribution) -> bool:
        given = self._has_given_prior() and not self._has_own("evaluate", VAE.evaluate)
        return given and q.is_gaussian and (self.prior is None or self.prior.is_gaussian)

    def _closed_kl(self, q: FlowDistribution, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return closed_kl(q, None if self.prior is None else prior_at(self.prior, y))
