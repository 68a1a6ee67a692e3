"""Local posteriors and inference gaps, against closed forms of a linear-Gaussian VAE."""

import copy
import math
from contextlib import nullcontext
from typing import cast

import pytest
import torch
from linear_gaussian import LinearGaussian, fitted
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import flowpost
from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    FlowDistribution,
    Planar,
    Reverse,
    Scale,
    Shared,
    UnitLowerTriangular,
)
from flowpost.decomposition import decompose_elbo
from flowpost.density import standard_normal_log_prob
from flowpost.gaps import _Local, _start, inference_gaps
from flowpost.importance import UnreliableEstimateWarning
from flowpost.objectives import elbo
from flowpost.vae import VAE, Bernoulli


def full(dim: int) -> Bijector:
    """What makes a diagonal Gaussian one of full covariance."""
    return Chain(UnitLowerTriangular(dim), Affine(dim)).double()


def test_gaps_are_the_closed_forms() -> None:
    """The best factorized q has variances ``1 / P_ii``, and misses log p(x) by ``(sum log P_ii - log det P) / 2``.

    Each ELBO is a mean of 20,000 log-weights of standard deviation 1 at most: the tolerances are over four standard
    errors, false-alarm rate 1e-4 each, and what 400 steps leave to gain is less.
    Control: the same after 5 steps is not there.
    """
    model = LinearGaussian(3)
    x = model.draw(5)[1]
    vae = fitted(model, "diagonal", stretch=1.2, shift=0.2)
    approximation = 0.5 * (model.precision.diagonal().log().sum() - model.precision.logdet())
    loc, tril = vae.posterior.gaussian(x)
    q, p = torch.distributions.MultivariateNormal(loc, scale_tril=tril), model.posterior(x)
    amortization = torch.distributions.kl_divergence(q, p) - approximation
    assert approximation > 0.1
    assert (amortization > 0.1).all()
    gaps = inference_gaps(vae, x, richer=full(3), steps=400, samples=20_000, pairs=20_000)
    exact = model.evidence(x)
    torch.testing.assert_close(gaps.estimate.log_p, exact, rtol=0, atol=0.005)
    torch.testing.assert_close(gaps.approximation, approximation.expand(5), rtol=0, atol=0.03)
    torch.testing.assert_close(gaps.amortization, amortization, rtol=0, atol=0.05)
    torch.testing.assert_close(gaps.richer_approximation, torch.zeros_like(exact), rtol=0, atol=0.005)
    total = gaps.approximation + gaps.amortization
    torch.testing.assert_close(total, gaps.estimate.log_p - gaps.elbo)
    early = inference_gaps(vae, x, steps=5, samples=20_000, pairs=20_000)
    assert (early.amortization < amortization - 0.05).all()


def flow_vae(dim: int = 2) -> VAE:
    torch.manual_seed(4)
    posterior = flowpost.iaf(5, dim, steps=2, hidden=(12,), context_size=6).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return VAE(nn.Identity(), posterior, LinearGaussian(dim), flowpost.vae.Gaussian())


@pytest.mark.full
def test_a_flow_s_weights_are_fitted_too() -> None:
    """With weights of its own a small IAF reaches the exact posterior; frozen weights count among them."""
    vae = flow_vae()
    vae.posterior.flow.requires_grad_(requires_grad=False)
    model = vae.decoder
    assert isinstance(model, LinearGaussian)
    x = model.draw(4)[1]
    gaps = inference_gaps(vae, x, steps=400, samples=2000, pairs=8000, lr=3e-2, weights_lr=3e-2)
    torch.testing.assert_close(gaps.estimate.log_p, model.evidence(x), rtol=0, atol=0.02)
    assert (gaps.approximation.abs() < 0.1).all()
    assert (gaps.amortization > 0.5).all()


@pytest.mark.filterwarnings("ignore::flowpost.importance.UnreliableEstimateWarning")
@pytest.mark.parametrize("richer", [None, Planar(2).double()], ids=["same", "planar"])
def test_every_fit_starts_at_the_amortized_posterior(richer: Bijector | None) -> None:
    vae, x = flow_vae(), torch.randn(7, 5, dtype=torch.float64)
    gaps = inference_gaps(vae, x, richer=richer, steps=0, samples=50, examples=3, pairs=30)
    assert gaps.elbo.shape == gaps.estimate.k_hat.shape == (7,)
    torch.testing.assert_close(gaps.local_elbo, gaps.elbo, rtol=0, atol=1e-10)
    if richer is None:
        assert gaps.richer_elbo is None
        with pytest.raises(ValueError, match="^richer: expected steps of a richer family in inference_gaps, got None"):
            _ = gaps.richer_approximation
    else:
        torch.testing.assert_close(gaps.richer_elbo, gaps.elbo, rtol=0, atol=1e-10)


def test_local_posteriors_are_each_example_s_own() -> None:
    """The batched map is a loop over examples, each with its context and weights."""
    vae, x = flow_vae(3), torch.randn(4, 5, dtype=torch.float64)
    flow = Chain(vae.posterior.flow, Planar(3).double())
    local = _Local(flow, _start(flow, cast(Tensor, vae.encode(x).context))).copy()
    with torch.no_grad():
        for value in (local.context, *local.weights.values()):
            value.add_(0.1 * torch.randn_like(value))
    noise = torch.randn(6, 4, 3, dtype=torch.float64)
    z, log_q = local(noise)
    for i in range(4):
        own = {name: weight[i] for name, weight in local.weights.items()}
        alone, log_det = functional_call(flow, own, (noise[:, i], local.context[i]))
        torch.testing.assert_close(z[:, i], alone)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise[:, i]).sum(-1) - log_det
        torch.testing.assert_close(log_q[:, i], expected)


def test_the_model_is_left_as_it_was() -> None:
    vae, x = flow_vae(), torch.randn(3, 5, dtype=torch.float64)
    before = copy.deepcopy(vae.state_dict())
    with torch.no_grad(), pytest.warns(UnreliableEstimateWarning):
        inference_gaps(vae, x, steps=3, samples=10)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), vae.state_dict().values(), strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())


def test_gaps_are_the_same_with_values_checked() -> None:
    vae, x, found = flow_vae(), torch.randn(3, 5, dtype=torch.float64), []
    for context in (nullcontext(), flowpost.checking()):
        torch.manual_seed(0)
        with context, pytest.warns(UnreliableEstimateWarning):
            found.append(inference_gaps(vae, x, steps=2, samples=10))
    assert torch.equal(found[0].local_elbo, found[1].local_elbo)


def test_a_weight_that_pruning_makes_can_be_read_afterwards() -> None:
    """The hook made it within `vmap`, whose tensors nobody can copy or save when it is over."""
    vae, x = flow_vae(), torch.randn(3, 5, dtype=torch.float64)
    layer = next(part for part in vae.posterior.flow.modules() if isinstance(part, nn.Linear))
    prune.l1_unstructured(layer, "weight", 0.5)
    weight = layer.weight.detach().clone()
    with pytest.warns(UnreliableEstimateWarning):
        inference_gaps(vae, x, richer=full(2), steps=1, samples=10)
    assert torch.equal(layer.weight, weight)


def test_a_step_that_comes_twice_keeps_its_weights() -> None:
    """Also one of whose weights another has: they are stood in for and come back."""
    torch.manual_seed(0)
    twice, other = (Autoregressive(2, 3, (6,)) for _ in range(2))
    other.net.stack[0].weight = twice.net.stack[0].weight
    flow = Chain(Affine(2), Shared(twice, Reverse(2), twice, other))
    vae = VAE(nn.Linear(9, 16), flowpost.FlowPosterior(16, flow), nn.Linear(2, 9), Bernoulli())
    before, x = list(vae.parameters()), torch.ones(3, 9)
    inference_gaps(vae, x, steps=1, samples=30)
    assert all(each is one for each, one in zip(vae.parameters(), before, strict=True))
    context, noise = torch.randn(3, flow.context_size), torch.randn(5, 3, 2)
    local = _Local(flow, context)
    moved = {name: w + 0.1 for name, w in local.weights.items()}
    z, log_q = _Local(flow, context, moved)(noise)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    expected, log_det = flow(noise, context)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log_q, standard_normal_log_prob(noise) - log_det)


def test_float32_and_a_binary_decoder() -> None:
    torch.manual_seed(0)
    vae = VAE(nn.Linear(9, 8), flowpost.diagonal(8, 2), nn.Linear(2, 9), Bernoulli())
    gaps = inference_gaps(vae, torch.rand(6, 9).round(), richer=full(2).float(), steps=150, samples=500)
    assert gaps.elbo.dtype == torch.float64
    assert (gaps.amortization > 0).all()
    assert (gaps.approximation > -3 * gaps.estimate.standard_error).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": -1}, "steps: expected an int >= 0, got -1"),
        ({"samples": 0}, "samples: expected an int >= 1, got 0"),
        ({"step_samples": 0}, "step_samples: expected an int >= 1, got 0"),
        ({"examples": 0}, "examples: expected an int >= 1, got 0"),
        ({"lr": 0.0}, "lr: expected a positive finite number, got 0.0"),
        ({"weights_lr": math.inf}, "weights_lr: expected a positive finite number, got inf"),
        ({"richer": Planar(3)}, r"Chain: expected steps of one dim, got \[2, 3\]"),
    ],
)
def test_gaps_refuse(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        inference_gaps(flow_vae(), Tensor(3, 5).double(), **kwargs)


class Farther(VAE):
    """Whose q(z|x) has a step more than its posterior."""

    def encode(self, x: Tensor, y: Tensor | None = None) -> FlowDistribution:
        q = super().encode(x, y)
        return FlowDistribution(Chain(q.flow, Scale(2, 3.0)), q.context, tuple(q.batch_shape))


def test_the_gaps_are_those_of_the_q_that_a_subclass_encodes() -> None:
    """They were those of the posterior's own flow, 8 nats better."""
    vae = Farther(nn.Linear(9, 8), flowpost.diagonal(8, 2), nn.Linear(2, 9), Bernoulli())
    x = torch.ones(5, 9)
    with torch.no_grad():
        wanted = elbo(*vae(x, (20_000,))[:3])
    found = inference_gaps(vae, x, steps=0, samples=20_000).elbo
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("richer", [None, full(2)])
def test_the_gaps_of_no_example_are_none(richer: Bijector | None) -> None:
    """It was an IndexError out of `torch.vmap`."""
    vae = VAE(nn.Linear(9, 8), flowpost.planar(8, 2, steps=1), nn.Linear(2, 9), Bernoulli()).double()
    found = inference_gaps(vae, torch.ones(0, 9, dtype=torch.float64), richer=richer, steps=1, samples=30)
    assert found.approximation.shape == found.amortization.shape == (0,)
    assert (found.richer_elbo is None) == (richer is None)


class OneRow(nn.Module):
    """A head whose context is the same for all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64).unsqueeze(0))

    def forward(self, h: Tensor) -> Tensor:
        return self.row


@pytest.mark.filterwarnings("ignore::flowpost.importance.UnreliableEstimateWarning")
def test_a_head_may_give_one_row_for_all() -> None:
    flow = Chain(Affine(2), Planar(2)).double()
    posterior = flowpost.FlowPosterior(9, flow, head=OneRow(flow.context_size))
    vae, x = VAE(nn.Identity(), posterior, nn.Linear(2, 9).double(), Bernoulli()), torch.eye(3, 9).double()
    found = inference_gaps(vae, x, steps=1, samples=50)
    assert found.amortization.shape == (3,)
    terms = decompose_elbo(vae, x, 5)
    torch.testing.assert_close(terms.mutual_information, torch.zeros(3).double(), rtol=0, atol=1e-9)
