"""`flowpost.fit` from end to end, on posteriors whose evidence and moments are known."""

import functools
import math
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Distribution, MultivariateNormal, Normal, StudentT, constraints
from versions import adam_elsewhere

import flowpost
from flowpost import Chain, Coupling, FlowPosterior, Learned, Reverse
from flowpost.bijectors import Affine
from flowpost.fit import FittedPosterior, Progress, fit
from flowpost.variational import running
from flowpost.variational.ascent import EXACT
from flowpost.variational.mixture import Mixture

SMALL: dict[str, Any] = {"steps": 4, "hidden": (16,)}
TINY: dict[str, Any] = {"steps": 2, "hidden": (8,)}
full = pytest.mark.full
LOC = torch.tensor([1.0, -2.0, 300.0], dtype=torch.float64)
TRIL = torch.tensor([[2.0, 0, 0], [0.9, 0.5, 0], [-4.0, 3.0, 10.0]], dtype=torch.float64)
EVIDENCE = 1.7


def gaussian(z: Tensor) -> Tensor:
    return EVIDENCE + MultivariateNormal(LOC.to(z), scale_tril=TRIL.to(z)).log_prob(z)


def two(z: Tensor) -> Tensor:
    """Normals of weights 0.73 and 0.27."""
    means = torch.tensor([[-4.0, 0.0], [4.0, 1.0]], dtype=z.dtype)
    logs = torch.tensor([0.73, 0.27], dtype=z.dtype).log()
    return (logs + Normal(means, 1.0).log_prob(z.unsqueeze(-2)).sum(-1)).logsumexp(-1)


def near_evidence(fitted: FittedPosterior, due: float, *, gap: float) -> None:
    """The importance-sampled evidence within 4 standard errors, and the ELBO so many nats below at most."""
    error = max(fitted.estimate.standard_error.item(), 1e-6)
    assert abs(fitted.log_evidence - due) < 4 * error
    elbo, error = fitted.elbo(4000)
    assert -gap - 4 * error < elbo - due < 4 * error + 1e-9


# --------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(("flow", "off"), [("full_covariance", 1e-6), ("realnvp", 10 * EXACT)])
def test_a_gaussian_is_fitted_exactly(flow: str, off: float) -> None:
    """Evidence to rounding, or to where a flow's ascent ends; moments within what 10,000 draws leave."""
    fitted = fit(gaussian, 3, flow, budget=15_000, **(TINY if flow == "realnvp" else {}))
    assert fitted.log_evidence == pytest.approx(EVIDENCE, abs=off)
    assert fitted.elbo(10_000)[0] == pytest.approx(EVIDENCE, abs=off)
    assert fitted.is_trusted
    assert fitted.verdict.startswith("Nothing speaks against this fit: ELBO 1.70")
    sd = (TRIL @ TRIL.mT).diagonal().sqrt()
    table = fitted.summary()
    assert table.names == ("theta[0]", "theta[1]", "theta[2]")
    assert ((table.mean - LOC) / sd).abs().max() < 0.045
    torch.testing.assert_close(table.sd, sd, rtol=0.035, atol=0)
    torch.testing.assert_close(table.error, sd / 100, rtol=0.05, atol=0)
    draws = fitted.sample(5000)
    assert isinstance(draws, Tensor)
    torch.testing.assert_close(draws.mT.corrcoef()[0, 1].item(), 0.9 * 2 / (sd[0] * sd[1]).item(), rtol=0.05, atol=0)
    torch.testing.assert_close(fitted.log_prob(draws), gaussian(draws) - EVIDENCE, rtol=0, atol=0.1)
    assert fitted.evaluations <= 15_000


def test_the_diagonal_is_the_best_factorized_gaussian() -> None:
    """KL(q || p) in closed form: half the log of the precision's diagonal over its determinant."""
    fitted = fit(gaussian, 3, "diagonal", budget=30_000)
    precision = torch.linalg.inv(TRIL @ TRIL.mT)
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    elbo, error = fitted.elbo(20_000)
    assert elbo == pytest.approx(EVIDENCE - gap, abs=4 * error + 0.01)
    assert not fitted.is_trusted
    assert "nats above the ELBO" in fitted.verdict or "k-hat is" in fitted.verdict


def funnel(z: Tensor) -> Tensor:
    """Neal's, of two dimensions: normalised."""
    return Normal(0.0, 3.0).log_prob(z[:, 0]) + Normal(0.0, (z[:, 0] / 2).exp()).log_prob(z[:, 1])


def banana(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(z[:, 0]) + Normal(0.5 * z[:, 0].square(), 0.3).log_prob(z[:, 1])


@pytest.mark.parametrize(
    ("log_joint", "budget", "gap"),
    [
        pytest.param(banana, 22_000, 0.25, marks=full),
        pytest.param(banana, 100_000, 0.05, marks=pytest.mark.long),
        pytest.param(funnel, 100_000, 0.12, marks=pytest.mark.long),
    ],
)
def test_bent_densities(log_joint: Callable[[Tensor], Tensor], budget: int, gap: float) -> None:
    """Far nearer than the best Gaussian, whose gap to a banana of these widths is 0.49."""
    fitted = fit(log_joint, 2, budget=budget, samples=64, **SMALL)
    near_evidence(fitted, 0.0, gap=gap)
    kept = fit(log_joint, 2, "full_covariance", budget=15_000)
    assert kept.elbo()[0] < fitted.elbo()[0] - 0.2


def test_two_modes_keep_their_weights() -> None:
    fitted = fit(two, 2, budget=25_000, samples=128, **TINY)
    assert isinstance(fitted.posterior, Mixture)
    assert fitted.log_evidence == pytest.approx(0, abs=4 * fitted.estimate.standard_error.item() + 1e-3)
    draws = fitted.sample(20_000)
    assert isinstance(draws, Tensor)
    assert abs((draws[:, 0] < 0).double().mean() - 0.73) < 4 * math.sqrt(0.73 * 0.27 / 20_000) + 0.005
    table = fitted.summary()  # its draws are stratified, and weighted
    assert table.mean[0].item() == pytest.approx(-4 * 0.73 + 4 * 0.27, abs=0.1)
    assert fitted.is_trusted
    assert (fitted.log_prob(draws) - two(draws)).abs().mean() < 0.1


@pytest.mark.parametrize("modes", [2, 6])
def test_as_many_modes_as_are_asked_for(modes: int) -> None:
    """Of six on a ring, with the share of those that are left out."""
    angles = torch.arange(6, dtype=torch.float64) * math.pi / 3
    means = 5 * torch.stack([angles.cos(), angles.sin()], -1)

    def ring(z: Tensor) -> Tensor:
        return Normal(means, 0.5).log_prob(z.unsqueeze(-2)).sum(-1).logsumexp(-1) - math.log(6)

    fitted = fit(ring, 2, "full_covariance", budget=20_000, modes=modes)
    held = 1 if isinstance(fitted.posterior, FlowPosterior) else len(fitted.posterior.posteriors)
    assert held <= modes
    said = re.search(
        r"(\w+) more modes? (?:was|were) found that q leaves out, of about (\d+)% of the mass", fitted.verdict
    )
    found = held + (0 if said is None else 1 if said[1] == "one" else int(said[1]))
    assert fitted.log_evidence == pytest.approx(math.log(held / 6), abs=0.02)
    assert found >= 4
    if said:
        assert int(said[2]) == pytest.approx(100 * (found - held) / found, abs=5)


@pytest.mark.parametrize("options", [{"modes": 1}, {"flow": "iaf"}])
def test_a_mode_that_q_cannot_hold_is_not_lost_without_a_word(options: dict) -> None:
    fitted = fit(two, 2, budget=12_000, **{"flow": "realnvp", "steps": 2, "hidden": (8,), **options})
    assert isinstance(fitted.posterior, FlowPosterior)
    assert not fitted.is_trusted
    said = r"one more mode was found that q leaves out, of about 2[5-9]% of the mass, near theta = \[(3\.9|4)"
    assert re.search(said, fitted.verdict)
    assert fitted.log_evidence == pytest.approx(math.log(0.73), abs=0.05)
    more = fit(two, 2, budget=3000, resume=fitted)
    assert more.left_out == fitted.left_out
    assert more.left_out[0] in more.verdict


# ---------------------------------------------------------------------------------- parameters, as a model has them

X = torch.tensor([1.2, 0.3, 2.2, 1.9], dtype=torch.float64)
SPEC = {"mu": (), "tau": constraints.positive}


def conjugate(p: dict[str, Tensor]) -> Tensor:
    """One draw: the precision is gamma(2, 1), the mean N(0, 1 / (0.5 precision)); a normal-gamma model."""
    prior = torch.distributions.Gamma(2.0, 1.0).log_prob(p["tau"]) + Normal(0.0, (0.5 * p["tau"]).rsqrt()).log_prob(
        p["mu"]
    )
    return prior + Normal(p["mu"], p["tau"].rsqrt()).log_prob(X).sum()


def evidence_of_conjugate() -> float:
    """Bernardo & Smith: from the normal-gamma's constants before and after."""
    n, mean = len(X), X.mean().item()
    k, a, b = 0.5, 2.0, 1.0
    k_n, a_n = k + n, a + n / 2
    b_n = b + 0.5 * (X - mean).square().sum().item() + 0.5 * k * n * mean**2 / k_n
    gammas = math.lgamma(a_n) - math.lgamma(a) + a * math.log(b) - a_n * math.log(b_n)
    return gammas + 0.5 * math.log(k / k_n) - 0.5 * n * math.log(2 * math.pi)


def by_loop(p: dict[str, Tensor]) -> Tensor:
    """The same with a branch on a value, that vmap cannot follow."""
    return conjugate(p) if p["tau"] > 0 else p["mu"] * math.nan


@pytest.mark.parametrize(
    ("log_joint", "budget", "gap"),
    [(conjugate, 20_000, 0.05), pytest.param(by_loop, 13_000, 0.1, marks=pytest.mark.long)],
)
def test_a_conjugate_model_has_its_evidence(
    log_joint: Callable[[dict[str, Tensor]], Tensor], budget: int, gap: float
) -> None:
    """Called for each draw alone, through vmap or in a loop; a positive parameter's log-det is in it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log_joint: is called in a Python loop")
        fitted = fit(log_joint, SPEC, budget=budget, samples=128, **SMALL)
    assert fitted.target.calls == ("vmap" if log_joint is conjugate else "loop")
    near_evidence(fitted, evidence_of_conjugate(), gap=gap)
    draws, table = fitted.sample(7), fitted.summary()
    assert isinstance(draws, dict)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"mu": (7,), "tau": (7,)}
    assert table.names == ("mu", "tau")
    a_n = 2 + len(X) / 2
    b_n = 1 + 0.5 * (X - X.mean()).square().sum() + 0.5 * 0.5 * 4 * X.mean() ** 2 / 4.5
    assert table.mean[1].item() == pytest.approx((a_n / b_n).item(), rel=0.03)
    assert table.mean[0].item() == pytest.approx((X.sum() / 4.5).item(), abs=0.04)


def test_the_loop_says_so() -> None:
    """At the line that called; the fit itself, which is slow, is in the full run."""
    calls = [0]

    def interrupted(p: dict[str, Tensor]) -> Tensor:
        calls[0] += 1
        if calls[0] > 200:
            raise LookupError
        return by_loop(p)

    few = fit(conjugate, SPEC, "full_covariance", budget=1)
    with (
        pytest.warns(UserWarning, match="^log_joint: is called in a Python loop over draws") as caught,
        pytest.raises(LookupError, match="^$"),
    ):
        fit(interrupted, SPEC, budget=1, resume=few)
    assert [each.filename for each in caught] == [__file__]


@full
def test_beta_bernoulli() -> None:
    """7 of 10: the posterior is Beta(9, 5), the evidence a ratio of beta functions."""
    y = torch.tensor([1.0] * 7 + [0.0] * 3, dtype=torch.float64)

    def log_joint(p: dict[str, Tensor]) -> Tensor:
        share = p["share"].unsqueeze(-1)
        return Beta(2.0, 2.0).log_prob(p["share"]) + Bernoulli(share).log_prob(y).sum(-1)

    fitted = fit(log_joint, {"share": constraints.unit_interval}, budget=20_000, samples=128, **TINY)
    due = math.lgamma(9) + math.lgamma(5) - math.lgamma(14) - (2 * math.lgamma(2) - math.lgamma(4))
    near_evidence(fitted, due, gap=0.01)
    exact = Beta(torch.tensor(9.0).double(), torch.tensor(5.0).double())
    at = torch.linspace(0.4, 0.85, 20, dtype=torch.float64)
    torch.testing.assert_close(fitted.log_prob({"share": at}), exact.log_prob(at), rtol=0, atol=0.15)
    assert fitted.summary().mean.item() == pytest.approx(9 / 14, abs=4 * exact.stddev.item() / 100)


def test_a_float32_log_joint() -> None:
    """Float32 data in a matrix product: the fit is in float32, and as exact as that allows."""
    x = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.3, 0.4]])

    def log_joint(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(-1) + Normal(0.0, 1.0).log_prob(z @ x.mT - 1).sum(-1)

    fitted = fit(log_joint, 2, "full_covariance", budget=20_000)
    assert fitted.target.dtype == torch.float32
    assert fitted.sample(3).dtype == torch.float32  # pyright: ignore
    precision = torch.eye(2).double() + (x.mT @ x).double()
    loc = torch.linalg.solve(precision, x.double().sum(0))
    due = -0.5 * (3 * math.log(2 * math.pi) + 3 - (loc @ precision @ loc)) + math.log(2 * math.pi)
    assert fitted.log_evidence == pytest.approx((due - 0.5 * precision.logdet()).item(), abs=1e-3)
    assert fit(gaussian, 3, "full_covariance", budget=1, dtype=torch.float32).target.dtype == torch.float32


# ---------------------------------------------------------------------------------------------- how it is called


def test_the_same_seed_is_the_same_fit_and_no_global_draw_is_used() -> None:
    state, runs = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        runs.append(fit(banana, 2, budget=13_000, seed=seed, **TINY))
        assert torch.equal(state, torch.get_rng_state())
    weights = [torch.cat([w.flatten() for w in run.posterior.state_dict().values()]) for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert runs[0].log_evidence == runs[1].log_evidence != runs[2].log_evidence
    assert runs[0].verdict == runs[1].verdict
    torch.rand(())  # a user's own draws in between change nothing
    again = fit(banana, 2, budget=13_000, **TINY)
    assert again.log_evidence == runs[0].log_evidence


def test_fits_in_several_threads_are_those_of_one_and_leave_globals_alone() -> None:
    def log_joint(p: dict[str, Tensor]) -> Tensor:
        sleep(1e-4)  # here another thread takes over
        return Normal(0.0, 1.0).log_prob(p["a"]) + Normal(p["a"], 0.5).log_prob(p["b"])

    def run(seed: int) -> float:
        return fit(log_joint, {"a": (), "b": ()}, budget=13_000, seed=seed, **TINY).log_evidence

    due, state, validates = [run(seed) for seed in range(4)], torch.get_rng_state(), Distribution._validate_args
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == due
    assert torch.equal(state, torch.get_rng_state())
    assert Distribution._validate_args is validates


WORLDS = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "elsewhere": lambda: torch.device("meta"),
}


@pytest.mark.parametrize(
    "world",
    [pytest.param(each, marks=adam_elsewhere if each == "elsewhere" else ()) for each in WORLDS],
)
def test_a_fit_is_the_same_in_every_world(world: str) -> None:
    """Where gradients are off, products are in half precision, or the default device is another."""

    def bent(z: Tensor) -> Tensor:
        return -0.5 * z[:, 0].square() - 0.5 * (z[:, 1] - z[:, 0].square()).square()

    alone = fit(bent, 2, budget=13_000, dtype=torch.float32, **TINY)
    with WORLDS[world]():
        fitted = fit(bent, 2, budget=13_000, dtype=torch.float32, **TINY)
    for one, other in zip(fitted.posterior.state_dict().values(), alone.posterior.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert fitted.log_evidence == alone.log_evidence


@pytest.mark.parametrize(
    "kind", ["posterior", pytest.param("bijector", marks=full), pytest.param("learned", marks=full)]
)
def test_a_flow_of_one_s_own(kind: str) -> None:
    """It is copied: the user's own stays as it was; a step that reads a context learns it."""
    steps = Chain(Coupling(2, Affine(1), 0, (8,)), Reverse(2), Coupling(2, Affine(1), 0, (8,)))
    made = {
        "bijector": steps,
        "posterior": FlowPosterior(0, Chain(Affine(2), steps)),
        "learned": Learned(Chain(Affine(2), steps)),
    }
    flow = made[kind]
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    fitted = fit(banana, 2, flow, budget=16_000, samples=64)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert -0.45 < fitted.elbo(4000)[0] < 0.02  # that of the best Gaussian is -0.49


def test_progress_comes_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LOOK", 2)
    seen: list[Progress] = []
    fitted = fit(banana, 2, budget=18_000, samples=64, progress=seen.append, **TINY)
    assert fitted.history == seen
    assert seen[0].stage == "start"
    assert {each.stage for each in seen[1:]} == {"flow"}
    spent = [each.evaluations for each in seen]
    assert spent == sorted(spent)
    assert spent[-1] == fitted.evaluations <= 18_000
    assert seen[-1].elbo > seen[0].elbo
    assert any(not math.isnan(each.k_hat) for each in seen)
    assert str(seen[1]).startswith("flow  ")
    assert f"of 18,000  ELBO {seen[1].elbo:.3f}" in str(seen[1])


@pytest.mark.long
def test_a_tempered_start_holds_two_modes_in_one_flow() -> None:
    """Two near modes, which the barrier does not part: the flow of a tempered start covers both."""

    def near(z: Tensor) -> Tensor:
        return torch.logaddexp(Normal(-2.2, 1.0).log_prob(z[:, 0]), Normal(2.2, 1.0).log_prob(z[:, 0])) - math.log(2)

    fitted = fit(near, 1, "spline_coupling", budget=60_000, samples=256, modes=1, temperature=4.0, **SMALL)
    draws = fitted.sample(4000)
    assert isinstance(draws, Tensor)
    assert 0.3 < (draws[:, 0] < 0).double().mean() < 0.7


def test_a_fit_goes_on() -> None:
    """The first one's evaluations, seconds and history count; it is left as it was, and the second is nearer."""
    first = fit(funnel, 2, budget=14_000, samples=64, **TINY)
    before = first.log_prob(torch.zeros(1, 2).double()).item()
    assert "the ELBO still rose when the budget was spent" in first.verdict
    second = fit(funnel, 2, budget=8000, samples=64, resume=first)
    assert first.log_prob(torch.zeros(1, 2).double()).item() == before
    assert second.evaluations <= first.evaluations + 8000
    assert second.evaluations > first.evaluations
    assert second.seconds > first.seconds
    assert second.history[: len(first.history)] == first.history
    spent = [each.evaluations for each in second.history]
    assert spent == sorted(spent)
    assert second.elbo()[0] > first.elbo()[0] + 0.01


@pytest.mark.parametrize("flow", ["full_covariance", "realnvp"])
def test_a_posterior_too_far_away_is_said_to_be(flow: str) -> None:
    """Millions from the origin of the coordinates, with a budget that does not lead there."""
    x = 1e6 * (3 + torch.linspace(-1.7, 1.7, 20, dtype=torch.float64))

    def far(p: dict[str, Tensor]) -> Tensor:
        return Normal(p["mu"], p["s"]).log_prob(x).sum() - p["s"].log()

    verdict = fit(far, {"mu": (), "s": constraints.positive}, flow, budget=20_000, samples=64).verdict
    assert "the ELBO still rose when the budget was spent" in verdict
    assert "the posterior is far from the origin of the free coordinates" in verdict


def heavy(z: Tensor) -> Tensor:
    """Independent Students of 3 degrees of freedom."""
    return StudentT(3.0).log_prob(z).sum(-1)


@full
def test_independent_variables_with_heavy_tails_are_fitted() -> None:
    """The best Gaussian is 0.16 nats off, and so are affine couplings, which have nothing to read there."""
    gaps = [-fit(heavy, 4, flow, budget=40_000, samples=128, **SMALL).elbo(10_000)[0] for flow in (None, "realnvp")]
    assert gaps[0] < 0.03
    assert gaps[1] > 0.1


# --------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("where", ["progress", "log_joint"])
@pytest.mark.parametrize("flow", [pytest.param("realnvp", marks=full), "full_covariance"])
def test_an_interrupted_fit_returns_what_it_has(where: str, flow: str) -> None:
    """Ctrl-C after the start; that it was interrupted is said, and resume goes on from there."""
    calls = [0]
    last = 13_000 if flow == "full_covariance" else 14_000

    def log_joint(z: Tensor) -> Tensor:
        calls[0] += len(z)
        if where == "log_joint" and calls[0] > last:
            calls[0] = -(10**9)
            raise KeyboardInterrupt
        return banana(z)

    def progress(at: Progress) -> None:
        if where == "progress" and at.evaluations > last:
            raise KeyboardInterrupt

    options = TINY if flow == "realnvp" else {}
    fitted = fit(log_joint, 2, flow, budget=18_000, samples=64, progress=progress, **options)
    assert fitted.evaluations < 18_000
    assert fitted.notes[0] == "the fit was interrupted; pass resume= to go on"
    assert not fitted.is_trusted
    assert -2 < fitted.elbo()[0] < 0
    more = fit(banana, 2, budget=2000, samples=64, resume=fitted)
    assert more.elbo()[0] > fitted.elbo()[0] - 0.1
    assert "interrupted" not in more.verdict


def stopping(log_joint: Callable[[Tensor], Tensor], after: int) -> Callable[[Tensor], Tensor]:
    """A log joint during which Ctrl-C comes, after so many draws."""
    calls = [0]

    def stopped(z: Tensor) -> Tensor:
        calls[0] += len(z)
        if calls[0] > after:
            calls[0] = -(10**9)
            raise KeyboardInterrupt
        return log_joint(z)

    return stopped


def test_a_search_for_modes_that_has_found_none_has_nothing_to_return() -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(stopping(banana, 1000), 2, budget=30_000, **TINY)


@pytest.mark.parametrize("flow", ["realnvp", "full_covariance", "diagonal"])
def test_an_interrupted_search_for_modes_returns_their_gaussians(flow: str) -> None:
    """Of two Gaussians the search has both, and nothing is left to be gained: the evidence is 0."""
    options = TINY if flow == "realnvp" else {}
    fitted = fit(stopping(two, 8000), 2, flow, budget=30_000, **options)
    assert fitted.notes[0] == "the fit was interrupted; pass resume= to go on"
    assert fitted.evaluations < 9000
    assert fitted.elbo()[0] == pytest.approx(0, abs=0.05)


def test_an_interrupt_when_the_search_has_ended_loses_nothing() -> None:
    def progress(at: Progress) -> None:
        raise KeyboardInterrupt

    fitted = fit(banana, 2, budget=30_000, progress=progress, **TINY)
    assert fitted.notes[0] == "the fit was interrupted; pass resume= to go on"
    more = fit(banana, 2, budget=2000, samples=64, resume=fitted)
    assert more.elbo()[0] > fitted.elbo()[0] - 0.1


# ------------------------------------------------------------------------------------------------------ bad input

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no function": ({"log_joint": 3}, TypeError, "log_joint: expected a function of the parameters, got int"),
    "several arguments": (
        {"log_joint": lambda mu, tau: -mu * tau, "dim_or_spec": {"mu": (), "tau": constraints.positive}},
        TypeError,
        r"log_joint: expected a function of one argument, a mapping of names to tensors, got one of \(mu, tau\); write "
        r"lambda p: log_joint\(\*\*p\) in its place$",
    ),
    "several arguments of an int": (
        {"log_joint": lambda a, b, c: -a * b * c},
        TypeError,
        r"log_joint: expected a function of one argument, a tensor of all parameters, got one of \(a, b, c\); write "
        r"lambda theta: log_joint\(\*theta.unbind\(-1\)\) in its place$",
    ),
    "no argument": ({"log_joint": lambda: torch.zeros(())}, TypeError, r"log_joint: .*, a tensor .*, got one of \(\)$"),
    "raises": (
        {"log_joint": lambda z: z.nonsense},
        ValueError,
        "log_joint: expected a value of one draw, got AttributeError: 'Tensor' object has .* at theta = ",
    ),
    "shape": ({"log_joint": lambda z: -z.square()}, ValueError, r"log_joint: expected a tensor \(S,\) .* at theta = "),
    "nan": ({"log_joint": lambda z: gaussian(z) * math.nan}, ValueError, "log_joint: expected a finite value, got nan"),
    "no slope": ({"log_joint": lambda z: gaussian(z.detach())}, TypeError, "log_joint: expected a value with a grad"),
    "no spec": ({"dim_or_spec": 2.5}, TypeError, "dim_or_spec: expected an int, or a mapping .*, got float"),
    "no dim": ({"dim_or_spec": 0}, ValueError, "dim_or_spec: expected an int >= 1, got 0"),
    "bad name": ({"dim_or_spec": {1: 2}}, TypeError, "dim_or_spec: expected names that are strings, got 1"),
    "flow": ({"flow": "nvp"}, ValueError, "flow: expected one of diagonal, .*, got 'nvp'"),
    "option": ({"step": 3}, TypeError, "flow_options: realnvp takes steps, .*; got step"),
    "budget": ({"budget": 0}, ValueError, "budget: expected an int >= 1, got 0"),
    "budget kind": ({"budget": 1e6}, TypeError, "budget: expected an int, got float"),
    "samples": ({"samples": 1}, ValueError, "samples: expected an int >= 2, got 1"),
    "modes": ({"modes": 0}, ValueError, "modes: expected an int >= 1, got 0"),
    "cold": ({"temperature": 0.5}, ValueError, "temperature: expected a finite number >= 1, got 0.5"),
    "hot": ({"temperature": math.inf}, ValueError, "temperature: expected a finite number >= 1, got inf"),
    "temperature": ({"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
    "seed": ({"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
    "device": ({"device": "nope"}, ValueError, "device: expected a torch.device or the name of one, got 'nope'"),
    "dtype": ({"dtype": torch.float16}, ValueError, "dtype: expected torch.float32, torch.float64 or None, got torch"),
    "progress": ({"progress": 3}, TypeError, "progress: expected a function of a Progress, got int; write print"),
    "resume": ({"resume": "file"}, TypeError, "resume: expected a FittedPosterior, got str; for a file write Fitted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused(name: str) -> None:
    given, error, message = WRONG[name]
    given = {"log_joint": gaussian, "dim_or_spec": 3, "budget": 1, **given}
    with pytest.raises(error, match=f"^{message}"):
        fit(given.pop("log_joint"), given.pop("dim_or_spec"), **given)


def test_arguments_are_those_of_the_function_that_is_called() -> None:
    """More of them have defaults, or are those of a function within it, or cannot be read."""

    @functools.wraps(funnel)
    def within(mu: Tensor, tau: Tensor) -> Tensor:
        return funnel(torch.stack([mu, tau], -1))

    @functools.wraps(within)
    def of_one(p: dict[str, Tensor], *_: object, scale: float = 1.0) -> Tensor:
        return scale * within(**p)

    class Unread:
        __signature__ = None

        def __call__(self, p: dict[str, Tensor]) -> Tensor:
            return within(**p)

    spec = {"mu": (), "tau": ()}
    for log_joint in (of_one, Unread()):
        assert fit(log_joint, spec, "full_covariance", budget=1).target.calls == "vectorised"


def test_a_fit_goes_on_only_with_its_own_parameters() -> None:
    fitted = fit(gaussian, 3, "full_covariance", budget=1)
    with pytest.raises(
        ValueError, match=r"^resume: expected a fit of Parameters\(theta: \(2,\) .*, got one of .*\(3,\)"
    ):
        fit(banana, 2, resume=fitted)
    with pytest.raises(TypeError, match="^flow_options: expected none with resume, whose flow goes on, got steps$"):
        fit(gaussian, 3, resume=fitted, steps=2)
    with pytest.raises(ValueError, match=r"^dtype: expected none with resume, or its torch.float64, got .*32$"):
        fit(gaussian, 3, resume=fitted, dtype=torch.float32)


def test_nan_at_some_draws_is_left_out_and_said() -> None:
    """In a tail of q: the rest is fitted, and the verdict says how often, and where."""

    def log_joint(z: Tensor) -> Tensor:
        return torch.where(z[:, 0] > 2, math.nan, Normal(0.0, 1.0).log_prob(z).sum(-1))

    fitted = fit(log_joint, 2, "full_covariance", budget=20_000)
    assert not fitted.is_trusted
    found = re.search(
        r"log p/q is not finite at ([\d.]+)% of q's draws; log_joint is nan at theta = \[([\d.]+),", fitted.verdict
    )
    assert found
    assert float(found[1]) == pytest.approx(2.28, abs=0.8)
    assert float(found[2]) > 2


@pytest.mark.parametrize("flow", ["realnvp", "full_covariance"])
def test_draws_at_which_a_factorization_fails_are_left_out(flow: str) -> None:
    """The determinant of a correlation matrix, to the power 8: beyond -3 and 3 there is no matrix."""

    def log_joint(p: dict[str, Tensor]) -> Tensor:
        rho = p["x"][..., None, None] / 3
        eye = torch.eye(2, dtype=rho.dtype)
        return 16 * torch.linalg.cholesky(rho + (1 - rho) * eye).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    fitted = fit(log_joint, {"x": ()}, flow, budget=14_000, samples=64, **(TINY if flow == "realnvp" else {}))
    due = math.log(3) + math.lgamma(0.5) + math.lgamma(9) - math.lgamma(9.5)
    assert fitted.log_evidence == pytest.approx(due, abs=0.02)


@pytest.mark.parametrize("flow", ["realnvp", "full_covariance"])
def test_a_log_joint_that_turns_to_nan_leaves_the_best_q_so_far(flow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of the fit on, every value is nan: a model that has lost its state."""
    monkeypatch.setattr(running, "RESTARTS", 1)
    calls = [0]

    def log_joint(z: Tensor) -> Tensor:
        calls[0] += len(z)
        return banana(z) * (math.nan if calls[0] > 15_000 else 1.0)

    options = TINY if flow == "realnvp" else {}
    fitted = fit(log_joint, 2, flow, budget=40_000, samples=64, **options)
    assert "log p/q is not finite at 100.00% of q's draws; log_joint is nan at theta = [" in fitted.verdict
    draws = fitted.sample(2000)
    assert isinstance(draws, Tensor)
    ratio = banana(draws) - fitted.log_prob(draws)
    assert -1 < ratio.mean() < 0.1


def test_a_log_joint_s_own_error_comes_through() -> None:
    calls = [0]

    def log_joint(z: Tensor) -> Tensor:
        calls[0] += len(z)
        if calls[0] > 15_000:
            raise LookupError("no such row")
        return banana(z)

    with pytest.raises(LookupError, match="^no such row$"):
        fit(log_joint, 2, budget=40_000, **TINY)


def test_the_names_are_exported() -> None:
    assert flowpost.fit is fit
