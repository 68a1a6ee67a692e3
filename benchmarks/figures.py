"""What is read off the test part: the one place where it decides a figure."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.config import Config
from benchmarks.data import Data
from benchmarks.objective import negative_elbo
from benchmarks.quadrature import quadrature
from benchmarks.team import Team
from benchmarks.train import EVALUATION_SEED, seeded
from flowpost.evaluation import active_units, annealed_estimate, decompose_elbo, importance_estimate
from flowpost.gaps import inference_gaps
from flowpost.importance import LIMIT, UnreliableEstimateWarning
from flowpost.vae import VAE

TEST_SAMPLES = 64  # samples of z for each test image behind -ELBO and the active units
ACTIVE = 0.01  # a unit is active where Var_x(E_q[z]) exceeds this (Burda et al. 2016)
LEVELS = ("categorical", "discretized-logistic")  # likelihoods of levels: their figures are told in bits too
ANNEALED = 8, 100, 5  # chains, temperatures and leapfrogs behind the trusted NLL
INTEGRATED = 300  # images, from the test part's start, whose log p(x) is integrated where z has two units

Figures = dict[str, float]


def evaluate(vae: VAE, data: Data, config: Config, seed: int = 0) -> Figures:
    """What the table says of the model trained from a seed, in nats per image."""
    x = _first(data.test, config)
    with seeded(EVALUATION_SEED, x.device), warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the table has the share of such images
        figures = _bounds(vae, x, config) | _codes(vae, x, config) | (_gaps(vae, x, config) if config.gaps else {})
        if is_integrated(config):
            exact = -quadrature(vae, x[:INTEGRATED]).mean().item()
            figures |= {"exact_nll": exact} if math.isfinite(exact) else {}  # too narrow a p(z|x) is not integrated
        if config.trusted_images and seed == config.seeds[0]:
            figures |= _trusted(vae, x[: config.trusted_images], config)
        figures |= _valid(vae, data, config) if config.valid_samples else {}
    if data.likelihood in LEVELS:
        bits = 1 / (x[0].numel() * math.log(2))
        figures |= {f"{key}_bits": figures[key] * bits for key in ("neg_elbo", "nll")}
    return figures


def is_integrated(config: Config) -> bool:
    """Whether log p(x) is known by the integral over z; of a learned p(z) nobody knows how far out it reaches."""
    return config.gaps and config.dim == 2 and not config.prior


def _first(x: Tensor, config: Config) -> Tensor:
    """The images that are evaluated."""
    return x[: config.images or None].to(config.device)


def _bounds(vae: VAE, x: Tensor, config: Config) -> Figures:
    """-ELBO, NLL, and how far the importance samples behind NLL can be trusted; processes share the images."""
    own = x[Team.on(config.device).rows(len(x))]
    parts = own.split(max(1, config.pairs // TEST_SAMPLES))
    with torch.no_grad():
        neg_elbo = _mean(torch.cat([negative_elbo(vae(part, (TEST_SAMPLES,))) for part in parts]), x, config)
    estimate = importance_estimate(vae, own, config.samples, pairs=config.pairs)
    nll = -_mean(estimate.log_p, x, config)
    heavy = ~(estimate.k_hat <= LIMIT)  # nan counts as heavy
    figures = {"neg_elbo": neg_elbo, "nll": nll, "gap": neg_elbo - nll}
    return figures | {"ess": _mean(estimate.ess, x, config), "heavy_tails": _mean(heavy, x, config)}


def _mean(values: Tensor, x: Tensor, config: Config) -> float:
    """Over all images, of which this process may have a share."""
    return Team.on(config.device).mean(values.double(), len(x)).item()


def _valid(vae: VAE, data: Data, config: Config) -> Figures:
    """The same two bounds of the validation part, as some tables have them."""
    config = replace(config, samples=config.valid_samples)
    figures = _bounds(vae, _first(data.valid, config), config)
    return {f"valid_{name}": figures[name] for name in ("neg_elbo", "nll")}


def _trusted(vae: VAE, x: Tensor, config: Config) -> Figures:
    """NLL of some images by annealing, which needs no q that is close, and importance sampling's of the same."""
    found = annealed_estimate(vae, x, *ANNEALED, pairs=max(1000, config.pairs))
    figures = {"trusted_nll": -found.log_p.mean().item(), "trusted_acceptance": found.acceptance.mean().item()}
    error = found.standard_error.square().sum().sqrt().item() / len(x)
    sampled = importance_estimate(vae, x, config.samples, pairs=config.pairs).log_p
    return figures | {"trusted_error": error, "trusted_images_nll": -sampled.mean().item()}


def _codes(vae: VAE, x: Tensor, config: Config) -> Figures:
    """How many units are active, and how much they tell about which image it is."""
    units = active_units(vae, x, TEST_SAMPLES, threshold=ACTIVE, pairs=config.pairs)
    figures: Figures = {"active_units": int(units.active.sum())}
    if not config.information:
        return figures
    terms = decompose_elbo(vae, x[: config.information], pairs=10 * config.pairs)
    return figures | {"mutual_information": terms.mutual_information.mean().item()}


def _gaps(vae: VAE, x: Tensor, config: Config) -> Figures:
    """The gap of the first test images, split: what the family loses, and what the encoder does."""
    gaps = inference_gaps(
        vae, x[: config.gap_images], steps=config.gap_steps, samples=config.samples, pairs=config.pairs
    )
    figures = {"approximation_gap": gaps.approximation, "amortization_gap": gaps.amortization}
    figures |= {"local_nll": -gaps.estimate.log_p, "local_heavy_tails": (~(gaps.estimate.k_hat <= LIMIT)).double()}
    return {name: figure.mean().item() for name, figure in figures.items()}
