"""Conditional models: y reaches the encoder, the decoder and the prior, each row its own, and nothing else changes."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

import flowpost
from flowpost import Affine, FlowPosterior
from flowpost.evaluation import active_units, decompose_elbo, importance_estimate, kl_per_latent, log_marginal
from flowpost.functional import log_var_scale
from flowpost.gaps import inference_gaps
from flowpost.vae import VAE, Bernoulli, Gaussian

LOAD, SHIFT, CENTRE, NOISE = 1.5, 2.0, -0.7, 0.5
"""x | z, y ~ N(LOAD z + SHIFT y, NOISE^2) and z | y ~ N(CENTRE y, 1), one number each."""


class Decoder(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        assert len(z) == len(y)
        return LOAD * z + SHIFT * y


class Encoder(nn.Module):
    """The mean and log-variance of p(z|x, y), moved by `off`."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.off = off

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        precision = torch.full_like(x, 1 + LOAD**2 / NOISE**2)
        mean = (CENTRE * y + LOAD * (x - SHIFT * y) / NOISE**2) / precision
        return torch.cat([mean + self.off, -precision.log()], -1)


class Centre(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return torch.cat([CENTRE * y, torch.zeros_like(y)], -1)


def gaussian(features: int, head: nn.Module) -> FlowPosterior:
    """N(loc, exp(log_var)) of what the head makes of the features."""
    return FlowPosterior(features, Affine(1, log_var_scale), head)


def exact(off: float = 0.0) -> VAE:
    prior = gaussian(1, Centre())
    return VAE(Encoder(off), gaussian(2, nn.Identity()), Decoder(), Gaussian(NOISE), prior=prior).double()


def evidence(x: Tensor, y: Tensor) -> Tensor:
    loc = (LOAD * CENTRE + SHIFT) * y
    return Normal(loc, (LOAD**2 + NOISE**2) ** 0.5).log_prob(x).squeeze(-1)


torch.manual_seed(5)
Y = torch.linspace(-2, 2, 130, dtype=torch.float64).unsqueeze(-1)  # more rows than evaluation takes at once
X = torch.randn(130, 1, dtype=torch.float64)


def test_the_elbo_of_the_exact_posterior_is_log_p_of_x_given_y() -> None:
    vae, expected = exact(), evidence(X, Y)
    out = vae(X, (3,), y=Y)  # log p(x, z|y) - log q(z|x, y) is log p(x|y) at every z
    torch.testing.assert_close(out.log_likelihood + out.log_prior - out.log_q, expected.expand(3, -1))
    q, p = vae.encode(X, Y), Normal(CENTRE * Y.squeeze(-1), 1.0)
    torch.testing.assert_close(out.kl, kl_divergence(Normal(q.mean.squeeze(-1), q.stddev.squeeze(-1)), p))
    torch.testing.assert_close(out.latent_kl, out.kl.unsqueeze(-1))
    torch.testing.assert_close(vae.elbo_terms(X, y=Y).kl, out.kl)
    torch.manual_seed(1)
    terms = vae.elbo_terms(X, (20_000,), y=Y)
    torch.testing.assert_close(terms.reconstruction - terms.kl, expected, rtol=0, atol=0.05)


def test_estimates_are_of_log_p_of_x_given_y() -> None:
    vae, expected = exact(), evidence(X, Y)
    torch.testing.assert_close(log_marginal(vae, X, 21, y=Y), expected)
    estimate = importance_estimate(vae, X, 100, y=Y)
    torch.testing.assert_close(estimate.log_p, expected)
    off = exact(off=0.2)
    gaps = inference_gaps(off, X[:60], steps=200, samples=500, y=Y[:60])  # two parts of examples
    torch.testing.assert_close(gaps.estimate.log_p, expected[:60], rtol=0, atol=0.05)
    cost = 0.5 * 0.2**2 * (1 + LOAD**2 / NOISE**2)  # the KL of two Gaussians whose means are apart
    torch.testing.assert_close(gaps.amortization.mean().item(), cost, rtol=0, atol=0.02)


def test_reports_are_of_q_given_x_and_y() -> None:
    vae = exact()
    q = vae.encode(X, Y)
    vae.prior = None
    variance, _ = active_units(vae, X, y=Y)
    torch.testing.assert_close(variance, q.mean.var(0))
    standard = Independent(Normal(torch.zeros(1).double(), 1.0), 1)
    torch.testing.assert_close(kl_per_latent(vae, X, y=Y).squeeze(-1), kl_divergence(q, standard))
    torch.manual_seed(0)
    terms = decompose_elbo(vae, X, 50, y=Y)
    total = terms.mutual_information + terms.marginal_kl
    torch.testing.assert_close(total.mean(), kl_divergence(q, standard).mean(), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="^prior: expected one p.z. for all examples"):
        decompose_elbo(exact(), X, y=Y)


def test_samples_are_of_their_own_rows() -> None:
    vae = exact()
    noise = torch.randn(130, 1, dtype=torch.float64)
    torch.testing.assert_close(vae.sample_prior(130, Y, noise), CENTRE * Y + noise)
    torch.testing.assert_close(vae.sample_prior(130, Y[:1], noise), CENTRE * Y[:1] + noise)
    z = torch.randn(4, 130, 1, dtype=torch.float64)
    torch.testing.assert_close(vae.decode(z, 1, Y).squeeze(-1), LOAD * z + SHIFT * Y)
    torch.testing.assert_close(vae.log_prior(z, Y), Normal(CENTRE * Y, 1.0).log_prob(z).squeeze(-1))
    torch.manual_seed(2)
    residual = vae.reconstruct(X, Y) - LOAD * vae.encode(X, Y).mean - SHIFT * Y
    assert residual.std() < 1.2 * LOAD * vae.encode(X, Y).stddev[0].item()
    many = vae.sample(20_000, (1,), Y[-1:])
    assert abs(many.mean().item() - (LOAD * CENTRE + SHIFT) * 2) < 0.05
    assert abs(many.std().item() - (LOAD**2 + NOISE**2) ** 0.5) < 0.05


@pytest.mark.parametrize("recipe", ["diagonal", "iaf"])
def test_labels_reach_every_part(recipe: str) -> None:
    """A condition of integers: a prior with an encoder of its own, a wrapped encoder, and a state by its usual keys."""

    class OfLabels(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.labels, self.linear = nn.Embedding(3, inputs), nn.Linear(inputs, outputs)

        def forward(self, given: Tensor, y: Tensor) -> Tensor:
            return self.linear(given + self.labels(y))

    x, y = torch.rand(6, 4).round(), torch.tensor([0, 1, 2, 2, 1, 0])
    prior = flowpost.wrap(nn.Embedding(3, 5), 2, features=5, flow="realnvp", steps=2, hidden=(8,))
    posterior = flowpost.wrap(OfLabels(4, 7), 2, example=(x, y), flow=recipe)
    vae = VAE(posterior, OfLabels(2, 4), Bernoulli(), prior=prior)
    assert {key.partition(".")[0] for key in vae.state_dict()} == {"encoder", "posterior", "decoder", "prior"}
    noise = torch.randn(2, 6, 2)
    out = vae(x, (2,), y=y, noise=noise)
    assert out.kl is None
    torch.testing.assert_close(out.log_prior, prior.log_prob(out.sample.z, y))
    torch.testing.assert_close(out.sample.z, posterior(x, y, sample_shape=(2,), noise=noise).z)
    other = vae(x, (2,), y=y.flip(0).roll(1), noise=noise)
    assert ((other.log_likelihood - out.log_likelihood).abs() > 1e-6).any(0)[y != y.flip(0).roll(1)].all()
    vae.elbo_terms(x, y=y).kl.sum().backward()
    assert all(p.grad is not None for p in [*vae.encoder.parameters(), *prior.parameters()] if p.numel())


def test_noise_of_one_s_own_is_what_is_mapped() -> None:
    for recipe in ("diagonal", "planar"):
        vae = VAE(nn.Linear(4, 5), flowpost.recipes.RECIPES[recipe](5, 2), nn.Linear(2, 4), Bernoulli())
        x, noise = torch.rand(3, 4).round(), torch.randn(7, 3, 2)
        outs = [vae(x, (7,), gradient, noise=noise) for gradient in ("standard", "stl", "dreg")]
        assert all(torch.equal(out.sample.noise, noise) for out in outs)
        torch.testing.assert_close(outs[0].log_likelihood, outs[2].log_likelihood)
        terms = vae.elbo_terms(x, (7,), noise=noise)
        torch.testing.assert_close(terms.reconstruction, outs[0].log_likelihood.mean(0))
        with pytest.raises(ValueError, match="^noise: expected shape"):
            vae(x, noise=noise)
        with pytest.raises(ValueError, match="^noise: expected shape"):
            vae.elbo_terms(x, noise=noise)


def test_a_condition_that_nothing_reads_or_that_is_missing_is_refused() -> None:
    vae, plain = exact(), VAE(nn.Linear(4, 5), flowpost.planar(5, 2), nn.Linear(2, 4), Bernoulli())
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match="^encoder: expected a forward.x, y., for a condition y is given, got Linear"):
        plain(x, y=torch.ones(3, 1))
    plain.encoder = Encoder()
    with pytest.raises(TypeError, match="^decoder: expected a forward.z, y.*whose forward takes input; write a module"):
        plain.decode(torch.zeros(3, 2), 4, torch.ones(3, 1))
    with pytest.raises(ValueError, match="^y: expected the condition that the prior p.z.y. reads, got None; pass y="):
        vae.log_prior(torch.zeros(3, 1).double())
    with pytest.raises(ValueError, match="^y: expected the condition that the prior"):
        vae.sample_prior(3)
    for wrong in (Y[:2], torch.tensor(1.0), [0.0, 1.0]):
        with pytest.raises(ValueError, match="^y: expected a tensor .130, ..... a row for each x, got"):
            vae(X, y=wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="^y: expected a tensor .130, ..... a row for each x, got"):
            log_marginal(vae, X, 21, y=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="^y: expected a tensor .3, ..... a row for each draw, got shape .2, 1."):
        vae.sample(3, (1,), Y[:2])
    with pytest.raises(ValueError, match="^y: expected a tensor .5, ..... a row for each z along"):
        vae.decode(torch.zeros(4, 5, 1), 1, Y[:2])


@pytest.mark.compile
def test_a_conditional_model_compiles_whole() -> None:
    vae = exact()
    noise = torch.randn(130, 1, dtype=torch.float64)

    def loss(x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        terms = vae.elbo_terms(x, y=y, noise=noise)
        return terms.kl - terms.reconstruction

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (130, 7):
        given = X[:count], Y[:count], noise[:count]
        torch.testing.assert_close(compiled(*given), loss(*given))
