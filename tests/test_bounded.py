"""Likelihoods against their definitions: masses and densities that add up to 1, moments, draws, and the MSE VAE."""

import math
from typing import Any

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor, nn
from torch.distributions import Normal

import flowpost
from flowpost.likelihoods import Likelihood
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical, ContinuousBernoulli, DiscretizedLogistic, Gaussian

Number = Any
"""One of mpmath's."""
LOGITS = [-300.0, -40.0, -3.0, -0.11, -0.09, -1e-3, -1e-5, 0.0, 1e-9, 1e-3, 0.5, 30.0, 200.0]


def outputs(*numbers: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of one element, ``(1, numbers, 1)``."""
    return torch.tensor(numbers, dtype=dtype).view(1, -1, 1)


@pytest.mark.parametrize("logit", LOGITS)
def test_a_continuous_bernoulli_is_the_paper_s(logit: float) -> None:
    """Its density ``C(l) l^x (1 - l)^(1 - x)``, its mean, and the gradients at the logit, with 60 digits."""
    like = ContinuousBernoulli()
    with mp.workdps(60):
        a = mpf(logit)

        def log_c(a: Number) -> Number:
            return mp.log(a / mp.tanh(a / 2)) if a else mp.log(2)

        def mean(a: Number) -> Number:
            return 1 / (1 - mp.exp(-a)) - 1 / a if a else mpf(1) / 2

        for x in (0.0, 0.3, 1.0):
            raw = outputs(logit).requires_grad_()
            found = like.log_prob(raw, torch.tensor([[x]], dtype=torch.float64))
            expected = a * x - mp.log1p(mp.exp(a)) + log_c(a)
            assert found.item() == pytest.approx(float(expected), rel=1e-13, abs=2e-9 if abs(logit) > 20 else 1e-13)
            (gradient,) = torch.autograd.grad(found, raw)
            assert gradient.item() == pytest.approx(float(x - mean(a)), rel=1e-6, abs=1e-6)
        assert like.mean(outputs(logit)).item() == pytest.approx(float(mean(a)), rel=2e-14)
        narrow = like.mean(outputs(logit, dtype=torch.float32)).item()
        assert narrow == pytest.approx(float(mean(mpf(outputs(logit, dtype=torch.float32).item()))), rel=4e-6)


def test_a_continuous_bernoulli_s_gradient_in_float32_near_a_logit_of_0() -> None:
    """Two terms of 1e4 cancelled in it: it was off by 2.5e-4, a thousandth of itself."""
    raw = torch.logspace(-5, 0, 501).view(-1, 1, 1).requires_grad_()
    like, x = ContinuousBernoulli(), torch.tensor([0.3])
    (found,) = torch.autograd.grad(like.log_prob(raw, x).sum(), raw)
    expected = 0.3 - like.mean(raw.detach().double())
    torch.testing.assert_close(found.flatten().double(), expected.flatten(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("levels", [2, 5, 256])
@pytest.mark.parametrize(("loc", "raw"), [(0.0, 0.0), (-0.4, -3.0), (0.9, -6.0), (3.0, -2.0), (-1.0, 4.0)])
def test_the_masses_of_a_discretized_logistic_are_its_cells(levels: int, loc: float, raw: float) -> None:
    like, x = DiscretizedLogistic(levels), torch.arange(levels, dtype=torch.float64).unsqueeze(-1)
    given = outputs(loc, raw)
    masses = like.log_prob(given, x).exp()
    torch.testing.assert_close(masses.sum(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)
    with mp.workdps(60):
        scale = mp.exp(10 * mp.tanh(mpf(raw) / 10))

        def below(level: float) -> Number:  # the distribution function in units where the levels run from -1 to 1
            return 1 / (1 + mp.exp(-(2 * mpf(level) / (levels - 1) - 1 - mpf(loc)) / scale))

        for k in {0, 1, levels // 2, levels - 1}:
            low = below(k - 0.5) if k else mpf(0)
            high = below(k + 0.5) if k < levels - 1 else mpf(1)
            assert math.log(masses[k]) == pytest.approx(float(mp.log(high - low)), rel=1e-11, abs=1e-11)
    mean = like.mean(given).item()
    assert mean == pytest.approx((masses * x.squeeze(-1)).sum().item(), rel=1e-11)


def test_a_discretized_logistic_keeps_its_gradients_far_out() -> None:
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor([[-30.0, 30.0, 0.0, 1e4], [-9.0, -9.0, -50.0, 1e4]], dtype=dtype).requires_grad_()
        log_p = DiscretizedLogistic().log_prob(given.unsqueeze(0), torch.tensor([[255, 0, 100, 3]]))
        (gradient,) = torch.autograd.grad(log_p.sum(), given)
        assert log_p.isfinite().all()
        assert gradient.isfinite().all()


EVERY = {
    "Bernoulli": (Bernoulli(), (0.4,)),
    "Binomial": (Binomial(7), (-0.7,)),
    "Categorical": (Categorical(3), (0.1, 1.0, -1.0)),
    "Gaussian": (Gaussian(), (0.3, -0.5)),
    "Gaussian of one scale": (Gaussian(0.25), (1.5,)),
    "ContinuousBernoulli, falling": (ContinuousBernoulli(), (-2.0,)),
    "ContinuousBernoulli, rising": (ContinuousBernoulli(), (3.0,)),
    "ContinuousBernoulli, flat": (ContinuousBernoulli(), (0.0,)),
    "DiscretizedLogistic": (DiscretizedLogistic(16), (0.2, -1.5)),
    "DiscretizedLogistic at an end": (DiscretizedLogistic(16), (1.1, -1.0)),
}


@pytest.mark.parametrize("name", EVERY)
def test_draws_have_the_mean_and_the_entropy(name: str) -> None:
    """Of 40,000 draws, mean and mean log p, within five standard errors; and log p of a draw has mean score 0."""
    like, numbers = EVERY[name]
    torch.manual_seed(0)
    raw = outputs(*numbers).requires_grad_()
    given = raw.expand(40_000, -1, -1)
    x = like.sample(given)
    assert x.shape == (40_000, 1)
    assert not x.requires_grad
    error = 5 * x.std() / 200 + 1e-9
    assert (x.mean() - like.mean(given)[0, 0]).abs() <= error
    log_p = like.log_prob(given, x)
    (score,) = torch.autograd.grad(log_p.mean(), raw)
    assert (score.abs() <= 0.06).all()


def test_a_gaussian_of_one_scale_is_the_squared_error() -> None:
    loc, x = torch.randn(2, 5, 3, dtype=torch.float64)
    found = Gaussian(scale=0.5).log_prob(loc.unsqueeze(-2), x)
    torch.testing.assert_close(found, Normal(loc, 0.5).log_prob(x).sum(-1))
    squared = (x - loc).square().sum(-1)
    torch.testing.assert_close(found[0] - found[1], -2 * (squared[0] - squared[1]))
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="^scale: expected a positive finite number"):
            Gaussian(wrong)
    learned = torch.nn.Parameter(torch.tensor(0.5))  # it was a parameter of the likelihood, and had no gradient
    with pytest.raises(
        TypeError, match="^scale: expected a number, got Parameter; it is a constant, which is not trained"
    ):
        Gaussian(learned)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(4), ContinuousBernoulli()])
def test_a_decoder_that_ends_in_a_sigmoid_is_refused(likelihood: Likelihood) -> None:
    ends = nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.Sigmoid()))
    with pytest.raises(ValueError, match="^decoder: expected logits for .* Sigmoid; leave it out"):
        VAE(nn.Linear(4, 3), flowpost.diagonal(3, 2), ends, likelihood)
    VAE(nn.Linear(4, 3), flowpost.diagonal(3, 2), ends, Gaussian(1.0))
    shares = torch.rand(5, 1, 4)
    x = torch.ones(5, 4)
    likelihood.log_prob(shares, x)
    with flowpost.checking(), pytest.warns(UserWarning, match="^decoder: all outputs lie from 0 to 1"):
        likelihood.log_prob(shares, x)


def test_a_likelihood_of_one_s_own_may_have_no_sample() -> None:
    class Own(Likelihood):
        def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
            return -(outputs.squeeze(-2) - x).abs().sum(-1)

        def mean(self, outputs: Tensor) -> Tensor:
            return outputs.squeeze(-2)

    vae = VAE(nn.Linear(4, 3), flowpost.diagonal(3, 2), nn.Linear(2, 4), Own())
    assert vae.reconstruct(torch.randn(5, 4)).shape == (5, 4)
    with pytest.raises(NotImplementedError, match="^Own has no sample"):
        vae.sample(3, (4,))
