"""A prior of one's own: every use of p(z) finds it, its KL is exact where it is Gaussian, and it is trained."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

import flowpost
from flowpost import Affine, Chain, FlowPosterior, Sample, Shift, Sigmoid, Softplus
from flowpost.distribution import FlowDistribution
from flowpost.evaluation import decompose_elbo, kl_per_latent, log_marginal, sandwich
from flowpost.gaps import inference_gaps
from flowpost.objectives import elbo_terms
from flowpost.vae import VAE, Bernoulli, Gaussian, VAEOutput
from flowpost.wrapped import WrappedPosterior

DIM = 2


def at(loc: float) -> FlowPosterior:
    """N(loc, I)."""
    prior = FlowPosterior(0, Chain(Shift(DIM)))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.fill_(loc)
    return prior


class Wide(FlowDistribution):
    """Ten times as wide as the flow's."""

    def draw(self, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None) -> Sample:
        z, log_prob, noise = super().draw(sample_shape, noise)
        return Sample(10 * z, log_prob - DIM * math.log(10), noise)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value / 10) - DIM * math.log(10)


class WidePosterior(FlowPosterior):
    def at(self, h: Tensor | None = None, *, validate_args: bool = False) -> FlowDistribution:
        q = super().at(h, validate_args=validate_args)
        return Wide(q.flow, q.context, tuple(q.batch_shape), validate_args=validate_args)


def make(prior: FlowPosterior | None = None, posterior: str = "planar") -> VAE:
    torch.manual_seed(0)
    posteriors = flowpost.recipes.RECIPES[posterior](5, DIM)
    return VAE(nn.Linear(4, 5), posteriors, nn.Linear(DIM, 4), Bernoulli(), prior=prior).double()


X = (torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4) > 0).double()
N3 = Independent(Normal(torch.full((DIM,), 3.0, dtype=torch.float64), 1.0), 1)


def test_a_prior_with_an_at_of_its_own_is_scored_as_it_is_drawn() -> None:
    """Its draws were the subclass's, and log p(z) was the flow's."""
    vae = make(WidePosterior(0, Shift(DIM)))
    z = vae.sample_prior(4000)
    assert z.std() > 9
    wide = Independent(Normal(torch.zeros(DIM, dtype=torch.float64), 10.0), 1)
    torch.testing.assert_close(vae.log_prior(z), wide.log_prob(z))
    of_y = make(WidePosterior(DIM, Shift(DIM)))
    y = torch.randn(6, DIM, dtype=torch.float64)
    drawn = of_y.prior.at(y).draw()  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(of_y.log_prior(drawn.z, y), drawn.log_prob)


def test_every_use_of_the_prior_finds_it() -> None:
    plain, vae = make(), make(at(3.0))
    z = torch.randn(7, DIM, dtype=torch.float64)
    torch.testing.assert_close(vae.log_prior(z), N3.log_prob(z))
    torch.testing.assert_close(plain.log_prior(z), Normal(0.0, 1.0).log_prob(z).sum(-1))
    torch.manual_seed(1)
    assert (vae.sample_prior(4000).mean(0) - 3).abs().max() < 0.1
    assert plain.sample_prior(4000).mean(0).abs().max() < 0.1
    noise = torch.randn(3, DIM, dtype=torch.float64)
    torch.testing.assert_close(vae.sample_prior(3, noise=noise), 3 + noise)
    assert torch.equal(plain.sample_prior(3, noise=noise), noise)
    for model in (plain, vae):
        with pytest.raises(ValueError, match=rf"^noise: expected shape \(3, {DIM}\), got \({DIM},\)$"):
            model.sample_prior(3, noise=noise[0])
    half = VAE(nn.Linear(4, 5).bfloat16(), flowpost.planar(5, DIM), nn.Linear(DIM, 4), Bernoulli())
    assert half.sample_prior(3).dtype == torch.float32  # z's, whatever the encoder's
    torch.manual_seed(2)
    out = vae(X, (3,))
    torch.testing.assert_close(out.log_prior, N3.log_prob(out.sample.z))
    torch.testing.assert_close(vae.log_joint(X, out.sample.z)[1], out.log_prior)
    assert out.kl is None


def test_estimates_of_log_p_find_it() -> None:
    """A decoder that does not read z: p(x) is the likelihood, whatever the prior."""
    vae = make(at(1.0))
    with torch.no_grad():
        vae.get_parameter("decoder.weight").zero_()
    expected = vae.likelihood.log_prob(vae.decode(torch.zeros(1, DIM, dtype=torch.float64), 4), X)
    torch.manual_seed(0)
    assert (log_marginal(vae, X, 20_000) - expected).abs().max() < 0.1
    gaps = inference_gaps(vae, X[:2], steps=300, samples=2000)
    torch.testing.assert_close(gaps.estimate.log_p, expected[:2], rtol=0, atol=0.02)
    assert (gaps.approximation < 0.05).all()  # the best planar posterior is the prior itself
    parts = decompose_elbo(vae, X, 512)
    terms = elbo_terms(*vae(X, (4000,))[:3])
    found = (parts.mutual_information + parts.marginal_kl).mean()
    torch.testing.assert_close(found, terms.kl.mean(), rtol=0.05, atol=0.05)


def test_the_kl_of_each_latent_is_to_n_0_1() -> None:
    with pytest.raises(ValueError, match="^prior: expected N.0, I., whose latents are independent"):
        kl_per_latent(make(at(3.0), "diagonal"), X)


@pytest.mark.parametrize("posterior", ["diagonal", "full_covariance"])
def test_the_kl_of_two_gaussians_is_exact(posterior: str) -> None:
    prior = flowpost.full_covariance(0, DIM)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    vae = make(prior, posterior)
    out = vae(X)
    q, p = vae.encode(X), prior.double().at()
    gaussians = [MultivariateNormal(loc, scale_tril=tril) for loc, tril in (q.gaussian(), p.gaussian())]
    expected = torch.distributions.kl_divergence(*gaussians)
    torch.testing.assert_close(out.kl, expected)
    assert out.latent_kl is None
    torch.testing.assert_close(vae.elbo_terms(X).kl, expected)
    torch.manual_seed(0)
    many = vae(X, (20_000,))
    estimate = elbo_terms(many.log_likelihood, many.log_prior, many.log_q).kl
    torch.testing.assert_close(estimate, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["realnvp", "maf"])
def test_a_prior_is_trained_with_the_rest(name: str) -> None:
    """x near 5 at scale 0.1: a prior that learns gets more of the ELBO."""
    torch.manual_seed(0)
    x = 5 + 0.1 * torch.randn(64, 1)
    bounds = []
    for prior in (None, flowpost.recipes.RECIPES[name](0, DIM, steps=2, hidden=(16,))):
        torch.manual_seed(1)
        vae = VAE(nn.Linear(1, 8), flowpost.diagonal(8, DIM), nn.Linear(DIM, 1), Gaussian(0.1), prior=prior)
        optimizer = torch.optim.Adam(vae.parameters(), 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            terms = vae.elbo_terms(x, (4,))
            loss = (terms.kl - terms.reconstruction).mean()
            loss.backward()
            optimizer.step()
        bounds.append(loss.item())
        if prior is not None:
            assert {key for key in vae.state_dict() if key.startswith("prior.")}
            assert all(p.grad is not None for p in prior.parameters() if p.requires_grad and p.numel())
    assert math.isfinite(bounds[1])
    assert bounds[1] < bounds[0] + 0.5


def test_samples_and_reconstructions_have_the_shape_of_x() -> None:
    vae = VAE(nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), flowpost.planar(5, DIM), nn.Linear(DIM, 6), Bernoulli())
    x = vae.sample(9, (2, 3))
    assert x.shape == (9, 2, 3)
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    again = vae.reconstruct(x)
    assert again.shape == x.shape
    assert not again.requires_grad
    assert ((again > 0) & (again < 1)).all()


def test_a_prior_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^prior: expected one of dim={DIM}, the posterior's, got dim={DIM + 1}"):
        make(flowpost.realnvp(0, DIM + 1))
    with pytest.raises(TypeError, match="^prior: expected a posterior, such as realnvp.0, dim=2., got Normal"):
        make(Normal(0.0, 1.0))  # pyright: ignore[reportArgumentType]


ENDS = {"all": (), "positive": (Softplus(DIM),), "shares": (Sigmoid(DIM),)}
"""From the widest to the narrowest."""


@pytest.mark.parametrize("q", ENDS)
@pytest.mark.parametrize("p", ENDS)
def test_a_prior_of_fewer_z_than_the_posterior_s_is_refused(q: str, p: str) -> None:
    """Its log p(z) is nan where z has left its interval, and with it the loss."""
    posterior, prior = FlowPosterior(4, Chain(Affine(DIM), *ENDS[q])), FlowPosterior(0, Chain(Affine(DIM), *ENDS[p]))
    parts = nn.Linear(5, 4), posterior, nn.Linear(DIM, 5), Bernoulli()
    if [*ENDS].index(p) <= [*ENDS].index(q):
        assert VAE(*parts, prior=prior)(torch.ones(6, 5), (50,)).log_prior.isfinite().all()
        return
    with pytest.raises(ValueError, match="^prior: expected one of all z that the posterior gives, numbers between "):
        VAE(*parts, prior=prior)


class Bimodal(VAE):
    """Of latents that are all near 2, or all near -2."""

    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        ends = [Normal(end, 1.0).log_prob(z).sum(-1) for end in (-2.0, 2.0)]
        return torch.logaddexp(*ends) - math.log(2)


def test_a_subclass_s_own_prior_has_no_closed_kl() -> None:
    """The KL of a Gaussian posterior was that to N(0, I), and so was what the model trained against."""
    torch.manual_seed(0)
    vae, x = Bimodal(nn.Linear(5, 4), flowpost.diagonal(4, DIM), nn.Linear(DIM, 5), Bernoulli()), torch.ones(6, 5)
    out = vae(x, (1000,))
    assert out.kl is None
    wanted = (out.log_q - vae.log_prior(out.sample.z)).mean(0)
    torch.testing.assert_close(vae.elbo_terms(x, (1000,), noise=out.sample.noise).kl, wanted, rtol=1e-5, atol=1e-5)
    terms = decompose_elbo(vae, x, samples=5)
    assert terms.total_correlation is not None
    assert terms.dimension_kl is None
    with pytest.raises(ValueError, match="^prior: expected N"):
        kl_per_latent(vae, x)


def test_a_prior_of_one_s_own_is_not_drawn_from_as_if_it_were_normal() -> None:
    """`sandwich` drew its x from another model than the one whose log p(x) it then bounded from above."""
    vae = Bimodal(nn.Linear(5, 4), flowpost.diagonal(4, DIM), nn.Linear(DIM, 5), Bernoulli())
    with pytest.raises(NotImplementedError, match="^sample_prior: expected one of Bimodal's own"):
        sandwich(vae, 5, (5,), 2, 2)


class Scaled(VAE):
    """Whose log p(x|z) counts double."""

    def evaluate(self, *args: Any, **kwargs: Any) -> VAEOutput:  # noqa: ANN401
        out = super().evaluate(*args, **kwargs)
        return out._replace(log_likelihood=2 * out.log_likelihood)


def test_a_subclass_s_own_evaluate_is_what_both_ways_to_the_elbo_take() -> None:
    """The terms of a Gaussian posterior passed it by."""
    vae, x = Scaled(nn.Linear(5, 4), flowpost.diagonal(4, DIM), nn.Linear(DIM, 5), Bernoulli()), torch.ones(6, 5)
    noise = torch.randn(3, 6, DIM)
    out = vae(x, (3,), noise=noise)
    torch.testing.assert_close(vae.elbo_terms(x, (3,), noise=noise), elbo_terms(*out[:4]))


def test_what_is_put_on_a_model_counts_as_what_a_subclass_has() -> None:
    """An ``evaluate`` was passed by for the closed KL, and x drawn from N(0, I), whatever log p(z) was."""
    vae, x = VAE(nn.Linear(5, 4), flowpost.diagonal(4, DIM), nn.Linear(DIM, 5), Bernoulli()), torch.ones(6, 5)
    noise, evaluate = torch.randn(3, 6, DIM), vae.evaluate

    def twice(*args: Any, **kwargs: Any) -> VAEOutput:  # noqa: ANN401
        out = evaluate(*args, **kwargs)
        return out._replace(log_likelihood=2 * out.log_likelihood)

    setattr(vae, "evaluate", twice)  # noqa: B010
    out = vae(x, (3,), noise=noise)
    assert out.kl is None
    torch.testing.assert_close(vae.elbo_terms(x, (3,), noise=noise), elbo_terms(*out[:3]))
    setattr(vae, "log_prior", lambda z, y=None: Normal(3.0, 1.0).log_prob(z).sum(-1))  # noqa: B010
    with pytest.raises(NotImplementedError, match="^sample_prior: expected one of VAE's own, as its log_prior"):
        vae.sample(4, (5,))
    setattr(vae, "sample_prior", lambda count, y=None: 3 + torch.randn(count, DIM))  # noqa: B010
    assert vae.sample(4, (5,)).shape == (4, 5)


class TwoModes(FlowPosterior):
    def log_prob(self, z: Tensor, h: Tensor | None = None) -> Tensor:
        return torch.logaddexp(super().log_prob(z - 3, h), super().log_prob(z + 3, h)) - math.log(2)


class Clamped(FlowPosterior):
    def forward(
        self, h: Tensor | None = None, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None
    ) -> Sample:
        sample = super().forward(h, sample_shape, noise)
        return sample._replace(z=sample.z.clamp(-1, 1))


class Doubled(WrappedPosterior):
    def features(self, *inputs: object, **kwargs: object) -> Tensor:
        return 2 * super().features(*inputs, **kwargs)


@pytest.mark.parametrize("part", ["prior", "posterior", "encoder"])
def test_what_a_subclass_does_where_nobody_asks_is_refused(part: str) -> None:
    """The KL was that to the prior's flow, the draws those of `at`, the features those of the parts."""
    encoder, decoder = nn.Linear(5, 4), nn.Linear(DIM, 5)
    wrapped = flowpost.wrap(encoder, DIM, features=4, flow="diagonal")
    build: dict[str, Callable[[], VAE]] = {
        "prior": lambda: VAE(wrapped, decoder, Bernoulli(), prior=TwoModes(0, Affine(DIM))),
        "posterior": lambda: VAE(encoder, Clamped(4, Affine(DIM)), decoder, Bernoulli()),
        "encoder": lambda: VAE(Doubled(encoder, wrapped.posterior, pair=False), decoder, Bernoulli()),
    }
    with pytest.raises(
        TypeError, match=f"^{part}: expected draws and log q as .* of its own, which a VAE does not call"
    ):
        build[part]()


@pytest.mark.parametrize("name", ["iaf", "affine_iaf", "naf"])
def test_a_prior_that_searches_at_every_z_says_so(name: str) -> None:
    with pytest.warns(UserWarning, match="^prior: log p.z. takes a sweep over the variables in each of 2 autoregr"):
        make(flowpost.recipes.RECIPES[name](0, DIM, steps=2, hidden=(8,)))


def test_a_decoder_that_returns_no_tensor_is_refused() -> None:
    class Named(nn.Linear):
        def forward(self, input: Tensor) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return {"reconstruction": super().forward(input)}

    vae = VAE(nn.Linear(4, 5), flowpost.planar(5, DIM), Named(DIM, 4), Bernoulli())
    with pytest.raises(TypeError, match="^decoder: expected a tensor of the likelihood's numbers, got dict of recon"):
        vae(X.float())
