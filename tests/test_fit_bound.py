"""The ELBO's loss and gradient in a fit, and the ascent along it: rate, clip, restarts, stop."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import flowpost
from flowpost import Affine, Chain, Coupling, FlowPosterior, Sigmoid
from flowpost.variational import ascent
from flowpost.variational.ascent import BLOCK, CLIP, EXACT, PATIENCE, RATE, WARM_UP, Ascent
from flowpost.variational.bound import Bound, Fitted, bound, draw, noise_for
from flowpost.variational.families import assemble, build_flow, components, is_mixable
from flowpost.variational.gaussian import Gaussian
from flowpost.variational.mixture import Mixture
from flowpost.variational.parameters import Parameters
from flowpost.variational.target import Target

CPU = torch.device("cpu")
MEANS = torch.tensor([-1.5, 1.0], dtype=torch.float64)
LOGS = torch.tensor([0.3, 0.7], dtype=torch.float64).log()


def log_p(z: Tensor) -> Tensor:
    """Two modes on a line, ``(S, 1)`` to ``(S,)``."""
    return (Normal(MEANS, 0.7).log_prob(z) + LOGS).logsumexp(-1)


def target(log_joint: Callable[[Tensor], Tensor] = log_p, dim: int = 1) -> Target:
    return Target(log_joint, Parameters(dim), device="cpu", dtype=torch.float64)


def normals(*numbers: tuple[float, float]) -> Fitted:
    """Normals of one dimension by loc and raw scale, one or a mixture."""
    parts = [FlowPosterior(0, Affine(1)).double() for _ in numbers]
    with torch.no_grad():
        for part, pair in zip(parts, numbers, strict=True):
            next(part.parameters())[:] = torch.tensor(pair, dtype=torch.float64)
    if len(parts) == 1:
        return parts[0]
    mixture = Mixture(parts)
    with torch.no_grad():
        mixture.logits[:] = torch.tensor([0.4, -0.2], dtype=torch.float64)
    return mixture


def middles(fitted: Fitted, count: int = 20_001) -> Tensor:
    """Noise at the middles of equal shares of N(0, 1): a mean over it is a quadrature."""
    noise = Normal(0.0, 1.0).icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(-1)
    return noise.expand(2, -1, -1) if isinstance(fitted, Mixture) else noise


def exact_elbo(fitted: Fitted, weight: float = 1.0) -> Tensor:
    """By the trapezoidal rule, from the definition."""
    z = torch.linspace(-15, 15, 6001, dtype=torch.float64).unsqueeze(-1)
    log_q = fitted.log_prob(z)
    return (log_q.exp() * (weight * log_p(z) - log_q)).sum() * (z[1, 0] - z[0, 0])


FITTED = {"posterior": ((0.9, 0.6),), "mixture": ((-1.0, -0.3), (1.5, 0.4))}


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("name", FITTED)
def test_the_loss_has_the_gradient_of_minus_the_elbo(name: str, weight: float) -> None:
    """Of every number and of the weights, against the plain gradient of another quadrature."""
    fitted = normals(*FITTED[name])
    found = bound(fitted, target(), middles(fitted), weight)
    got = torch.autograd.grad(found.loss, list(fitted.parameters()))
    due = torch.autograd.grad(-exact_elbo(fitted, weight), list(fitted.parameters()))
    if weight != 1 and name == "mixture":  # the weights climb the ELBO of p itself
        due = (torch.autograd.grad(-exact_elbo(fitted), [fitted.logits])[0], *due[1:])  # pyright: ignore
    assert max(gradient.abs().max().item() for gradient in due) > 0.1
    for one, other in zip(got, due, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.share.sum().item(), 1.0)
    torch.testing.assert_close((found.share * found.ratio).sum(), exact_elbo(fitted).detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", FITTED)
def test_where_q_is_p_no_draw_moves_it(name: str) -> None:
    """Sticking the landing: the gradient is 0 for every batch, and not only in the mean."""
    fitted = normals(*FITTED[name])
    own = target(normals(*FITTED[name]).log_prob)
    found = bound(fitted, own, noise_for(fitted, 16, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found.ratio, torch.zeros_like(found.ratio))
    assert max(each.abs().max().item() for each in torch.autograd.grad(found.loss, list(fitted.parameters()))) < 1e-10


@pytest.mark.parametrize("name", FITTED)
def test_draws_whose_value_or_slope_is_not_finite_are_left_out(name: str) -> None:
    """The loss and its gradient are those of the other draws, shared anew."""
    fitted = normals(*FITTED[name])
    spoilt = {
        "value": lambda z: torch.where(z.squeeze(-1) > 1, math.nan, log_p(z)),
        "slope": lambda z: log_p(z) + 0 * ((1 - z).abs() + (1 - z)).squeeze(-1).sqrt(),
    }
    noise = noise_for(fitted, 64, torch.Generator().manual_seed(0))
    whole = bound(fitted, target(), noise)
    lost = draw(fitted, noise).z.squeeze(-1) > 1
    assert 0 < lost.sum() < len(lost)
    for log_joint in spoilt.values():
        found = bound(fitted, target(log_joint), noise)
        assert torch.equal(found.ratio.isnan(), lost)
        torch.testing.assert_close(found.share, torch.where(lost, 0.0, whole.share) / whole.share[~lost].sum())
        gradients = torch.autograd.grad(found.loss, list(fitted.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_noise_is_stratified_and_rounded_up() -> None:
    assert noise_for(normals((0, 0)), 7, torch.Generator()).shape == (7, 1)
    assert noise_for(normals((0, 0), (1, 0)), 7, torch.Generator()).shape == (2, 4, 1)


# ------------------------------------------------------------------------------------------------------- families


def test_a_fresh_fit_is_the_gaussian_of_the_start() -> None:
    gaussian = Gaussian(torch.tensor([3.0, -1.0]).double(), torch.tensor([[2.0, 0], [1.0, 0.1]]).double())
    z = torch.randn(20, 2, dtype=torch.float64)
    due = torch.distributions.MultivariateNormal(gaussian.loc, scale_tril=gaussian.scale_tril).log_prob(z)
    for name in (None, "diagonal", "full_covariance", "realnvp", "spline_coupling", "maf", "iaf", "planar"):
        fitted = assemble(build_flow(name, 2, {}), [gaussian], [0.0])
        torch.testing.assert_close(fitted.log_prob(z), due, msg=str(name))


def test_components_learn_for_themselves_and_weigh_as_their_evidence() -> None:
    gaussian = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    fitted = assemble(build_flow("realnvp", 2, {"steps": 2, "hidden": (8,)}), [gaussian, gaussian], [-3.0, -1.0])
    assert isinstance(fitted, Mixture)
    torch.testing.assert_close(fitted.log_weights, torch.tensor([-3.0, -1.0]).double().log_softmax(0))
    one, other = components(fitted)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
    assert [is_mixable(build_flow(name, 2, {})) for name in (None, "maf", "iaf", "planar", "diagonal")] == [
        1,
        1,
        0,
        0,
        1,
    ]


@pytest.mark.parametrize(("dim", "steps", "width"), [(2, 8, 32), (16, 8, 32), (17, 12, 32), (32, 12, 32), (40, 12, 64)])
def test_a_flow_of_many_variables_is_deeper_and_wider(dim: int, steps: int, width: int) -> None:
    """Unless it is told how deep, or how wide."""
    for given, due in (({}, (steps, width)), ({"steps": 5, "hidden": (7,)}, (5, 7))):
        couplings = [part for part in build_flow("realnvp", dim, given).modules() if isinstance(part, Coupling)]
        assert (len(couplings), len(next(couplings[0].net.parameters()))) == due


WRONG = {
    "unknown": ("realvnp", {}, ValueError, "flow: expected one of diagonal, .*, got 'realvnp'"),
    "number": (3, {}, TypeError, "flow: expected a recipe's name, a Bijector or a FlowPosterior, got int"),
    "option": ("realnvp", {"step": 3}, TypeError, "flow_options: realnvp takes steps, .*; got step"),
    "none taken": ("diagonal", {"steps": 3}, TypeError, "flow_options: diagonal takes none; got steps"),
    "with options": (Affine(2), {"steps": 3}, TypeError, "flow_options: expected none with a Affine, got steps"),
    "features": (flowpost.diagonal(5, 2), {}, ValueError, "flow: expected a posterior of features=0, got features=5"),
    "dim": (flowpost.diagonal(0, 3), {}, ValueError, "flow: expected dim=2, the number of free coordinates, got dim=3"),
    "an interval": (
        Chain(Affine(2), Sigmoid(2)), {}, ValueError,
        r"flow: expected one onto all real numbers, .* got codomain \(0.0, 1.0\); leave its last step out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_flow_is_refused(name: str) -> None:
    flow, options, error, message = WRONG[name]
    with pytest.raises(error, match=f"^{message}"):
        build_flow(flow, 2, options)


# --------------------------------------------------------------------------------------------------------- ascent


class Line(nn.Module):
    """One number to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def climb(
    elbo: Callable[[int, Tensor], float], steps: int, *, spread: float = 1.0, slope: float = 1.0, **options: float
) -> tuple[Ascent, Line, list[float]]:
    """An ascent whose ELBO at each step is given, with draws that scatter so much; its rates."""
    line, rates, count, looked = Line(), [], [0], []

    def objective(noise: Tensor, weight: Tensor) -> Bound:
        if not looked:  # before the first step, whether there is anything to gain
            looked.append(True)
            return Bound(line.x.sum(), torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5]))
        rates.append(made.rate.item())
        value = elbo(count[0], line.x.detach())
        count[0] += 1
        ratio = torch.tensor([value - spread, value + spread], dtype=torch.float64)
        return Bound(-slope * line.x.sum(), ratio, torch.tensor([0.5, 0.5], dtype=torch.float64))

    made = Ascent(line, objective, lambda: torch.zeros(()), steps, CPU, **options)
    return made, line, rates


def test_the_rate_warms_up_stays_and_falls_as_a_half_cosine() -> None:
    """An ELBO that rises for good: the rate falls over the second half of the steps."""
    made, _, rates = climb(lambda step, x: float(step), 400)
    list(made.run())
    assert made.made == 400
    torch.testing.assert_close(rates[:WARM_UP], [RATE * (i + 1) / WARM_UP for i in range(WARM_UP)], rtol=1e-6, atol=0)
    assert rates[WARM_UP:200] == [pytest.approx(RATE)] * (200 - WARM_UP)
    due = [RATE * 0.5 * (1 + math.cos(math.pi * i / 200)) for i in range(200)]
    torch.testing.assert_close(rates[200:], due, rtol=1e-5, atol=1e-9)
    assert made.unsettled


def test_an_objective_that_makes_no_graph_runs_as_it_is() -> None:
    """And an error of its own is let through."""
    made, line, _ = climb(lambda step, x: float(step), BLOCK)

    def refuse(noise: Tensor) -> Tensor:
        raise RuntimeError("the device was waited for")

    made._launched = lambda: refuse
    assert len(list(made.run())) == 1
    assert line.x.item() != 0
    made._step = refuse
    made.steps = 2 * BLOCK
    made.fall = None
    with pytest.raises(RuntimeError, match="waited for"):
        list(made.run())


def test_nothing_of_a_refused_step_is_held_in_the_next_one() -> None:
    """On a GPU the graph of its objective would keep autograd on the stream of the capture."""
    made, line, _ = climb(lambda step, x: float(step), BLOCK)
    graphs: list[weakref.ref[Tensor]] = []
    plain = made._step

    def refuse(noise: Tensor) -> Tensor:
        loss = 2 * line.x
        graphs.append(weakref.ref(loss))
        raise RuntimeError("the device was waited for")

    def step(noise: Tensor) -> Tensor:
        assert graphs[0]() is None
        return plain(noise)

    made._launched, made._step = lambda: refuse, step
    assert len(list(made.run())) == 1
    assert len(graphs) == 1


def test_the_rate_falls_early_where_the_elbo_is_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it stayed; then the ascent ends, whatever the budget. In blocks of 5 steps, to be quick."""
    monkeypatch.setattr(ascent, "BLOCK", 5)
    made, _, rates = climb(lambda step, x: -1e-5 * step, 4000)
    list(made.run())
    stayed = 2 * PATIENCE * 5
    assert made.made == 2 * stayed
    assert rates[stayed - 1] == pytest.approx(RATE)
    assert rates[-1] < 1e-3 * RATE
    assert not made.unsettled


@pytest.mark.parametrize("size", [1.0, 1e4, 1e100])
def test_a_gradient_far_above_the_usual_one_is_clipped(size: float) -> None:
    """After 50 of norm 1, one of any size reaches Adam as one of norm CLIP."""
    line, seen = Line(), []

    def objective(noise: Tensor, weight: Tensor) -> Bound:
        slope = size if len(seen) == 50 else 1.0
        return Bound(-slope * line.x.sum(), torch.zeros(2).double(), torch.full((2,), 0.5).double())

    made = Ascent(line, objective, lambda: torch.zeros(()), 60, CPU)
    step = made.adam.step
    made.adam.step = lambda *_: (seen.append(line.x.grad.item()), step())[1]  # pyright: ignore
    for _ in range(51):
        made._step(torch.zeros(()))
    assert seen[:50] == [-1.0] * 50
    assert seen[50] == pytest.approx(-min(size, CLIP))


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    made, line, _ = climb(lambda step, x: 0.0, 10, slope=math.nan)
    assert not made._is_exact()
    made._step(torch.zeros(()))
    assert line.x.item() == 0


def test_a_divergence_goes_back_to_the_best_weights_at_half_the_rate() -> None:
    """The ELBO rises with x to x = 0.2, then falls off a cliff: every restart is from below it."""
    made, line, rates = climb(lambda step, x: x.item() if x.item() < 0.2 else -1e6, 400)
    readings = list(made.run())
    assert made.restarts >= 1
    assert made.peak == pytest.approx(RATE / 2**made.restarts)
    assert any(reading.elbo < -1e5 for reading in readings)
    made.settle()
    assert 0.1 < line.x.item() < 0.2
    assert made.top is not None
    assert made.top.elbo < 0.2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_density_lost_from_some_step_on_restarts(share: float) -> None:
    """From step 100 all draws are nan, or none is: then nothing restarts."""
    made, line, _ = climb(lambda step, x: math.nan if step >= 100 and share else float(step), 300)
    seen = []
    for _ in made.run():
        seen.append(line.x.item())
    assert (made.restarts > 0) == bool(share)
    if share:
        assert made.restarts == 200 / BLOCK
        assert made.peak == RATE / 2**made.restarts
        made.settle()
        assert line.x.item() == pytest.approx(seen[2])


def test_nothing_is_moved_where_q_is_exact_to_begin_with() -> None:
    line = Line()
    even = Bound(line.x.sum(), torch.full((4,), 2.0), torch.full((4,), 0.25))
    made = Ascent(line, lambda noise, weight: even, lambda: torch.zeros(()), 100, CPU)
    assert list(made.run()) == []
    assert (made.made, line.x.item(), made.unsettled) == (0, Line().x.item(), False)


def test_the_ascent_ends_where_log_ratios_are_constant() -> None:
    made, _, _ = climb(lambda step, x: 1.0, 400, spread=math.sqrt(EXACT))
    assert len(list(made.run())) == 1
    assert made.made == BLOCK
    made, _, _ = climb(lambda step, x: 1.0, 400, spread=math.sqrt(3 * EXACT))
    assert len(list(made.run())) > 1


def test_a_tempered_density_cools_over_a_third_of_the_steps() -> None:
    weights = []
    line = Line()

    def objective(noise: Tensor, weight: Tensor) -> Bound:
        weights.append(weight.item())
        return Bound(-line.x.sum(), torch.tensor([-1.0, 1.0]).double(), torch.full((2,), 0.5).double())

    list(Ascent(line, objective, lambda: torch.zeros(()), 300, CPU, temperature=16.0).run())
    _, *weights = weights  # the look before the first step
    assert weights[0] == pytest.approx(1 / 16)
    assert weights[50] == pytest.approx(1 / 4)
    assert weights[100:] == [1.0] * (len(weights) - 100)


def test_a_tempered_density_is_fitted_also_where_q_is_exact_in_one_mode() -> None:
    """There log p/q is constant to begin with, and would end the fit before it has seen another mode."""
    line = Line()

    def even(noise: Tensor, weight: Tensor) -> Bound:
        return Bound(line.x.sum(), torch.full((4,), 2.0), torch.full((4,), 0.25))

    made = Ascent(line, even, lambda: torch.zeros(()), 90, CPU, temperature=4.0)
    assert len(list(made.run())) == 2
    assert made.made == 2 * BLOCK  # the first block that ends at or after a third of the steps


def test_an_elbo_that_falls_while_the_density_is_tempered_is_no_divergence() -> None:
    """It is that of the density itself, and falls as q widens; when the density is cold, it counts."""
    made, line, _ = climb(lambda step, x: -float(step) if step < 100 else step - 1000.0, 300, temperature=4.0)
    list(made.run())
    assert made.restarts == 0
    assert made.top is not None
    assert made.top.elbo < -600
    made.settle()
    assert line.x.item() > 1


def test_nothing_but_nan_is_given_up_and_not_a_crash() -> None:
    made, line, _ = climb(lambda step, x: math.nan, 200)
    list(made.run())
    made.settle()
    assert not made.unsettled
    assert line.x.item() == pytest.approx(0, abs=WARM_UP * RATE)
