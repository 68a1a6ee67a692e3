"""The command on posteriors of known evidence: distances, exact KL, tables, stops, all with fits that are made up."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.distributions import MultivariateNormal

import flowpost
from benchmarks import __main__ as cli
from benchmarks.config import ConfigError
from benchmarks.posteriors import command, fitting
from benchmarks.posteriors.collection import Posterior, collection, posterior
from benchmarks.posteriors.fitting import FLOWS, GUIDES, Fit, Plan, fit
from benchmarks.posteriors.measures import marginals, wasserstein
from benchmarks.posteriors.pictures import PAIRS, colour_of, pairs, traces
from benchmarks.posteriors.table import beside_published, details, goal, is_impossible, published, shortfalls, summary

PLAN = Plan(budget=100, samples=4000)


class Moment(NamedTuple):
    evaluations: int
    elbo: float


@dataclass
class Made:
    """A Gaussian of the free coordinates, where `flowpost.fit` would have trained."""

    one: Posterior
    q: MultivariateNormal
    evaluations: int
    verdict: str = ""
    k_hat: Tensor = torch.tensor(0.4)

    def sample(self, n: int) -> Mapping[str, Tensor]:
        values = self.one.parameters.constrain(self.q.sample((n,)))[0]
        assert isinstance(values, Mapping)
        return values

    def elbo(self, samples: int) -> tuple[Tensor, Tensor]:
        free = self.q.sample((samples,))
        weights = self.one.log_density(free) - self.q.log_prob(free)
        return weights.mean(), weights.std() / samples**0.5

    @property
    def history(self) -> list[Moment]:
        return [Moment(50, -math.inf), Moment(100, self.elbo(100)[0].item())]


def made_fit(log_joint: Any, spec: Any, flow: str, *, budget: int, seed: int) -> Made:  # noqa: ANN401
    """The Gaussian of the reference draws' moments; of the diagonal's, those that are best in reverse KL."""
    one = next(each for each in collection().values() if each.spec is spec)
    assert log_joint == one.log_joint
    torch.manual_seed(seed)
    free = one.free(one.reference)
    covariance = free.T.cov()
    if flow == "diagonal":
        covariance = covariance.inverse().diagonal().reciprocal().diag()
    return Made(one, MultivariateNormal(free.mean(0), covariance), budget)


@pytest.fixture
def _made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowpost, "fit", made_fit)


# ---- measures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(40, 40), (60, 20), (7, 30), (31, 12)])
def test_distances_are_scipy_s(n: int, m: int) -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(n, 3)), generator.gamma(2, size=(m, 3))
    expected = [wasserstein_distance(first[:, k], second[:, k]) for k in range(3)]
    np.testing.assert_allclose(wasserstein(first, second), expected, rtol=1e-12)


def test_marginals_are_in_standard_deviations() -> None:
    one = posterior("kilpisjarvi")
    same = marginals(one.reference, one)
    assert same.w1_max < 1e-12
    assert abs(same.mean_error) < 0.15
    assert same.sd_ratio == pytest.approx(1, abs=0.1)
    moved = one.reference.clone()
    moved[:, 1] -= 2 * one.sd[1]
    far = marginals(moved, one)
    assert far.w1_where == "beta"
    assert far.w1_max == pytest.approx(2, abs=1e-9)
    assert far.w1_mean == pytest.approx(2 / 3, abs=1e-9)
    assert far.mean_error == pytest.approx(-2, abs=0.15)
    wide = one.mean + 3 * (one.reference - one.mean)
    assert marginals(wide, one).sd_ratio == pytest.approx(3, rel=0.1)


# ---- fits --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_made")
@pytest.mark.parametrize("name", ["kilpisjarvi", "low_dim_gauss_mix", "wells_dist"])
def test_kl_is_that_of_gaussians(name: str) -> None:
    """With all moments, what another program found for the best one; with the precision's diagonal, its closed form."""
    one = posterior(name)
    whole, draws = fit(name, "full_covariance", 0, PLAN)
    assert whole.kl == pytest.approx(one.full_rank.gap, abs=0.03)
    assert 0 < whole.standard_error < 0.02
    assert draws.shape == (1000, one.dim)
    mean_field, _ = fit(name, "diagonal", 0, PLAN)
    precision = one.free(one.reference).T.cov().inverse()
    expected = 0.5 * (precision.diagonal().log().sum() - precision.logdet())  # of two Gaussians
    assert mean_field.kl == pytest.approx(expected.item(), abs=0.15)  # the variances of 1,000 draws
    assert whole.w1_max < 0.15
    assert whole.history[0] == (50, math.inf)
    assert whole.history[1][1] == pytest.approx(whole.kl, abs=0.1)


def test_a_fit_that_raises_is_a_failure_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("log_joint: expected\n  finite values")

    monkeypatch.setattr(flowpost, "fit", broken)
    found, draws = fit("dogs", "realnvp", 1, PLAN)
    assert found.failed
    assert found.error == "ValueError: log_joint: expected finite values"
    assert len(draws) == 0


def test_figures_survive_json() -> None:
    one = Fit("dogs", "iaf", 2, 100, kl=0.25, k_hat=0.5, w1_where="beta[1]", history=((64, math.inf), (128, 0.5)))
    text = json.dumps(one.as_json(), allow_nan=False)
    back = Fit.from_json(json.loads(text))
    assert math.isnan(back.standard_error)
    assert math.isnan(back.history[0][1])
    assert back.as_json() == one.as_json()
    assert (back.posterior, back.contender, back.seed, back.kl, back.w1_where) == ("dogs", "iaf", 2, 0.25, "beta[1]")
    near = Fit("dogs", "iaf", 2, 100, kl=0.0, k_hat=-math.inf)
    assert Fit.from_json(json.loads(json.dumps(near.as_json(), allow_nan=False))).k_hat == -math.inf
    assert math.isnan(Fit.from_json(Fit("dogs", "iaf", 2, 100, error="diverged").as_json()).k_hat)


def test_large_posteriors_have_three_times_the_budget() -> None:
    budgets = {one.dim: Plan().budget_of(one) for one in collection().values()}
    assert {dim for dim, budget in budgets.items() if budget == 3_000_000} == {116, 175, 218}
    assert budgets[90] == 1_000_000
    assert Plan(budget=7).budget_of(posterior("hepatitis")) == 7


# ---- tables ------------------------------------------------------------------------------------------------------

GOOD = Fit("dogs", "realnvp", 0, 1000, 0.01, 0.001, 0.4, 0.02, 0.03, "beta[1]", 0.01, 1.02, 1000, 3.0)


def test_what_fell_short_comes_first_and_says_why() -> None:
    assert shortfalls([GOOD]) == []
    failed = replace(GOOD, kl=math.nan, error="ValueError: bad")
    wrong = replace(GOOD, kl=-0.2)
    assert shortfalls([failed]) == ["dogs, realnvp, seed 0: failed: ValueError: bad"]
    assert is_impossible(wrong)
    assert "KL -0.2000 is negative" in shortfalls([wrong])[0]
    gaussian = replace(GOOD, contender="full_covariance", kl=0.2)
    assert shortfalls([gaussian]) == ["dogs: full_covariance leaves 0.200, the best Gaussian known 0.005"]
    lines = shortfalls([replace(GOOD, kl=0.09, k_hat=0.9), replace(GOOD, contender="iaf", kl=0.3)])
    assert lines == [
        "dogs: the best flow, realnvp, leaves 0.090; the goal is 0.050",
        "dogs: the best flow, realnvp, has k-hat 0.90, above 0.7",
    ]


def test_monte_carlo_evidence_has_a_tolerance() -> None:
    """The evidence of gp_pois_regr is known to 0.017: a KL of -0.03 is not impossible, nor is one of 0.08 a miss."""
    rough = replace(GOOD, posterior="gp_pois_regr", kl=-0.03)
    assert not is_impossible(rough)
    assert shortfalls([replace(rough, kl=0.08)]) == []
    assert shortfalls([replace(rough, kl=0.09)]) != []
    assert is_impossible(replace(GOOD, posterior="blr", kl=-0.03))


def test_goals_are_the_issue_s() -> None:
    goals = {one.short: goal(one) for one in collection().values()}
    assert goals["diamonds"] == 0.05
    assert goals["accel_gp"] == goals["radon_hierarchical_intercept_centered"] == 0.5
    largest = goals["electric_1c_chr"], goals["radon_vary_si_chr"], goals["hepatitis"]
    assert largest == pytest.approx((0.910, 0.201, 0.416), abs=1e-3)


def test_published_figures_are_those_of_the_paper() -> None:
    known = published("electric_1c_chr")
    assert list(known.values()) == pytest.approx([11.273, 7.245, 0.910, 0.210], abs=1e-3)
    assert published("dogs-dogs") == {}
    assert beside_published([GOOD]) is None
    table = beside_published([replace(GOOD, posterior="hepatitis", kl=0.3)])
    assert table is not None
    assert table.rows == [["hepatitis", "3.441", "3.110", "0.416", "0.100", "", "0.300 (realnvp)"]]


def test_the_summary_has_spreads_and_failures() -> None:
    fits = [GOOD, replace(GOOD, seed=1, kl=0.03), replace(GOOD, contender="planar", kl=math.nan)]
    missed = replace(GOOD, posterior="arK", kl=0.3)
    table = summary([*fits, missed])
    assert table.header[4:] == ["planar", "realnvp"]
    assert table.rows[0][:2] == ["arK", "7"] or table.rows[0][0] == "dogs"
    by_name = {row[0]: row for row in table.rows}
    assert by_name["dogs"][2:] == ["1.155", "0.005", "1 of 1 failed", "0.020 (0.010 to 0.030)"]
    assert by_name["arK"][-1] == "0.300"
    ordered = summary([GOOD, missed]).rows
    assert [row[0] for row in ordered] == ["arK", "dogs"]
    worst = details([GOOD, replace(GOOD, seed=1, kl=0.03, w1_max=0.2, w1_where="beta[3]", mean_error=-0.5, k_hat=0.6)])
    assert worst.rows[0][3:] == ["0.0010", "0.60", "0.020", "0.200 (beta[3])", "-0.500", "1.020", "1,000", "3"]


def test_several_runs_make_one_page() -> None:
    """Rows in the order of posteriors and contenders, and whose rows a run's are."""

    def run(commit: str, *fits: Fit) -> dict[str, Any]:
        environment = {"device": "a CPU", "cpu": "a CPU", "cores": 2, "threads": 1, "commit": commit}
        environment |= {"python": "3", "torch": "2", "flowpost": "0", "libraries": {}}
        head = {"started": "2026-11-29T00:00:00+00:00", "seconds": 1.0, "command": "python", "environment": environment}
        return {"what": "posteriors", **head, "fits": [one.as_json() for one in fits]}

    page = command.shown(
        {"runs": [run("one", replace(GOOD, posterior="arK"), GOOD), run("two", replace(GOOD, contender="planar"))]}
    )
    rows = [line.split(" | ")[:2] for line in page.partition("Every fit")[2].splitlines() if line.startswith("| ")]
    assert rows[2:] == [["| dogs", "planar"], ["| dogs", "realnvp"], ["| arK", "realnvp"]]
    assert page.index("realnvp: Measured on") < page.index("commit one") < page.index("planar: Measured on")


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_pictured_coordinates_are_there() -> None:
    for name, given in PAIRS.items():
        assert all(column in posterior(name).columns for pair in given for column in pair)


def test_every_contender_has_a_colour_of_its_own() -> None:
    names = [*FLOWS, *GUIDES]
    assert len({colour_of(name) for name in names}) == len(names)


def test_pair_plots_show_free_coordinates_beside_the_reference() -> None:
    one = posterior("eight_schools_centered")
    draws = one.free(one.reference[:50]).numpy()
    figure = pairs(one.short, {"diagonal": draws, "AutoNormal": draws + 100})
    assert len(figure.axes) == 4
    first = figure.axes[0]
    assert (first.get_xlabel(), first.get_ylabel()) == ("theta[1]", "log tau")
    reference, own = (np.asarray(line.get_xydata()) for line in first.lines)
    np.testing.assert_allclose(own, draws[:, [0, 9]])
    assert len(reference) == 1000
    low, high = figure.axes[1].get_xlim()
    assert high - low < 100


def test_a_trace_leaves_out_what_is_not_finite_and_ends_at_the_table_s_figure() -> None:
    figure = traces([replace(GOOD, history=((10, math.inf), (20, 0.5), (30, -0.1), (40, 0.2)), evaluations=50, kl=0.3)])
    way, end = (np.asarray(line.get_xydata()).tolist() for line in figure.axes[0].lines)
    assert (way, end) == ([[20, 0.5], [30, 1e-3], [40, 0.2]], [[50, 0.3]])


# ---- the command -------------------------------------------------------------------------------------------------


def run(out: Path, *options: str) -> int:
    return cli.main(["posteriors", "--posterior", "dogs-dogs,kilpisjarvi", "--out", str(out), *options])


SHORT = ("--flow", "diagonal,full_covariance", "--seeds", "1", "--budget", "100")


@pytest.mark.usefixtures("_made")
def test_a_run_writes_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\n<!-- end of tables -->\nafter\n")
    assert run(out, *SHORT, "--page", str(page)) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "posteriors.json",
        "posteriors.md",
        "traces.png",
        "pairs-dogs.png",
        "pairs-kilpisjarvi.png",
        "draws",
    }
    content = json.loads((out / "posteriors.json").read_text())
    assert content["plan"] == {"budget": 100, "samples": 20000}
    assert [(one["posterior"], one["contender"]) for one in content["fits"]] == [
        (name, what) for name in ("dogs", "kilpisjarvi") for what in ("diagonal", "full_covariance")
    ]
    text = page.read_text()
    assert text.index("What fell short") < text.index("KL(q || p) in nats")
    assert "![KL(q || p) against gradients" in text
    assert (tmp_path / "page.png").exists()
    monkeypatch.setattr(command, "draw", lambda *_: None)
    before = {path: path.stat().st_mtime_ns for path in (out / "draws").iterdir()}
    assert len(before) == 4
    assert run(out, *SHORT[:2], "--seeds", "2", *SHORT[4:]) == 0
    assert "4 of 8 fits are already done." in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (out / "draws").iterdir()}
    fits = json.loads((out / "posteriors.json").read_text())["fits"]
    assert [one["seed"] for one in fits] == [0, 1] * 4
    assert fits[0] == content["fits"][0]
    assert run(out, *SHORT[:4], "--budget", "200") == 2
    assert "out: expected the folder's own plan" in capsys.readouterr().err


def test_failures_are_told_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def second_fails(log_joint: object, spec: object, flow: str, *, budget: int, seed: int) -> Made:
        if flow == "full_covariance":
            raise RuntimeError("diverged")
        return made_fit(log_joint, spec, flow, budget=budget, seed=seed)

    monkeypatch.setattr(flowpost, "fit", second_fails)
    monkeypatch.setattr(command, "draw", lambda *_: None)
    assert run(tmp_path, *SHORT) == 1
    assert "dogs, full_covariance, seed 0: failed: RuntimeError: diverged" in capsys.readouterr().out
    assert "- kilpisjarvi, full_covariance, seed 0: failed" in (tmp_path / "posteriors.md").read_text()


def test_a_stop_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(log_joint: object, spec: object, flow: str, *, budget: int, seed: int) -> Made:
        try:
            if flow == "full_covariance":
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass  # as `flowpost.fit` does, for the best q so far
        return made_fit(log_joint, spec, flow, budget=budget, seed=seed)

    monkeypatch.setattr(flowpost, "fit", stopped)
    monkeypatch.setattr(command, "draw", lambda *_: None)
    assert run(tmp_path, *SHORT) == command.INTERRUPTED
    assert f"--out {tmp_path}" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "posteriors.json").read_text())["fits"]) == 1
    monkeypatch.setattr(flowpost, "fit", made_fit)
    assert run(tmp_path, *SHORT) == 0
    assert len(json.loads((tmp_path / "posteriors.json").read_text())["fits"]) == 4


def test_quick_is_six_small_posteriors_without_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    monkeypatch.setattr(command, "hold", lambda run, tasks, plan, jobs, done: held.extend([tasks, plan, jobs]) or 0)
    assert cli.main(["posteriors", "--quick", "--out", str(tmp_path)]) == 0
    tasks, plan, jobs = held
    assert {posterior(task.posterior).dim for task in tasks} == {3, 6, 7, 10}
    assert len({task.posterior for task in tasks}) == 6
    assert {task.contender for task in tasks} == set(FLOWS)
    assert {task.seed for task in tasks} == {0}
    assert (plan, jobs) == (command.QUICK_PLAN, 2)


def test_wrong_names_are_told_the_right_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["posteriors", "--flow", "nvp"]) == 2
    assert "flow: expected one of diagonal, full_covariance" in capsys.readouterr().err
    assert cli.main(["posteriors", "--posterior", "schools"]) == 2
    assert "posterior: expected one of wells_dist" in capsys.readouterr().err
    (tmp_path / "posteriors.json").write_text("[]")
    assert run(tmp_path, *SHORT) == 2
    assert "out: expected a folder of this command" in capsys.readouterr().err
    monkeypatch.setattr(command, "here", lambda name: False)
    monkeypatch.setattr(fitting, "here", lambda name: False)
    assert fitting.contenders() == FLOWS
    with pytest.raises(ConfigError, match="flow: 'AutoNormal' is pyro's"):
        command._contenders(["AutoNormal"])


def test_flowpost_s_own_fit_is_measured() -> None:
    """What the made-up fits stand for: a short fit of a Gaussian leaves what the best one is known to."""
    one = posterior("logmesquite_logvolume")
    found, draws = fit(one.short, "full_covariance", 0, Plan(budget=20_000, samples=4000))
    assert not found.error
    assert found.kl == pytest.approx(one.full_rank.gap, abs=0.02)
    assert 0 < found.evaluations <= 20_000
    assert found.history[-1][1] == pytest.approx(found.kl, abs=0.1)
    assert draws.shape == (1000, 3)
