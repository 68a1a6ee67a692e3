"""Trained posteriors against exact answers: every test states its false-alarm rate and has a control that must fail.

Seeds are fixed, so on one machine the verdicts do not vary; the rates say how likely a right flow was to fail when the
seed was chosen. All tests together stay below 1e-2.
"""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from mutants import TransposedSylvester
from scipy import stats
from torch import Tensor

import flowpost
from flowpost import Autoregressive, Bijector, Chain, FlowPosterior, Learned, Planar, Reverse
from flowpost.testing.maths import total_mass

DIM, PIXELS, NOISE = 3, 6, 0.7


class LinearGaussian:
    """``z ~ N(0, I)``, ``x = W z + noise``: the posterior is Gaussian, with a covariance that is far from diagonal."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        common = torch.randn(PIXELS, 1, generator=generator)  # nearly parallel columns: strongly correlated posterior
        self.weight = common + 0.4 * torch.randn(PIXELS, DIM, generator=generator)
        precision = torch.eye(DIM) + self.weight.mT @ self.weight / NOISE**2
        self.covariance = torch.linalg.inv(precision)
        self.gain = self.covariance @ self.weight.mT / NOISE**2
        self.generator = generator

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(count, DIM, generator=self.generator)
        return z, z @ self.weight.mT + NOISE * torch.randn(count, PIXELS, generator=self.generator)

    def posterior(self, x: Tensor) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(x @ self.gain.mT, self.covariance)


def _linear_gaussian_iaf(features: int, dim: int) -> FlowPosterior:
    return flowpost.iaf(features, dim, steps=2, hidden=(24,), context_size=8)


RECIPES: dict[str, Callable[[int, int], FlowPosterior]] = {
    "diagonal": flowpost.diagonal,
    "full_covariance": flowpost.full_covariance,
    "iaf": _linear_gaussian_iaf,
}


@cache
@torch.enable_grad()
def fitted(name: str) -> tuple[LinearGaussian, FlowPosterior]:
    """The posterior trained by the reverse KL to the exact one."""
    torch.manual_seed(0)
    model, posterior = LinearGaussian(), RECIPES[name](PIXELS, DIM)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    steps = 700 if name == "iaf" else 1500  # each is then where its bound asks it to be
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        _, x = model.draw(256)
        sample = posterior(x)
        loss = (sample.log_prob - model.posterior(x).log_prob(sample.z)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model, posterior


@torch.no_grad()
def _kl(name: str) -> float:
    model, posterior = fitted(name)
    _, x = model.draw(2000)
    sample = posterior(x, sample_shape=(50,))
    return (sample.log_prob - model.posterior(x).log_prob(sample.z)).mean().item()


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "bound"), [("full_covariance", 0.01), pytest.param("iaf", 0.02, marks=pytest.mark.long)]
)
def test_exact_posterior_is_reached(name: str, bound: float) -> None:
    """No false alarm but by failed training: the estimate's standard error is below 1e-3."""
    assert -0.003 < _kl(name) < bound


@pytest.mark.full
def test_a_diagonal_gaussian_does_not_reach_it() -> None:
    assert _kl("diagonal") > 0.2


@torch.no_grad()
def _ranks(name: str, stretch: float = 1.0) -> Tensor:
    """For each of 2,000 draws of (z, x) and each coordinate, how many of 127 posterior samples are below z."""
    model, posterior = fitted(name)
    z, x = model.draw(2000)
    samples = posterior(x, sample_shape=(127,)).z
    center = samples.mean(0)
    return (center + stretch * (samples - center) < z).sum(0)


def _uniform_p(ranks: Tensor) -> float:
    """The smallest chi-squared p-value over coordinates, of 16 bins."""
    counts = torch.stack([torch.bincount(column // 8, minlength=16) for column in ranks.mT])
    return min(stats.chisquare(row.numpy()).pvalue for row in counts)


@pytest.mark.full
@pytest.mark.parametrize("name", ["full_covariance", "iaf"])
def test_simulation_based_calibration(name: str) -> None:
    """False-alarm rate: 3 coordinates at 1e-4 each."""
    assert _uniform_p(_ranks(name)) > 1e-4


@pytest.mark.full
def test_calibration_finds_a_wrong_posterior() -> None:
    assert _uniform_p(_ranks("diagonal")) < 1e-6
    assert _uniform_p(_ranks("full_covariance", stretch=0.9)) < 1e-4


@torch.no_grad()
def _coverage(name: str) -> float:
    """Share of 2,000 draws of z inside the 90 % region of the samples' own Gaussian."""
    model, posterior = fitted(name)
    z, x = model.draw(2000)
    samples = posterior(x, sample_shape=(500,)).z
    center = samples.mean(0)
    spread = torch.einsum("sbi,sbj->bij", samples - center, samples - center) / 499
    distance = torch.einsum("bi,bij,bj->b", z - center, torch.linalg.inv(spread), z - center)
    return (distance < float(stats.chi2.ppf(0.9, DIM))).float().mean().item()


@pytest.mark.full
def test_joint_coverage() -> None:
    """False-alarm rate 6e-5: four binomial standard errors."""
    error = 4 * math.sqrt(0.9 * 0.1 / 2000)
    assert abs(_coverage("full_covariance") - 0.9) < error
    assert _coverage("diagonal") < 0.9 - error


class Mixture:
    """A normalized density with two modes in the first two coordinates: the KL to it cannot be negative."""

    def log_prob(self, z: Tensor) -> Tensor:
        centers = torch.zeros(2, z.shape[-1])
        centers[0, :2], centers[1, :2] = 1.5, -1.5
        logs = -0.5 * ((z.unsqueeze(-2) - centers) / 0.6).square().sum(-1)
        return logs.logsumexp(-1) - math.log(2) - z.shape[-1] * math.log(0.6 * math.sqrt(2 * math.pi))


def _reverse_kl(flow: Bijector, steps: int = 400) -> tuple[float, float]:
    """KL to the mixture after some Adam steps, and its standard error, from 100,000 fresh samples."""
    torch.manual_seed(1)
    posterior, target = FlowPosterior(0, flow), Mixture()
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    for _ in range(steps):
        sample = posterior(sample_shape=(256,))
        loss = (sample.log_prob - target.log_prob(sample.z)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sample = posterior(sample_shape=(100_000,))
        gap = sample.log_prob - target.log_prob(sample.z)
    return gap.mean().item(), (gap.std() / math.sqrt(len(gap))).item()


def _gated() -> Autoregressive:
    return Autoregressive(2, 0, (32,))


FLOWS: dict[str, Callable[[], Bijector]] = {
    "planar": lambda: Chain(*(Learned(Planar(2)) for _ in range(8))),
    "full_covariance": lambda: Learned(Chain(flowpost.UnitLowerTriangular(2), flowpost.Affine(2))),
    "iaf": lambda: Chain(
        Autoregressive(2, 0, (32,)), Reverse(2), Autoregressive(2, 0, (32,)), Learned(flowpost.Affine(2))
    ),
    "maf": lambda: Chain(flowpost.Inverse(Autoregressive(2, 0, (32,))), Learned(flowpost.Affine(2))),
}


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in ("planar", "full_covariance")),
        "iaf",
        pytest.param("maf", marks=pytest.mark.full),
    ],
)
def test_kl_to_a_known_density_is_not_negative(name: str) -> None:
    """False-alarm rate 3e-7 each: five standard errors."""
    torch.manual_seed(0)
    kl, error = _reverse_kl(FLOWS[name]())
    assert -5 * error < kl < 1.5


@pytest.mark.full
@pytest.mark.parametrize("name", FLOWS)
def test_a_trained_density_integrates_to_one(name: str) -> None:
    """B15 after 100 steps: by then the parameters are where training takes them, not where a test puts them."""
    torch.manual_seed(0)
    flow = FLOWS[name]()
    start = total_mass(flow.double())
    _reverse_kl(flow.float(), steps=100)
    assert abs(start - 1) < 1e-2
    assert abs(total_mass(flow.double()) - 1) < 1e-2


@pytest.mark.full
def test_a_wrong_log_det_claims_a_negative_kl() -> None:
    torch.manual_seed(0)
    steps = [flowpost.testing.push(TransposedSylvester(4, reach=0.95), 1.0, seed) for seed in range(6)]
    kl, error = _reverse_kl(Chain(*steps))
    assert kl < -5 * error
