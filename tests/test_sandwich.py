"""log p(x) between two bounds, on models whose log p(x) is known: linear-Gaussian ones, and two latents by quadrature.

Seeds are fixed. Each statistical test says how likely a right estimator was to fail, and has a fault that it must find.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from linear_gaussian import LinearGaussian, fitted
from small import small
from torch import Tensor, nn

import flowpost
from flowpost import annealed
from flowpost.annealed import anneal, pilot, schedule
from flowpost.annealing import Gradient
from flowpost.chains import Chains, Part, mixed
from flowpost.density import standard_normal_log_prob
from flowpost.distribution import FlowDistribution
from flowpost.evaluation import AnnealedEstimate, annealed_estimate, importance_estimate, refine, sandwich
from flowpost.gaps import inference_gaps
from flowpost.refining import Proposal, fit_proposal
from flowpost.sandwich import _parts
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical, Gaussian, Likelihood

MORE = [pytest.param(name, False, marks=pytest.mark.full) for name in ("full_covariance", "planar", "maf")]
FAMILIES = [("diagonal", False), ("diagonal", True), ("iaf", False), ("realnvp", False), *MORE]
CHAINS = 1500


def known(name: str, dim: int = 2) -> tuple[VAE, LinearGaussian]:
    """A linear-Gaussian model with some q of a family, that is not p(z|x)."""
    model = LinearGaussian(dim, scale=2.0)
    if name in ("diagonal", "planar"):
        return fitted(model, name, stretch=0.8, shift=0.3), model
    return VAE(nn.Identity(), small(name, len(model.bias), dim, push=0.05), model, Gaussian()), model


def space(vae: VAE, x: Tensor, *, of_prior: bool = False) -> tuple[Part, FlowDistribution]:
    """The noise space of q(z|x), or of p(z)."""
    return _parts(vae, (x, None), Chains(1, int(of_prior), 10, 2, "sigmoidal", 100))[-1]


def ways(
    vae: VAE, model: LinearGaussian, x: Tensor, gradient: Gradient | None = None, *, of_prior: bool = False
) -> tuple[Tensor, Tensor]:
    """The log-weights less log p(x), there and back, each ``(CHAINS, B)``, from exact draws."""
    part, q = space(vae, x, of_prior=of_prior)
    gradient = gradient or part.gradient
    sizes = pilot(gradient, torch.randn(4, *part.like.shape, dtype=x.dtype), 10, "sigmoidal", 2)
    there = anneal(gradient, torch.randn(CHAINS, *part.like.shape, dtype=x.dtype), schedule(10), sizes, 2)
    noise, _ = q.flow.inverse(model.posterior(x).sample((CHAINS,)), q.context)
    back = anneal(gradient, noise, schedule(10), sizes, 2, backwards=True)
    return there.log_weight - model.evidence(x), back.log_weight + model.evidence(x)


def fair(log_ratio: Tensor) -> bool:
    """Whether the mean of weights is 1 within 4.5 standard errors, for each x: 1e-5 of right ones fail."""
    ratio = log_ratio.exp()
    return bool(((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / math.sqrt(len(ratio))).all())


@pytest.mark.parametrize(("name", "of_prior"), FAMILIES)
def test_weights_have_the_evidence_as_their_mean_there_and_back(name: str, of_prior: bool) -> None:  # noqa: FBT001
    vae, model = known(name)
    x = model.draw(3)[1]
    there, back = ways(vae, model, x, of_prior=of_prior)
    assert fair(there)
    assert fair(back)
    assert (there.mean(0) < 0.02).all()
    assert (back.mean(0) < 0.02).all()
    assert (there.std(0) > 0.05).all()  # it was no trivial case


def test_a_missing_log_det_is_found() -> None:
    vae, model = known("diagonal")
    x = model.draw(3)[1]
    q = vae.encode(x)

    def wrong(noise: Tensor) -> tuple[Tensor, Tensor]:
        leaf = noise.detach().requires_grad_()
        value = sum(vae.log_joint(x, q.rsample(tuple(noise.shape[:1]), leaf)))
        assert isinstance(value, Tensor)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    assert not any(fair(way) for way in ways(vae, model, x, wrong))


def test_a_way_back_in_the_order_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, model = known("iaf")
    x = model.draw(3)[1]
    monkeypatch.setattr(Tensor, "flip", lambda self, *_: self)
    there, back = ways(vae, model, x)
    assert fair(there)
    assert not fair(back)


def test_step_sizes_that_follow_the_chain_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a run adapts them to where its own chains are."""
    vae, model = known("iaf")
    x, right = model.draw(3)[1], annealed.vary

    def follows(state: annealed.State, gradient: Gradient, size: Tensor, *rest: object) -> object:
        here = torch.where(state.value > state.value.mean(0), 0.3, 2.0)
        return right(state, gradient, size * here, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(annealed, "vary", follows)
    assert not all(fair(way) for way in ways(vae, model, x))


@pytest.mark.parametrize("name", ["diagonal", "iaf", pytest.param("realnvp", marks=pytest.mark.full)])
def test_the_evidence_lies_in_between(name: str) -> None:
    """200 simulated x: means within 4 standard errors of their side, intervals of 2 errors cover about as they say."""
    vae, model = known(name)
    found = sandwich(vae, 200, (5,), chains=16, temperatures=10, leapfrogs=2, samples=100)
    z, x = model.draw(200)
    lower = annealed_estimate(vae, x, chains=16, temperatures=10, leapfrogs=2)
    missed = (lower.log_p - model.evidence(x)).double()
    assert missed.mean() < 4 * missed.std() / math.sqrt(200)
    assert ((missed.abs() < 2 * lower.standard_error).double().mean() - 0.92).abs() < 0.08
    gap = found.gap
    assert gap.mean() > -4 * gap.std() / math.sqrt(200)
    assert gap.mean() < 0.1
    assert (found.residual < 1e-6).all()
    assert found.importance.k_hat.shape == (200,)


def test_the_upper_bound_is_above_and_the_lower_below() -> None:
    """With one chain and few temperatures, both miss by far more than their errors, each on its side."""
    vae, model = known("diagonal")
    torch.manual_seed(1)
    seen: list[Tensor] = []
    original = vae.encode
    vae.encode = lambda x, y=None: (seen.append(x), original(x, y))[1]  # pyright: ignore[reportAttributeAccessIssue]
    found = sandwich(vae, 300, (5,), chains=1, temperatures=2, leapfrogs=1, samples=30, pairs=1000)
    truth = model.evidence(seen[0])
    for away in (truth - found.lower.log_p, found.upper.log_p - truth):
        assert away.mean() > 4 * away.std() / math.sqrt(300)
    assert found.lower.standard_error.isnan().all()


def test_more_temperatures_are_tighter() -> None:
    vae, model = known("realnvp")
    x = model.draw(100)[1]
    missed = [
        (model.evidence(x) - annealed_estimate(vae, x, 2, temperatures, 2, prior_chains=0).log_p).mean()
        for temperatures in (1, 5, 25)
    ]
    assert missed[0] > 2 * missed[1] > 4 * missed[2]


def test_one_temperature_is_importance_sampling() -> None:
    """The same draws, the same numbers."""
    vae, model = known("iaf")
    x = model.draw(4)[1]
    torch.manual_seed(5)
    part, q = space(vae, x)
    noise = torch.randn(50, 4, 2, dtype=torch.float64)
    walk = anneal(part.gradient, noise, schedule(1), torch.empty(0, 4), 1)
    out = vae.evaluate(x, q, (50,), noise=noise)
    torch.testing.assert_close(walk.log_weight, (out.log_likelihood + out.log_prior - out.log_q).detach())
    assert walk.acceptance.isnan().all()


# -------------------------------------------------------------------------------------------- quadrature, two latents


def quadrature(vae: VAE, x: Tensor, y: Tensor | None = None) -> Tensor:
    line = torch.linspace(-7, 7, 141, dtype=torch.float64)
    z = torch.cartesian_prod(line, line).unsqueeze(1).expand(-1, len(x), -1)
    with torch.no_grad():
        joint = torch.stack([sum(vae.log_joint(x, part, y)) for part in z.split(1000)[:-1]]).flatten(0, 1)  # pyright: ignore[reportCallIssue, reportArgumentType]
        joint = torch.cat([joint, sum(vae.log_joint(x, z[len(joint) :], y))])  # pyright: ignore[reportArgumentType]
    return joint.logsumexp(0) + 2 * math.log(14 / 140)


class Both(nn.Module):
    """A network of the latents or x, and of y."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs + 2, 16), nn.Tanh(), nn.Linear(16, outputs)).double()

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([z, y], -1))


CASES: dict[str, tuple[Likelihood, int]] = {
    "bernoulli": (Bernoulli(), 1),
    "binomial": (Binomial(7), 1),
    "gaussian": (Gaussian(), 2),
    "categorical": (Categorical(3), 3),
}


def nonlinear(kind: str, *, conditional: bool) -> VAE:
    """Two latents, six elements, a learned prior; with a condition y every part reads it."""
    torch.manual_seed(3)
    likelihood, numbers = CASES[kind]
    prior = small("realnvp", 2 if conditional else 0, 2, seed=4, push=0.2)
    if conditional:
        return VAE(Both(6, 16), small("planar", 16, 2, push=0.1), Both(2, 6 * numbers), likelihood, prior=prior)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 6 * numbers)).double()
    return VAE(nn.Linear(6, 16).double(), small("iaf", 16, 2, push=0.1), net, likelihood, prior=prior)


def _pairs() -> list:
    """Of the likelihood and of the condition, which have no part in common: each once in the full run."""
    early = {("binomial", False), ("gaussian", True), ("categorical", False)}
    marks = {True: pytest.mark.full, False: pytest.mark.long}
    pairs = [(kind, conditional) for kind in CASES for conditional in (False, True)]
    return [pytest.param(*pair, marks=() if pair[0] == "bernoulli" else marks[pair in early]) for pair in pairs]


@pytest.mark.parametrize(("kind", "conditional"), _pairs())
def test_two_latents_against_quadrature(kind: str, conditional: bool) -> None:  # noqa: FBT001
    """A nonlinear decoder and a learned prior, or with a condition y one of p(z|y): within 0.1 nat for every x."""
    vae = nonlinear(kind, conditional=conditional)
    y = torch.randn(4, 2, dtype=torch.float64) if conditional else None
    x = vae.sample(4, (6,), y)
    found = annealed_estimate(vae, x, chains=200, temperatures=30, leapfrogs=2, y=y)
    torch.testing.assert_close(found.log_p, quadrature(vae, x, y), rtol=0, atol=0.1)


class Folded(nn.Module):
    """x = 0 comes of z = -2 and, six nats less often and a wall away, of z = 2."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([2 * (z.square() - 4), math.sqrt(12) * torch.sigmoid(9 * z)], -1)


def folded(*, learned: bool) -> tuple[VAE, Tensor, Tensor]:
    """With a q at the mode that has a 400th of p(z|x); x, and log p(x) by quadrature."""
    torch.manual_seed(0)
    prior = small("realnvp", 0, 1, push=0.05) if learned else None
    q = flowpost.diagonal(2, 1).double()
    head = cast(nn.Linear, q.head)
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([2.0, -2.0], dtype=torch.float64)
    vae, x = VAE(nn.Identity(), q, Folded(), Gaussian(1.0), prior=prior), torch.zeros(3, 2, dtype=torch.float64)
    z = torch.linspace(-7, 7, 5001, dtype=torch.float64).view(-1, 1, 1)
    with torch.no_grad():
        truth = sum(vae.log_joint(x, z.expand(-1, 3, -1), None)).logsumexp(0) + math.log(14 / 5000)  # pyright: ignore[reportAttributeAccessIssue]
    return vae, x, truth


@pytest.mark.parametrize("learned", [False, True])
def test_a_mode_that_q_does_not_reach_is_found_from_the_prior(learned: bool) -> None:  # noqa: FBT001
    """Chains in q's noise alone are short by six nats; with some from the prior, by the eighth that these count."""
    vae, x, truth = folded(learned=learned)
    for prior_chains, expected in ((0, 6.0), (30, math.log(8))):
        found = annealed_estimate(vae, x, 30, 40, 2, prior_chains=prior_chains).log_p
        torch.testing.assert_close(truth - found, torch.full_like(truth, expected), rtol=0, atol=0.8)


@pytest.mark.parametrize("learned", [False, True])
def test_a_refined_proposal_reaches_a_mode_that_q_does_not(learned: bool) -> None:  # noqa: FBT001
    """Samples of q alone are short by six nats, and their k-hat says nothing of it."""
    vae, x, truth = folded(learned=learned)
    alone, refined = importance_estimate(vae, x, 1000), importance_estimate(vae, x, 1000, refine=10)
    torch.testing.assert_close(truth - alone.log_p, torch.full_like(truth, 6.0), rtol=0, atol=0.8)
    assert (alone.k_hat < 0.7).all()
    assert (refined.k_hat < 0.7).all()
    assert ((truth - refined.log_p).abs() < 5 * refined.standard_error).all()
    assert (refined.standard_error < 0.1).all()


@pytest.mark.full
@pytest.mark.parametrize("conditional", [False, True])
def test_simulated_x_of_a_nonlinear_model(conditional: bool) -> None:  # noqa: FBT001
    vae = nonlinear("categorical", conditional=conditional)
    y = torch.randn(100, 2, dtype=torch.float64) if conditional else None
    gap = sandwich(vae, 100, (6,), 8, 60, 2, samples=30, y=y).gap
    assert gap.mean().abs() < 4 * gap.std() / 10 + 0.02


# ---------------------------------------------------------------------------------------------------- the interface


def test_parts_do_not_matter_and_progress_counts() -> None:
    """Three parts, of five chunks of chains each; the model's parameters want gradients as before."""
    vae, model = known("diagonal")
    vae.decoder.register_parameter("frozen", nn.Parameter(torch.zeros(1), requires_grad=False))
    x = model.draw(3)[1]
    before = [parameter.requires_grad for parameter in vae.parameters()]
    told: list[tuple[int, int]] = []
    found = annealed_estimate(vae, x, 20, 12, 2, pairs=7, progress=lambda *now: told.append(now))
    torch.testing.assert_close(found.log_p, model.evidence(x), rtol=0, atol=0.2)
    assert found.log_p.dtype == found.standard_error.dtype == found.ess.dtype == torch.float64
    assert (found.acceptance > 0.6).all()
    total = 3 * (30 + 3 * 11 + 30 + 2 * 11)  # of q(z|x), and of the ten chains in the noise of p(z)
    assert told == [(done, total) for done in range(1, total + 1)]
    assert before == [parameter.requires_grad for parameter in vae.parameters()]
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_the_errors_are_those_of_importance_weights() -> None:
    """Against 300 repetitions: the mean standard error is the spread of log p, within a fifth."""
    vae, model = known("diagonal")
    x = model.draw(1)[1].expand(300, -1)
    found = annealed_estimate(vae, x, 32, 10, 2)
    assert found.standard_error.mean().item() == pytest.approx(found.log_p.std().item(), rel=0.2)
    assert ((found.ess > 1) & (found.ess <= 48)).all()


def test_chains_whose_weights_are_all_zero_leave_the_error_of_the_others() -> None:
    zero, one = torch.full((1,), -math.inf, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    good, none = AnnealedEstimate(one, 0.1 * one, 5 * one, one), AnnealedEstimate(zero, zero.log(), zero.log(), one)
    like = torch.zeros(1, 2)
    found = mixed([good, none], [Part(lambda e: (e, e), like, 8, 7 / 8), Part(lambda e: (e, e), like, 8, 1 / 8)])
    torch.testing.assert_close(found, AnnealedEstimate(one + math.log(7 / 8), 0.1 * one, 5 * one, one))


def test_the_summary_says_what_was_found() -> None:
    vae, _ = known("diagonal")
    found = sandwich(vae, 20, (5,), 4, 10, 2, samples=100)
    lines = str(found).splitlines()
    assert lines[0].startswith("log p(x) of 20 x simulated from the model")
    assert f"{found.lower.log_p.mean():.3f} ± " in lines[1]
    assert f"{found.gap.mean():.3f} ± {found.gap.std() / math.sqrt(20):.3f}, largest {found.gap.max():.2f}" in lines[3]
    assert "100 importance samples" in lines[4]
    assert lines[4].endswith(f", k-hat above 0.7 for {int((found.importance.k_hat > 0.7).sum())}")
    assert "residual of the inverse at most" in lines[5]


def test_a_summary_of_one_x_has_no_standard_error_and_warns_nobody() -> None:
    vae, _ = known("diagonal")
    found = sandwich(vae, 1, (5,), 4, 10, 2, samples=100)
    assert f"{found.lower.log_p.item():.3f} ± nan" in str(found).splitlines()[1]


def test_float32_and_a_wrapped_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(9, 16), nn.ReLU())
    wrapped = flowpost.wrap(encoder, 2, example=torch.zeros(1, 9), flow="iaf", steps=1)
    vae = VAE(wrapped, nn.Linear(2, 9), Bernoulli()).eval()
    x = torch.rand(5, 9).round()
    found = annealed_estimate(vae, x, 200, 10, 2)
    truth = importance_estimate(vae, x, 5000).log_p
    torch.testing.assert_close(found.log_p, truth, rtol=0, atol=0.1)


def test_a_row_without_a_number_is_the_only_one() -> None:
    vae, model = known("diagonal")
    x = model.draw(3)[1]
    x[1] = math.nan
    found = annealed_estimate(vae, x, 8, 10, 2)
    assert found.log_p.isfinite().tolist() == [True, False, True]


@pytest.mark.filterwarnings("ignore::flowpost.importance.UnreliableEstimateWarning")  # of 50 samples
@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(2)], ids=["dropout", "batch norm"])
def test_a_model_in_training_mode_is_refused(layer: Callable[[], nn.Module]) -> None:
    vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, 2), nn.Sequential(layer(), nn.Linear(2, 9)), Bernoulli())
    x = torch.rand(50, 9).round()
    calls = [lambda: annealed_estimate(vae, x, 2, 3, 1), lambda: importance_estimate(vae, x, 50, refine=1)]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"^vae: expected a log p\(x, z\) that is the same at every call, got .*eval"
        ):
            call()
    vae.eval()
    for call in calls:
        assert call()[0].isfinite().all()


def test_bad_numbers_are_refused() -> None:
    vae, model = known("diagonal")
    x = model.draw(2)[1]
    wrong: dict[str, Any]
    for name in ("chains", "temperatures", "leapfrogs", "pairs"):
        wrong = {name: 0}
        with pytest.raises(ValueError, match=f"^{name}: expected an int >= 1, got 0$"):
            annealed_estimate(vae, x, **wrong)
    with pytest.raises(ValueError, match="^path: expected one of sigmoidal, linear, got 'log'$"):
        annealed_estimate(vae, x, path="log")
    for name in ("count", "samples"):
        wrong = {"count": 2, "shape": (5,), name: 0}
        with pytest.raises(ValueError, match=f"^{name}: expected an int >= 1, got 0$"):
            sandwich(vae, **wrong)
    wrong = {"count": 2, "shape": 5}
    with pytest.raises(TypeError, match="^shape: expected the shape of one x, a tuple of ints, got 5$"):
        sandwich(vae, **wrong)
    with pytest.raises(ValueError, match="^refine: expected an int >= 0, got -1$"):
        importance_estimate(vae, x, refine=-1)
    with pytest.raises(ValueError, match="^steps: expected an int >= 1, got 0$"):
        refine(vae.encode(x), lambda z: -z.square().sum(-1), steps=0)


def test_no_examples_have_no_estimates() -> None:
    """As where none has a large k-hat: ``x[k_hat > 0.7]``."""
    vae, model = known("diagonal")
    x = model.draw(2)[1][:0]
    for found in (annealed_estimate(vae, x, temperatures=20), importance_estimate(vae, x, 50, refine=2)):
        assert [tuple(each.shape) for each in found] == [(0,)] * 4


def test_nothing_is_read_on_the_host() -> None:
    """On the meta device there is nothing to read."""

    def flat(position: Tensor) -> tuple[Tensor, Tensor]:
        return position.sum(-1), torch.ones_like(position)

    start = torch.zeros(4, 3, 2, device="meta")
    sizes = pilot(flat, start, 9, "linear", 2)
    walk = anneal(flat, start, schedule(9), sizes, 2)
    assert sizes.shape == (8, 3)
    assert walk.log_weight.is_meta
    assert walk.log_weight.dtype == torch.float64


def test_the_schedules() -> None:
    bent = schedule(1000)
    assert bent[0] == 0
    assert bent[-1] == 1
    assert (bent.diff() > 0).all()
    torch.testing.assert_close(bent + bent.flip(0), torch.ones_like(bent))
    assert (bent.diff().max() / bent.diff().min()).item() == pytest.approx(14.2, abs=0.2)  # 1 / (4 s(4) s(-4))


# ------------------------------------------------------------------------------------------------------- refined q


@pytest.mark.parametrize("name", ["diagonal", pytest.param("iaf", marks=pytest.mark.full)])
def test_refined_draws_are_the_posterior_s(name: str) -> None:
    """Moments of 2,000 draws within 5 standard errors of p(z|x)'s; q's are far away."""
    vae, model = known(name)
    x = model.draw(2)[1]
    truth = model.posterior(x)
    z = refine(vae.encode(x), lambda z: sum(vae.log_joint(x, z)), 2000, steps=12, leapfrogs=2, pairs=3000)  # pyright: ignore[reportArgumentType]

    def away(z: Tensor) -> Tensor:
        scaled = torch.einsum("ij,sbj->sbi", torch.linalg.inv(truth.scale_tril[0]), z - truth.mean)
        errors = [scaled.mean(0).abs(), (scaled.square().mean(0) - 1).abs() / math.sqrt(2), scaled.prod(-1).mean(0)]
        return torch.stack([error.abs().max() for error in errors]) * math.sqrt(2000)

    assert z.shape == (2000, 2, 2)
    assert (away(z) < 5).all()
    assert away(vae.encode(x).sample((2000,))).max() > 15


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_refined_proposal_is_a_density_and_draws_from_it(count: int) -> None:
    """Its integral is 1, and its draws have the mean and variance of its own density on a grid."""
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(count, 1, 2, dtype=torch.float64, generator=generator)
    tril = torch.tensor([[0.7, 0.0], [0.5, 0.3]], dtype=torch.float64) * torch.ones(count, 1, 1, 1)
    proposal = Proposal(loc, tril)
    line = torch.linspace(-14, 14, 701, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).unsqueeze(1)
    share = proposal.log_prob(grid).exp() * (28 / 700) ** 2
    assert share.sum().item() == pytest.approx(1, abs=1e-3)
    draws = proposal.draw(100_000)
    assert (draws.mean(0) - (share[..., None] * grid).sum(0)).abs().max() < 0.015
    spread = draws.var(0) / (share[..., None] * (grid - (share[..., None] * grid).sum(0)).square()).sum(0)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0, atol=0.03)


def test_a_refined_estimate_has_the_evidence_as_its_mean() -> None:
    """q is so narrow that its k-hat is 0.9; the refined one's is below 0.7, and log p(x) is the exact one."""
    model = LinearGaussian(2)
    vae = fitted(model, stretch=0.35, shift=0.2)
    x = model.draw(40)[1]
    with pytest.warns(flowpost.importance.UnreliableEstimateWarning):
        before = importance_estimate(vae, x, 1000)
    after = importance_estimate(vae, x, 1000, refine=10, pairs=2000)
    assert (before.k_hat > 0.7).double().mean() > 0.6
    assert (after.k_hat < 0.7).all()
    away = (after.log_p - model.evidence(x)) / after.standard_error
    assert away.mean().abs() < 4.5 / math.sqrt(40)
    assert 0.7 < away.std() < 1.4
    assert after.ess.mean() > 500


def test_a_proposal_for_chains_that_are_not_finite_is_n01() -> None:
    def broken(noise: Tensor) -> tuple[Tensor, Tensor]:
        return noise.sum(-1) * math.nan, noise * math.nan

    proposal = fit_proposal(lambda e: (broken(e)[0], broken(e)[1]), torch.zeros(2, 3), 3)
    noise = torch.randn(5, 2, 3)
    assert proposal.log_prob(noise).isfinite().all()
    assert proposal.loc.isfinite().all()
    assert standard_normal_log_prob(noise).shape == (5, 2)


def test_estimates_are_tuples() -> None:
    assert AnnealedEstimate._fields == ("log_p", "standard_error", "ess", "acceptance")


READINGS: dict[str, Callable[[VAE, Tensor], Tensor]] = {
    "annealed_estimate": lambda vae, x: annealed_estimate(vae, x, 2, 5, 1).log_p,
    "sandwich": lambda vae, _: sandwich(vae, 2, (5,), 2, 5, 1, samples=30).upper.log_p,
    "importance_estimate": lambda vae, x: importance_estimate(vae, x, 100, refine=2).log_p,
    "refine": lambda vae, x: refine(vae.encode(x), lambda z: -z.square().sum(-1), 4, 2, 1),
    "inference_gaps": lambda vae, x: inference_gaps(vae, x, steps=3, samples=30).local_elbo,
}


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("flow", ["diagonal", "iaf", "realnvp"])
def test_what_takes_gradients_of_its_own_is_the_same_in_inference_mode(name: str, flow: str) -> None:
    """Where nothing that is computed has a gradient, nor x, which was made there."""
    vae, model = known(flow)
    x, found = model.draw(3)[1], []
    for mode in (False, True):
        with torch.inference_mode(mode):
            torch.manual_seed(0)
            found.append(READINGS[name](vae, x.clone()))
    assert torch.equal(*found)
    assert not found[0].requires_grad
