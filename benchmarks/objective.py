"""What a run maximizes: the bound, its gradient, and which of them go together."""

from __future__ import annotations

from torch import Tensor

from benchmarks.config import Config
from flowpost.objectives import elbo, elbo_terms, free_bits, renyi
from flowpost.vae import VAE, VAEOutput


def objective_pass(vae: VAE, x: Tensor, config: Config, noise: Tensor | None = None) -> VAEOutput:
    """The training pass: as many samples of z as the objective takes, with the gradient asked for.

    `noise` is the draw ``(train_samples, B, dim)`` to map to z, instead of a fresh one.
    """
    samples = (config.train_samples,) if config.train_samples > 1 else ()
    noise = noise if noise is None or samples else noise[0]
    return vae(x, samples, config.gradient, alpha=config.alpha if config.gradient == "dreg" else 0.0, noise=noise)


def objective_loss(out: VAEOutput, kl_weight: float | Tensor, config: Config) -> Tensor:
    """What a step minimizes, a scalar: the mean negative bound, or with free bits their KL in the place of the KL."""
    if config.free_bits == 0:
        return negative_bound(out, config, kl_weight).mean()
    terms = elbo_terms(out.log_likelihood, out.log_prior, out.log_q, out.kl)
    # One group for every posterior: a flow's KL does not split over latents.
    return kl_weight * free_bits(terms.kl.unsqueeze(-1), config.free_bits) - terms.reconstruction.mean()


def negative_bound(out: VAEOutput, config: Config, kl_weight: float | Tensor = 1.0) -> Tensor:
    """The negative bound of each image ``(B,)`` in nats, free bits aside: what curves show and early stopping reads."""
    return negative_elbo(out, kl_weight) if config.objective == "elbo" else negative_renyi(out, config.alpha, kl_weight)


def negative_elbo(out: VAEOutput, kl_weight: float | Tensor = 1.0) -> Tensor:
    """-ELBO of each image ``(B,)``, in nats."""
    return -elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl, kl_weight=kl_weight)


def negative_renyi(out: VAEOutput, alpha: float, kl_weight: float | Tensor = 1.0) -> Tensor:
    """The negative Renyi bound of each image ``(B,)``, over all its samples, in nats; at an alpha of 0 it is -IWAE."""
    return -renyi(out.log_likelihood, out.log_prior, out.log_q, alpha, kl_weight=kl_weight)


def bound_name(config: Config) -> str:
    """What the bound is called in pictures."""
    if config.objective == "elbo":
        return "-ELBO"
    return f"-Renyi({config.alpha:g}, {config.train_samples})" if config.alpha else f"-IWAE({config.train_samples})"


def objective_name(config: Config) -> str:
    """Objective, gradient and free bits as a part of a folder's name: nothing for a plain ELBO."""
    samples = str(config.train_samples) if config.train_samples > 1 or config.objective != "elbo" else ""
    order = f"{config.alpha:g}-" if config.objective == "renyi" else ""
    parts = [config.objective + order + samples, config.gradient, f"free{config.free_bits:g}"]
    plain = ["elbo", "standard", "free0"]
    return "-".join(part for part, usual in zip(parts, plain, strict=True) if part != usual)


def objective_words(config: Config) -> str:
    """The same for a caption."""
    words = [f"{bound_name(config)[1:]}, gradient {config.gradient}"]
    words += [f"{config.train_samples} samples"] if config.train_samples > 1 and config.objective == "elbo" else []
    words += [f"{config.free_bits:g} nats of KL free"] if config.free_bits else []
    return ", ".join(words)
