"""What is reported of a trained VAE, against closed forms of a linear-Gaussian one, quadrature and naive estimators.

Seeds are fixed, so on one machine the verdicts do not vary; each statistical test says how likely a right estimator was
to fail when the seed was chosen, and has a control that must fail.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian, fitted
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import flowpost
from flowpost.evaluation import active_units, decompose_elbo, importance_estimate, kl_per_latent, log_marginal
from flowpost.importance import UnreliableEstimateWarning, summarize, warn_unreliable
from flowpost.objectives import elbo, gaussian_kl
from flowpost.pareto import chance_of_largest, fit_pareto, pareto_k, smoothed, tail_size, unseen
from flowpost.vae import VAE, Bernoulli

# ---------------------------------------------------------------------------------------------------- Pareto's k


def naive_k(log_w: np.ndarray) -> float:
    """Vehtari et al. (2024) on one set of weights, with Zhang & Stephens' own sign of k, one grid point at a time."""
    size = math.ceil(min(len(log_w) / 5, 3 * math.sqrt(len(log_w))))
    w = np.sort(np.exp(log_w - log_w.max()))
    x = w[-size:] - w[-size - 1]
    n, m = len(x), 30 + int(math.sqrt(len(x)))
    quartile = x[int(n / 4 + 0.5) - 1]
    grid = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)]
    profile = []
    for theta in grid:
        k = -np.mean(np.log(1 - theta * x))
        profile.append(n * (math.log(theta / k) + k - 1))
    weights = [1 / sum(math.exp(other - one) for other in profile) for one in profile]
    theta = sum(a * b for a, b in zip(weights, grid, strict=True))
    return (n * np.mean(np.log(1 - theta * x)) + 5) / (n + 10)


@pytest.mark.parametrize("samples", [21, 100, 1000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_k_hat_is_the_naive_formula_s(samples: int, spread: float) -> None:
    log_w = spread * torch.randn(samples, 4, dtype=torch.float64) - 300
    found = pareto_k(log_w.topk(tail_size(samples) + 1, dim=0).values, samples)
    expected = [naive_k(column.numpy()) for column in log_w.mT]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "samples", [100, 900, 2500]
)  # where 3 sqrt(samples) is whole: it is rounded down there, not up
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_k_hat_is_arviz_s(samples: int, spread: float) -> None:
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    log_w = spread * torch.randn(samples, 4, dtype=torch.float64) - 300
    found = pareto_k(log_w.topk(tail_size(samples) + 1, dim=0).values, samples)
    expected = array_stats.psislw(-log_w.mT.numpy())[1]  # of log-likelihoods, whose weights are the inverse
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [-0.5, 0.0, 0.3, 0.7, 1.5])
def test_the_shape_of_pareto_samples_is_found(k: float) -> None:
    """Means over 100 sets of 500; false-alarm rate below 1e-4 at 0.03: the estimator's sd is below 0.1 a set."""
    excess = torch.tensor(stats.genpareto.rvs(k, size=(500, 100), random_state=1)).sort(0).values
    found = fit_pareto(excess)
    assert found.mean().item() == pytest.approx(k, abs=0.03)
    assert (found - k).abs().max() < 0.5
    torch.testing.assert_close(fit_pareto(1e-9 * excess), found)  # whatever the scale


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_k_hat_of_pareto_weights(k: float) -> None:
    """Weights ``u^-k`` have shape k from the first to the last; 0.05 is over five standard errors of the mean."""
    log_w = -k * torch.rand(4000, 200, dtype=torch.float64).log()
    found = summarize([log_w], 4000).k_hat
    size = tail_size(4000)
    assert found.mean().item() == pytest.approx((size * k + 5) / (size + 10), abs=0.05)


@pytest.mark.parametrize("k", [0.4, 0.6])
def test_smoothed_weights_have_a_better_mean(k: float) -> None:
    """Of 300 sets of 2000 weights ``u^-k``, whose mean is ``1 / (1 - k)``: it is nearer, if a little low."""
    log_w = -k * torch.rand(300, 2000, dtype=torch.float64).log()
    found = torch.stack([smoothed(row) for row in log_w])
    errors = [(each.logsumexp(-1) - math.log(2000) + math.log(1 - k)) for each in (log_w, found)]
    assert errors[1].square().mean() < 0.95 * errors[0].square().mean()
    assert errors[1].mean().abs() < 0.04


def test_smoothing_moves_the_tail_alone() -> None:
    log_w = 2 * torch.randn(1000, dtype=torch.float64) + 500
    log_w[:300] = -math.inf
    found = smoothed(log_w)
    order, size = log_w.argsort(), tail_size(1000)
    assert torch.equal(found[order[:-size]], log_w[order[:-size]])
    assert (found[order[-size:]] != log_w[order[-size:]]).any()
    assert (found[order[-size - 1 :]].diff() >= 0).all()
    assert found.max() <= log_w.max()
    for each in (torch.zeros(1000), torch.randn(20), torch.full((1000,), -math.inf), torch.randn(1000) * math.nan):
        assert torch.equal(smoothed(each).nan_to_num(), each.double().nan_to_num())


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_smoothed_weights_are_arviz_s(spread: float) -> None:
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    log_w = spread * torch.randn(900, dtype=torch.float64)
    expected = array_stats.psislw(-log_w.numpy())[0]
    np.testing.assert_allclose(smoothed(log_w).log_softmax(0), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [0.3, 0.6, 1.0])
def test_the_largest_weight_of_a_pareto_tail_is_one_of_it(k: float) -> None:
    """Of 50 sets of weights ``u^-k`` none has a largest one by a chance of 1e-4; one 1e4^k times as large is none."""
    log_w = -k * torch.rand(50, 4000, dtype=torch.float64).log()
    assert min(chance_of_largest(row) for row in log_w) > 1e-4
    log_w.scatter_add_(1, log_w.argmax(1, keepdim=True), torch.full((50, 1), 1e4**k, dtype=torch.float64).log())
    assert sum(chance_of_largest(row) < 0.01 for row in log_w) > 40
    assert chance_of_largest(torch.zeros(1000)) == chance_of_largest(torch.randn(20)) == 1


@pytest.mark.parametrize("shape", [0.3, 0.6])
def test_what_lies_beyond_the_draws_is_that_of_the_pareto_distribution(shape: float) -> None:
    """Of weights that are all a Pareto tail the mean above the last of 10,000 is known; a standard error more is said.

    Of the mean ``1 / (1 - k)`` of weights ``u^-k`` the share ``S^(k - 1)`` is above the 1 - 1/S quantile.
    """
    generator = torch.Generator().manual_seed(0)
    found = [unseen(-shape * torch.rand(10_000, generator=generator).double().log()) for _ in range(20)]
    due = 10_000 ** (shape - 1)
    assert due < sorted(found)[10] < 4 * due + 0.01
    assert unseen(-1.1 * torch.rand(10_000, generator=generator).double().log()) == math.inf


def test_of_equal_weights_nothing_is_unseen_and_of_few_all() -> None:
    assert unseen(torch.full((1000,), 3.0)) == 0
    assert unseen(torch.randn(20)) == math.inf


@pytest.mark.full
def test_k_hat_of_a_gaussian_that_is_too_narrow() -> None:
    """With variances v_q < v_p the weights ``p / q`` have shape ``1 - v_q / v_p``, up to logarithms; wider: bounded."""
    model = LinearGaussian(1)
    x = model.draw(20)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # it is the point
        found = {v: importance_estimate(fitted(model, stretch=v**0.5), x, 20_000).k_hat for v in (0.1, 0.5, 2.0)}
    assert found[0.1].mean().item() == pytest.approx(0.9, abs=0.15)
    assert found[0.5].mean().item() == pytest.approx(0.5, abs=0.15)
    assert (found[2.0] < 0.2).all()


def test_k_hat_at_its_edges() -> None:
    assert pareto_k(torch.zeros(97, 2), 1000).tolist() == [-math.inf] * 2
    assert pareto_k(torch.randn(5, 3), 20).tolist() == [math.inf] * 3
    assert pareto_k(torch.randn(6, 3), 21).isfinite().all()
    tail = torch.randn(97, 4, dtype=torch.float64)
    tail[3, 0], tail[3, 1], tail[:, 2] = math.nan, math.inf, -math.inf
    found = pareto_k(tail, 1000)
    assert found[:3].isnan().all()
    assert found[3].isfinite()
    assert pareto_k(1e3 * torch.randn(97, 3, dtype=torch.float64), 1000).min() > 2  # most weights underflow
    half = torch.cat([torch.zeros(60, 1), torch.rand(37, 1)]).double()  # ties at the threshold, past the quartile
    assert pareto_k(half, 1000) > 0.7


# ------------------------------------------------------------------------------------------------ the stream


def test_the_stream_is_the_sum() -> None:
    log_w = 3 * torch.randn(1000, 5, dtype=torch.float64) - 1e4
    w = (log_w - log_w.amax(0)).exp()
    expected_p = log_w.amax(0) + w.mean(0).log()
    expected_ess = w.sum(0) ** 2 / w.square().sum(0)
    expected_error = w.std(0) / (math.sqrt(1000) * w.mean(0))
    expected_k = torch.tensor([naive_k(column.numpy()) for column in log_w.mT])
    for sizes in ([1000], [1] * 1000, [7] * 142 + [6], [300, 0, 700]):
        found = summarize(log_w.split(sizes), 1000)
        for a, b in zip(found, (expected_p, expected_error, expected_ess, expected_k), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert summarize([log_w.float()], 1000).log_p.dtype == torch.float64


def test_the_stream_s_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = []
    real = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda t, *args, **kwargs: longest.append(len(t)) or real(t, *args, **kwargs)
    )
    summarize((torch.randn(50, 3) for _ in range(400)), 20_000)
    assert max(longest) <= 2 * (tail_size(20_000) + 1) + 50


def test_the_stream_counts() -> None:
    with pytest.raises(ValueError, match="^samples: expected 30, the rows of all chunks, got 31"):
        summarize([torch.zeros(30, 2)], 31)
    with pytest.raises(ValueError, match="^samples: expected 0, the rows of all chunks, got 5"):
        summarize([], 5)
    one = summarize([torch.zeros(1, 2)], 1)
    assert one.standard_error.isnan().all()
    assert one.log_p.tolist() == [0.0, 0.0]


def test_weights_of_zero_and_nan_stay_in_their_column() -> None:
    log_w = torch.randn(100, 3, dtype=torch.float64)
    alone = summarize([log_w[:, :1]], 100)
    log_w[5, 1], log_w[:, 2] = math.nan, -math.inf
    found = summarize(log_w.split(30), 100)
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a[:1], b)
    assert found.log_p[1].isnan()
    assert found.log_p[2] == -math.inf
    assert found.k_hat[1:].isnan().all()


# ------------------------------------------------------------------------------------------- importance sampling


def test_the_exact_posterior_s_weights_do_not_vary() -> None:
    model = LinearGaussian(3)
    x = model.draw(230)[1]
    found = importance_estimate(fitted(model), x, 50, pairs=70)
    torch.testing.assert_close(found.log_p, model.evidence(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.ess, torch.full_like(found.ess, 50))
    assert found.standard_error.max() < 1e-6
    assert (found.k_hat < 0.7).all()


def test_ess_and_standard_error_of_a_gaussian_that_is_too_wide() -> None:
    """``S / ess -> E_q[(p/q)^2]``, the product over dimensions of ``a / sqrt(2 a - 1)``, a the variances' ratio.

    The standard error is right if the error over it has mean square 1: 400 examples, false-alarm rate 1e-4 at 0.28.
    """
    model, ratio, dim = LinearGaussian(3), 1.5, 3
    x = model.draw(400)[1]
    second = (ratio / math.sqrt(2 * ratio - 1)) ** dim
    found = importance_estimate(fitted(model, stretch=ratio**0.5), x, 2000, pairs=20_000)
    assert (2000 / found.ess).mean().item() == pytest.approx(second, rel=0.01)
    assert found.standard_error.mean().item() == pytest.approx(math.sqrt((second - 1) / 2000), rel=0.02)
    scores = (found.log_p - model.evidence(x)) / found.standard_error
    assert scores.square().mean().item() == pytest.approx(1, abs=0.28)
    assert (2 * scores).square().mean().item() != pytest.approx(1, abs=0.28)  # a standard error half as large is seen
    assert found.k_hat.max() < 0.7


def test_the_estimate_is_log_marginal_s() -> None:
    model = LinearGaussian(2)
    vae, x = fitted(model, "diagonal", stretch=1.3), model.draw(130)[1]
    torch.manual_seed(4)
    plain = log_marginal(vae, x, 300, pairs=500)
    torch.manual_seed(4)
    torch.testing.assert_close(importance_estimate(vae, x, 300, pairs=500).log_p, plain, rtol=0, atol=1e-12)


def test_a_heavy_tail_is_said_in_plain_words() -> None:
    model = LinearGaussian(2)
    x = model.draw(20)[1]
    with pytest.warns(UnreliableEstimateWarning) as caught:
        found = importance_estimate(fitted(model, stretch=0.2), x, 500)
    bad = int((found.k_hat > 0.7).sum())
    assert bad > 10
    message = str(caught[0].message)
    assert message.startswith(f"log p(x): not to be trusted for {bad} of 20 examples, whose Pareto k-hat is above 0.7")
    assert caught[0].filename == __file__
    with pytest.warns(
        UnreliableEstimateWarning, match=r"^log p\(x\): 20 samples are too few for k-hat, which needs 21"
    ):
        importance_estimate(fitted(model), x, 20)
    broken = found._replace(k_hat=torch.full_like(found.k_hat, math.nan))
    with pytest.warns(UnreliableEstimateWarning, match="for 20 of 20"):
        warn_unreliable(broken, 500)


def test_an_empty_batch() -> None:
    vae = fitted(LinearGaussian(2))
    found = importance_estimate(vae, torch.zeros(0, 5, dtype=torch.float64), 30)
    assert all(value.shape == (0,) for value in found)


def test_evaluation_leaves_gradient_mode_alone() -> None:
    """Generators that hold `no_grad` open would leak it to the caller."""
    model = LinearGaussian(2)
    importance_estimate(fitted(model), model.draw(5)[1], 40, pairs=20)
    assert torch.is_grad_enabled()


def test_counts_are_checked() -> None:
    vae, x = fitted(LinearGaussian(2)), torch.zeros(3, 5, dtype=torch.float64)
    for call in (importance_estimate, decompose_elbo):
        with pytest.raises(ValueError, match="^samples: expected an int >= 1, got 0"):
            call(vae, x, samples=0)
        with pytest.raises(ValueError, match="^pairs: expected an int >= 1, got 0"):
            call(vae, x, pairs=0)
    with pytest.raises(ValueError, match="^samples: expected an int >= 2, got 1"):
        active_units(vae, x, 1)


# ----------------------------------------------------------------------------------------- KL per latent, activity


@pytest.mark.parametrize("name", ["diagonal", "full_covariance"])
def test_kl_per_latent_is_the_marginals(name: str) -> None:
    model = LinearGaussian(3)
    vae, x = fitted(model, name), model.draw(120)[1]
    found = kl_per_latent(vae, x)
    q = model.posterior(x)
    variance = model.covariance.diagonal() if name == "full_covariance" else 1 / model.precision.diagonal()
    prior = Normal(torch.zeros(()).double(), torch.ones(()).double())
    torch.testing.assert_close(found, kl_divergence(Normal(q.mean, variance.sqrt()), prior))
    loc, tril = vae.posterior.gaussian(x)
    whole = gaussian_kl(loc, tril)
    if name == "diagonal":
        torch.testing.assert_close(found.sum(-1), whole)
    else:
        correlation = 0.5 * (model.covariance.diagonal().log().sum() - model.covariance.logdet())
        torch.testing.assert_close(found.sum(-1) + correlation, whole)


def test_a_flow_s_marginals_have_no_closed_form() -> None:
    vae = fitted(LinearGaussian(2), "planar")
    with pytest.raises(TypeError, match="^posterior: expected a Gaussian one, got a flow of Chain"):
        kl_per_latent(vae, torch.zeros(3, 5, dtype=torch.float64))


def test_active_units_of_a_gaussian_are_exact() -> None:
    """``Var_x(E_q[z]) = diag(I - S)`` for data from the model, S q's covariance; the last latent is dead."""
    model = LinearGaussian(3, last=0.02)
    x = model.draw(20_000)[1]
    found = active_units(fitted(model), x)
    torch.testing.assert_close(found.variance, model.posterior(x).mean.var(0))
    torch.testing.assert_close(found.variance, 1 - model.covariance.diagonal(), rtol=0.05, atol=1e-3)
    assert found.active.tolist() == [True, True, False]
    assert active_units(fitted(model), x, threshold=1e-5).active.all()


def test_active_units_of_a_flow_take_off_the_samples_own_noise() -> None:
    """A flat planar flow is its Gaussian; without the correction a dead latent at 64 samples has about 1/64 > 0.01."""
    model = LinearGaussian(2)
    x = model.draw(4000)[1]
    vae = fitted(model, "planar")
    found = active_units(vae, x, 16, pairs=700)
    exact = active_units(fitted(model, "diagonal"), x)
    torch.testing.assert_close(found.variance, exact.variance, rtol=0, atol=0.01)
    constant = x[:1].expand(4000, -1)
    silent = active_units(vae, constant, 16)
    assert silent.variance.abs().max() < 2e-3
    assert not silent.active.any()
    uncorrected = (1 / model.precision.diagonal()) / 16
    assert (uncorrected > 2e-3).all()  # the control: what it would have been


# -------------------------------------------------------------------------------------------------- decomposition


def test_decomposition_of_data_from_the_model() -> None:
    """The exact posteriors of all data are together the prior, and tell ``-log det S / 2`` about x.

    Means over 1,500 examples, 4 samples each: five standard errors, false-alarm rate 1e-6, and the bias, which is here
    below ``(e^I - 1) / 2N`` = 0.004. Control: the best factorized Gaussian, whose aggregate is not the prior.
    """
    model = LinearGaussian(2, elements=2, scale=1.0)
    x = model.draw(1500)[1]
    terms = decompose_elbo(fitted(model), x, 4)
    information = -0.5 * model.covariance.logdet()
    assert information > 0.4
    for term, expected in ((terms.mutual_information, information), (terms.marginal_kl, torch.zeros(()))):
        error = 5 * term.std() / math.sqrt(1500) + 0.01
        assert abs(term.mean() - expected) < error
        assert error < 0.25
    torch.testing.assert_close(
        terms.reconstruction - terms.mutual_information - terms.marginal_kl, model.evidence(x), rtol=0, atol=1e-8
    )
    wrong = decompose_elbo(fitted(model, "diagonal", stretch=0.5), x, 4)
    assert abs(wrong.mutual_information.mean() - information) > error


def mixture(vae: VAE, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The aggregate posterior's log q(z), and log q(z_j) for each latent, in the plainest way."""
    joint, latents = [], []
    for loc, tril in zip(*vae.encode(x).gaussian(), strict=True):
        joint.append(MultivariateNormal(loc, tril @ tril.mT).log_prob(z))
        latents.append(Normal(loc, (tril @ tril.mT).diagonal().sqrt()).log_prob(z))
    return torch.stack(joint).logsumexp(0) - math.log(len(x)), torch.stack(latents).logsumexp(0) - math.log(len(x))


@pytest.mark.parametrize("name", ["diagonal", "full_covariance"])
def test_the_latents_part_of_the_decomposition_by_hand(name: str) -> None:
    model = LinearGaussian(3)
    vae, x = fitted(model, name, stretch=0.8), model.draw(120)[1]
    found = []
    for pairs in (500, 2000, 10**6):  # one row's draws in every case
        torch.manual_seed(3)
        found.append(decompose_elbo(vae, x, 4, pairs=pairs))
        for a, b in zip(found[0], found[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    terms = found[0]
    assert terms.total_correlation is not None
    assert terms.dimension_kl is not None
    assert terms.dimension_kl.dtype == torch.float64
    torch.testing.assert_close(terms.total_correlation + terms.dimension_kl, terms.marginal_kl, rtol=0, atol=1e-12)
    torch.manual_seed(3)
    z = torch.cat([vae.encode(part).draw((4,)).z for part in x.split(100)], 1)
    joint, latents = mixture(vae, x, z)
    torch.testing.assert_close(terms.total_correlation, (joint - latents.sum(-1)).mean(0), rtol=0, atol=1e-9)
    expected = (latents - Normal(0.0, 1.0).log_prob(z)).sum(-1).mean(0)
    torch.testing.assert_close(terms.dimension_kl, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["diagonal", "full_covariance"])
def test_total_correlation_by_quadrature(name: str) -> None:
    """Three examples, two latents, on a grid; 4,000 samples each, five standard errors, false-alarm rate 1e-6."""
    model = LinearGaussian(2, elements=2, scale=0.4)
    vae, x = fitted(model, name, stretch=0.7), 2 * model.draw(3)[1]
    axis = torch.linspace(-6, 6, 301, dtype=torch.float64)
    grid, cell = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
    with torch.no_grad():
        joint, latents = mixture(vae, x, grid)
    mass, product = joint.exp() * cell, latents.sum(-1)
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    terms = decompose_elbo(vae, x, 4000)
    values = joint - product, product - Normal(0.0, 1.0).log_prob(grid).sum(-1)
    for term, value in zip((terms.total_correlation, terms.dimension_kl), values, strict=True):
        assert term is not None
        expected = (mass * value).sum()
        error = 5 * ((mass * (value - expected).square()).sum() / 12_000).sqrt()
        assert abs(term.mean() - expected) < error
        assert expected > 4 * error  # a term that is left out is seen


def test_total_correlation_of_one_latent_and_of_one_example() -> None:
    """One latent has none; of one example it is ``-log det R / 2``, R the correlations, and the rest the marginals'."""
    model = LinearGaussian(1)
    terms = decompose_elbo(fitted(model), model.draw(30)[1], 2)
    assert terms.total_correlation is not None
    assert terms.total_correlation.abs().max() < 1e-12
    model = LinearGaussian(3)
    x = model.draw(1)[1]
    deviations = model.covariance.diagonal().sqrt()
    expected = -0.5 * (model.covariance / deviations / deviations.unsqueeze(-1)).logdet()
    vae = fitted(model)
    terms = decompose_elbo(vae, x, 100_000)
    assert terms.total_correlation is not None
    assert terms.dimension_kl is not None
    assert expected > 0.1
    assert terms.total_correlation.item() == pytest.approx(expected.item(), abs=0.02)
    assert terms.dimension_kl.item() == pytest.approx(kl_per_latent(vae, x).sum().item(), abs=0.02)
    one = decompose_elbo(fitted(model, "diagonal"), x, 50)
    assert one.total_correlation is not None
    assert one.total_correlation.abs().item() < 1e-9


def test_what_has_no_closed_form_marginals_is_none() -> None:
    model = LinearGaussian(2)
    x = model.draw(10)[1]
    terms = decompose_elbo(fitted(model, "planar"), x, 2)
    assert terms.total_correlation is None
    assert terms.dimension_kl is None
    vae = fitted(model)
    torch.manual_seed(1)
    plain = decompose_elbo(vae, x, 2)
    vae.prior = flowpost.full_covariance(0, 2).double()
    torch.manual_seed(1)
    own = decompose_elbo(vae, x, 2)
    torch.testing.assert_close(own.total_correlation, plain.total_correlation)  # q(z)'s, whatever the prior
    assert own.dimension_kl is None


@pytest.mark.full
def test_decomposition_of_few_examples_by_quadrature() -> None:
    """One latent and 12 examples: q(z) is a mixture of 12 Gaussians. 4,000 samples each, false-alarm rate 1e-6."""
    model = LinearGaussian(1)
    x = model.draw(12)[1]
    vae = fitted(model, "planar", stretch=0.7, shift=0.4)
    loc = model.posterior(x).mean.squeeze(-1).numpy() + 0.4
    scale = 0.7 * model.covariance.sqrt().item()

    def density(z: float) -> float:
        return stats.norm.pdf(z, loc, scale).mean()

    entropy = -integrate.quad(lambda z: density(z) * math.log(density(z)), -9, 9, limit=500)[0]
    information = entropy - stats.norm(scale=scale).entropy()
    second_moment = scale**2 + np.mean(loc**2)
    marginal = -entropy + 0.5 * math.log(2 * math.pi) + 0.5 * second_moment
    for pairs in (5000, 100_000):
        terms = decompose_elbo(vae, x, 4000, pairs=pairs)
        assert terms.mutual_information.mean().item() == pytest.approx(information, abs=0.02)
        assert terms.marginal_kl.mean().item() == pytest.approx(marginal, abs=0.05)
    assert 0.4 < information < math.log(12)


def test_decomposition_adds_up_and_does_not_depend_on_its_chunks() -> None:
    torch.manual_seed(2)
    vae = VAE(nn.Linear(6, 5), flowpost.iaf(5, 3, steps=2, hidden=(8,)), nn.Linear(3, 6), Bernoulli()).double()
    with torch.no_grad():
        for parameter in vae.posterior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.rand(40, 6, dtype=torch.float64).round()
    found = []
    for pairs in (80, 7 * 80, 10**6):  # one, seven and all columns at once; fewer pairs would draw in another order
        torch.manual_seed(3)
        found.append(decompose_elbo(vae, x, 2, pairs=pairs))
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-10)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-10)
    torch.manual_seed(3)
    out = vae(x, (2,))
    terms = found[0]
    total = terms.reconstruction - terms.mutual_information - terms.marginal_kl
    torch.testing.assert_close(total, elbo(*out[:3]), rtol=0, atol=1e-9)
    naive = torch.stack([vae.posterior.log_prob(out.sample.z, vae.encoder(row)) for row in x], -1).logsumexp(-1)
    expected = (out.log_q - naive + math.log(40)).mean(0)
    torch.testing.assert_close(terms.mutual_information, expected, rtol=0, atol=1e-6)
    assert terms.mutual_information.mean() <= math.log(40)


def test_a_point_without_density_counts_as_none() -> None:
    """Where an inverse overflows there is no density; the row's own is known."""

    class Steep(flowpost.Bijector):
        def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            assert context is not None
            return z + context, z.new_zeros(())

        def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
            assert context is not None
            far = (z - context).abs() > 50
            return torch.where(far, math.inf, z - context), z.new_zeros(())

    posterior = flowpost.FlowPosterior(1, Steep(1, 1), head=nn.Identity())
    vae = VAE(nn.Identity(), posterior, nn.Linear(1, 1), Bernoulli())
    terms = decompose_elbo(vae, torch.tensor([[0.0], [100.0]]), 5)
    torch.testing.assert_close(terms.mutual_information, torch.full((2,), math.log(2), dtype=torch.float64))


def test_multivariate_reference() -> None:
    """The closed forms themselves: evidence, prior and posterior obey Bayes' rule."""
    model = LinearGaussian(3)
    z, x = model.draw(5)
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double()).log_prob(z)
    likelihood = Normal(z @ model.weight.mT + model.bias, model.scale).log_prob(x).sum(-1)
    torch.testing.assert_close(prior + likelihood - model.posterior(x).log_prob(z), model.evidence(x))
