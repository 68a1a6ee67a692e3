"""Likelihoods where float32 and narrow integers fail: counts out of many against 40 digits, and x of every dtype."""

import re

import pytest
import torch
from mpmath import mp
from torch import Tensor, nn

import flowpost
from flowpost.evaluation import decompose_elbo, importance_estimate, log_marginal
from flowpost.vae import (
    VAE,
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
)

INTEGERS = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64]


def binomial_truth(n: int, logits: list[float], counts: list[int]) -> float:
    """The sum of ``log C(n, x) + x a - n log(1 + e^a)`` to 40 digits."""
    with mp.workdps(40):
        total = mp.mpf(0)
        for a, x in zip(logits, counts, strict=True):
            ways = mp.loggamma(n + 1) - mp.loggamma(x + 1) - mp.loggamma(n - x + 1)
            total += ways + x * mp.mpf(a) - n * mp.log1p(mp.exp(mp.mpf(a)))
        return float(total)


def test_bytes_do_not_wrap() -> None:
    """In 8 bits 255 + 1 is 0, whose lgamma is infinite."""
    logits, counts = [-2.0, 3.0, 0.25, 0.0, 5.5], [0, 255, 254, 1, 255]
    x = torch.tensor(counts, dtype=torch.uint8)
    found = Binomial(255).log_prob(torch.tensor([logits]), x)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(binomial_truth(255, logits, counts), rel=1e-6)


@pytest.mark.parametrize("n", [1, 16, 255, 65_535, 1_000_000])
def test_counts_out_of_many(n: int) -> None:
    """A float32 decoder's logits near the counts, so that what remains is 1e-5 of the terms that cancel."""
    torch.manual_seed(n)
    logits = 3 * torch.randn(40)
    logits[:2] = torch.tensor([24.0, -24.0])
    counts = (n * torch.sigmoid(logits.double())).round()
    found = Binomial(n).log_prob(logits.unsqueeze(0), counts)
    truth = binomial_truth(n, logits.double().tolist(), [int(count) for count in counts])
    assert found.item() == pytest.approx(truth, rel=1e-6, abs=1e-6)
    double = Binomial(n).log_prob(logits.double().unsqueeze(0), counts)
    assert double.item() == pytest.approx(truth, rel=1e-9, abs=1e-7)


def test_the_gradient_of_counts_out_of_many() -> None:
    """``x - n sigmoid(a)``, in the logit's dtype."""
    logits = torch.tensor([[-1.0, 0.5, 2.0]], requires_grad=True)
    x = torch.tensor([20_000.0, 40_000.0, 57_000.0])
    (gradient,) = torch.autograd.grad(Binomial(65_535).log_prob(logits, x).sum(), logits)
    exact = x.double() - 65_535 * torch.sigmoid(logits.detach().double())
    torch.testing.assert_close(gradient, exact.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(3), Gaussian(), Categorical(4)], ids=repr)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_x_of_any_dtype_is_as_in_floats(likelihood: Likelihood, dtype: torch.dtype) -> None:
    outputs = torch.randn(7, 4, likelihood.numbers, 5)
    x = torch.randint(0, 2, (4, 5))
    found = likelihood.log_prob(outputs, x.to(dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found, likelihood.log_prob(outputs, x.float()))


EACH = [Bernoulli(), Binomial(3), Gaussian(), Gaussian(0.5), Categorical(4), ContinuousBernoulli()]
EACH += [DiscretizedLogistic(4)]


@pytest.mark.parametrize("likelihood", EACH, ids=repr)
def test_an_x_that_would_broadcast_into_a_mix_is_refused(likelihood: Likelihood) -> None:
    """Four images of five pixels with a channel axis were scored against all four outputs, 16 numbers in all."""
    outputs, x = torch.randn(4, likelihood.numbers, 5), torch.zeros(4, 5)
    for wrong in (x.unsqueeze(1), x.unsqueeze(0), x[:, :1], x[0, 0], torch.zeros(4, 5, 5)):
        got = re.escape(str(tuple(wrong.shape)))
        with pytest.raises(ValueError, match=rf"^x: expected shape \(\*, 5\) of at most 2 axes .*, got {got}; flatten"):
            likelihood.log_prob(outputs, wrong)
    for wrong in (torch.zeros(3, 5), torch.zeros(4, likelihood.numbers + 1, 5), torch.zeros(5)):
        with pytest.raises(ValueError, match=rf"^outputs: expected shape \(\*, {likelihood.numbers}, elements\), got"):
            likelihood.log_prob(wrong, x)
    found = likelihood.log_prob(outputs.expand(3, *outputs.shape), x)
    torch.testing.assert_close(found, likelihood.log_prob(outputs, x).expand(3, 4))
    assert likelihood.log_prob(outputs, x[0]).shape == (4,)  # one x under four outputs
    torch.testing.assert_close(torch.vmap(likelihood.log_prob)(outputs, x), likelihood.log_prob(outputs, x))


class Unsummed(Bernoulli):
    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        return x * outputs.squeeze(-2)


def test_a_likelihood_that_does_not_sum_is_refused() -> None:
    """Five pixels of five images: each pixel's log-density was added to another image's log p(z)."""
    vae, x = VAE(nn.Linear(5, 3), flowpost.diagonal(3, 2), nn.Linear(2, 5), Unsummed()), torch.zeros(5, 5)
    said = r"^likelihood: expected a log p\(x\|z\) for each z, \(3, 5\), got shape \(3, 5, 5\) for x of shape \(5, 5\);"
    for call in (vae, vae.elbo_terms):
        with pytest.raises(ValueError, match=said):
            call(x, (3,))
    for call in (log_marginal, importance_estimate, decompose_elbo):
        with pytest.raises(ValueError, match="^likelihood: expected a log p"):
            call(vae, x, 30)


class Scaled(nn.Module):
    """An encoder of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return self.linear(x / 255)


def test_a_vae_of_bytes() -> None:
    """The encoder gets x as it is; the likelihood converts it."""
    vae = VAE(Scaled(), flowpost.diagonal(3, 2), nn.Linear(2, 5), Binomial(255))
    x = torch.tensor([[0, 255, 255, 7, 0]] * 4, dtype=torch.uint8)
    out = vae(x, (3,))
    assert out.log_likelihood.shape == (3, 4)
    logits = vae.decoder(out.sample.z)
    expected = binomial_truth(255, logits[1, 2].tolist(), x[2].tolist())
    assert out.log_likelihood[1, 2].item() == pytest.approx(expected, rel=1e-6)


def test_a_vae_of_tokens() -> None:
    encoder = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(15, 3))
    vae = VAE(encoder, flowpost.diagonal(3, 2), nn.Linear(2, 20), Categorical(4))
    assert vae(torch.randint(0, 4, (6, 5))).log_likelihood.shape == (6,)


def test_a_decoder_in_half_precision_is_scored_in_full() -> None:
    """bfloat16 has 8 bits: a sum of 784 terms in it would be off by whole nats."""
    vae = VAE(nn.Linear(784, 3), flowpost.diagonal(3, 2), nn.Linear(2, 784), Bernoulli())
    x = torch.rand(4, 784).round()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vae(x)
        logits = vae.decoder(out.sample.z)
    assert out.log_likelihood.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.log_likelihood, Bernoulli().log_prob(logits.float().unsqueeze(-2), x))


WRONG: list[tuple[Likelihood, Tensor, str]] = [
    (Bernoulli(), torch.tensor([[0, 1], [255, 1]], dtype=torch.uint8), "numbers from 0 to 1, got 1 of 2 rows outside"),
    (Bernoulli(), torch.tensor([[0.5, -0.1]]), "numbers from 0 to 1, got 1 of 1 rows outside"),
    (Binomial(16), torch.tensor([[0.0, 17.0]]), "whole numbers from 0 to 16, got 1 of 1 rows outside"),
    (Binomial(16), torch.tensor([[0.0, 1.5]]), "whole numbers from 0 to 16, got 1 of 1 rows outside"),
    (Categorical(3), torch.tensor([[0, 2], [0, 3]]), "whole numbers from 0 to 2, got 1 of 2 rows outside"),
    (Categorical(3), torch.tensor([[0.7, 2.0]]), "whole numbers from 0 to 2, got 1 of 1 rows outside"),
    (Categorical(3), torch.tensor([[-1.0, 2.0]]), "whole numbers from 0 to 2, got 1 of 1 rows outside"),
    (Categorical(3), torch.tensor([[0.7, torch.nan]]), "whole numbers from 0 to 2, got 1 of 1 rows outside"),
]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_checking_names_an_x_that_the_likelihood_does_not_have(index: int) -> None:
    likelihood, x, message = WRONG[index]
    with flowpost.checking(), pytest.raises(flowpost.DomainError, match="^x: expected " + re.escape(message)):
        likelihood.log_prob(torch.zeros(len(x), likelihood.numbers, 2), x)


def test_checking_lets_pass_what_there_is() -> None:
    with flowpost.checking():
        Bernoulli().log_prob(torch.zeros(1, 1, 3), torch.tensor([[0.0, 0.3, 1.0]]))
        Binomial(16).log_prob(torch.zeros(1, 1, 3), torch.tensor([[0, 5, 16]], dtype=torch.uint8))
        Categorical(3).log_prob(torch.zeros(1, 3, 3), torch.tensor([[0.0, 1.0, 2.0]]))
        Bernoulli().log_prob(torch.zeros(1, 1, 2), torch.tensor([[True, False]]))
