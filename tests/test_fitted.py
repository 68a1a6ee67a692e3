"""A fitted posterior as a statistician reads it, from a q that is known: nothing is fitted here."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import LogNormal, Normal, StudentT, constraints

import flowpost
from flowpost import CorruptFileError
from flowpost.fit import FittedPosterior, Progress
from flowpost.importance import ImportanceEstimate, UnreliableEstimateWarning
from flowpost.variational import weighing
from flowpost.variational.families import Flow, assemble, build_flow
from flowpost.variational.far import Far, where_far
from flowpost.variational.gaussian import Gaussian
from flowpost.variational.mixture import Mixture
from flowpost.variational.parameters import Parameters, Spec
from flowpost.variational.summary import Summary, misses, summary
from flowpost.variational.target import Target
from flowpost.variational.verdict import reasons, verdict
from flowpost.variational.weighing import Weighed, estimate, mean_and_error, weigh

TINY: dict[str, Any] = {"steps": 2, "hidden": (4,)}
SHORT = r"a sd of mu that is off by -(19|20|21)%"
ROOM = {"mu": (), "tau": (2, constraints.positive)}


def made(
    log_joint: Callable[[Any], Tensor],
    spec: Spec,
    *normals: tuple[float, float],
    flow: Flow = "diagonal",
    dtype: torch.dtype = torch.float64,
    options: dict | None = None,
    **given: Any,  # noqa: ANN401
) -> FittedPosterior:
    """Q is N(loc, scale^2) in every free coordinate, or an even mixture of such ones."""
    target = Target(log_joint, Parameters(spec), device="cpu", dtype=dtype)
    eye = torch.eye(target.parameters.dim, dtype=dtype)
    gaussians = [Gaussian(loc * eye.sum(0), scale * eye) for loc, scale in normals]
    built = build_flow(flow, target.parameters.dim, options or {})
    return FittedPosterior(
        assemble(built, gaussians, [0.0] * len(gaussians)), target, **{"evaluations": 5, "seconds": 0.5, **given}
    )


def standard(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(z).sum(-1)


def room(p: dict[str, Tensor]) -> Tensor:
    """Of many draws: mu is N(1, 1), the logarithms of tau too."""
    return Normal(1.0, 1.0).log_prob(p["mu"]) + LogNormal(1.0, 1.0).log_prob(p["tau"]).sum(-1)


# --------------------------------------------------------------------------------------------------------- weights


def test_weights_of_a_normal_by_another_are_the_closed_form() -> None:
    """Q = N(0.3, 1) for p = 2 N(0, 1): log p/q, the ELBO, the evidence, and the ESS, ``S exp(-0.09)``."""
    fitted = made(lambda z: standard(z) + math.log(2), 1, (0.3, 1.0))
    weighed = weigh(fitted.posterior, fitted.target, 10_000, torch.Generator().manual_seed(3))
    z = weighed.z.squeeze(-1)
    torch.testing.assert_close(weighed.log_ratio, math.log(2) + 0.5 * (z - 0.3) ** 2 - 0.5 * z**2)
    torch.testing.assert_close(weighed.share, torch.full((10_000,), 1e-4, dtype=torch.float64))
    elbo, error = mean_and_error(weighed)
    assert error == pytest.approx(0.3 / 100, rel=0.05)
    assert elbo == pytest.approx(math.log(2) - 0.045, abs=4 * error)
    found = estimate(weighed)
    assert found.standard_error.item() == pytest.approx(math.sqrt(math.expm1(0.09)) / 100, rel=0.1)
    assert found.log_p.item() == pytest.approx(math.log(2), abs=4 * found.standard_error.item())
    assert found.ess.item() == pytest.approx(10_000 * math.exp(-0.09), rel=0.02)
    assert found.k_hat < 0.5
    assert (fitted.log_evidence, fitted.k_hat, fitted.ess) == pytest.approx(
        (fitted.estimate.log_p.item(), fitted.estimate.k_hat.item(), fitted.estimate.ess.item())
    )
    elbo, error = fitted.elbo(2000)
    assert elbo == pytest.approx(math.log(2) - 0.045, abs=4 * error)


def test_equal_weights_have_no_tail() -> None:
    fitted = made(standard, 3, (0.0, 1.0))
    assert fitted.k_hat == -math.inf
    assert fitted.log_evidence == pytest.approx(0, abs=1e-12)
    assert fitted.is_trusted


@pytest.mark.parametrize(
    ("size", "k_hat"), [(2e-5, -math.inf), (1e-4, -math.inf), (1e-3, pytest.approx(0.95, abs=0.05))]
)
def test_a_tail_counts_where_its_weights_do(size: float, k_hat: float) -> None:
    """Weights with a Pareto tail of shape 1, which weighs next to nothing at the first sizes, and not at the last.

    Of 20,000 weights at the second, three are above 1.65 times the mean, and none above 3.
    """
    log_ratio = (1 + size * 20_000 / torch.arange(1, 20_001, dtype=torch.float64)).log()
    found = estimate(Weighed(log_ratio.unsqueeze(-1), log_ratio, torch.full((20_000,), 5e-5, dtype=torch.float64)))
    assert found.k_hat.item() == k_hat


def test_one_draw_s_chance_is_smoothed_away() -> None:
    """Weights of a Pareto tail of shape 0.6 but for the largest, ten times what it would be, at a draw far out."""
    share = torch.full((10_000,), 1e-4, dtype=torch.float64)
    log_ratio = -0.6 * ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000).log() + math.log(0.4)
    z = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_ratio[0], z[0] = log_ratio[0] + math.log(10), 5.0
    wild = Weighed(z, log_ratio, share)
    fitted = made(standard, 1, (0.0, 1.0), weighed=wild)
    assert fitted.k_hat == pytest.approx(0.6, abs=0.05)
    assert wild.log_ratio.logsumexp(0) - math.log(10_000) > 0.1
    assert fitted.log_evidence == pytest.approx(0, abs=0.03)
    found, raw = fitted.summary(), summary(fitted.parameters, wild, weighted=True)
    assert found.weighted
    assert raw.mean > 0.45
    assert found.mean.item() == pytest.approx(0, abs=0.1)
    assert fitted.ess > 5 * (log_ratio.logsumexp(0) * 2 - (2 * log_ratio).logsumexp(0)).exp()


def found_by_few(count: int, above: float, spread: float = 0.1) -> Weighed:
    """Of 10,000 normal draws so many are at 5, with weights so far above all others, which are nearly equal."""
    generator = torch.Generator().manual_seed(4)
    z, log_ratio = torch.randn(2, 10_000, generator=generator, dtype=torch.float64)
    z[:count], log_ratio = 5.0, spread * log_ratio
    log_ratio[:count] = math.log(above)
    return Weighed(z.unsqueeze(-1), log_ratio, torch.full_like(z, 1e-4))


@pytest.mark.parametrize(("count", "above"), [(1, 4000), (2, 1500), (3, 5000)])
def test_what_a_few_draws_have_found_is_not_smoothed_away(count: int, above: float) -> None:
    """A mode that q all but misses: its few draws stand for much of the mass, and k-hat, of the others, may be fine."""
    wild = found_by_few(count, above)
    fitted = made(standard, 1, (0.0, 1.0), weighed=wild)
    share = count * above / (count * above + 10_000)
    assert fitted.log_evidence == pytest.approx(-math.log1p(-share), abs=0.02)
    assert fitted.estimate.standard_error.item() == pytest.approx(share / math.sqrt(count), rel=0.1)
    assert re.search(rf"{count} of 10000 draws have \d+% of all weight, as near theta = \[5\]: more", fitted.verdict)
    assert not fitted.is_trusted
    if fitted.summary().weighted:
        assert fitted.summary().mean.item() == pytest.approx(5 * share, abs=0.2)


@pytest.mark.parametrize(("count", "above"), [(1, 20), (0, 1)])
def test_what_a_few_draws_have_found_is_not_said_where_it_is_little(count: int, above: float) -> None:
    fitted = made(standard, 1, (0.0, 1.0), weighed=found_by_few(count, above))
    assert fitted.log_evidence == pytest.approx(0.005, abs=0.005)
    assert fitted.is_trusted


def test_the_means_of_a_gaussian_are_exact_and_each_draw_is_its(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is centred a thousand at a time; in twos the loss of variance would show, were it not made up for."""
    fitted = made(standard, 1, (0.3, 2.0))
    weighed = weigh(fitted.posterior, fitted.target, 3000, torch.Generator().manual_seed(0))
    assert weighed.z.mean().item() == pytest.approx(0.3, abs=1e-12)
    monkeypatch.setattr(weighing, "CHUNK", 2)
    in_twos = weigh(fitted.posterior, fitted.target, 20_000, torch.Generator().manual_seed(0)).z - 0.3
    assert in_twos.square().mean().item() == pytest.approx(4, rel=4 * math.sqrt(2 / 10_000))


def test_stratified_draws_have_their_components_shares() -> None:
    """An uneven mixture of far normals: the mean over draws is that of the weights, and not of the counts."""
    fitted = made(standard, 1, (-9.0, 1.0), (9.0, 1.0))
    assert isinstance(fitted.posterior, Mixture)
    with torch.no_grad():
        fitted.posterior.logits[:] = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    weighed = weigh(fitted.posterior, fitted.target, 2001, torch.Generator().manual_seed(0))
    left = weighed.z.squeeze(-1) < 0
    assert left.sum() == len(left) / 2
    assert weighed.share.sum().item() == pytest.approx(1)
    assert weighed.share[left].sum().item() == pytest.approx(0.9)


# --------------------------------------------------------------------------------------------------------- summary


@pytest.mark.parametrize("weighted", [True, False])
def test_the_summary_is_that_of_weighted_draws_by_hand(weighted: bool) -> None:  # noqa: FBT001
    """Moments by numpy's average; a quantile is the first draw at which the weights reach the level."""
    z = torch.randn(500, 3, dtype=torch.float64)
    log_ratio, share = torch.randn(500, dtype=torch.float64), torch.rand(500, dtype=torch.float64)
    parameters = Parameters({"mu": (), "tau": (2, constraints.positive)})
    found = summary(parameters, Weighed(z, log_ratio, share / share.sum()), weighted=weighted)
    weight = (share * log_ratio.exp() if weighted else share).numpy()
    weight = weight / weight.sum()
    columns = np.concatenate([z[:, :1].numpy(), np.exp(z[:, 1:].numpy())], 1)
    mean = np.average(columns, 0, weight)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.sd, np.sqrt(np.average((columns - mean) ** 2, 0, weight)), rtol=1e-10)
    np.testing.assert_allclose(found.error, np.sqrt(((weight[:, None] * (columns - mean)) ** 2).sum(0)), rtol=1e-10)
    for row, level in zip(found.quantiles.numpy(), (0.05, 0.5, 0.95), strict=True):
        for j in range(3):
            order = columns[:, j].argsort()
            due = columns[order[np.searchsorted(weight[order].cumsum(), level)], j]
            assert row[j] == due
    assert found.names == ("mu", "tau[0]", "tau[1]")
    assert str(found).splitlines()[-1] == ("weighted by p/q" if weighted else "draws of q, not weighted")


def test_the_summary_prints_what_a_small_sd_leaves() -> None:
    """A location of 10,000 with a sd of 1e-4 shows its last digits, and the columns stay columns."""
    numbers = torch.tensor([10_000.00012, 2.5], dtype=torch.float64)
    table = Summary(
        ("far", "near"),
        numbers,
        torch.tensor([1e-4, 1.0]),
        numbers.expand(3, 2),
        torch.tensor([1e-6, 0.01]),
        weighted=True,
    )
    lines = str(table).splitlines()
    assert lines[1].split() == ["far", "10000.00012", "0.0001", *["10000.00012"] * 3, "1e-06"]
    assert lines[2].split() == ["near", "2.5", "1", "2.5", "2.5", "2.5", "0.01"]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_the_summary_is_weighted_where_k_hat_allows_it() -> None:
    near, far = made(standard, 1, (0.3, 1.0)), made(standard, 1, (0.0, 0.3))
    assert near.summary().weighted
    assert near.summary().mean.item() == pytest.approx(0, abs=0.05)  # of q alone it is 0.3
    assert far.k_hat > 0.7
    assert not far.summary().weighted
    assert far.summary().sd.item() == pytest.approx(0.3, rel=0.03)


def test_the_summary_is_where_the_draws_are() -> None:
    """And not on the default device."""
    fitted = made(room, ROOM, (1.0, 1.0))
    with torch.device("meta"):
        found = fitted.summary()
    torch.testing.assert_close(found.mean, fitted.summary().mean, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- verdict


def estimated(log_p: float, k_hat: float) -> ImportanceEstimate:
    return ImportanceEstimate(*(torch.tensor(value, dtype=torch.float64) for value in (log_p, 0.01, 500.0, k_hat)))


@pytest.mark.parametrize(
    ("k_hat", "elbo", "lost", "wrong", "notes", "said"),
    [
        (0.3, -0.4, "", [], [], []),
        (0.71, -0.4, "", [], [], ["Pareto k-hat is 0.71, above 0.7: "]),
        (math.nan, -0.4, "", [], [], ["Pareto k-hat is nan, above 0.7: "]),
        (0.7, -0.6, "", [], [], ["the importance-sampled log evidence is 0.60 nats above the ELBO, so KL"]),
        (0.3, -math.inf, "2% of q's draws", [], [], ["log p/q is not finite at 2% of q's draws"]),
        (math.nan, -math.inf, "100% of q's draws", [], [], ["log p/q is not finite at 100% of q's draws"]),
        (0.7, -0.4, "", ["m", "s"], [], ["q's own draws have m and s; summary() and"]),
        (-math.inf, -0.4, "", ["m"], [], ["q's own draws have m; summary() and"]),
        (0.71, -0.4, "", ["m"], [], ["Pareto k-hat is 0.71, above 0.7: "]),
        (0.3, -math.inf, "2% of q's draws", ["m"], [], ["log p/q is not finite at 2% of q's draws"]),
        (0.3, -0.4, "", [], ["a mode is lost"], ["a mode is lost"]),
        (2.0, -9.0, "", [], ["a", "b"], ["Pareto k-hat is 2.00", "the importance-sampled log evidence is 9", "a", "b"]),
    ],
)
def test_what_speaks_against_a_fit(
    k_hat: float, elbo: float, lost: str, wrong: list[str], notes: list[str], said: list[str]
) -> None:
    found = reasons(estimated(0.0, k_hat), elbo, lost=lost, missed=wrong, far=Far(0.5, 0.1, "mu = 3"), notes=notes)
    assert len(found) == len(said)
    assert all(one.startswith(other) for one, other in zip(found, said, strict=True))
    text = verdict(found, estimated(0.0, k_hat), elbo)
    assert ("where a prior is improper" in text) == ("Pareto" in text)
    figures = f"ELBO {elbo:.3f}, log evidence 0.000 (standard error 0.010), k-hat {k_hat:.2f}"
    assert figures in text
    if said:
        assert text == f"Not to be trusted as it is: {'; '.join(found)}. {figures}."
    else:
        assert text.startswith("Nothing speaks against this fit: ")
        assert text.endswith("Mass that no draw has reached shows in none of these.")


TAIL = 0.05 * torch.arange(1, 10_001, dtype=torch.float64).pow(-0.75)
"""Of 10,000 weights near 1, a Pareto tail of shape 0.75 on top."""


def tailed(size: float, mean: float = 0.0) -> Weighed:
    """Weights with such a tail, whose largest is so far above the others, at draws of N(mean, 1)."""
    z = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean
    return Weighed(z, (1 + size * TAIL / TAIL[0]).log(), torch.full((10_000,), 1e-4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "trusted", "off"),
    [(0.5, True, math.nan), (3.0, True, 0.06), (20.0, False, math.nan), (1000.0, False, math.nan)],
)
def test_a_tail_of_next_to_no_mass_speaks_against_nothing_but_itself(size: float, trusted: bool, off: float) -> None:  # noqa: FBT001
    """K-hat is above its limit from the second on; what it is worth is the mass that may lie beyond the draws."""
    fitted = made(standard, 1, (0.0, 1.0), weighed=tailed(size))
    assert fitted.is_trusted == trusted, fitted.verdict
    assert ("far tails" in fitted.verdict) == (not math.isnan(off))
    if not math.isnan(off):
        assert fitted.k_hat > 0.7
        assert not fitted.summary().weighted
        said = re.search(r"by more than (\d\.\d+); .*k-hat 0\.\d\d, above 0\.7\. Mass that no draw", fitted.verdict)
        assert said
        assert float(said[1]) == pytest.approx(off, abs=0.02)
        assert fitted.verdict.startswith("Good for means, sds and probabilities, but not for far tails, where q is too")
    if not trusted:
        assert "Pareto k-hat is" in fitted.verdict


@pytest.mark.parametrize(
    "given",
    [
        {"lost": "2% of q's draws"},
        {"apart": "2 of 10000 draws"},
        {"missed": ["a mean that is off"]},
        {"far": Far(0.0, 0.11, "")},
        {"elbo": -0.02},
        {"unseen": 0.02},
        {"unseen": math.inf},
    ],
)
def test_a_light_tail_excuses_nothing_else(given: dict) -> None:
    """Where the KL, the mass beyond the draws, or a mean is not small too, k-hat counts."""
    base = {"lost": "", "missed": [], "far": Far(0.0, 0.0, ""), "notes": [], "unseen": 1e-3, "elbo": -0.001}
    assert reasons(estimated(0.0, 0.76), **base) == []
    assert reasons(estimated(0.0, 0.76), **{**base, **given})[0].startswith("Pareto k-hat is 0.76, above 0.7")


@pytest.mark.parametrize(
    ("loc", "scale", "said"),
    [
        (0.0, 1.0, []),
        (0.08, 1.0, []),
        (-0.3, 1.0, [r"a mean of mu that is off by -0\.(29|30|31) of its sd"]),
        (0.2, 0.8, [r"a mean of mu that is off by \+0\.(1[89]|2[0-3]) of its sd", SHORT]),
        (0.0, 0.95, []),
        (0.0, 0.8, [SHORT]),
    ],
)
def test_draws_are_said_to_be_off_where_their_weights_know_better(loc: float, scale: float, said: list[str]) -> None:
    """P is N(0, 1); k-hat allows its weights."""
    fitted = made(lambda p: standard(p["mu"].unsqueeze(-1)), {"mu": ()}, (loc, scale))
    assert fitted.k_hat < 0.7
    found = misses(fitted.parameters, fitted._weighed)
    assert len(found) == len(said)
    assert all(re.fullmatch(one, other) for one, other in zip(said, found, strict=True)), found
    assert fitted.is_trusted == (not said)
    assert ("q's own draws have a" in fitted.verdict) == bool(said)


def test_what_may_be_chance_is_not_said() -> None:
    """Fifty draws whose weights know nothing of them: a mean is off by a quarter of its sd, by chance."""
    generator = torch.Generator().manual_seed(7)
    z, log_ratio = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    weighed = Weighed(z.unsqueeze(-1), log_ratio, torch.full_like(z, 1 / 50))
    weight = log_ratio.softmax(0)
    mean = (weight * z).sum()
    sd = (weight * (z - mean).square()).sum().sqrt()
    assert (z.mean() - mean).abs() / sd > 0.2
    assert misses(Parameters(1), weighed) == []


def test_an_entry_that_is_constant_is_not_off() -> None:
    """The first row of a correlation's factor is 1, 0: it has no sd, and no draw is off from it."""
    spec = {"L": ((2, 2), constraints.corr_cholesky)}
    fitted = made(lambda p: 0.5 * p["L"][..., 1, 1].log(), spec, (0.0, 0.9))
    assert all("L[1," in each for each in misses(fitted.parameters, fitted._weighed))


def on_a_line(count: int = 1000) -> Weighed:
    """Evenly on the diagonal from -1 to 1, and close to it a normal; where p is flat along it, p/q is 2."""
    generator = torch.Generator().manual_seed(0)
    along = torch.linspace(-1, 1, count, dtype=torch.float64)
    half = 0.01 * torch.randn(count // 2, generator=generator, dtype=torch.float64)
    across = torch.cat([half, half.flip(0)])  # uncorrelated
    z = torch.stack([along + across, along - across], -1) / math.sqrt(2)
    return Weighed(z, torch.full_like(along, math.log(2)), torch.full_like(along, 1 / count))


NOWHERE: Any = SimpleNamespace(log_prob=lambda z: torch.full(z.shape[:-1], -math.inf, dtype=z.dtype))
"""A q that has nothing beyond its draws."""


def ridge(z: Tensor) -> Tensor:
    """Flat along the diagonal, but for what keeps a gradient; its integral is infinite."""
    return Normal(0.0, 0.01).log_prob((z[..., 0] - z[..., 1]) / math.sqrt(2)) + 1e-9 * z[..., 0]


def box(z: Tensor) -> Tensor:
    """The same between -1 and 1."""
    return torch.where(z.sum(-1).abs() / math.sqrt(2) <= 1, ridge(z), -math.inf)


def test_a_density_without_end_is_told() -> None:
    """Ten times as far out there is ten times the mass; of a density that ends, as much as before, less four errors."""
    targets = {f: Target(f, Parameters(2), device="cpu", dtype=torch.float64) for f in (ridge, box)}
    found = {f: where_far(NOWHERE, target, on_a_line()) for f, target in targets.items()}
    assert found[ridge].rise == pytest.approx(math.log(10), abs=1e-6)
    assert re.fullmatch(r"theta = \[-?7\.\d+, -?7\.\d+\]", found[ridge].where)
    assert found[box].rise == pytest.approx(math.log(1 - 4 * math.sqrt(9 / 999)), abs=0.1)
    said = reasons(estimated(0.0, 0.3), -0.4, lost="", missed=[], far=found[ridge], notes=[])
    assert len(said) == 1
    assert said[0].startswith(
        "draws 10 times as far out raise the log evidence by 2.30 nats and more, as near theta = ["
    )
    assert "draws 10 times as far out" in made(lambda p: 1e-9 * p["mu"], {"mu": ()}, (0.0, 1.0)).verdict


@pytest.mark.parametrize(("freedom", "told"), [(3.0, True), (8.0, False), (30.0, False)])
def test_a_tail_that_no_draw_reaches_is_told_by_the_sd_that_it_has(freedom: float, told: bool) -> None:  # noqa: FBT001
    """A normal in the place of a Student's t; by quadrature the sd without what is where p/q is above e^3, at most."""

    def log_joint(z: Tensor) -> Tensor:
        return StudentT(freedom).log_prob(z).sum(-1)

    target = Target(log_joint, Parameters(1), device="cpu", dtype=torch.float64)
    q = assemble(build_flow("diagonal", 1, {}), [Gaussian(torch.zeros(1).double(), 1.3 * torch.eye(1).double())], [0.0])
    found = where_far(q, target, weigh(q, target, 1000, torch.Generator().manual_seed(0)))
    z = torch.linspace(-60, 60, 24_001, dtype=torch.float64).unsqueeze(-1)
    log_p = log_joint(z)
    beyond = torch.where(log_p - Normal(0.0, 1.3).log_prob(z).squeeze(-1) > 3, log_p.exp(), 0.0)
    due = 1 - (1 + (beyond * z.squeeze(-1).square()).sum() * 0.005 / 1.69).rsqrt().item()
    assert 0.6 * due - 0.1 < found.sd < due
    said = reasons(estimated(0.0, 0.3), -0.4, lost="", missed=[], far=found, notes=[])
    assert len(said) == told
    if told:
        assert found.sd > 0.15
        assert re.match(
            r"draws 10 times as far out find a tail .* its sd there is off by -\d+% or more, as near", said[0]
        )


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.4])
def test_a_q_of_light_tails_lacks_no_more_sd_than_it_does(scale: float) -> None:
    """By counting on the line on which it lacks most, that of all three: nothing, where q is not too narrow."""
    fitted = made(standard, 3, (0.2, scale))
    z = torch.randn(400_000, 3, dtype=torch.float64)
    beyond = Normal(0.0, 1.0).log_prob(z).sum(-1) - Normal(0.2, scale).log_prob(z).sum(-1) > 3
    lacking = torch.where(beyond, (z - 0.2).sum(-1).square() / 3, 0.0).mean() / scale**2
    found = where_far(fitted.posterior, fitted.target, fitted._weighed).sd
    assert 0 <= found <= 1 - (1 + lacking).rsqrt()


def contaminated(z: Tensor) -> Tensor:
    """A normal with a hundredth of another, ten times as wide: an sd of 1.41."""
    return torch.logaddexp(
        math.log(0.99) + Normal(0.0, 1.0).log_prob(z), math.log(0.01) + Normal(0.0, 10.0).log_prob(z)
    )


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dim", [2, 3, 30])
def test_a_tail_of_one_parameter_is_told_whatever_the_units_of_others(unit: float, dim: int) -> None:
    """The others go together. Without the tail q's sd is 0.29 off, and half of it is sure."""

    def log_joint(z: Tensor) -> Tensor:
        others = Normal(0.0, unit).log_prob(z[:, 1]) + Normal(z[:, 1:2], unit / 10).log_prob(z[:, 2:]).sum(-1)
        return contaminated(z[:, 0]) + others

    tril = torch.eye(dim, dtype=torch.float64)
    tril[1:, 1], tril[2:, 2:] = unit, 0.1 * unit * torch.eye(dim - 2)
    target = Target(log_joint, Parameters(dim), device="cpu", dtype=torch.float64)
    gaussian = Gaussian(torch.zeros(dim, dtype=torch.float64), tril)
    q = assemble(build_flow("full_covariance", dim, {}), [gaussian], [0.0])
    found = where_far(q, target, weigh(q, target, 10_000, torch.Generator().manual_seed(0)))
    assert 0.15 < found.sd < 0.3
    assert found.rise < 0.1
    assert abs(float(re.findall(r"-?[\d.]+", found.where)[0])) > 4


@pytest.mark.parametrize(
    ("constant", "dtype", "told"),
    [(3e7, torch.float32, True), (1e6, torch.float32, False), (3e7, torch.float64, False)],
)
def test_a_log_joint_that_its_dtype_rounds_is_told(constant: float, dtype: torch.dtype, told: bool) -> None:  # noqa: FBT001
    """Of 3e7 float32 knows every second number: the evidence is off by up to a nat, and no weight is right."""
    fitted = made(lambda z: standard(z) + constant, 2, (0.0, 1.0), dtype=dtype)
    assert fitted.is_trusted == (not told)
    assert ("is about 3e+07 in size, which torch.float32 rounds to 4 nats, and with it" in fitted.verdict) == told


def test_a_log_joint_that_rounds_its_values_itself_is_told() -> None:
    """Whatever the dtype of the draws is: its values are known to 4 nats, or to 8."""
    for dtype, constant in ((torch.float32, 3e7), (torch.bfloat16, 1e3)):
        fitted = made(lambda z, dtype=dtype, constant=constant: standard(z.to(dtype)) + constant, 2, (0.0, 1.0))
        assert f"which {dtype} rounds to" in fitted.verdict


@pytest.mark.filterwarnings("ignore:log_joint. has a finite value but no finite gradient")
@pytest.mark.parametrize(("at", "told"), [(0.0, True), (5.0, False)])
def test_draws_without_a_gradient_are_told(at: float, told: bool) -> None:  # noqa: FBT001
    """A twentieth of q's draws, or none of them, has a value and no slope: the fit has not seen it."""
    fitted = made(lambda z: standard(z - at) + 0 * torch.where(z > -1.6, (z + 1.6).sqrt(), 0.0).sum(-1), 1, (at, 1.0))
    assert fitted.is_trusted == (not told)
    assert ("log joint has a finite value but no finite gradient at" in fitted.verdict) == told


def test_a_log_joint_that_fails_far_out_says_nothing() -> None:
    def near(z: Tensor) -> Tensor:
        if z.abs().max() > 5:
            raise RuntimeError
        return standard(z)

    target = Target(near, Parameters(2), device="cpu", dtype=torch.float64)
    assert where_far(NOWHERE, target, on_a_line()) == Far(0.0, 0.0, "")


@pytest.mark.parametrize(("bad", "hint"), [(math.nan, ""), (-math.inf, "; give the parameters constraints that are")])
def test_draws_without_a_value_are_said_with_their_place(bad: float, hint: str) -> None:
    """The right tail of q, 2.28 % of it."""
    fitted = made(lambda z: torch.where(z[:, 0] > 2, bad, standard(z)), 2, (0.0, 1.0))
    found = re.search(
        rf"log p/q is not finite at ([\d.]+)% of q's draws; log_joint is {bad} at theta = \[([\d.]+), [\d.-]+\]{hint}",
        fitted.verdict,
    )
    assert found
    assert float(found[1]) == pytest.approx(2.28, abs=4 * 0.15)
    assert float(found[2]) > 2
    assert "ELBO -inf, " in fitted.verdict
    assert fitted.log_evidence == pytest.approx(math.log1p(-0.02275), abs=0.01)
    assert not fitted.is_trusted


def test_draws_at_which_the_log_joint_fails_are_said_with_what_it_raises() -> None:
    """A matrix that is none beyond 2, where q has 4.55 % of its mass."""

    def log_joint(z: Tensor) -> Tensor:
        corner = z.unsqueeze(-1) / 2
        factor = torch.linalg.cholesky(corner + (1 - corner) * torch.eye(2, dtype=z.dtype))
        return standard(z) + 0 * factor.sum((-2, -1))

    fitted = made(log_joint, 1, (0.0, 1.0))
    found = re.search(
        r"not finite at ([\d.]+)% of q's draws; log_joint raises _?LinAlgError: linalg.cholesky: .* at theta "
        r"= \[(-?[\d.]+)\]; add a small number to the diagonal of a matrix",
        fitted.verdict,
    )
    assert found
    assert float(found[1]) == pytest.approx(4.55, abs=4 * 0.21)
    assert abs(float(found[2])) > 2


def test_a_scale_that_has_run_off_to_infinity_is_no_fault_of_constraints() -> None:
    """As where its prior is flat and it has no data; exp(710) is infinite."""
    fitted = made(lambda p: -1e-9 * p["s"].log(), {"s": constraints.positive}, (710.0, 1.0))
    assert re.search(
        r"log_joint is -inf at s = inf; there may be no posterior, for its integral is infinite; a proper",
        fitted.verdict,
    )
    assert "support" not in fitted.verdict


# ---------------------------------------------------------------------------------------------------- draws, density


def test_the_density_is_one_over_the_parameters() -> None:
    """Of log-normal scales in closed form, for any batch; outside the support it is refused."""
    fitted = made(room, ROOM, (1.0, 0.5))
    mu, tau = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, 2, dtype=torch.float64) + 0.1
    due = Normal(1.0, 0.5).log_prob(mu) + LogNormal(1.0, 0.5).log_prob(tau).sum(-1)
    torch.testing.assert_close(fitted.log_prob({"mu": mu, "tau": tau}), due)
    with pytest.raises(ValueError, match="^values: 'tau': expected values inside GreaterThan"):
        fitted.log_prob({"mu": mu, "tau": -tau})


def test_numbers_have_their_density_to_all_digits() -> None:
    """A Python number is no float32: there 1e6 + 0.3 would be 1e6 + 0.3125, which is three sds off."""

    def at_a_million(p: dict[str, Tensor]) -> Tensor:
        return -0.5 * ((p["mu"] - 1e6) / 0.004).square()

    fitted = made(at_a_million, {"mu": ()}, (1e6, 0.004))
    due = Normal(1e6, torch.tensor(0.004, dtype=torch.float64)).log_prob(torch.tensor(1e6 + 0.3, dtype=torch.float64))
    for value in (1e6 + 0.3, np.float64(1e6 + 0.3), torch.tensor(1e6 + 0.3, dtype=torch.float64)):
        assert fitted.log_prob({"mu": value}).item() == pytest.approx(due.item(), rel=1e-6)  # pyright: ignore


@pytest.mark.parametrize("normals", [[(1.0, 0.5)], [(1.0, 0.5), (1.0, 0.5)]])
def test_draws_have_the_moments_of_q(normals: list[tuple[float, float]]) -> None:
    fitted = made(room, ROOM, *normals)
    draws = fitted.sample(4000)
    assert isinstance(draws, dict)
    assert draws["tau"].shape == (4000, 2)
    logs = torch.cat([draws["mu"].unsqueeze(-1), draws["tau"].log()], -1)
    assert (logs.mean(0) - 1).abs().max() < 4.5 * 0.5 / math.sqrt(4000)
    torch.testing.assert_close(logs.std(0), torch.full((3,), 0.5, dtype=torch.float64), rtol=0.05, atol=0)
    assert not draws["mu"].requires_grad
    with pytest.raises(ValueError, match="^n: expected an int >= 1, got 0$"):
        fitted.sample(0)


def test_resampling_moves_q_to_p() -> None:
    """Q = N(0, 1.5^2), p = N(1, 1) in log units: moments of p, and draws of the pool alone."""
    fitted = made(room, ROOM, (0.5, 1.5))
    draws = fitted.importance_resample(4000, pool=40_000)
    assert isinstance(draws, dict)
    logs = torch.cat([draws["mu"].unsqueeze(-1), draws["tau"].log()], -1)
    assert (logs.mean(0) - 1).abs().max() < 0.1
    torch.testing.assert_close(logs.std(0), torch.ones(3, dtype=torch.float64), rtol=0.06, atol=0)
    for pool in (0, 5):
        with pytest.raises(ValueError, match=f"^pool: expected an int >= 10, got {pool}$"):
            fitted.importance_resample(10, pool=pool)


def test_where_no_draw_has_a_weight_none_is_taken() -> None:
    fitted = made(lambda z: torch.where(z[:, 0] > 5, -math.inf, standard(z)), 1, (9.0, 0.1))
    for read in (fitted.importance_resample, fitted.refine):
        with pytest.raises(ValueError, match=r"^log_joint: expected a finite log p/q at some draws of q, got none"):
            read(5)


def test_resampling_warns_where_weights_do_not_allow_it() -> None:
    fitted = made(standard, 1, (0.0, 0.2))
    with pytest.warns(
        UnreliableEstimateWarning,
        match="^importance_resample: Pareto k-hat is .*, above 0.7, and one draw is [1-9][0-9]* of these 100; if",
    ) as caught:
        fitted.importance_resample(100, pool=5000)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("normals", [[(0.5, 0.4)], [(-4.0, 0.5), (4.0, 0.5)]])
def test_refine_moves_a_wrong_q_to_p(normals: list[tuple[float, float]]) -> None:
    """Too narrow a q, of one mode and of two: the draws get the width of p, and each mode keeps its own."""

    def two(z: Tensor) -> Tensor:
        return torch.logaddexp(standard(z - 4), standard(z + 4)) - math.log(2)

    fitted = made(two if len(normals) > 1 else standard, 2, *normals)
    draws = fitted.refine(300, steps=10, leapfrogs=4)
    assert isinstance(draws, Tensor)
    if len(normals) > 1:
        assert 0.3 < (draws[:, 0] < 0).double().mean() < 0.7
        draws = draws - 4 * draws.sign()
    assert draws.mean(0).abs().max() < 4.5 / math.sqrt(300)
    torch.testing.assert_close(draws.std(0), torch.ones(2, dtype=torch.float64), rtol=4.5 / math.sqrt(600), atol=0)
    with pytest.raises(ValueError, match="^steps: expected an int >= 1, got 0$"):
        fitted.refine(10, steps=0)


def test_a_log_joint_whose_data_have_changed_is_told() -> None:
    """As one that looks them up by a name, in a loop over data sets: what reads it again would mix two models."""
    data = torch.tensor(1.0, dtype=torch.float64)
    fitted = made(lambda z: standard(z - data), 1, (1.0, 1.0))
    assert fitted.elbo(500)[0] == pytest.approx(0.0, abs=1e-9)
    data += 1
    found = r"whose value was -[0-9.]+ at theta = \[0.1541\], and now -[0-9.]+; keep its data"
    for read in (fitted.elbo, fitted.importance_resample, fitted.refine, fitted.to_arviz):
        with pytest.raises(ValueError, match=f"^log_joint: expected that which was fitted, {found}"):
            read()
    target = Target(lambda z: standard(z - data), Parameters(1), device="cpu", dtype=torch.float64)
    data += 1
    again = FittedPosterior(fitted.posterior, target, evaluations=0, seconds=0.0)
    assert "the log joint was -2.62" in again.verdict
    assert ": it is not one" in again.verdict


def test_it_says_what_it_is_of() -> None:
    text = repr(made(room, ROOM, (1.0, 0.5)))
    assert text.startswith(
        "FittedPosterior(Parameters(mu: () Real(), tau: (2,) GreaterThan(lower_bound=0.0); dim=3); N"
    )


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normals", [[(1.0, 0.5)], [(0.5, 0.5), (1.5, 0.6)]])
def test_a_file_has_all_of_a_fit(normals: list, dtype: torch.dtype, tmp_path: Path) -> None:
    """Draws, figures, history and notes to the bit, and a fit goes on from it."""
    history = [Progress("start", 3, 9, -2.5, 0.0, math.nan), Progress("flow", 5, 9, -math.inf, 1e-3, 0.3)]
    given = {"history": history, "notes": ["it was short"], "left_out": ["a mode is lost"], "seconds": 1.25}
    fitted = made(room, ROOM, *normals, flow=None, options=TINY, dtype=dtype, **given)
    with torch.no_grad():
        for weight in fitted.posterior.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    fitted = FittedPosterior(fitted.posterior, fitted.target, evaluations=5, **given)
    path, state = tmp_path / "fit.safetensors", torch.get_rng_state()
    fitted.save(path)
    read = FittedPosterior.load(path, room, ROOM, **TINY)
    assert torch.equal(state, torch.get_rng_state())
    assert [str(each) for each in read.history] == [str(each) for each in history]
    assert (read.evaluations, read.seconds, read.notes, read.left_out) == (
        5,
        1.25,
        ["it was short"],
        ["a mode is lost"],
    )
    assert read.verdict == fitted.verdict
    assert str(read.summary()) == str(fitted.summary())
    assert read.estimate == fitted.estimate
    for (name, one), other in zip(
        fitted.posterior.state_dict().items(), read.posterior.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype in (dtype, torch.int64)
    more = flowpost.fit(room, ROOM, budget=64, samples=32, resume=read)
    assert more.evaluations == 5 + 64
    assert [each.stage for each in more.history[:2]] == ["start", "flow"]
    assert "a mode is lost" in more.verdict
    assert "it was short" not in more.verdict


def test_a_fit_is_read_and_refined_in_inference_mode(tmp_path: Path) -> None:
    """Where nothing has a gradient; and a fit goes on from it."""
    fitted, path = made(room, ROOM, (1.2, 0.9), flow=None, options=TINY), tmp_path / "fit.safetensors"
    fitted.save(path)
    with torch.inference_mode():
        read = FittedPosterior.load(path, room, ROOM, **TINY)
        draws = [each.refine(9, steps=2) for each in (fitted, read) if torch.manual_seed(0)]
    assert torch.equal(*(fitted.parameters.flat(each) for each in draws))
    assert flowpost.fit(room, ROOM, budget=64, samples=32, resume=read).evaluations == 5 + 64


def test_draws_outside_the_support_are_kept_in_a_file(tmp_path: Path) -> None:
    fitted = made(lambda z: torch.where(z[:, 0] > 0, standard(z), -math.inf), 2, (0.0, 1.0))
    fitted.save(tmp_path / "fit")
    read = FittedPosterior.load(tmp_path / "fit", fitted.target.log_joint, 2, "diagonal")
    assert read.verdict == fitted.verdict
    assert "not finite at 4" in read.verdict or "not finite at 5" in read.verdict


SPLINE = {"steps": 2, "hidden": (4,), "bins": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"spec": {"mu": (), "tau": 2}},
            r"dim_or_spec: expected Parameters\(mu: .*GreaterThan.*, of '.*', got .* Real",
        ),
        ({"spec": 3}, r"dim_or_spec: expected Parameters\(mu: .*, got Parameters\(theta: \(3,\) Real"),
        (
            {"flow": "realnvp", "bins": None},
            "flow: expected the .* modules of '.*', got .*; from module .* on it has Shared, .*, and flow has Affine",
        ),
        (
            {"steps": 3},
            "flow: expected the .* modules of '.*', got .*; from module .* on it has Standard, and flow has Permute",
        ),
        (
            {"hidden": (5,)},
            r"flow: expected the architecture of '.*, got another .file != flow.: 'posterior.flow.*\(4,\) .* != \(5,\)",
        ),
        (
            {"bound": 7.0},
            r"flow: expected the steps of '.*', got others \(file != flow\): .*: bound 5.0 != 7.0; make it with",
        ),
        (
            {"log_joint": lambda p: room(p) + 0.5},
            "log_joint: expected that of '.*', whose log p/q is .* at mu = .*, got",
        ),
    ],
)
def test_a_file_of_another_fit_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    """With what differs."""
    fitted = made(room, ROOM, (1.0, 0.5), flow="spline_coupling", options=SPLINE)
    with torch.no_grad():
        for weight in fitted.posterior.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    fitted.save(tmp_path / "fit")
    given = {"log_joint": room, "spec": ROOM, "flow": "spline_coupling", **SPLINE, **change}
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(ValueError, match=f"^{message}"):
        FittedPosterior.load(tmp_path / "fit", given.pop("log_joint"), given.pop("spec"), given.pop("flow"), **given)


def test_another_map_is_refused_by_its_draws_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that an older release wrote, which names no bound."""
    monkeypatch.setattr("flowpost.files.settings_of", lambda _: {})
    fitted = made(room, ROOM, (1.0, 0.5), flow="spline_coupling", options=SPLINE)
    with torch.no_grad():
        for weight in fitted.posterior.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    fitted.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="^flow: expected the map of '.*', got another one of the same sizes; pass"):
        FittedPosterior.load(tmp_path / "fit", room, ROOM, "spline_coupling", **{**SPLINE, "bound": 7.0})


def test_a_file_that_is_no_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    flowpost.save(flowpost.diagonal(0, 3), path)
    with pytest.raises(
        ValueError, match="^path: expected a file that FittedPosterior.save wrote, got another: '.*fit'$"
    ):
        FittedPosterior.load(path, room, ROOM)
    made(room, ROOM, (1.0, 0.5)).save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="^path: '.*fit' is damaged: "):
        FittedPosterior.load(path, room, ROOM, "diagonal")
    with pytest.raises(FileNotFoundError):
        FittedPosterior.load(tmp_path / "none", room, ROOM)


# ----------------------------------------------------------------------------------------------------------- ArviZ


@pytest.mark.parametrize("normals", [[(1.0, 0.5)], [(0.5, 0.5), (1.5, 0.6)]])
def test_arviz_gets_named_draws_with_their_densities(normals: list) -> None:
    pytest.importorskip("arviz_base", reason="ArviZ comes with the extra flowpost[arviz]")
    fitted = made(room, ROOM, *normals)
    tree = fitted.to_arviz(50, chains=4)
    draws, stats = tree["posterior"], tree["sample_stats"]
    assert draws["mu"].dims == ("chain", "draw")
    assert draws["tau"].shape == (4, 50, 2)
    values = {name: torch.as_tensor(draws[name].values) for name in ("mu", "tau")}
    torch.testing.assert_close(torch.as_tensor(stats["log_q"].values), fitted.log_prob(values))
    flat = {name: value.flatten(0, 1) for name, value in values.items()}
    torch.testing.assert_close(torch.as_tensor(stats["lp"].values).flatten(), room(flat))
    assert abs(values["mu"].mean() - 1) < 4.5 * 0.8 / math.sqrt(200)
    assert tree.attrs["inference_library"] == "flowpost"
    assert tree.attrs["verdict"] == fitted.verdict
    assert tree.attrs["evaluations"] == 5
    assert tree.attrs["log_evidence"] == fitted.log_evidence


def test_arviz_calls_a_bare_dim_theta() -> None:
    pytest.importorskip("arviz_base", reason="ArviZ comes with the extra flowpost[arviz]")
    fitted = made(standard, 3, (0.0, 1.0))
    assert fitted.to_arviz(5)["posterior"]["theta"].shape == (1, 5, 3)
    for wrong, message in (
        ({"draws": 0}, "draws: expected an int >= 1"),
        ({"chains": 0}, "chains: expected an int >="),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            fitted.to_arviz(**wrong)
