"""The Gaussian start of a fit, on densities whose nearest Gaussian is known in closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from flowpost import Affine, Bijector, Chain, FlowPosterior
from flowpost.testing import check_bijector
from flowpost.variational.gaussian import (
    RATE,
    STRETCH,
    Gaussian,
    elbo,
    factorized,
    laplace,
    natural_ascent,
    rise,
    standard_gaussian,
)
from flowpost.variational.standard import Standard
from flowpost.variational.starts import BARRIER, NEGLIGIBLE, Start, distinct, find_start

LOC = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TRIL = torch.tensor([[2.0, 0, 0], [0.9, 0.5, 0], [-0.4, 0.3, 0.1]], dtype=torch.float64)
ZERO = torch.zeros(3, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slopes(log_p: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A log density with its gradient."""

    def gradient(points: Tensor) -> tuple[Tensor, Tensor]:
        leaf = points.detach().requires_grad_()
        with torch.enable_grad():
            value = log_p(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    return gradient


def normal(loc: Tensor = LOC, tril: Tensor = TRIL) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return slopes(MultivariateNormal(loc, scale_tril=tril, validate_args=False).log_prob)


def two(weight: float, apart: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Unit normals of two dimensions at -apart and +apart, and the weight of the first."""
    means = torch.tensor([[-apart, 0.0], [apart, 0.0]], dtype=torch.float64)
    logs = torch.tensor([weight, 1 - weight], dtype=torch.float64).log() - math.log(2 * math.pi)
    return slopes(lambda z: (logs - 0.5 * (z.unsqueeze(-2) - means).square().sum(-1)).logsumexp(-1))


# ------------------------------------------------------------------------------------------- the map of a Gaussian


def standard(*, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
    del context_size
    loc, below = torch.randn(dim, generator=seeded(seed)), torch.randn(dim, dim, generator=seeded(seed + 1))
    diagonal = (0.3 * below.diagonal()).exp().diag()
    return Standard(push * loc, push * below.tril(-1) + diagonal).to(dtype)


def test_standard_keeps_the_contract() -> None:
    """But for what is asked of steps whose numbers are parameters: that half precision rounds nothing else."""
    check_bijector(standard, dims=(3,), examples=1, skip=["identity", "averaged", "compiles", "batch_sizes"])


def test_standard_gives_a_gaussian_its_mean_and_covariance() -> None:
    step = Standard(LOC, TRIL)
    assert [name for name, _ in step.named_parameters()] == []
    assert set(step.state_dict()) == {"loc", "scale_tril"}
    z, log_det = step(torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(z, LOC + TRIL.mT)
    torch.testing.assert_close(log_det, torch.full((3,), math.log(2.0 * 0.5 * 0.1), dtype=torch.float64))
    loc, tril = FlowPosterior(0, Chain(Affine(3), Standard(LOC, TRIL))).double().gaussian()
    torch.testing.assert_close(loc, LOC)
    torch.testing.assert_close(tril, TRIL)


@pytest.mark.parametrize("tril", [torch.eye(2), -torch.eye(3)])
def test_standard_refuses_what_is_no_factor(tril: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^scale_tril: expected shape \(3, 3\) and a positive diagonal, got shape"):
        Standard(LOC, tril)


@pytest.mark.parametrize("loc", [LOC.unsqueeze(-1), LOC[0]])
def test_a_loc_that_is_no_vector_is_refused(loc: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^loc: expected shape \(dim,\), got"):
        Standard(loc, TRIL)


# ------------------------------------------------------------------------------------------------ natural gradient


def test_a_gaussian_is_reached_exactly() -> None:
    found, elbos = natural_ascent(normal(), standard_gaussian(ZERO), 100, 32, seeded())
    torch.testing.assert_close(found.loc, LOC, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.scale_tril, TRIL, rtol=0, atol=1e-6)
    own = natural_ascent(normal(), found, 3, 32, seeded())[0]  # no draw moves it once it is there
    torch.testing.assert_close(own, found, rtol=0, atol=1e-6)
    assert elbos.shape == (100,)
    assert elbo(normal(), found, 10, seeded()).item() == pytest.approx(0, abs=3)


def test_a_step_is_the_natural_gradient_s() -> None:
    """From N(m, s^2) to N(0, 1), by hand: ``r = e - s (m + s e)``, and half of mean(r e) in the logarithm of s."""
    m, s = 0.05, 1.1
    start = Gaussian(torch.tensor([m]).double(), torch.tensor([[s]]).double())
    found, _ = natural_ascent(normal(ZERO[:1], torch.eye(1).double()), start, 1, 8, seeded())
    square = torch.randn(4, 1, 1, dtype=torch.float64, generator=seeded()).square().mean().item()
    assert found.loc.item() == pytest.approx(m - RATE * s * s * m)
    assert found.scale_tril.item() == pytest.approx(s * math.exp(RATE * 0.5 * (1 - s * s) * square))


def test_a_gaussian_scores_its_own_density() -> None:
    """ELBO of p itself is 0 in the mean: log p there has the mean of minus the entropy."""
    own = Gaussian(LOC, TRIL)
    due = MultivariateNormal(LOC, scale_tril=TRIL).entropy()
    torch.testing.assert_close(own.entropy(), due)
    error = math.sqrt(3 / 2 / 4000)  # log p is -chi2 / 2 of 3 degrees
    assert abs(elbo(normal(), own, 4000, seeded()).item()) < 4 * error


def test_the_path_does_not_depend_on_units() -> None:
    """The same ELBOs, but for the log-det, on a target and start that an affine map has moved."""
    tilt = torch.tensor([[1e3, 0, 0], [-200.0, 1e-3, 0], [7.0, 2e-3, 5.0]], dtype=torch.float64)
    moved = normal(torch.tensor([1e4, 0.0, -3.0], dtype=torch.float64) + tilt @ LOC, tilt @ TRIL)
    start = Gaussian(torch.tensor([1e4, 0.0, -3.0], dtype=torch.float64), tilt)
    plain = natural_ascent(normal(), standard_gaussian(ZERO), 30, 16, seeded())[1]
    other = natural_ascent(moved, start, 30, 16, seeded())[1]
    assert plain[0] < plain[-1] - 10
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)


def test_the_factorized_optimum_has_the_precision_s_diagonal() -> None:
    """Closed form: the mean of p, and variances ``1 / diag(inv(cov))``."""
    tril = torch.tensor([[2.0, 0, 0], [0.6, 0.5, 0], [-0.04, 0.03, 0.1]], dtype=torch.float64)
    found, elbos = natural_ascent(normal(LOC, tril), standard_gaussian(ZERO), 200, 64, seeded(), diagonal=True)
    due = torch.linalg.inv(tril @ tril.mT).diagonal().rsqrt()
    assert found.scale_tril.tril(-1).abs().max() == 0
    # The noise of 64 draws, over the steps of the falling rate, is about 1 / sqrt(64 * 20).
    torch.testing.assert_close(found.scale_tril.diagonal(), due, rtol=0.08, atol=0)
    assert ((found.loc - LOC) / due).abs().max() < 0.12
    gap = tril.diagonal().log().sum() - due.log().sum()  # KL(q || p), where the trace term is dim
    assert abs(elbos[-50:].mean() + gap) < 0.1


def test_several_rise_side_by_side() -> None:
    """Each as it would alone, to its own mode."""
    starts = standard_gaussian(torch.tensor([[-3.0, 1.0], [4.0, -1.0]], dtype=torch.float64))
    found, elbos = natural_ascent(two(0.73, 5.0), starts, 100, 64, seeded())
    assert elbos.shape == (100, 2)
    due = torch.tensor([[-5.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found.loc, due, rtol=0, atol=1e-6)
    # log p/q is log w of every draw but for the entropy, which stands for -log q: a chi-square's noise, 2 sd / 8.
    due = torch.tensor([0.73, 0.27], dtype=torch.float64).log()
    torch.testing.assert_close(elbos[-50:].mean(0), due, rtol=0, atol=4 / math.sqrt(50 * 64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_draws_that_are_not_finite_are_left_out(bad: float) -> None:
    """Half of the space is bad, and the Gaussian of the other half's formula is reached all the same."""
    gradient = normal()

    def spoilt(points: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = gradient(points)
        wrong = points[:, 1] < LOC[1]
        return torch.where(wrong, bad, value), torch.where(wrong.unsqueeze(-1), math.nan, slope)

    found, elbos = natural_ascent(spoilt, standard_gaussian(ZERO), 200, 64, seeded())
    assert elbos.isfinite().all()
    torch.testing.assert_close(found.loc, LOC, rtol=0, atol=1e-4)


def test_rise_ends_where_nothing_is_gained() -> None:
    found, elbos = rise(normal(), standard_gaussian(ZERO), 10_000, 16, seeded(), diagonal=False)
    torch.testing.assert_close(found, Gaussian(LOC, TRIL), rtol=0, atol=1e-6)
    assert len(elbos) < 2000
    _, few = rise(normal(), standard_gaussian(ZERO), 40, 16, seeded(), diagonal=False)
    assert len(few) == 40


def test_a_climb_whose_last_stretch_is_one_step_warns_nobody() -> None:
    """Of one step's ELBO there is no variance to compare with."""
    _, elbos = rise(normal(), standard_gaussian(ZERO), 2 * (STRETCH + 1), 16, seeded(), diagonal=False)
    assert len(elbos) == 2 * (STRETCH + 1)


# -------------------------------------------------------------------------------------------------------- Laplace


def test_laplace_of_a_gaussian_is_itself() -> None:
    found = laplace(normal(), ZERO)
    assert found is not None
    torch.testing.assert_close(found.loc, LOC, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scale_tril, TRIL, rtol=0, atol=1e-5)


def test_laplace_has_the_curvature_at_the_mode() -> None:
    """Of a gamma density in log units, ``a u - b e^u``: the mode is log(a / b), the variance 1 / a.

    The search ends where log p changes by 1e-9, within sqrt(2e-9) standard deviations of the mode.
    """
    found = laplace(slopes(lambda u: (3.0 * u - 2.0 * u.exp()).sum(-1)), torch.zeros(1, dtype=torch.float64))
    assert found is not None
    assert found.loc.item() == pytest.approx(math.log(1.5), abs=5e-5)
    assert found.scale_tril.item() == pytest.approx(1 / math.sqrt(3), rel=5e-5)


@pytest.mark.parametrize(
    "log_p",
    [
        lambda z: z.sum(-1),
        lambda z: z.square().sum(-1),
        lambda z: -0.5 * z[..., 0].square() * (-z[..., 1]).exp() - 0.5 * z[..., 1],  # centred, of one observation
        lambda z: z.sum(-1) * math.nan,
    ],
)
def test_laplace_is_none_where_there_is_no_highest_point(log_p: Callable[[Tensor], Tensor]) -> None:
    assert laplace(slopes(log_p), ZERO + 0.1) is None


# --------------------------------------------------------------------------------------------------------- starts


def start(gradient: Callable[[Tensor], tuple[Tensor, Tensor]], dim: int = 2) -> Start:
    return find_start(gradient, torch.zeros(dim, dtype=torch.float64), 100_000, seeded(), diagonal=False)


def test_two_modes_are_found_with_their_evidence() -> None:
    found = start(two(0.73, 5.0))
    assert len(found.gaussians) == 2
    locs = torch.stack([each.loc for each in found.gaussians])
    torch.testing.assert_close(locs, torch.tensor([[-5.0, 0.0], [5.0, 0.0]]).double(), rtol=0, atol=1e-3)
    due = torch.tensor([0.73, 0.27], dtype=torch.float64).log()
    torch.testing.assert_close(torch.tensor(found.elbos, dtype=torch.float64), due, rtol=0, atol=0.2)


@pytest.mark.parametrize("apart", [8.0, 20.0])
def test_a_narrow_mode_is_found_beside_a_wide_one_that_all_near_guesses_climb_to(apart: float) -> None:
    """Of 0.3 N(-apart, I) + 0.7 N(apart, I / 4); what has its budget's search too short for far guesses finds one."""
    one = torch.ones(2, dtype=torch.float64)
    wide, narrow = MultivariateNormal(-apart * one, one.diag()), MultivariateNormal(apart * one, one.diag() / 4)
    gradient = slopes(lambda z: torch.logaddexp(wide.log_prob(z) + math.log(0.3), narrow.log_prob(z) + math.log(0.7)))
    found = find_start(gradient, torch.zeros(2).double(), 1_000_000, seeded(), diagonal=False)
    torch.testing.assert_close(torch.tensor(found.elbos), torch.tensor([0.7, 0.3]).log(), rtol=0, atol=0.2)
    assert len(start(gradient).gaussians) == 1


def test_guesses_that_stop_at_different_places_of_a_mode_cost_no_long_climb_each() -> None:
    """On a bent ridge there is a valley on the line between them; a long climb has 102,400 gradients."""
    points = []

    def counted(z: Tensor) -> tuple[Tensor, Tensor]:
        points.append(len(z))
        return slopes(lambda z: -0.5 * ((z[..., 0] / 2).square() + (2 * z[..., 1] - z[..., 0].square()).square()))(z)

    found = find_start(counted, torch.zeros(2).double(), 1_000_000, seeded(), diagonal=False)
    assert len(found.gaussians) == 1
    assert sum(points) < 230_000


@pytest.mark.parametrize("guessed", [True, False])
def test_a_narrow_ridge_is_walked_to_its_end(guessed: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """A thousand times as long as wide; with the mode given by L-BFGS, and without. The optimum is a closed form."""
    if not guessed:
        monkeypatch.setattr("flowpost.variational.starts.laplace", lambda *_: None)
    along = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64) / math.sqrt(3)
    cov = 1e-4 * torch.eye(3).double() + 100 * torch.outer(along, along)
    tril, loc = torch.linalg.cholesky(cov), 20 * along
    found = find_start(normal(loc, tril), ZERO, 1_000_000, seeded(), diagonal=True)
    due = torch.linalg.inv(cov).diagonal().rsqrt()
    assert found.gaussians[0].scale_tril.tril(-1).abs().max() == 0
    torch.testing.assert_close(found.gaussians[0].scale_tril.diagonal(), due, rtol=1e-4, atol=0)
    assert ((found.gaussians[0].loc - loc) / due).abs().max() < 0.01
    gap = tril.diagonal().log().sum() - due.log().sum()
    assert abs(found.elbos[0] + gap) < 0.2


def test_a_factorized_gaussian_has_the_precision_s_diagonal() -> None:
    """Also where there are several."""
    loc, tril = torch.stack([LOC, ZERO]), torch.stack([TRIL, TRIL.square().tril()])
    found = factorized(Gaussian(loc, tril))
    due = torch.linalg.inv(tril @ tril.mT).diagonal(dim1=-2, dim2=-1).rsqrt().diag_embed()
    torch.testing.assert_close(found.scale_tril, due)
    assert found.loc is loc


def test_one_mode_is_found_once() -> None:
    found = start(normal(), dim=3)
    assert len(found.gaussians) == 1
    torch.testing.assert_close(found.gaussians[0].scale_tril, TRIL, rtol=0, atol=1e-6)


def test_a_mode_of_next_to_nothing_is_dropped() -> None:
    assert len(start(two(1 - math.exp(-NEGLIGIBLE - 1), 5.0)).gaussians) == 1
    assert len(start(two(1 - math.exp(-NEGLIGIBLE + 2), 5.0)).gaussians) == 2


def test_more_modes_than_are_asked_for_are_not_forgotten() -> None:
    """Three equal ones, of which one is to be fitted: the others are there, as the search left them."""
    means = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    gradient = slopes(lambda z: (-0.5 * (z.unsqueeze(-2) - means).square().sum(-1)).logsumexp(-1))
    found = find_start(gradient, torch.zeros(2).double(), 100_000, seeded(), diagonal=False, most=1)
    assert len(found.gaussians) == 3
    assert found.elbos == sorted(found.elbos, reverse=True)
    assert max(found.elbos) - min(found.elbos) < 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_six_equal_modes_are_found_where_eight_may_be_had(seed: int) -> None:
    """On a ring of radius 5; eight guesses miss one or two of them. Each has a sixth of the mass, within the budget."""
    angles = torch.arange(6, dtype=torch.float64) * math.pi / 3
    means = 5 * torch.stack([angles.cos(), angles.sin()], -1)
    points = []

    def counted(z: Tensor) -> tuple[Tensor, Tensor]:
        points.append(len(z))
        return slopes(lambda z: (-2 * (z.unsqueeze(-2) - means).square().sum(-1)).logsumexp(-1))(z)

    generator = torch.Generator().manual_seed(seed)
    found = find_start(counted, torch.zeros(2).double(), 100_000, generator, diagonal=False, most=8)
    assert len(found.gaussians) == 6
    torch.testing.assert_close(torch.tensor(found.elbos), torch.full((6,), math.log(math.pi / 2)), rtol=0, atol=0.1)
    assert sum(points) < 100_000


def far_away(z: Tensor) -> Tensor:
    """Twenty draws about 90,000 +- 30,000, under a flat prior of their mean and of the logarithm of their scale."""
    x = 30_000 * (3 + torch.linspace(-1.7, 1.7, 20, dtype=torch.float64))
    return -20 * z[..., 1] - 0.5 * ((x - z[..., :1]) * (-z[..., 1:]).exp()).square().sum(-1)


@pytest.mark.parametrize(("budget", "far"), [(20_000, True), (1_000_000, False)])
def test_a_climb_that_has_not_arrived_goes_on(budget: int, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """Where a model of data in large units has no highest point; where the budget does not lead there, this is told."""
    monkeypatch.setattr("flowpost.variational.starts.laplace", lambda *_: None)
    points = []

    def counted(z: Tensor) -> tuple[Tensor, Tensor]:
        points.append(len(z))
        return slopes(far_away)(z)

    found = find_start(counted, torch.zeros(2, dtype=torch.float64), budget, seeded(), diagonal=False)
    assert found.far is far
    assert sum(points) < max(20_000, 0.6 * budget)
    if not far:
        assert found.gaussians[0].loc[0].item() == pytest.approx(90_000, rel=0.01)


def test_one_that_has_arrived_goes_no_further() -> None:
    assert not start(normal(), dim=3).far


def test_distinct_keeps_one_of_each_mode_the_best_first() -> None:
    """Guesses 0 and 2 are in one mode; a barrier is what two normals have between them, known in closed form."""
    locs = torch.tensor([[-5.0, 0.1], [5.0, 0.0], [-5.0, 0.0]], dtype=torch.float64)
    elbos = torch.tensor([-0.4, -1.3, -0.3], dtype=torch.float64)
    found = standard_gaussian(locs)
    assert distinct(two(0.73, 5.0), found, elbos) == [2, 1]
    assert distinct(two(0.73, 5.0), found, elbos - torch.tensor([0.0, NEGLIGIBLE, 0.0]).double()) == [2]
    for apart, count in ((math.sqrt(2 * BARRIER), 1), (math.sqrt(2 * BARRIER) + 0.5, 2)):
        # Between equal normals log p falls by apart^2 / 2 - log 2 from a mean to the middle.
        locs = torch.tensor([[-apart, 0.0], [apart, 0.0]], dtype=torch.float64)
        assert len(distinct(two(0.5, apart), standard_gaussian(locs), elbos[:2])) == count


def test_no_finite_value_keeps_the_first() -> None:
    found = standard_gaussian(torch.zeros(2, 2, dtype=torch.float64))
    assert len(distinct(two(0.5, 5.0), found, torch.full((2,), -math.inf, dtype=torch.float64))) == 1
