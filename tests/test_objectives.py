"""Objectives and their gradients, against the papers' formulas written naively, quadrature and closed forms.

Seeds are fixed, so on one machine the verdicts do not vary; each statistical test says how likely a right estimator was
to fail when the seed was chosen, and has a control that must fail.
"""

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from versions import untraceable

import flowpost
from flowpost import Autoregressive, FlowDistribution, FlowPosterior, Reverse, Sample, Shared
from flowpost.objectives import elbo, elbo_terms, free_bits, gaussian_kl, iwae, latent_kl, renyi, reweigh
from flowpost.schedules import constant, cyclical, linear
from flowpost.vae import VAE, Gaussian

RECIPES: dict[str, Callable[[int, int], FlowPosterior]] = {
    "diagonal": flowpost.diagonal,
    "full_covariance": flowpost.full_covariance,
    "planar": lambda features, dim: flowpost.planar(features, dim, steps=3),
    "iaf": lambda features, dim: flowpost.iaf(features, dim, steps=2, hidden=(12,), context_size=5),
    "maf": lambda features, dim: FlowPosterior(
        features, flowpost.Chain(flowpost.Inverse(flowpost.Autoregressive(dim, 2, (8,))), flowpost.Affine(dim))
    ),
}
every = pytest.mark.parametrize("name", RECIPES)
compiled = pytest.mark.parametrize("name", [
    "full_covariance", pytest.param("planar", marks=pytest.mark.compile), pytest.param("iaf", marks=pytest.mark.full)
])  # fmt: skip


def make(name: str, features: int = 4, dim: int = 3, push: float = 0.3) -> FlowPosterior:
    """A float64 posterior whose every parameter was moved."""
    posterior = RECIPES[name](features, dim).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(push * torch.randn_like(parameter))
    return posterior


def small_vae(name: str = "planar", dim: int = 1) -> VAE:
    """Four pixels, ``x | z ~ N(A z + b, diag(s^2))``: the exact posterior is Gaussian, and q is not it."""
    torch.manual_seed(5)
    layer = nn.Linear(dim, 8)
    nn.init.zeros_(layer.weight[4:])  # the scales do not depend on z
    return VAE(
        nn.Identity(), make(name, 4, dim, push=0.15), nn.Sequential(layer, nn.Unflatten(1, (2, 4))), Gaussian()
    ).double()


def linear_part(vae: VAE) -> tuple[Tensor, Tensor, Tensor]:
    """A, b and s of a `small_vae`."""
    layer = cast(nn.Linear, cast(nn.Sequential, vae.decoder)[0])
    return layer.weight[:4], layer.bias[:4], torch.exp(10 * torch.tanh(layer.bias[4:] / 10))


def evidence(vae: VAE, x: Tensor) -> Tensor:
    weight, bias, scale = linear_part(vae)
    return MultivariateNormal(bias, weight @ weight.mT + torch.diag(scale**2)).log_prob(x)


def gradients(value: Tensor, module: nn.Module, *, keep: bool = False) -> Tensor:
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=keep, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, module.parameters(), strict=True)]
    return torch.cat([g.flatten() for g in flat])


# ---------------------------------------------------------------------------------------------------------- values


def test_elbo_terms_by_hand() -> None:
    likelihood, prior = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[0.5, 1.0], [1.5, 1.0]])
    log_q = torch.tensor([[2.0, 2.0], [2.0, 4.0]])
    terms = elbo_terms(likelihood, prior, log_q)
    assert terms.reconstruction.tolist() == [2.0, 4.0]
    assert terms.kl.tolist() == [1.0, 2.0]
    closed = elbo_terms(likelihood, prior, log_q, torch.tensor([7.0, 8.0]))
    assert closed.kl.tolist() == [7.0, 8.0]
    torch.testing.assert_close(elbo(likelihood, prior, log_q, kl_weight=0.3), terms.reconstruction - 0.3 * terms.kl)


def test_iwae_is_the_log_of_the_mean_weight() -> None:
    likelihood, prior, log_q = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = (likelihood + prior - log_q).exp().mean(0).log()
    torch.testing.assert_close(iwae(likelihood, prior, log_q), expected)
    pairs = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(iwae(*pairs), iwae(*pairs.flatten(1, 2)))
    tempered = (likelihood + 0.3 * (prior - log_q)).exp().mean(0).log()
    torch.testing.assert_close(iwae(likelihood, prior, log_q, kl_weight=0.3), tempered)
    one = iwae(likelihood[0], prior[0], log_q[0])
    torch.testing.assert_close(one, elbo(likelihood[0], prior[0], log_q[0]))
    far = iwae(likelihood - 1e6, prior, log_q)
    torch.testing.assert_close(far, expected - 1e6)


def test_a_log_q_for_each_token_is_refused() -> None:
    """Four tokens of four examples: it broadcast, and mixed them."""
    whole, tokens = torch.zeros(2, 4), torch.zeros(2, 4, 4)
    said = r": expected a shape like log_likelihood's \(2, 4\), got \(2, 4, 4\); sum over tokens or other parts of an"
    for bound in (elbo, elbo_terms, iwae):
        with pytest.raises(ValueError, match="^log_q" + said):
            bound(whole, whole, tokens)
        with pytest.raises(ValueError, match="^log_prior" + said):
            bound(whole, tokens, whole)
        with pytest.raises(ValueError, match=r"^log_prior: expected a shape like log_likelihood's \(2, 4, 4\), got"):
            bound(tokens, whole, whole)
    with pytest.raises(ValueError, match=r"^kl: expected a shape like log_likelihood's \(4,\), got \(4, 4\)"):
        elbo(whole, whole, whole, torch.zeros(4, 4))


def test_renyi_is_the_log_of_a_power_mean() -> None:
    likelihood, prior, log_q = torch.randn(3, 5, 4, dtype=torch.float64)
    weights = (likelihood + 0.3 * (prior - log_q)).exp()
    expected = (weights**0.7).mean(0).log() / 0.7
    torch.testing.assert_close(renyi(likelihood, prior, log_q, 0.3, kl_weight=0.3), expected)
    each = torch.full((4,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(renyi(likelihood, prior, log_q, 0.3, kl_weight=each), expected)
    far = renyi(likelihood - 1e6, prior, log_q, 0.3, kl_weight=0.3)
    torch.testing.assert_close(far, expected - 1e6)
    pairs = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(renyi(*pairs, alpha=0.3), renyi(*pairs.flatten(1, 2), alpha=0.3))
    log_w = likelihood + prior - log_q
    torch.testing.assert_close(renyi(likelihood, prior, log_q, 0.0), log_w.exp().mean(0).log())
    assert torch.equal(renyi(likelihood, prior, log_q, 0.0), iwae(likelihood, prior, log_q))
    torch.testing.assert_close(renyi(*pairs[:, 0, 0], alpha=0.3), elbo(*pairs[:, 0, 0]))


def test_renyi_falls_from_iwae_to_the_elbo() -> None:
    terms = torch.randn(3, 6, 4, dtype=torch.float64)
    found = torch.stack([renyi(*terms, alpha=alpha) for alpha in (0.0, 0.1, 0.5, 0.9, 0.99, 1 - 1e-6)])
    assert (found[1:] < found[:-1]).all()
    torch.testing.assert_close(found[0], iwae(*terms))
    torch.testing.assert_close(found[-1], elbo(*terms), rtol=0, atol=1e-5)  # (1 - alpha) / 2 of the variance
    assert (found[-2] - elbo(*terms) > 1e-3).all()  # the control: at 0.99 the two are apart


def test_renyi_s_gradient_is_its_normalized_weights() -> None:
    log_w = (10 * torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    for alpha in (0.0, 0.4, 0.999):
        (found,) = torch.autograd.grad(renyi(log_w, zeros, zeros, alpha).sum(), log_w)
        torch.testing.assert_close(found, ((1 - alpha) * log_w).softmax(0))
    assert torch.autograd.gradcheck(lambda w: renyi(w, zeros, zeros, 0.4), log_w)


def test_renyi_s_rounding_in_float32() -> None:
    """What the docstring says of alpha = 0.999."""
    terms = torch.randn(3, 50, 1000, dtype=torch.float64).float()
    found, exact = renyi(*terms, alpha=0.999), renyi(*terms.double(), alpha=0.999)
    assert (found - exact).abs().max() < 1e-3


def test_an_alpha_that_is_none() -> None:
    terms, vae, x = torch.zeros(3, 2, 4), small_vae(), torch.zeros(2, 4, dtype=torch.float64)
    calls: list[Callable[[float], object]] = [
        lambda alpha: renyi(*terms, alpha=alpha),
        lambda alpha: reweigh(torch.zeros(3, 4, 2), alpha),
        lambda alpha: vae(x, (3,), "dreg", alpha=alpha),
        lambda alpha: vae(x, (3,), alpha=alpha),
    ]
    for call in calls:
        for alpha in (1.0, 1, -0.1, math.nan):
            with pytest.raises(
                ValueError, match=rf"^alpha: expected a number in \[0, 1\), got {alpha}; for alpha = 1 use"
            ):
                call(alpha)
        with pytest.raises(TypeError, match=r"^alpha: expected a Python number in \[0, 1\), got a tensor"):
            call(torch.tensor(0.5))  # pyright: ignore[reportArgumentType]
    q = vae.encode(x)
    for gradient in ("standard", "stl"):
        said = (
            f"^alpha: expected 0 with gradient='{gradient}', whose log-densities do not depend on it, got 0.5; give it"
        )
        with pytest.raises(ValueError, match=said):
            vae(x, (3,), gradient, alpha=0.5)
        with pytest.raises(ValueError, match=said):
            vae.evaluate(x, q, (3,), gradient, alpha=0.5)


BOUNDS: dict[str, Callable[..., object]] = {
    "elbo": elbo,
    "elbo_terms": elbo_terms,
    "iwae": iwae,
    "renyi": lambda *terms, **options: renyi(*terms, alpha=0.5, **options),
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("shape", [(3, 1), (1, 4), (1, 1), (4, 3), (1, 4, 4)], ids=str)
def test_a_term_of_another_size_is_refused(name: str, shape: tuple[int, ...]) -> None:
    """All but one of these broadcast without a word; three samples, four examples."""
    whole, other = torch.zeros(3, 4), torch.zeros(shape)
    hint = "; sum over tokens" if len(shape) == 3 else "; expand what examples share$"
    said = rf": expected a shape like log_likelihood's \(3, 4\), got {re.escape(str(shape))}{hint}"
    with pytest.raises(ValueError, match="^log_prior" + said):
        BOUNDS[name](whole, other, whole)
    with pytest.raises(ValueError, match="^log_q" + said):
        BOUNDS[name](whole, whole, other)
    with pytest.raises(ValueError, match=r"^log_prior: expected a shape like log_likelihood's"):
        BOUNDS[name](other, whole, whole)


@pytest.mark.parametrize("bound", [elbo, elbo_terms])
def test_a_kl_of_another_batch_is_refused(bound: Callable[..., object]) -> None:
    whole = torch.zeros(3, 4)
    for kl in (torch.zeros(1), torch.zeros(5), torch.zeros(()), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"^kl: expected a shape like log_likelihood's \(4,\), got"):
            bound(whole, whole, whole, kl)


@pytest.mark.parametrize("name", ["elbo", "iwae", "renyi"])
def test_a_kl_weight_is_one_number_or_one_for_each_example(name: str) -> None:
    """A column of four would give four bounds for every example."""
    terms, bound = torch.randn(3, 4, 4), cast(Callable[..., Tensor], BOUNDS[name])
    for weight in (torch.ones(4, 1), torch.ones(4, 4), torch.ones(1, 4), torch.ones(3), torch.ones(1, 1)):
        got = re.escape(str(tuple(weight.shape)))
        said = rf"^kl_weight: expected one number or one for each example, \(4,\), got shape {got}$"
        with pytest.raises(ValueError, match=said):
            bound(*terms, kl_weight=weight)
    with pytest.raises(TypeError, match="^kl_weight: expected a number or a tensor, got list; write torch.tensor"):
        bound(*terms, kl_weight=[0.5] * 4)
    with pytest.raises(ValueError, match="^kl_weight: expected one number or one for each example"):
        bound(*terms[:, :, :1], kl_weight=torch.ones(4))  # of one example it made four
    with pytest.raises(ValueError, match="^kl_weight: expected one number or one for each example"):
        bound(*terms[:, 0, 0], kl_weight=torch.ones(1))  # an axis of its own
    expected = bound(*terms, kl_weight=0.3)
    for weight in (torch.tensor(0.3), torch.tensor([0.3]), torch.full((4,), 0.3)):
        torch.testing.assert_close(bound(*terms, kl_weight=weight), expected)
    models = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(torch.vmap(bound)(*models), torch.stack([bound(*models[:, i]) for i in (0, 1)]))


def test_a_scale_that_would_broadcast_is_refused() -> None:
    """Four examples of four latents: a column for each latent was read as one for each example."""
    loc = torch.zeros(4, 4)
    for scale in (torch.ones(4, 1), torch.ones(4), torch.ones(()), torch.ones(1, 4, 4)):
        got = re.escape(str(tuple(scale.shape)))
        with pytest.raises(
            ValueError, match=rf"^scale: expected shape \(4, 4\) for a loc of shape \(4, 4\), got {got};"
        ):
            latent_kl(loc, scale)
    for tril in (torch.eye(4), torch.ones(4, 4, 1), torch.ones(4, 1, 4, 4)):
        with pytest.raises(
            ValueError, match=r"^scale_tril: expected shape \(4, 4, 4\) for a loc of shape \(4, 4\), got"
        ):
            gaussian_kl(loc, tril)
    with pytest.raises(ValueError, match=r"^scale_tril: expected shape \(4, 1, 1\) for a loc of shape \(4, 1\)"):
        gaussian_kl(loc[:, :1], torch.eye(4).expand(4, 4, 4))


def test_latents_kl_adds_up_to_the_factorized_gaussian_s() -> None:
    loc, scale = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64) + 0.1
    torch.testing.assert_close(latent_kl(loc, scale).sum(-1), gaussian_kl(loc, torch.diag_embed(scale)))
    expected = kl_divergence(Normal(loc, scale), Normal(torch.zeros(()).double(), 1.0))
    torch.testing.assert_close(latent_kl(loc, scale), expected)


# ------------------------------------------------------------------------------------------------------- schedules


def test_schedules_at_their_corners() -> None:
    assert [constant(step) for step in (0, 7)] == [1.0, 1.0]
    assert constant(3, weight=4.0) == 4.0
    assert [linear(step, 10) for step in (0, 1, 5, 9, 10, 11, 10**9)] == [0.0, 0.1, 0.5, 0.9, 1.0, 1.0, 1.0]
    assert [linear(step, 4, start=0.5, end=2.0) for step in (0, 2, 4)] == [0.5, 1.25, 2.0]
    assert linear(0, 0) == 1.0
    assert [cyclical(step, 10) for step in (0, 1, 4, 5, 9, 10, 11)] == [0.0, 0.2, 0.8, 1.0, 1.0, 0.0, 0.2]
    assert [cyclical(step, 4, rise=1.0, start=1.0, end=3.0) for step in (0, 1, 3, 4)] == [1.0, 1.5, 2.5, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(-1, 10), "step: expected an int >= 0, got -1"),
        (lambda: linear(1, -1), "steps: expected an int >= 0, got -1"),
        (lambda: constant(1, -1.0), "weight: expected a finite number >= 0, got -1.0"),
        (lambda: linear(1, 4, end=math.nan), "end: expected a finite number >= 0, got nan"),
        (lambda: cyclical(1, 4, start=-0.5), "start: expected a finite number >= 0, got -0.5"),
        (lambda: cyclical(1, 0), "period: expected an int >= 1, got 0"),
        (lambda: cyclical(1, 5, rise=0.0), "rise: expected a share in"),
        (lambda: cyclical(1, 5, rise=1.5), "rise: expected a share in"),
    ],
)
def test_schedules_refuse(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


# ------------------------------------------------------------------------------------------------------- free bits


def test_free_bits_by_hand() -> None:
    """Group means 0.5, 3 and -1: the mean is inside the max, so 0 and 1 share the first group's 0.6."""
    kl = torch.tensor([[0.0, 2.0, -3.0], [1.0, 4.0, 1.0]], requires_grad=True)
    value = free_bits(kl, 0.6)
    assert value.item() == pytest.approx(0.6 + 3.0 + 0.6)
    (gradient,) = torch.autograd.grad(value, kl)
    assert gradient.tolist() == [[0.0, 0.5, 0.0], [0.0, 0.5, 0.0]]
    value = free_bits(kl, 0.25)
    assert value.item() == pytest.approx(0.5 + 3.0 + 0.25)
    (gradient,) = torch.autograd.grad(value, kl)
    assert gradient.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]  # 0.0 in the first group learns: its mean is above
    torch.testing.assert_close(free_bits(kl[:, :2], 0.0), kl[:, :2].mean(0).sum())


def test_free_bits_refuse() -> None:
    with pytest.raises(
        ValueError,
        match=r"^kl: expected shape \(B, G\), .*kl_groups\(\) gives it, got \(3,\); write kl.unsqueeze\(-1\)",
    ):
        free_bits(torch.zeros(3), 0.5)
    for minimum in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="^minimum: expected a finite number >= 0, got"):
            free_bits(torch.zeros(3, 1), minimum)


@every
def test_only_a_factorized_gaussian_has_a_group_per_latent(name: str) -> None:
    vae = small_vae(name, dim=3)
    x = torch.randn(5, 4, dtype=torch.float64)
    out = vae(x, (2,))
    one = out.kl_groups()
    expected = (out.log_q - out.log_prior).mean(0) if out.kl is None else out.kl
    torch.testing.assert_close(one, expected.unsqueeze(-1))
    if name == "diagonal":
        loc, tril = vae.posterior.gaussian(x)
        torch.testing.assert_close(out.kl_groups(3), latent_kl(loc, tril.diagonal(dim1=-2, dim2=-1)))
        torch.testing.assert_close(out.kl_groups(3).sum(-1), out.kl)
        with pytest.raises(ValueError, match="^groups: expected 1 or 3, the number of latents, got 2"):
            out.kl_groups(2)
    else:
        with pytest.raises(ValueError, match="^groups: expected 1, for this posterior's KL does not split .* got 3"):
            out.kl_groups(3)


def test_factorized_whatever_it_is_made_of() -> None:
    def latents(flow: flowpost.Bijector) -> bool:
        return (
            VAE(nn.Identity(), FlowPosterior(4, flow), nn.Linear(2, 8), Gaussian())(torch.ones(3, 4)).latent_kl
            is not None
        )

    assert latents(flowpost.Chain(flowpost.Scale(2, 0.5), flowpost.Chain(flowpost.Affine(2), flowpost.Affine(2))))
    assert latents(flowpost.Conditioned(flowpost.Affine(2), 3))
    assert latents(
        flowpost.Chain(flowpost.Affine(2), flowpost.Learned(flowpost.Shift(2)), flowpost.Learned(flowpost.Affine(2)))
    )
    assert not latents(flowpost.Chain(flowpost.Affine(2), flowpost.UnitLowerTriangular(2)))


@pytest.mark.full
def test_free_bits_stop_a_collapse() -> None:
    """A decoder that does not read z: the KL falls to 0, and with a minimum no further than to it."""

    def kl_after_training(minimum: float) -> Tensor:
        vae = small_vae("diagonal", dim=2)
        nn.init.zeros_(cast(nn.Linear, cast(nn.Sequential, vae.decoder)[0]).weight)
        x = 2 * torch.randn(32, 4, dtype=torch.float64)
        optimizer = torch.optim.SGD(vae.posterior.parameters(), lr=0.02)
        for _ in range(400):
            out = vae(x)
            loss = free_bits(out.kl_groups(2), minimum) - elbo_terms(*out[:4]).reconstruction.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return vae(x).kl_groups(2).mean(0)

    assert (kl_after_training(0.0) < 0.01).all()
    held = kl_after_training(0.2)
    assert (held < 0.2).all()
    assert (held > 0.15).all()


# ------------------------------------------------------------------------------------------------------ path log q


def frozen_log_prob(posterior: FlowPosterior, sample: Sample, h: Tensor | None) -> Tensor:
    """The same by a frozen copy, whose inverse knows nothing."""
    copied = copy.deepcopy(posterior).requires_grad_(requires_grad=False)
    return copied.log_prob(sample.z, None if h is None else h.detach())


@every
@pytest.mark.parametrize("width", [4, 0])
def test_path_log_prob_is_that_of_a_frozen_copy(name: str, width: int) -> None:
    posterior = make(name, width)
    h = torch.randn(6, 4, dtype=torch.float64, requires_grad=True) if width else None
    sample = posterior(h, (5,))
    found, naive = posterior.path_log_prob(sample, h), frozen_log_prob(posterior, sample, h)
    assert torch.equal(found, sample.log_prob)
    weights = torch.randn_like(found)
    learnable = [*posterior.parameters(), *([] if h is None else [h])]
    for a, b in zip(
        torch.autograd.grad((weights * found).sum(), learnable, retain_graph=True, allow_unused=True),
        torch.autograd.grad((weights * naive).sum(), learnable, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@every
def test_path_log_prob_follows_z_alone(name: str) -> None:
    posterior, h = make(name), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    sample = posterior(h, (5,))
    z = sample.z.detach().requires_grad_()
    value = posterior.path_log_prob(sample._replace(z=z), h)
    value.sum().backward()
    assert h.grad is None
    assert all(parameter.grad is None for parameter in posterior.parameters())
    (expected,) = torch.autograd.grad(posterior.log_prob(z, h).sum(), z)
    torch.testing.assert_close(z.grad, expected, rtol=1e-8, atol=1e-8)


@every
def test_frozen_parameters_stay_frozen(name: str) -> None:
    posterior, h = make(name), torch.randn(6, 4, dtype=torch.float64)
    flags = [index % 2 == 0 for index, _ in enumerate(posterior.parameters())]
    for parameter, flag in zip(posterior.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    posterior.path_log_prob(posterior(h), h).sum().backward()
    assert [parameter.requires_grad for parameter in posterior.parameters()] == flags
    for parameter, flag in zip(posterior.parameters(), flags, strict=True):
        assert flag or parameter.grad is None
    posterior.requires_grad_(requires_grad=False)
    assert not posterior.path_log_prob(posterior(h), h).requires_grad


def test_path_log_prob_without_gradient_costs_nothing() -> None:
    posterior, h = make("planar"), torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        sample = posterior(h)
        assert posterior.path_log_prob(sample, h) is sample.log_prob


def test_path_log_prob_refuses() -> None:
    posterior, h = make("planar"), torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^sample: expected a flowpost.Sample, got Tensor"):
        posterior.path_log_prob(posterior(h).z, h)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^h: expected shape \(\*, 4\), got \(6, 3\)"):
        posterior.path_log_prob(posterior(h), h[:, :3])
    with pytest.raises(ValueError, match=r"^context: batch shape \(5,\) does not broadcast with z batch shape \(6,\)"):
        posterior.path_log_prob(posterior(h), h[:5])


def _dropping(inputs: int, outputs: int, layer: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), layer or nn.Dropout(0.5), nn.Linear(8, outputs))


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU(), nn.BatchNorm1d(8).double()], ids=str)
def test_a_flow_that_draws_anew_or_mixes_rows_has_no_path_gradient(gradient: str, layer: nn.Module) -> None:
    """Dropout in a coupling's network: the map that made z is gone, and another one's gradient was half wrong.

    With batch norm log q of a row follows the z of the others too, and the weights of the rows were mixed up.
    """
    vae = small_vae(dim=2)
    step = flowpost.Coupling(2, flowpost.Affine(1), network=partial(_dropping, layer=layer))
    flow = flowpost.Chain(step, flowpost.Affine(2))
    vae.posterior, x = FlowPosterior(4, flow).double(), torch.randn(6, 4, dtype=torch.float64)
    message = f"^flow: expected the same function again for the path gradient, got {type(layer).__name__} in train mode"
    with pytest.raises(ValueError, match=message):
        vae(x, (3,), gradient)
    vae(x, (3,))
    vae.eval()(x, (3,), gradient)
    with torch.no_grad():  # where there is no gradient, none is wrong
        vae.train()(x, (3,), gradient)


def test_what_gives_features_anew_has_no_path_gradient() -> None:
    """A head or an encoder that is run again gives other features than those that the sample was drawn for."""
    flow, x = flowpost.Chain(flowpost.Affine(2), flowpost.Planar(2)), torch.randn(6, 4)
    posterior = FlowPosterior(4, flow, head=_dropping(4, flow.context_size))
    with pytest.raises(ValueError, match=r"^head: .* got Dropout in train mode.*; q = posterior.at\(h\) runs it once"):
        posterior.path_log_prob(posterior(x), x)
    wrapped = flowpost.wrap(nn.LSTM(4, 5, 2, dropout=0.1), 2, features=5, read=lambda out: out[0], flow="planar")
    with pytest.raises(ValueError, match=r"^encoder: .* got LSTM in train mode.*; q = wrapped.at\(x\) runs it once"):
        wrapped.path_log_prob(wrapped(x), x)
    for q in (posterior.at(x), wrapped.at(x)):
        assert q.path_log_prob(q.draw()).requires_grad


@every
def test_path_log_prob_in_float32_and_autocast(name: str) -> None:
    posterior = make(name, push=0.1).float()
    h = torch.randn(6, 4)
    sample = posterior(h)
    z = sample.z.detach().requires_grad_()
    (plain,) = torch.autograd.grad(posterior.path_log_prob(sample._replace(z=z), h).sum(), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = posterior.path_log_prob(sample._replace(z=z), h)
    assert value.dtype == torch.float32
    assert torch.equal(value, sample.log_prob)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], plain, rtol=1e-5, atol=1e-5)


@untraceable
@compiled
def test_path_log_prob_compiles_whole(name: str) -> None:
    posterior, h = make(name), torch.randn(6, 4, dtype=torch.float64)
    noise = torch.randn(5, 6, 3, dtype=torch.float64)

    def score(h: Tensor, noise: Tensor) -> Tensor:
        return posterior.path_log_prob(posterior(h, (5,), noise), h)

    torch.compiler.reset()
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, noise), score(h, noise))
    expected, found = gradients(score(h, noise).sum(), posterior), gradients(compiled(h, noise).sum(), posterior)
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()


@untraceable
def test_path_log_prob_leaves_a_step_that_comes_twice_its_parameters() -> None:
    """A compiled one stands something in for each while it runs."""
    step = Autoregressive(3, 4, (5,)).double()
    posterior, h = FlowPosterior(4, Shared(step, Reverse(3), step)).double(), torch.randn(6, 4, dtype=torch.float64)
    noise, before = torch.randn(6, 3, dtype=torch.float64), list(posterior.parameters())

    def score(h: Tensor, noise: Tensor) -> Tensor:
        return posterior.path_log_prob(posterior(h, noise=noise), h)

    torch.compiler.reset()
    value = torch.compile(score, fullgraph=True, backend="eager")(h, noise)
    assert all(each is one for each, one in zip(posterior.parameters(), before, strict=True))
    expected, found = gradients(score(h, noise).sum(), posterior), gradients(value.sum(), posterior)
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()


@every
def test_path_log_prob_under_vmap_and_grad(name: str) -> None:
    posterior, h = make(name), torch.randn(6, 4, dtype=torch.float64)
    sample = posterior(h)
    expected = torch.autograd.grad(frozen_log_prob(posterior, sample, h).sum(), sample.z)[0]

    def score(z: Tensor, noise: Tensor, log_prob: Tensor, h: Tensor) -> Tensor:
        return posterior.path_log_prob(Sample(z, log_prob, noise), h)

    found = torch.vmap(torch.func.grad(score))(sample.z, sample.noise, sample.log_prob, h)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# -------------------------------------------------------------------------------------------- gradient estimators


def objective(vae: VAE, x: Tensor, samples: int, gradient: str, kl_weight: float = 1.0, alpha: float = 0.0) -> Tensor:
    out = vae(x, (samples,), gradient, alpha=alpha if gradient == "dreg" else 0.0)
    terms = out.log_likelihood, out.log_prior, out.log_q
    return renyi(*terms, alpha=alpha, kl_weight=kl_weight) if alpha else iwae(*terms, kl_weight=kl_weight)


def exact_bound(vae: VAE, x: Tensor, samples: int, kl_weight: float = 1.0, alpha: float = 0.0) -> Tensor:
    """The expectation of the bound at 1, 2 or 3 samples of a one-dimensional z, by quadrature over the noise."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(100)
    nodes, node_weights = torch.tensor(nodes), torch.tensor(node_weights / math.sqrt(2 * math.pi))
    sample = vae.posterior(vae.encoder(x), (100,), nodes.view(100, 1, 1).expand(100, len(x), 1))
    log_likelihood, log_prior = vae.log_joint(x, sample.z)
    log_w = (1 - alpha) * (log_likelihood + kl_weight * (log_prior - sample.log_prob))
    total, mass = log_w, node_weights
    for _ in range(samples - 1):  # all tuples of nodes
        total = torch.logaddexp(total.unsqueeze(1), log_w).flatten(0, 1)
        mass = (mass.unsqueeze(1) * node_weights).flatten()
    return mass @ (total - math.log(samples)) / (1 - alpha)


def z_scores(vae: VAE, x: Tensor, samples: int, gradient: str, kl_weight: float = 1.0, alpha: float = 0.0) -> Tensor:
    """How many standard errors the mean gradient of 20,000 draws is from the exact one, for each parameter."""
    exact = gradients(exact_bound(vae, x, samples, kl_weight, alpha).mean(), vae)
    wide, options = x.expand(200, *x.shape).flatten(0, 1), (samples, gradient, kl_weight, alpha)
    draws = torch.stack([gradients(objective(vae, wide, *options).mean(), vae) for _ in range(100)])
    error = draws.std(0) / math.sqrt(len(draws))
    return (draws.mean(0) - exact).abs() / (error + 1e-9)


@pytest.mark.parametrize(
    "name",
    ["planar", pytest.param("iaf", marks=pytest.mark.full), pytest.param("diagonal", marks=pytest.mark.long)],
)
@pytest.mark.parametrize(
    ("samples", "gradient", "kl_weight", "alpha"),
    [
        (1, "standard", 1.0, 0.0),
        (1, "stl", 1.0, 0.0),
        pytest.param(1, "stl", 0.4, 0.0, marks=pytest.mark.long),
        (2, "standard", 1.0, 0.0),
        pytest.param(2, "dreg", 1.0, 0.0, marks=pytest.mark.long),
        (2, "dreg", 0.4, 0.0),
        pytest.param(2, "standard", 1.0, 0.5, marks=pytest.mark.long),
        pytest.param(2, "dreg", 1.0, 0.5, marks=pytest.mark.long),
        (2, "dreg", 0.4, 0.5),
    ],
)
def test_gradients_are_unbiased(name: str, samples: int, gradient: str, kl_weight: float, alpha: float) -> None:
    """False-alarm rate 1e-4 each: 5.5 standard errors from 100 means (Student's t), at most 240 parameters."""
    vae, x = small_vae(name), torch.randn(1, 4, dtype=torch.float64)
    assert z_scores(vae, x, samples, gradient, kl_weight, alpha).max() < 5.5


def test_sticking_the_landing_is_biased_for_several_samples() -> None:
    """The control: Tucker et al. (2018), section 3, and what the docstring says."""
    vae, x = small_vae("planar"), torch.randn(1, 4, dtype=torch.float64)
    assert z_scores(vae, x, 2, "stl").max() > 20


@pytest.mark.full
def test_dreg_is_biased_for_a_bound_of_another_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what `reweigh` and `VAE` say."""
    vae, x = small_vae("planar"), torch.randn(1, 4, dtype=torch.float64)
    monkeypatch.setattr("flowpost.vae.reweigh", lambda z, alpha: reweigh(z, 0.0))
    assert z_scores(vae, x, 2, "dreg", 1.0, 0.5).max() > 20


def test_quadrature_is_the_closed_form_s() -> None:
    """The reference itself: the ELBO of a Gaussian q, and log p(x) above every bound."""
    vae, x = small_vae("diagonal"), torch.randn(3, 4, dtype=torch.float64)
    loc, tril = vae.posterior.gaussian(x)
    weight, bias, scale = linear_part(vae)
    reconstruction = Normal(loc @ weight.mT + bias, scale).log_prob(x).sum(-1)
    spread = 0.5 * ((weight @ tril).squeeze(-1) / scale).square().sum(-1)
    one, two, three = (exact_bound(vae, x, samples) for samples in (1, 2, 3))
    torch.testing.assert_close(one, reconstruction - spread - gaussian_kl(loc, tril), rtol=0, atol=1e-9)
    assert (one < two).all()
    assert (two < three).all()
    assert (three < evidence(vae, x)).all()
    between = exact_bound(vae, x, 2, alpha=0.5)
    assert ((one < between) & (between < two)).all()
    assert (between < exact_bound(vae, x, 3, alpha=0.5)).all()


def test_iwae_rises_with_its_samples_and_stays_below_the_evidence() -> None:
    """Means of 4,000 draws; false-alarm rate 3e-7 each, five standard errors. Control: a wrong constant is seen."""
    vae, x = small_vae("planar"), torch.randn(1, 4, dtype=torch.float64)
    exact = evidence(vae, x)
    with torch.no_grad():
        draws = torch.stack([objective(vae, x.expand(4000, 4), samples, "standard") for samples in (1, 4, 16, 64)])
    means, errors = draws.mean(-1), draws.std(-1) / math.sqrt(4000)
    for low in range(3):
        assert means[low] < means[low + 1] - 5 * (errors[low] ** 2 + errors[low + 1] ** 2).sqrt()
    assert means[3] < exact + 5 * errors[3]
    assert exact - means[3] < 0.1
    assert means[3] + math.log(64 / 60) > exact + 5 * errors[3]


@every
def test_sticking_the_landing_has_no_variance_where_q_is_the_posterior(name: str) -> None:
    """The joint is the posterior's own density, so every weight is 1; the control is plain reparameterization."""
    posterior, h = make(name), torch.randn(6, 4, dtype=torch.float64)
    sample = posterior(h, (7,))
    log_joint = frozen_log_prob(posterior, sample, h)
    path, plain = log_joint - posterior.path_log_prob(sample, h), log_joint - sample.log_prob
    assert gradients(path.mean(), posterior, keep=True).abs().max() < 1e-12
    assert gradients(plain.mean(), posterior).abs().max() > 1e-2


def test_sticking_the_landing_has_no_variance_in_a_linear_gaussian_vae() -> None:
    """The same through `VAE`, with a closed-form posterior: 1e-12 in float64, for ELBO and for IWAE, and for DReG."""
    from test_vae import linear_gaussian

    vae, x = linear_gaussian(), 2 * torch.randn(6, 4, dtype=torch.float64)
    for gradient in ("stl", "dreg"):
        out = vae(x, (5,), gradient)
        for value in (elbo(*out[:3]), iwae(*out[:3])):
            assert gradients(value.mean(), vae.posterior, keep=True).abs().max() < 1e-12
    out = vae(x, (5,), "dreg", alpha=0.6)
    assert gradients(renyi(*out[:3], alpha=0.6).mean(), vae.posterior).abs().max() < 1e-12
    out = vae(x, (5,))
    assert gradients(elbo(*out[:3]).mean(), vae.posterior).abs().max() > 1e-2


def naive_dreg(vae: VAE, x: Tensor, noise: Tensor, kl_weight: float, alpha: float) -> Tensor:
    """Tucker et al. (2018), eq. 8, sample by sample; with an alpha Daudel et al. (2023).

    The factor of tempered weights by the same derivation: the score's part, `kl_weight` times as large, is what the
    second reparameterization turns from v into (1 - alpha) (v^2 - v), in which alpha v + (1 - alpha) v^2 is left of v.
    """
    samples = len(noise)
    sample = vae.posterior(vae.encoder(x), (samples,), noise)
    leaf = sample.z.detach().requires_grad_()
    log_likelihood, log_prior = vae.log_joint(x, leaf)
    log_q = frozen_log_prob(vae.posterior, sample._replace(z=leaf), vae.encoder(x))
    log_w = log_likelihood + kl_weight * (log_prior - log_q)
    v = ((1 - alpha) * log_w).softmax(0).detach()
    value = (v * log_w).sum(0).mean()  # the decoder's side
    slopes = torch.stack([torch.autograd.grad(log_w[k].sum(), leaf, retain_graph=True)[0][k] for k in range(samples)])
    factor = (1 - kl_weight) * v + kl_weight * (alpha * v + (1 - alpha) * v**2)
    surrogate = (factor.unsqueeze(-1) * slopes * sample.z).sum((0, 2)).mean()  # the posterior's
    return gradients(value, vae) + gradients(surrogate, vae)


@pytest.mark.parametrize("name", ["full_covariance", "planar", "iaf"])
@pytest.mark.parametrize("kl_weight", [1.0, 0.4])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_dreg_is_the_paper_s_formula(name: str, kl_weight: float, alpha: float) -> None:
    vae, x = small_vae(name, dim=3), torch.randn(5, 4, dtype=torch.float64)
    torch.manual_seed(1)
    found = gradients(objective(vae, x, 7, "dreg", kl_weight, alpha).mean(), vae)
    torch.manual_seed(1)
    expected = naive_dreg(vae, x, torch.randn(7, 5, 3, dtype=torch.float64), kl_weight, alpha)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_values_and_the_decoder_s_gradient_do_not_depend_on_the_estimator() -> None:
    vae, x = small_vae("iaf", dim=3), torch.randn(5, 4, dtype=torch.float64)
    found = {}
    for gradient in ("standard", "stl", "dreg"):
        torch.manual_seed(1)
        value = objective(vae, x, 6, gradient)
        found[gradient] = value.detach(), gradients(value.mean(), vae.decoder)
    for gradient in ("stl", "dreg"):
        torch.testing.assert_close(found[gradient], found["standard"], rtol=0, atol=1e-12)


def test_dreg_follows_any_scale_of_the_loss() -> None:
    """Per example, so also where an example counts for nothing, and for two sample axes."""
    vae, x = small_vae("planar", dim=2), torch.randn(3, 4, dtype=torch.float64)
    scales = torch.tensor([5.0, 0.0, -0.3], dtype=torch.float64)

    def found(shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        torch.manual_seed(1)
        out = vae(x, shape, "dreg")
        values = iwae(*out[:3])
        return gradients((scales * values).sum() if rows is None else values[rows].sum(), vae)

    alone = [found((6,), slice(i, i + 1)) for i in range(3)]
    torch.testing.assert_close(found((6,)), 5.0 * alone[0] - 0.3 * alone[2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found((2, 3)), found((6,)), rtol=1e-9, atol=1e-12)


def test_reweighing_under_vmap_and_grad() -> None:
    """Each example by itself, with a batch axis of one, as all of them together."""
    loc, noise = torch.randn(4, 2, dtype=torch.float64), torch.randn(6, 4, 2, dtype=torch.float64)

    def bound(loc: Tensor, noise: Tensor) -> Tensor:
        z, zeros, more_zeros = reweigh(loc + noise, 0.3)
        log_q = Normal(loc.detach(), 1.0, validate_args=False).log_prob(z).sum(-1)
        return renyi(-(z**4).sum(-1) + zeros, -z.square().sum(-1), log_q + more_zeros, 0.3, kl_weight=0.7).sum()

    expected = torch.func.grad(bound)(loc, noise)
    found = torch.vmap(torch.func.grad(bound), in_dims=(0, 1))(loc.unsqueeze(1), noise.unsqueeze(2))
    torch.testing.assert_close(found.squeeze(1), expected)


def test_a_reweighed_gradient_is_not_differentiated() -> None:
    """The second derivative came back by the same node and was weighed by 0 / 0: it was 1e15 in place of 10."""
    vae, x = small_vae("planar", dim=2), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def bound(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return iwae(*vae(x, (4,), "dreg")[:3]).sum()

    (slope,) = torch.autograd.grad(bound(x), x, create_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(bound(x), x)[0])
    with pytest.raises(RuntimeError, match=r"^double reparameterization: expected a first derivative"):
        torch.autograd.grad(slope.sum(), x)
    with pytest.raises(RuntimeError, match=r"^double reparameterization: expected a first derivative"):
        torch.func.jacrev(torch.func.jacrev(bound))(x.detach())


def test_a_term_in_the_sample_itself_is_not_reweighted() -> None:
    vae, x = small_vae("planar", dim=2), torch.randn(3, 4, dtype=torch.float64)
    found = []
    for gradient in ("standard", "dreg"):
        torch.manual_seed(1)
        found.append(gradients(vae(x, (4,), gradient).sample.z.square().sum(), vae))
    assert torch.equal(*found)


@pytest.mark.long
def test_dreg_varies_less_than_plain_iwae_at_64_samples() -> None:
    """The posterior's gradient: its summed variance is under a third; 200 draws put the ratio's error near a tenth.

    Control: the decoder's side, which both estimators share, does not vary less.
    """
    vae, x = small_vae("planar", dim=2), torch.randn(4, 4, dtype=torch.float64)
    spread: dict[tuple[str, str], Tensor] = {}
    for gradient in ("standard", "dreg"):
        for part in ("posterior", "decoder"):
            torch.manual_seed(1)
            draws = [gradients(objective(vae, x, 64, gradient).mean(), getattr(vae, part)) for _ in range(200)]
            spread[gradient, part] = torch.stack(draws).var(0).sum()
    assert spread["dreg", "posterior"] < spread["standard", "posterior"] / 3
    assert spread["dreg", "decoder"] == pytest.approx(spread["standard", "decoder"].item())


class WithNoise(FlowDistribution):
    """One whose draws are always the same: a compiled program draws other numbers."""

    fixed: Tensor

    def draw(self, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None) -> Sample:
        return super().draw(sample_shape, self.fixed)


@pytest.mark.compile
def test_a_training_step_compiles_whole() -> None:
    vae, x = small_vae("planar", dim=3), torch.randn(5, 4, dtype=torch.float64)
    posterior, noise = vae.posterior, torch.randn(6, 5, 3, dtype=torch.float64)

    def at(h: Tensor) -> FlowDistribution:
        q = WithNoise(posterior.flow, posterior.context(h), h.shape[:-1])
        q.fixed = noise
        return q

    posterior.at = at  # pyright: ignore[reportAttributeAccessIssue]
    torch.compiler.reset()

    def bound(x: Tensor) -> Tensor:
        return objective(vae, x, 6, "dreg", alpha=0.3).mean()

    compiled, expected = torch.compile(bound, fullgraph=True, backend="aot_eager"), bound(x)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(gradients(compiled(x), vae), gradients(expected, vae))
    torch.compiler.reset()


@pytest.mark.parametrize("unused", [False, True])
def test_dreg_under_data_parallel(tmp_path: Path, unused: bool) -> None:  # noqa: FBT001
    """Looking for unused parameters the wrapper returns copies of its outputs: a hook on them would see nothing."""
    vae, x = small_vae("planar", dim=2), torch.randn(3, 4, dtype=torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(vae, find_unused_parameters=unused)
        torch.manual_seed(1)
        iwae(*model(x, (5,), "dreg")[:3]).mean().backward()
        found = torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])
    finally:
        dist.destroy_process_group()
    torch.manual_seed(1)
    torch.testing.assert_close(found, gradients(objective(vae, x, 5, "dreg").mean(), vae))


def test_an_unknown_gradient() -> None:
    with pytest.raises(ValueError, match="^gradient: expected one of standard, stl, dreg, got 'path'"):
        small_vae()(torch.zeros(2, 4, dtype=torch.float64), (3,), "path")


def test_path_gradients_have_no_closed_form_kl() -> None:
    vae, x = small_vae("diagonal"), torch.zeros(2, 4, dtype=torch.float64)
    assert vae(x).kl is not None
    assert vae(x, (2,), "stl").kl is None
    assert vae(x, (2,), "dreg").latent_kl is None
