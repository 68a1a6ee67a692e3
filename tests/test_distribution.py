"""q(.|x) as an object: a torch distribution that draws with its noise, and is exact where it is Gaussian."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributions import (
    Distribution,
    Gamma,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from versions import untold

import flowpost
from flowpost import Affine, Chain, FlowDistribution, FlowPosterior, Sample, Scale
from flowpost.evaluation import decompose_elbo, importance_estimate, refine
from flowpost.gaps import inference_gaps
from flowpost.vae import VAE, Bernoulli

RECIPES: dict[str, Callable[..., FlowPosterior]] = {
    "diagonal": flowpost.diagonal,
    "full_covariance": flowpost.full_covariance,
    "planar": lambda features, dim: flowpost.planar(features, dim, steps=3),
    "iaf": lambda features, dim: flowpost.iaf(features, dim, steps=2, hidden=(20,), context_size=7),
}
every = pytest.mark.parametrize("name", RECIPES)
compiled = pytest.mark.parametrize("name", [
    "diagonal", pytest.param("planar", marks=pytest.mark.compile), pytest.param("iaf", marks=pytest.mark.compile)
])  # fmt: skip
fsdp2 = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="public from torch 2.6 on")
gaussians = pytest.mark.parametrize("name", ["diagonal", "full_covariance"])


def make(name: str, features: int = 5, dim: int = 3, *, push: float = 0.3) -> FlowPosterior:
    """A float64 posterior whose every parameter was moved."""
    posterior = RECIPES[name](features, dim).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(push * torch.randn_like(parameter))
    return posterior


def features(*batch: int) -> Tensor:
    return torch.randn(*batch, 5, dtype=torch.float64)


def heads_calls(posterior: FlowPosterior) -> list[int]:
    calls: list[int] = []
    assert posterior.head is not None
    posterior.head.register_forward_hook(lambda *_: calls.append(1))
    return calls


# ---------------------------------------------------------------------------------------------- the object, and torch


@every
def test_it_is_a_torch_distribution(name: str) -> None:
    posterior, h = make(name), features(2, 4)
    q = posterior.at(h)
    assert isinstance(q, Distribution)
    assert isinstance(q, FlowDistribution)
    assert (q.batch_shape, q.event_shape) == ((2, 4), (3,))
    assert q.has_rsample
    assert not q._validate_args
    z, log_prob = q.rsample_and_log_prob((6,))
    assert z.requires_grad
    torch.testing.assert_close(q.log_prob(z), log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_prob, posterior.log_prob(z, h), rtol=0, atol=1e-6)
    torch.manual_seed(3)
    first = q.rsample(torch.Size([5]))
    torch.manual_seed(3)
    assert torch.equal(q.sample(torch.Size([5])), first)
    assert not q.sample().requires_grad
    assert q.sample().shape == (2, 4, 3)
    independent = Independent(q, 1)
    assert (independent.batch_shape, independent.event_shape) == ((2,), (4, 3))
    torch.testing.assert_close(independent.log_prob(z), log_prob.sum(-1), rtol=0, atol=1e-6)
    assert repr(q) == f"FlowDistribution({type(posterior.flow).__name__}, batch_shape=(2, 4))"


@every
def test_it_gives_what_the_posterior_gives(name: str) -> None:
    posterior, h = make(name), features(4)
    q, noise = posterior.at(h), torch.randn(6, 4, 3, dtype=torch.float64)
    expected = posterior(h, (6,), noise)
    found = q.draw((6,), noise)
    assert isinstance(found, Sample)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.manual_seed(3)
    drawn = q.draw((6,))
    torch.manual_seed(3)
    assert torch.equal(drawn.noise, posterior(h, (6,)).noise)
    assert torch.equal(q.log_prob(found.z), posterior.log_prob(expected.z, h))
    path, wanted = q.path_log_prob(found), posterior.path_log_prob(expected, h)
    for a, b in zip(
        torch.autograd.grad(path.sum(), list(posterior.parameters())),
        torch.autograd.grad(wanted.sum(), list(posterior.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert q.is_gaussian is posterior.is_gaussian
    if q.is_gaussian:
        assert all(torch.equal(a, b) for a, b in zip(q.gaussian(), posterior.gaussian(h), strict=True))


def test_the_head_runs_once() -> None:
    posterior = make("full_covariance")
    calls = heads_calls(posterior)
    q = posterior.at(features(4))
    sample = q.draw((3,))
    q.path_log_prob(sample).sum().backward(retain_graph=True)
    q.log_prob(sample.z.detach())
    assert all(isinstance(value, Tensor) for value in (*q.gaussian(), q.mean, q.stddev, q.entropy()))
    kl_divergence(q, q)
    q.expand((2, 4)).sample()
    assert calls == [1]


def test_a_call_of_the_posterior_makes_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, h = make("planar"), features(4)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an object was made")

    monkeypatch.setattr(FlowDistribution, "__init__", refuse)
    sample = posterior(h)
    posterior.log_prob(sample.z, h)
    posterior.path_log_prob(sample, h)
    with pytest.raises(AssertionError, match="an object was made"):
        posterior.at(h)


@every
def test_gradients_reach_the_head_through_the_object(name: str) -> None:
    posterior, h = make(name), features(4)
    q, noise = posterior.at(h), torch.randn(4, 3, dtype=torch.float64)

    def gradients(sample: Sample) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sample.log_prob.sum() + sample.z.sin().sum(), list(posterior.parameters()))

    for a, b in zip(gradients(q.draw(noise=noise)), gradients(posterior(h, noise=noise)), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------ no value is read, and what follows it


@every
def test_nothing_is_read_on_a_device_without_values(name: str) -> None:
    """The meta device: an `.item()`, a branch on a value or a mix of devices raises there."""
    posterior = make(name).to("meta")
    h = features(4).to("meta")
    q = posterior.at(h)
    z, log_prob, _ = q.draw((6,))
    assert (z.device.type, z.dtype, log_prob.shape) == ("meta", torch.float64, (6, 4))
    assert q.log_prob(z).shape == (6, 4)
    q.path_log_prob(q.draw()).sum().backward()
    if q.is_gaussian:
        assert q.entropy().shape == (4,)
        assert q.stddev.shape == (4, 3)
        assert kl_divergence(q, q).shape == (4,)


@every
def test_under_vmap(name: str) -> None:
    posterior, h = make(name), features(4)
    z = torch.randn(4, 3, dtype=torch.float64)
    found = torch.vmap(lambda h, z: posterior.at(h).log_prob(z))(h, z)
    torch.testing.assert_close(found, posterior.log_prob(z, h), rtol=0, atol=1e-10)


@compiled
def test_compiles_into_one_graph(name: str) -> None:
    posterior, h = make(name), features(4)
    z = torch.randn(6, 4, 3, dtype=torch.float64)
    torch.compiler.reset()

    def run(h: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        q = posterior.at(h)
        return q.log_prob(z), q.draw((2,)).z

    log_prob, drawn = torch.compile(run, fullgraph=True, backend="aot_eager")(h, z)
    torch.testing.assert_close(log_prob, posterior.log_prob(z, h), rtol=1e-9, atol=1e-9)
    assert drawn.shape == (2, 4, 3)
    torch.compiler.reset()


def test_values_are_validated_where_that_is_asked_for() -> None:
    nan = torch.full((4, 3), math.nan, dtype=torch.float64)
    posterior, h = make("planar"), features(4)
    assert posterior.at(h).log_prob(nan).isnan().all()
    with pytest.raises(ValueError, match="Real"):
        posterior.at(h, validate_args=True).log_prob(nan)
    with pytest.raises(ValueError, match="Real"):
        posterior.at(h, validate_args=True).expand((2, 4)).log_prob(nan)


def test_checking_holds_for_the_object() -> None:
    q = make("planar").at(features(4))
    with flowpost.checking(), pytest.raises(flowpost.NonFiniteError, match="^z: 4 of 4 rows are not finite"):
        q.log_prob(torch.full((4, 3), math.nan, dtype=torch.float64))


@every
def test_it_copies_and_pickles(name: str) -> None:
    q = make(name).at(features(4))
    q.context = None if q.context is None else q.context.detach()
    z = torch.randn(4, 3, dtype=torch.float64)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other.log_prob(z), q.log_prob(z))


# ----------------------------------------------------------------------------------------------------- subclasses


class Wide(FlowDistribution):
    """Ten times as wide as the flow's."""

    def draw(self, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None) -> Sample:
        z, log_prob, noise = super().draw(sample_shape, noise)
        return Sample(10 * z, log_prob - self.event_shape[0] * math.log(10), noise)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value / 10) - self.event_shape[0] * math.log(10)


class WidePosterior(FlowPosterior):
    def at(self, h: Tensor | None = None, *, validate_args: bool = False) -> FlowDistribution:
        return Wide(self.flow, self.context(h), () if h is None else tuple(h.shape[:-1]), validate_args=validate_args)


def test_a_log_q_of_one_s_own_is_not_the_flow_s_gaussian() -> None:
    """Mean, entropy, KL and path gradient were the flow's, and so was `rsample`."""
    torch.manual_seed(0)
    posterior = WidePosterior(0, Affine(3))
    q = posterior.at()
    assert not q.is_gaussian
    assert not posterior.is_gaussian
    assert q.rsample((1000,)).std() > 9
    with pytest.raises(NotImplementedError, match="^path_log_prob: expected one of Wide's own"):
        q.path_log_prob(q.draw())
    parts = nn.Linear(5, 4), WidePosterior(4, Affine(3)), nn.Linear(3, 5), Bernoulli()
    x = torch.ones(6, 5)
    terms, out = VAE(*parts).elbo_terms(x, (2000,)), VAE(*parts)(x, (2000,))
    assert out.kl is None
    assert (terms.kl > 50).all()
    prior = VAE(nn.Linear(5, 4), flowpost.diagonal(4, 3), nn.Linear(3, 5), Bernoulli(), prior=posterior)
    assert prior(x).kl is None


def test_estimates_leave_no_density_of_one_s_own_out() -> None:
    """Draws of `refine` were moved twice, and gaps and decomposition were those of the flow: off by nats."""
    torch.manual_seed(0)
    q = WidePosterior(0, Affine(3)).at()
    z = refine(q, lambda z: -0.5 * (z - 1).square().sum(-1), samples=2000)
    assert (z.mean(0) - 1).abs().max() < 0.1
    assert (z.std(0) - 1).abs().max() < 0.1
    vae = VAE(nn.Linear(5, 4), WidePosterior(4, Affine(3)), nn.Linear(3, 5), Bernoulli())
    for estimate in (decompose_elbo, inference_gaps):
        with pytest.raises(TypeError, match=r"^posterior: expected a q\(z\|x\) that is what .* got a Wide with"):
            estimate(vae, torch.ones(6, 5))


class HeavyTailed(FlowDistribution):
    """Its noise is no normal one: log q is not that of the flow."""

    def draw(self, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None) -> Sample:
        z, log_prob, noise = super().draw(sample_shape, noise)
        return Sample(z, log_prob - 3, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - 3


def test_a_refined_proposal_is_of_the_flow_s_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae, x = VAE(nn.Linear(5, 4), flowpost.diagonal(4, 3), nn.Linear(3, 5), Bernoulli()).eval(), torch.ones(6, 5)
    expected = importance_estimate(vae, x, 2000, refine=5).log_p
    monkeypatch.setattr(vae.posterior, "at", lambda h: HeavyTailed(vae.posterior.flow, vae.posterior.context(h), (6,)))
    torch.testing.assert_close(importance_estimate(vae, x, 2000, refine=5).log_p, expected, rtol=0, atol=0.1)


# --------------------------------------------------------------------------------------------------------- expand


class Named(FlowDistribution):
    """A subclass that is built otherwise and remembers something."""

    def __init__(self, q: FlowDistribution, label: str) -> None:
        super().__init__(q.flow, q.context, q.batch_shape)
        self.label = label


class Weighted(FlowDistribution):
    """A subclass with a tensor of its own, which it expands in torch's way."""

    weight: Tensor

    def expand(self, batch_shape: tuple[int, ...], _instance: Distribution | None = None) -> FlowDistribution:
        new = self.__new__(type(self)) if _instance is None else _instance
        assert isinstance(new, Weighted)
        new.weight = self.weight.expand(batch_shape)
        return super().expand(batch_shape, _instance=new)


@every
@pytest.mark.parametrize(("batch", "larger"), [((2, 4), (6, 2, 4)), ((1, 4), (3, 4)), ((), (5,)), ((4,), (4,))])
def test_expand(name: str, batch: tuple[int, ...], larger: tuple[int, ...]) -> None:
    posterior, h = make(name), features(*batch)
    q = posterior.at(h).expand(larger)
    assert (q.batch_shape, q.event_shape) == (larger, (3,))
    z, log_prob, noise = q.draw((7,))
    assert z.shape == noise.shape == (7, *larger, 3)
    torch.testing.assert_close(log_prob, posterior(h.expand(*larger, -1), (7,), noise).log_prob)
    torch.testing.assert_close(q.log_prob(z), log_prob, rtol=0, atol=1e-6)
    point = torch.randn(3, dtype=torch.float64)
    assert torch.equal(q.log_prob(point), posterior.log_prob(point, h).expand(larger))
    if q.is_gaussian:
        loc, scale_tril = q.gaussian()
        assert (loc.shape, scale_tril.shape) == ((*larger, 3), (*larger, 3, 3))
        assert q.entropy().shape == larger


@every
def test_a_posterior_without_features_expands(name: str) -> None:
    posterior = make(name, features=0)
    q = posterior.at().expand((4,))
    assert posterior.at().batch_shape == ()
    z, log_prob, noise = q.draw((6,))
    assert z.shape == (6, 4, 3)
    assert len(noise.unique()) == noise.numel()
    torch.testing.assert_close(log_prob, posterior.log_prob(z), rtol=0, atol=1e-6)
    assert q.log_prob(z[0, 0]).shape == (4,)


def test_a_subclass_survives_expand() -> None:
    q = make("planar").at(features(4))
    larger = Named(q, "mine").expand((2, 4))
    assert isinstance(larger, Named)
    assert larger.label == "mine"
    assert larger.batch_shape == (2, 4)
    weighted = Weighted(q.flow, q.context, q.batch_shape)
    weighted.weight = torch.ones(4)
    twice = weighted.expand((2, 4)).expand((3, 2, 4))
    assert isinstance(twice, Weighted)
    assert twice.weight.shape == (3, 2, 4)
    z, log_prob = twice.rsample_and_log_prob()
    torch.testing.assert_close(twice.log_prob(z), log_prob, rtol=0, atol=1e-6)


def test_features_that_the_flow_does_not_read_give_the_batch() -> None:
    posterior = FlowPosterior(5, Scale(3, 2.0))
    h, point = torch.zeros(4, 5), torch.zeros(3)
    q = posterior.at(h)
    assert q.batch_shape == (4,)
    assert q.sample((6,)).shape == (6, 4, 3)
    expected = Normal(0.0, 2.0).log_prob(point).sum().expand(4)
    torch.testing.assert_close(q.log_prob(point), expected)
    torch.testing.assert_close(posterior.log_prob(point, h), expected)
    assert q.mean.shape == (4, 3)


# ------------------------------------------------------------------------------------------------- in closed form


@gaussians
def test_moments_and_entropy_are_torch_s(name: str) -> None:
    posterior, h = make(name), features(2, 4)
    q = posterior.at(h)
    loc, scale_tril = posterior.gaussian(h)
    expected = MultivariateNormal(loc, scale_tril=scale_tril)
    torch.testing.assert_close(q.mean, expected.mean)
    torch.testing.assert_close(q.variance, expected.variance)
    torch.testing.assert_close(q.stddev, expected.stddev)
    torch.testing.assert_close(q.entropy(), expected.entropy())
    (gradient,) = torch.autograd.grad(q.entropy().sum(), posterior.head.bias)  # pyright: ignore
    (wanted,) = torch.autograd.grad(expected.entropy().sum(), posterior.head.bias)  # pyright: ignore
    torch.testing.assert_close(gradient, wanted)


def others(batch: tuple[int, ...]) -> dict[str, Distribution]:
    loc, scale = torch.randn(*batch, 3, dtype=torch.float64), torch.rand(*batch, 3, dtype=torch.float64) + 0.3
    matrix = torch.randn(*batch, 3, 3, dtype=torch.float64)
    return {
        "independent": Independent(Normal(loc, scale), 1),
        "multivariate": MultivariateNormal(loc, matrix @ matrix.mT + torch.eye(3, dtype=torch.float64)),
    }


@gaussians
@pytest.mark.parametrize("other", ["diagonal", "full_covariance", "independent", "multivariate"])
@pytest.mark.parametrize("batch", [(2, 4), (4,), ()], ids=str)
def test_kl_is_torch_s_either_way_round(name: str, other: str, batch: tuple[int, ...]) -> None:
    q = make(name).at(features(2, 4))
    p = make(other).at(features(*batch)) if other in RECIPES else others(batch)[other]

    def plain(given: Distribution) -> MultivariateNormal:
        if isinstance(given, FlowDistribution):
            loc, scale_tril = given.gaussian()
            return MultivariateNormal(loc, scale_tril=scale_tril)
        return MultivariateNormal(given.mean, torch.diag_embed(given.variance)) if other == "independent" else given  # pyright: ignore

    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(plain(q), plain(p)))
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(plain(p), plain(q)))
    assert kl_divergence(q, p).shape == (2, 4)
    assert (kl_divergence(q, p) > 0).all()


@pytest.mark.parametrize("rows", [(), (0,), (3, 1)])
def test_kl_of_correlated_gaussians_is_torch_s_also_of_no_rows(rows: tuple[int, ...]) -> None:
    """A ZeroDivisionError of torch's formula came out of the loss of an empty batch."""
    q, r = flowpost.full_covariance(2, dim=3).double(), flowpost.full_covariance(2, dim=3).double()
    with torch.no_grad():
        for parameter in (*q.parameters(), *r.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    p, other = q.at(torch.randn(*rows, 2).double()), r.at(torch.randn(4 if rows != (0,) else 1, 2).double())
    shape = torch.broadcast_shapes(p.batch_shape, other.batch_shape)
    normals = [MultivariateNormal(loc, scale_tril=tril) for loc, tril in (p.gaussian(), other.gaussian())]
    expected = kl_divergence(*normals) if 0 not in rows else torch.zeros(0).double()
    assert kl_divergence(p, other).shape == shape
    torch.testing.assert_close(kl_divergence(p, other), expected, rtol=1e-10, atol=1e-10)


def test_kl_by_samples() -> None:
    """KL(q || p) by Monte Carlo, within four standard errors of the closed form; and of `Independent`, summed."""
    q = make("full_covariance", push=0.2).at(features(1))
    prior = MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    z, log_prob = q.rsample_and_log_prob((20_000,))
    terms = log_prob - prior.log_prob(z)
    assert (terms.mean(0) - kl_divergence(q, prior)).abs() < 4 * terms.std(0) / math.sqrt(20_000)
    assert kl_divergence(Independent(q, 1), Independent(q, 1)).shape == ()


@pytest.mark.parametrize("name", ["diagonal", "full_covariance"])
def test_a_gaussian_of_another_size_is_refused(name: str) -> None:
    q, zeros = make(name).at(features(4)), torch.zeros(1).double()
    for other in (Independent(Normal(zeros, 1.0), 1), flowpost.diagonal(0, dim=1).double().at()):
        for p, r in [(q, other), (other, q)]:
            with pytest.raises(ValueError, match=r"^q: expected one over "):
                kl_divergence(p, r)


def test_a_bare_normal_is_refused() -> None:
    q, normal = make("diagonal").at(features(4)), Normal(torch.zeros(3).double(), 1.0)
    for p, r in [(q, normal), (normal, q)]:
        with pytest.raises(TypeError, match=r"got a bare Normal; wrap it in Independent\(..., 1\)$"):
            kl_divergence(p, r)


def test_nothing_else_has_a_closed_form() -> None:
    q, h = make("planar").at(features(4)), features(4)
    for name, call in {
        "mean": lambda: q.mean,
        "variance": lambda: q.variance,
        "variance ": lambda: q.stddev,
        "entropy": q.entropy,
    }.items():
        with pytest.raises(NotImplementedError, match=f"^{name.strip()}: a flow of Chain has none in closed form"):
            call()
    gaussian = make("diagonal").at(h)
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    flat = Independent(Normal(torch.zeros(4, 3).double(), 1.0), 2)
    gammas = Independent(Gamma(torch.ones(3).double(), 1.0), 1)
    for p, r, said in [
        (q, prior, "p is a flow of Chain"),
        (prior, q, "q is a flow of Chain"),
        (q, q, "p is a flow of Chain"),
        (gaussian, q, "q is a flow of Chain"),
        (gaussian, flat, r"q is Independent\(Normal, 2\)"),
        (gammas, gaussian, r"p is Independent\(Gamma, 1\)"),
    ]:
        with pytest.raises(NotImplementedError, match=f"^kl_divergence: {said}, and only two Gaussians over vectors"):
            kl_divergence(p, r)
    low_rank = LowRankMultivariateNormal(torch.zeros(3).double(), torch.ones(3, 1).double(), torch.ones(3).double())
    with pytest.raises(NotImplementedError):
        kl_divergence(gaussian, low_rank)


# ---------------------------------------------------------------------------------------------------------- hooks


def test_hooks_on_the_flow_are_called() -> None:
    posterior, h = make("planar"), features(4)
    calls: list[tuple[int, ...]] = []
    posterior.flow.register_forward_hook(lambda _, args, __: calls.append(tuple(args[0].shape)))
    plain = make("planar")
    plain.load_state_dict(posterior.state_dict())
    noise = torch.randn(6, 4, 3, dtype=torch.float64)
    found, expected = posterior(h, (6,), noise), plain(h, (6,), noise)
    assert torch.equal(found.log_prob, expected.log_prob)
    posterior.at(h).draw((2,))
    assert calls == [(6, 4, 3), (2, 4, 3)]


def test_an_inverse_put_on_the_flow_is_called() -> None:
    """As `register_fsdp_forward_method` does."""
    posterior, h = make("planar"), features(4)
    z, real, calls = torch.randn(4, 3, dtype=torch.float64), posterior.flow.inverse, []

    def inverse(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return real(*args, **kwargs)

    expected = posterior.log_prob(z, h)
    posterior.flow.inverse = inverse  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(posterior.log_prob(z, h), expected)
    posterior.path_log_prob(posterior(h), h)
    assert calls == [1, 1]


@pytest.mark.parametrize("flow", [
    lambda: Chain(flowpost.Learned(flowpost.Affine(3)).double(), flowpost.Reverse(3)),
    lambda: flowpost.Inverse(flowpost.Learned(flowpost.Planar(3)).double()),
])  # fmt: skip
def test_parts_that_were_cast_before_they_were_put_together(flow: Callable[[], flowpost.Bijector]) -> None:
    posterior, noise = FlowPosterior(0, flow()), torch.randn(4, 3, dtype=torch.float64)
    assert posterior(sample_shape=(4,)).z.dtype == torch.float64
    assert posterior(sample_shape=(4,), noise=noise).log_prob.dtype == torch.float64


@pytest.mark.parametrize("flow", [lambda: flowpost.Planar(3), lambda: flowpost.Autoregressive(3, 2, (8,))])
def test_a_head_is_made_where_the_flow_is(flow: Callable[[], flowpost.Bijector]) -> None:
    posterior = FlowPosterior(5, flow().double())
    z, log_prob, _ = posterior(features(4))
    assert z.dtype == log_prob.dtype == torch.float64
    step = flowpost.Conditioned(flow().double(), 5)
    assert step(torch.zeros(4, 3, dtype=torch.float64), features(4))[0].dtype == torch.float64
    moved = FlowPosterior(5, flow().to("meta"))
    assert moved(torch.zeros(4, 5, device="meta")).z.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_cast_to_the_head_s_dtype(dtype: torch.dtype) -> None:
    flow, head = flowpost.Autoregressive(3, 2, (8,)).double(), nn.Linear(5, 2)
    posterior, h, noise = FlowPosterior(5, flow, head), features(4), torch.randn(4, 3, dtype=torch.float64)
    z, _ = flow(noise, head(h.float()).double())
    assert torch.equal(posterior(h.to(dtype), noise=noise).z, z)


def test_a_half_precision_head_is_refused() -> None:
    posterior = FlowPosterior(5, flowpost.Autoregressive(3, 2, (8,)), nn.Linear(5, 2).bfloat16())
    with pytest.raises(TypeError, match=r"^parameters: expected float32 or float64, got torch\.bfloat16"):
        posterior(torch.zeros(4, 5))


def test_a_posterior_without_parameters_is_of_the_features_dtype() -> None:
    posterior = FlowPosterior(6, flowpost.Affine(3), nn.Identity())
    for dtype in (torch.float32, torch.float64):
        sample = posterior(torch.zeros(4, 6, dtype=dtype))
        assert {value.dtype for value in sample} == {dtype}
    assert posterior.at(torch.zeros(4, 6, device="meta")).draw().z.device.type == "meta"


# ----------------------------------------------------------------------------------------------- traced, and sharded


@every
def test_a_sample_of_inference_mode_has_its_log_q(name: str) -> None:
    posterior, h = make(name), features(4)
    with torch.inference_mode():
        sample = posterior(h)
    assert torch.equal(posterior.path_log_prob(sample, h), sample.log_prob)


class PathLogProb(nn.Module):
    """Features in, log q of a sample as a function of z out."""

    def __init__(self, posterior: FlowPosterior) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, h: Tensor, noise: Tensor) -> Tensor:
        return self.posterior.path_log_prob(self.posterior(h, noise=noise), h)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=untold)])
@pytest.mark.parametrize("name", ["diagonal", "planar"])
def test_a_path_gradient_is_not_exported(name: str, *, strict: bool) -> None:
    model, h, noise = PathLogProb(make(name)), features(4), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"path_log_prob: .* export it under torch\.no_grad"):
        torch.export.export(model, (h, noise), strict=strict)
    with torch.no_grad():
        program = torch.export.export(model, (h, noise), strict=strict)
    assert torch.allclose(program.module()(h, noise), model(h, noise), rtol=1e-12)


@every
def test_a_trace_is_refused(name: str) -> None:
    posterior, h = make(name), features(4)
    message = r"^torch\.jit\.trace: .* use torch\.export or torch\.compile"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(posterior, (h,), check_trace=False)
    context = posterior.context(h)
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(posterior.flow, (torch.zeros(4, 3, dtype=torch.float64), context), check_trace=False)


@fsdp2
def test_shards_are_refused_by_name(tmp_path: Path) -> None:
    """FSDP2 gathers the parameters for `forward`, and for the methods that are registered; one process is enough."""
    posterior, h = make("planar"), features(4)
    sample, expected = posterior(h), posterior.log_prob(torch.ones(4, 3).double(), h)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fsdp.fully_shard(posterior, mesh=init_device_mesh("cpu", (1,)))
        message = r"^parameters: expected whole tensors, .* torch\.distributed\.fsdp\.register_fsdp_forward_method"
        for call in (
            lambda: posterior.log_prob(sample.z, h),
            lambda: posterior.path_log_prob(sample, h),
            lambda: posterior.at(h),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        for name in ("log_prob", "path_log_prob"):
            fsdp.register_fsdp_forward_method(posterior, name)
        assert torch.equal(posterior.log_prob(torch.ones(4, 3).double(), h), expected)
        assert torch.equal(posterior.path_log_prob(sample, h), sample.log_prob)
        assert torch.equal(posterior(h, noise=sample.noise).log_prob, sample.log_prob)
    finally:
        dist.destroy_process_group()


@fsdp2
def test_a_sharded_step_within_refuses_to_be_inverted(tmp_path: Path) -> None:
    step = flowpost.Autoregressive(3, hidden=(8,)).double()
    posterior, z = FlowPosterior(0, Chain(flowpost.Reverse(3), step)), torch.randn(4, 3).double()
    expected = posterior.log_prob(z)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fsdp.fully_shard(step, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match="register_fsdp_forward_method"):
            posterior.log_prob(z)
        with pytest.raises(RuntimeError, match="register_fsdp_forward_method"):
            step.inverse(z)
        fsdp.register_fsdp_forward_method(step, "inverse")
        with torch.no_grad():
            found = posterior.log_prob(z)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    finally:
        dist.destroy_process_group()
