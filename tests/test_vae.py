"""Likelihoods, the VAE, its objectives and its evaluation, against torch.distributions and exact evidence."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

import flowpost
from flowpost.evaluation import log_marginal
from flowpost.objectives import elbo, elbo_terms, gaussian_kl
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical, Gaussian, Likelihood, VAEOutput

ROOT = Path(__file__).parents[1]


def outputs_for(likelihood: Likelihood) -> Tensor:
    return 2 * torch.randn(7, 4, likelihood.numbers, 5, dtype=torch.float64)


def test_binomial_is_torch_s() -> None:
    likelihood = Binomial(16)
    outputs = outputs_for(likelihood)
    x = torch.randint(0, 17, (4, 5)).double()
    expected = td.Binomial(16, logits=outputs[:, :, 0])
    torch.testing.assert_close(likelihood.log_prob(outputs, x), expected.log_prob(x).sum(-1))
    torch.testing.assert_close(likelihood.mean(outputs), expected.mean)


def test_binomial_adds_up_to_one() -> None:
    outputs = torch.randn(1, 1, dtype=torch.float64).expand(17, 1, 1)
    x = torch.arange(17.0, dtype=torch.float64).unsqueeze(-1)
    assert Binomial(16).log_prob(outputs, x).exp().sum().item() == pytest.approx(1)


def test_bernoulli_is_torch_s_and_binomial_s() -> None:
    likelihood = Bernoulli()
    outputs = outputs_for(likelihood)
    x = torch.randint(0, 2, (4, 5)).double()
    expected = td.Bernoulli(logits=outputs[:, :, 0])
    torch.testing.assert_close(likelihood.log_prob(outputs, x), expected.log_prob(x).sum(-1))
    torch.testing.assert_close(likelihood.log_prob(outputs, x), Binomial(1).log_prob(outputs, x))
    torch.testing.assert_close(likelihood.mean(outputs), expected.mean)


def test_gaussian_is_torch_s() -> None:
    likelihood = Gaussian()
    outputs = outputs_for(likelihood)
    x = torch.randn(4, 5, dtype=torch.float64)
    scale = torch.exp(10 * torch.tanh(outputs[:, :, 1] / 10))
    expected = td.Normal(outputs[:, :, 0], scale)
    torch.testing.assert_close(likelihood.log_prob(outputs, x), expected.log_prob(x).sum(-1))
    torch.testing.assert_close(likelihood.mean(outputs), expected.mean)


def test_categorical_is_torch_s() -> None:
    likelihood = Categorical(6)
    outputs = outputs_for(likelihood)
    x = torch.randint(0, 6, (4, 5))
    expected = td.Categorical(logits=outputs.mT)
    torch.testing.assert_close(likelihood.log_prob(outputs, x.double()), expected.log_prob(x).sum(-1))
    probabilities = expected.probs
    assert probabilities is not None
    torch.testing.assert_close(likelihood.mean(outputs), probabilities @ torch.arange(6.0, dtype=torch.float64))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(16), Gaussian(), Categorical(3)], ids=repr)
def test_extreme_outputs_stay_finite(likelihood: Likelihood) -> None:
    outputs = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).expand(2, likelihood.numbers, 5).clone().requires_grad_()
    log_prob = likelihood.log_prob(outputs, torch.ones(2, 5))
    (gradient,) = torch.autograd.grad(log_prob.sum(), outputs)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------------- objectives


def test_gaussian_kl_is_torch_s() -> None:
    loc = torch.randn(6, 4, dtype=torch.float64)
    scale_tril = torch.randn(6, 4, 4, dtype=torch.float64).tril(-1) + torch.diag_embed(torch.rand(6, 4).double() + 0.1)
    prior = td.MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    expected = td.kl_divergence(td.MultivariateNormal(loc, scale_tril=scale_tril), prior)
    torch.testing.assert_close(gaussian_kl(loc, scale_tril), expected)
    scale = scale_tril.diagonal(dim1=-2, dim2=-1)
    factorized = td.kl_divergence(td.Normal(loc, scale), td.Normal(torch.zeros(4).double(), 1.0)).sum(-1)
    torch.testing.assert_close(gaussian_kl(loc, torch.diag_embed(scale)), factorized)


def test_elbo_by_hand() -> None:
    likelihood = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    prior = torch.tensor([[0.5, 0.0], [0.5, 0.0], [2.0, 3.0]])
    log_q = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert elbo(likelihood, prior, log_q).tolist() == [3.0 - 0.0, 5.0 - 0.0]
    assert elbo(likelihood, prior, 4 * log_q).tolist() == [3.0 - 3.0, 5.0 - 3.0]
    assert elbo(likelihood, prior, 4 * log_q, kl_weight=0.5).tolist() == [1.5, 3.5]
    kl = torch.tensor([7.0, 8.0])
    assert elbo(likelihood, prior, log_q, kl).tolist() == [-4.0, -3.0]
    assert elbo(likelihood, prior, log_q, kl, kl_weight=torch.tensor(0.25)).tolist() == [1.25, 3.0]
    assert elbo(likelihood[0], prior[0], log_q[0]).tolist() == [0.5, 1.0]
    assert elbo(likelihood.view(3, 1, 2), prior.view(3, 1, 2), log_q.view(3, 1, 2)).tolist() == [3.0, 5.0]


def test_the_reparameterized_elbo_gradient_is_the_closed_form_s() -> None:
    """In the Gaussian case, within four standard errors."""
    vae = linear_gaussian().train()
    x = torch.randn(1, 4, dtype=torch.float64)
    parameters = list(vae.posterior.parameters())
    closed, sampled = [], []
    for _ in range(300):
        out = vae(x, (20,))
        for found, kl in ((closed, out.kl), (sampled, None)):
            value = elbo(out.log_likelihood, out.log_prior, out.log_q, kl).mean()
            grads = torch.autograd.grad(value, parameters, retain_graph=True)
            found.append(torch.cat([g.flatten() for g in grads]))
    gap = torch.stack(closed) - torch.stack(sampled)
    error = gap.std(0) / math.sqrt(300)
    assert (gap.mean(0).abs() <= 4.5 * error + 1e-9).all()
    assert (error > 0).any()


# ----------------------------------------------------------------------------------------------------------- VAE


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(3), Gaussian(), Categorical(4)], ids=repr)
@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 3)], ids=str)
def test_the_vae_s_terms_are_what_they_say(likelihood: Likelihood, sample_shape: tuple[int, ...]) -> None:
    decoder = nn.Linear(2, likelihood.numbers * 6)
    vae = VAE(nn.Sequential(Flat(), nn.Linear(6, 5)), flowpost.full_covariance(5, 2), decoder, likelihood)
    x = torch.randint(0, 2, (4, 2, 3)).float()
    out = vae(x, sample_shape)
    assert isinstance(out, VAEOutput)
    z, log_q, noise = out.sample
    assert z.shape == (*sample_shape, 4, 2)
    outputs = decoder(z).unflatten(-1, (likelihood.numbers, 6))
    torch.testing.assert_close(out.log_likelihood, likelihood.log_prob(outputs, x.flatten(1)))
    torch.testing.assert_close(out.log_prior, td.Normal(0.0, 1.0).log_prob(z).sum(-1))
    h = vae.encoder(x)
    again = vae.posterior(h, sample_shape, noise)
    torch.testing.assert_close((out.log_q, z), (again.log_prob, again.z))
    assert torch.equal(log_q, out.log_q)
    torch.testing.assert_close(out.kl, gaussian_kl(*vae.posterior.gaussian(h)))


@pytest.mark.parametrize("name", ["diagonal", "full_covariance", "planar"])
@pytest.mark.parametrize("sample_shape", [(), (2, 3)], ids=str)
def test_the_elbo_s_terms_alone_are_those_of_a_whole_pass(name: str, sample_shape: tuple[int, ...]) -> None:
    vae = VAE(nn.Linear(6, 5), RECIPES[name](5, 2), nn.Linear(2, 6), Bernoulli())
    x, found = torch.rand(4, 6), []
    for whole in (True, False):
        torch.manual_seed(3)
        terms = elbo_terms(*vae(x, sample_shape)[:4]) if whole else vae.elbo_terms(x, sample_shape)
        loss = (terms.reconstruction - 0.5 * terms.kl).sum()
        found.append((*terms, *torch.autograd.grad(loss, list(vae.parameters()))))
    torch.testing.assert_close(*found)


class Moving(nn.Module):
    """A network that scales its input in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z.mul_(2))


class MovingGaussian(Gaussian):
    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        return super().log_prob(outputs, x.sub_(0.5))


@pytest.mark.parametrize("part", ["encoder", "decoder", "likelihood"])
def test_a_part_that_changes_its_input_in_place_is_refused(part: str) -> None:
    """The log p(z) was of the moved z, and log q of the other; x moved on with each epoch."""
    kinds = {name: Moving if name == part else nn.Linear for name in ("encoder", "decoder")}
    likelihood = MovingGaussian() if part == "likelihood" else Gaussian()
    vae = VAE(kinds["encoder"](5, 4), flowpost.diagonal(4, dim=2), kinds["decoder"](2, 10), likelihood)
    for ask in (vae, vae.elbo_terms, lambda x: log_marginal(vae, x)):
        with pytest.raises(ValueError, match=f"^{part}: expected its input left as it is, got it changed in place"):
            ask(torch.ones(6, 5))


def test_a_decoder_of_whole_numbers_is_refused() -> None:
    """It has no gradient, and so was never trained."""
    rounding = nn.Sequential(nn.Linear(2, 5), Whole())
    vae = VAE(nn.Linear(5, 4), flowpost.diagonal(4, dim=2), rounding, Bernoulli())
    with pytest.raises(TypeError, match="^decoder: expected numbers with a gradient, got torch.int64"):
        vae(torch.ones(6, 5))


class Whole(nn.Module):
    def forward(self, numbers: Tensor) -> Tensor:
        return numbers.long()


def test_an_x_may_be_one_number() -> None:
    """Of no axes of its own: the same figures as with an axis of one element."""
    encoder = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))
    vae = VAE(encoder, flowpost.diagonal(4, 2), nn.Linear(2, 1), Bernoulli())
    x, noise = torch.rand(5).round(), torch.randn(3, 5, 2)
    found, due = vae(x, (3,), noise=noise), vae(x.unsqueeze(1), (3,), noise=noise)
    assert torch.equal(found.log_likelihood, due.log_likelihood)
    assert vae.reconstruct(x).shape == vae.sample(5, ()).shape == (5,)
    assert log_marginal(vae, x, 10).shape == (5,)
    vae.decoder = nn.Sequential(vae.decoder, nn.Flatten(0))  # a decoder that gives one number, and no axis of one
    assert torch.equal(vae(x, (3,), noise=noise).log_likelihood, due.log_likelihood)
    assert vae.reconstruct(x).shape == vae.sample(5, ()).shape == (5,)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 4), 0])
def test_a_decoder_gives_a_row_for_each_z(rows: slice | int) -> None:
    class Fewer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[rows]

    vae = VAE(nn.Linear(6, 5), flowpost.diagonal(5, 2), Fewer(2, 6), Bernoulli())
    with pytest.raises(ValueError, match="^decoder: expected a row of numbers for each of 8 z, got shape .*; expand"):
        vae(torch.ones(8, 6))


def test_a_convolutional_decoder_s_shape() -> None:
    decoder = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (2, 2, 3)))
    vae = VAE(nn.Sequential(Flat(), nn.Linear(6, 5)), flowpost.diagonal(5, 2), decoder, Gaussian())
    x = torch.randn(4, 1, 2, 3)
    out = vae(x, (3,))
    outputs = decoder(out.sample.z.flatten(0, 1)).view(3, 4, 2, 6)
    expected = Gaussian().log_prob(outputs, x.flatten(1))
    torch.testing.assert_close(out.log_likelihood, expected)


def test_only_gaussian_posteriors_have_a_closed_form_kl() -> None:
    for recipe, closed in [(flowpost.diagonal, True), (flowpost.full_covariance, True), (flowpost.planar, False)]:
        vae = VAE(nn.Linear(6, 5), recipe(5, 2), nn.Linear(2, 6), Bernoulli())
        assert (vae(torch.zeros(3, 6)).kl is not None) is closed


def test_everything_in_a_vae_gets_a_gradient() -> None:
    vae = VAE(nn.Linear(6, 5), flowpost.iaf(5, 3, steps=1, hidden=(8,)), nn.Linear(3, 6), Bernoulli())
    for parameter in vae.posterior.flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    out = vae(torch.rand(8, 6).round(), (4,))
    (-elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl).mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


# ------------------------------------------------------------------------------------------------------ evidence


class Linear(nn.Module):
    """``x | z ~ N(A z + b, s^2)`` as a decoder: loc and log-scale for each element."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.raw = 10 * math.atanh(math.log(scale) / 10)

    def forward(self, z: Tensor) -> Tensor:
        loc = z @ self.weight.T + self.bias
        return torch.stack([loc, torch.full_like(loc, self.raw)], 1)


def linear_gaussian(dim: int = 3, elements: int = 4, scale: float = 0.7) -> VAE:
    """A VAE whose posterior was set by hand to the exact one, N(S A^T (x - b) / s^2, S), S = (I + A^T A / s^2)^-1."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(elements, dim, dtype=torch.float64, generator=generator)
    bias = torch.randn(elements, dtype=torch.float64, generator=generator)
    cov = torch.linalg.inv(torch.eye(dim, dtype=torch.float64) + weight.T @ weight / scale**2)
    tril = torch.linalg.cholesky(cov)
    sigma = tril.diagonal()
    lower = tril / sigma.unsqueeze(-1)
    posterior = flowpost.full_covariance(elements, dim, rate=1.0).double()
    entries = torch.stack([lower[i, j] for i in range(dim) for j in range(i)])
    raw = torch.log(torch.expm1(sigma - 1e-3)) - math.log(math.expm1(1 - 1e-3))
    gain = cov @ weight.T / scale**2
    head = posterior.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[len(entries) : len(entries) + dim] = gain
        head.bias.copy_(torch.cat([entries, -gain @ bias, raw]))
    return VAE(nn.Identity(), posterior, Linear(weight, bias, scale), Gaussian())


def exact_evidence(vae: VAE, x: Tensor, scale: float = 0.7) -> Tensor:
    decoder = vae.decoder
    assert isinstance(decoder, Linear)
    noise = scale**2 * torch.eye(len(decoder.bias), dtype=torch.float64)
    return td.MultivariateNormal(decoder.bias, decoder.weight @ decoder.weight.T + noise).log_prob(x)


def test_log_marginal_is_exact_for_the_exact_posterior() -> None:
    """Every importance weight is then p(x) itself: one sample is enough."""
    vae = linear_gaussian()
    x = 2 * torch.randn(6, 4, dtype=torch.float64)
    for samples in (1, 7):
        found = log_marginal(vae, x, samples)
        assert found.dtype == torch.float64
        assert not found.requires_grad
        torch.testing.assert_close(found, exact_evidence(vae, x), rtol=0, atol=1e-9)
    out = vae(x)
    closed = elbo(out.log_likelihood, out.log_prior, out.log_q)
    torch.testing.assert_close(closed, exact_evidence(vae, x), rtol=0, atol=1e-9)


def test_bounds_are_ordered_for_a_wrong_posterior() -> None:
    """ELBO <= 8 samples <= 64 samples <= log p(x), each gap many standard errors wide here."""
    vae = linear_gaussian()
    head = vae.posterior.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.add_(0.3)
    x = 2 * torch.randn(1, 4, dtype=torch.float64).expand(400, 4)
    means = [log_marginal(vae, x, samples).mean().item() for samples in (1, 8, 64)]
    assert means[0] < means[1] < means[2] < exact_evidence(vae, x[:1]).item() + 0.02
    assert exact_evidence(vae, x[:1]).item() - means[2] < 0.1
    assert exact_evidence(vae, x[:1]).item() - means[0] > 0.2


def test_log_marginal_is_the_plain_average_of_weights_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is counted once: with noise that is a function of its place, chunks of any size agree."""
    vae = VAE(nn.Linear(6, 5), flowpost.planar(5, 2, steps=2), nn.Linear(2, 6), Bernoulli()).double()
    x = torch.rand(5, 6, dtype=torch.float64).round()
    noise = torch.randn(23, 5, 2, dtype=torch.float64)
    out = vae.posterior(vae.encoder(x), (23,), noise)
    logits = vae.decoder(out.z)
    weights = td.Bernoulli(logits=logits).log_prob(x).sum(-1) + td.Normal(0.0, 1.0).log_prob(out.z).sum(-1)
    expected = (weights - out.log_prob).exp().mean(0).log()
    real = flowpost.FlowDistribution.draw
    for pairs in (5, 10, 35, 1000):
        drawn = 0

        def draw(q: flowpost.FlowDistribution, sample_shape: tuple[int, ...], fresh: None) -> flowpost.Sample:
            nonlocal drawn
            start, drawn = drawn, drawn + sample_shape[0]
            return real(q, sample_shape, noise[start:drawn])

        monkeypatch.setattr(flowpost.FlowDistribution, "draw", draw)
        torch.testing.assert_close(log_marginal(vae, x, 23, pairs=pairs), expected.detach(), rtol=0, atol=1e-10)
        assert drawn == 23


def test_log_marginal_splits_examples_too() -> None:
    vae = linear_gaussian()
    x = torch.randn(230, 4, dtype=torch.float64)
    for pairs in (1, 7, 150):
        torch.testing.assert_close(log_marginal(vae, x, 2, pairs=pairs), exact_evidence(vae, x), rtol=0, atol=1e-9)


def test_log_marginal_encodes_once() -> None:
    vae = linear_gaussian()
    calls = []
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    log_marginal(vae, torch.randn(6, 4, dtype=torch.float64), 50, pairs=12)
    assert len(calls) == 1


def test_log_marginal_survives_weights_far_from_one() -> None:
    """exp would underflow: log-weights near -1e5 in float32."""
    vae = linear_gaussian()
    x = 1e3 * torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(log_marginal(vae, x, 5), exact_evidence(vae, x), rtol=1e-9, atol=0)


def test_log_marginal_s_largest_tensor_does_not_grow_with_samples() -> None:
    """What an IAF's layers are handed is bounded by `pairs`, and every sample passes through them."""
    vae = VAE(nn.Linear(6, 5), flowpost.iaf(5, 3, steps=2, hidden=(8,)), nn.Linear(3, 6), Bernoulli())
    rows: list[int] = []
    vae.decoder.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    x = torch.rand(4, 6).round()
    for samples in (3, 50, 5000):
        rows.clear()
        log_marginal(vae, x, samples, pairs=100)
        assert sum(rows) == 4 * samples
        assert max(rows) == min(4 * samples, 100)


@pytest.mark.long
def test_log_marginal_s_memory_does_not_grow_with_samples() -> None:
    """5,000 samples of 64 latents for 100 images: all at once, z alone would take 128 MB, and the logits 1.6 GB."""
    code = """
import resource
import torch
from torch import nn
import flowpost
from flowpost.evaluation import log_marginal
from flowpost.vae import VAE, Bernoulli
torch.set_num_threads(1)
vae = VAE(nn.Linear(784, 16), flowpost.diagonal(16, 64), nn.Linear(64, 784), Bernoulli())
x = torch.rand(100, 784).round()
log_marginal(vae, x, samples=10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
log_p = log_marginal(vae, x, samples=5000)
assert log_p.shape == (100,) and log_p.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 100  # MiB


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_integers_for_an_encoder_of_numbers_are_refused_with_what_to_write(dtype: torch.dtype) -> None:
    vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
    x = torch.ones(5, 9, dtype=dtype)
    with pytest.raises(
        TypeError, match=rf"^x: expected what the encoder takes, got {dtype} \(.*\); write x\.float\(\)$"
    ):
        vae(x)
    embedding = nn.Sequential(nn.Embedding(2, 3), nn.Flatten(), nn.Linear(27, 16))
    words = VAE(embedding, flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
    assert words(x.long()).log_q.shape == (5,)
