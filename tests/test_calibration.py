"""Simulation-based calibration of exact and wrong posteriors, and the band against its own definition."""

import math

import pytest
import torch
from linear_gaussian import LinearGaussian, fitted
from scipy import stats
from torch import Tensor

from flowpost.calibration import _binomial_cdf, rank_ecdf, rank_histogram, sbc_ranks


def ranks_of(name: str = "full_covariance", **wrong: float) -> Tensor:
    """Of 2,000 simulations of a linear-Gaussian model, 127 samples each."""
    model = LinearGaussian(3)
    vae = fitted(model, name, **wrong)
    return sbc_ranks(model.draw, lambda x, s: vae.posterior(x, (s,)).z, 2000, 127, batch=300)


def chi_squared(ranks: Tensor) -> float:
    return min(stats.chisquare(row.numpy()).pvalue for row in rank_histogram(ranks, 127))


def test_an_exact_posterior_is_calibrated() -> None:
    """False-alarm rates: 3 latents at 1e-4, and 3 at 1e-3. Controls: the wrong ones below."""
    ranks = ranks_of()
    assert ranks.shape == (2000, 3)
    assert chi_squared(ranks) > 1e-4
    assert rank_ecdf(ranks, 127, 0.999).inside.all()


@pytest.mark.parametrize("wrong", [{"stretch": 0.9}, {"stretch": 1.1}, {"shift": 0.05}], ids=str)
def test_a_wrong_posterior_is_found(wrong: dict) -> None:
    ranks = ranks_of(**wrong)
    assert chi_squared(ranks) < 1e-4
    assert not rank_ecdf(ranks, 127, 0.999).inside.all()


def test_ranks_by_hand() -> None:
    z = torch.tensor([[0.5, -3.0], [2.5, 9.0]])
    drawn = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 2, 2)
    found = sbc_ranks(lambda n: (z[:n], z[:n]), lambda x, s: drawn[:s, : len(x)], 2, 3)
    assert found.tolist() == [[1, 0], [3, 3]]
    assert rank_histogram(found, 3, 4).tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]
    assert rank_histogram(found, 3, 2).tolist() == [[1, 1], [1, 1]]
    ecdf = rank_ecdf(found, 3)
    assert ecdf.ecdf.tolist() == [[0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 1.0]]
    assert ecdf.uniform.tolist() == [0.25, 0.5, 0.75, 1.0]


def test_the_band_holds_a_uniform_curve_as_often_as_it_says() -> None:
    """1,000 fresh sets of 200 ranks; four binomial standard errors and the band's own, false-alarm rate 1e-4."""
    level = 0.9
    ranks = torch.randint(64, (200, 1000))
    share = rank_ecdf(ranks, 63, level).inside.double().mean().item()
    error = math.sqrt(level * (1 - level) * (1 / 1000 + 1 / 2000))
    assert abs(share - level) < 4 * error
    pointwise = stats.binom.ppf(0.05, 200, 32 / 64) / 200
    assert rank_ecdf(ranks, 63, level).lower[31] < pointwise  # a simultaneous band is wider


def test_the_binomial_is_scipy_s() -> None:
    p = torch.tensor([0.1, 0.5, 0.99, 1.0], dtype=torch.float64)
    expected = stats.binom.cdf(torch.arange(51).numpy(), 50, p.unsqueeze(-1).numpy())
    torch.testing.assert_close(_binomial_cdf(50, p), torch.tensor(expected))


def test_the_global_seed_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    rank_ecdf(torch.zeros(50, 1, dtype=torch.long), 15)
    assert torch.equal(torch.rand(()), expected)


def test_calibration_refuses() -> None:
    def simulate(n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(n, 2), torch.zeros(n, 4)

    for kwargs in ({"simulations": 0}, {"samples": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(kwargs))}: expected an int >= 1, got 0"):
            sbc_ranks(simulate, lambda x, s: torch.zeros(s, len(x), 2), **kwargs)
    with pytest.raises(ValueError, match=r"^draw: expected shape \(7, 3, 2\), got \(3, 7, 2\)"):
        sbc_ranks(simulate, lambda x, s: torch.zeros(len(x), s, 2), 3, 7)
    with pytest.raises(ValueError, match=r"^simulate: expected z of shape \(3, dim\), got \(3,\)"):
        sbc_ranks(lambda n: (torch.zeros(n), torch.zeros(n)), lambda x, s: x, 3, 7)
    with pytest.raises(ValueError, match="^bins: expected a divisor of samples [+] 1 = 8, got 3"):
        rank_histogram(torch.zeros(4, 1, dtype=torch.long), 7, 3)
    for level in (0.0, 1.0, 0.9999):
        with pytest.raises(ValueError, match="^level: expected a probability in"):
            rank_ecdf(torch.zeros(4, 1, dtype=torch.long), 7, level)
    ranks = torch.tensor([[0, 9], [3, 2]])
    for report in (rank_ecdf, rank_histogram):
        with pytest.raises(ValueError, match="^ranks: expected numbers from 0 to samples = 7, got from 0 to 9; pass"):
            report(ranks, 7)
        with pytest.raises(ValueError, match=r"^ranks: expected shape \(simulations, dim\), got \(2,\)"):
            report(ranks[:, 0], 15)
        with pytest.raises(TypeError, match=r"^ranks: expected integers, as sbc_ranks gives them, got torch.float32"):
            report(ranks.float(), 15)


@pytest.mark.parametrize("who", ["simulate", "draw"])
def test_what_is_no_number_has_no_rank(who: str) -> None:
    """Nan is below nothing, so that it would count as the lowest rank, or as the highest draw."""

    def spoilt(values: Tensor, name: str) -> Tensor:
        return values.index_fill(0, torch.tensor([1]), math.nan) if name == who else values

    with pytest.raises(ValueError, match=f"^{who}: expected numbers, which have a rank, got nan$"):
        sbc_ranks(
            lambda n: (spoilt(torch.zeros(n, 2), "simulate"), torch.zeros(n)),
            lambda x, s: spoilt(torch.zeros(s, len(x), 2), "draw"),
            3,
            7,
        )
