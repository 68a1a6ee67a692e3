"""A posterior as the guide's distribution in Pyro: the ELBOs and gradients of flowpost's own, and nothing inverted."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from linear_gaussian import LinearGaussian
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.distributions import kl_divergence

from flowpost import FlowPosterior, density
from flowpost.density import standard_normal_log_prob

pyro = pytest.importorskip("pyro", reason="Pyro comes with the extra flowpost[pyro]")

import pyro.distributions as dist  # noqa: E402  # pyright: ignore[reportMissingImports]
from pyro import poutine  # noqa: E402  # pyright: ignore[reportMissingImports]
from pyro.infer import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    SVI,
    Predictive,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from flowpost.interop.pyro import PyroFlow, as_pyro  # noqa: E402

FAMILIES = ["diagonal", "full_covariance", "planar", "triangular_sylvester", "iaf", "maf", "spline_coupling"]
GAUSSIAN = FAMILIES[:2]
ELBOS = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO]
BATCH = 5
every = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def _store() -> None:
    pyro.clear_param_store()


@pytest.fixture
def inversions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a log q is worked out by the flow's inverse."""
    calls: list[int] = []

    def counted(*args: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return real(*args)  # pyright: ignore[reportArgumentType]

    real = density.apply_inverse
    monkeypatch.setattr(density, "apply_inverse", counted)
    return calls


def features() -> Tensor:
    return torch.linspace(-1, 1, BATCH * FEATURES, dtype=torch.float64).view(BATCH, FEATURES)


def prior() -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1)


def score(z: Tensor) -> Tensor:
    """A log-likelihood."""
    return -(z - 0.5).pow(4).sum(-1)


class Problem:
    """A posterior as guide, and a model with a likelihood; in a plate, of which some rows are taken."""

    def __init__(self, posterior: FlowPosterior, rows: Tensor | None = None) -> None:
        self.posterior, self.rows = posterior, rows

    def guide(self) -> None:
        pyro.module("posterior", self.posterior)
        with pyro.plate("data", BATCH, subsample=self.rows) as rows:
            pyro.sample("z", as_pyro(self.posterior.at(features()[rows])))

    def model(self) -> None:
        with pyro.plate("data", BATCH, subsample=self.rows):
            z = pyro.sample("z", prior())
            pyro.factor("score", score(z))


def loss_and_grads(elbo: Trace_ELBO, problem: Problem) -> tuple[float, list[Tensor]]:
    problem.posterior.zero_grad()
    torch.manual_seed(1)
    loss = elbo.loss_and_grads(problem.model, problem.guide)
    return loss, grads_of(problem.posterior)


def grads_of(posterior: FlowPosterior) -> list[Tensor]:
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in posterior.parameters()]


def expected(
    posterior: FlowPosterior, particles: int, rows: Tensor | slice = slice(None), *, closed: bool
) -> tuple[float, list[Tensor]]:
    """The same by flowpost alone."""
    posterior.zero_grad()
    torch.manual_seed(1)
    q = posterior.at(features()[rows])
    z, log_q, _ = q.draw((particles,) if particles > 1 else ())
    kl = kl_divergence(q, prior()) if closed else log_q - standard_normal_log_prob(z)
    loss = (kl - score(z)).sum() / particles
    loss.backward()
    return float(loss.detach()), grads_of(posterior)


# ------------------------------------------------------------------------------------------------------------- SVI


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("kind", ELBOS)
@every
def test_the_elbo_and_its_gradients_are_flowpost_s(
    name: str, kind: type[Trace_ELBO], particles: int, inversions: list[int]
) -> None:
    vectorized = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = kind(**(vectorized if particles > 1 else {}))
    loss, grads = loss_and_grads(elbo, Problem(small(name)))
    assert inversions == []
    closed = kind is TraceMeanField_ELBO and name in GAUSSIAN
    wanted, slopes = expected(small(name), particles, closed=closed)
    assert math.isclose(loss, wanted, rel_tol=1e-12)
    torch.testing.assert_close(grads, slopes, rtol=1e-9, atol=1e-11)
    assert max(float(grad.abs().max()) for grad in grads) > 0.01


@pytest.mark.parametrize("kind", ELBOS)
@pytest.mark.parametrize("name", ["full_covariance", "iaf"])
def test_a_plate_s_part_of_the_data_stands_for_all(name: str, kind: type[Trace_ELBO], inversions: list[int]) -> None:
    rows = torch.tensor([0, 3])
    loss, grads = loss_and_grads(kind(), Problem(small(name), rows))
    closed = kind is TraceMeanField_ELBO and name in GAUSSIAN
    wanted, slopes = expected(small(name), 1, rows, closed=closed)
    assert math.isclose(loss, BATCH / 2 * wanted, rel_tol=1e-12)
    torch.testing.assert_close(grads, [BATCH / 2 * slope for slope in slopes], rtol=1e-9, atol=1e-11)
    assert inversions == []


@pytest.mark.parametrize("kind", ELBOS)
@pytest.mark.parametrize("name", ["full_covariance", "iaf"])
def test_scales_and_masks_reach_log_q(name: str, kind: type[Trace_ELBO], inversions: list[int]) -> None:
    posterior, mask = small(name), torch.tensor([True, False, True, True, False])

    def loss(handler: Callable[..., Callable[[], None]], *args: object) -> float:
        problem = Problem(posterior)
        torch.manual_seed(1)
        return kind().loss(handler(problem.model, *args), handler(problem.guide, *args))

    torch.manual_seed(1)
    q = posterior.at(features())
    z, log_q, _ = q.draw()
    closed = kind is TraceMeanField_ELBO and name in GAUSSIAN
    each = ((kl_divergence(q, prior()) if closed else log_q - standard_normal_log_prob(z)) - score(z)).detach()
    assert math.isclose(loss(poutine.scale, 0.5), 0.5 * float(each.sum()), rel_tol=1e-12)
    assert math.isclose(loss(poutine.mask, mask), float(each[mask].sum()), rel_tol=1e-12)
    assert inversions == []


@pytest.mark.parametrize("kind", ELBOS)
def test_an_auxiliary_site_is_scored(kind: type[Trace_ELBO]) -> None:
    """One that the model has not: log q of it is all that it adds."""
    posterior = small("iaf")

    def guide() -> None:
        with pyro.plate("data", BATCH):
            pyro.sample("aside", as_pyro(posterior.at(features())), infer={"is_auxiliary": True})

    def model() -> None:
        with pyro.plate("data", BATCH):
            pass

    torch.manual_seed(1)
    loss = kind().loss(model, guide)
    torch.manual_seed(1)
    assert math.isclose(loss, float(posterior(features()).log_prob.sum().detach()), rel_tol=1e-12)


@pytest.mark.parametrize("kind", ELBOS[:2])
def test_svi_reaches_the_true_posterior(kind: type[Trace_ELBO]) -> None:
    """A linear-Gaussian model, whose posteriors are Gaussians of one covariance, their means linear in x."""
    decoder = LinearGaussian(DIM)
    x = decoder.draw(64)[1]
    posterior = small("full_covariance", features=x.shape[1], push=0.0)

    def model() -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z @ decoder.weight.mT + decoder.bias, decoder.scale).to_event(1), obs=x)

    def guide() -> None:
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            pyro.sample("z", as_pyro(posterior.at(x)))

    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97}), kind())
    for _ in range(200):
        svi.step()
    truth = dist.MultivariateNormal((x - decoder.bias) @ decoder.gain.mT, decoder.covariance)
    assert kl_divergence(posterior.at(x), truth).mean() < 0.02


def test_parameters_are_pyro_s_and_the_guide_predicts() -> None:
    problem = Problem(small("iaf"))
    problem.guide()
    names = {f"posterior$$${name}" for name, _ in problem.posterior.named_parameters()}
    assert set(pyro.get_param_store()) == names
    drawn = Predictive(problem.guide, num_samples=7, parallel=True)()["z"]
    assert drawn.shape == (7, BATCH, DIM)
    assert not torch.equal(drawn[0], drawn[1])


# ---------------------------------------------------------------------------------------------------- distribution


@every
def test_it_is_the_same_distribution(name: str) -> None:
    q = small(name).at(features())
    p = as_pyro(q)
    z = torch.randn(2, BATCH, DIM, dtype=torch.float64)
    assert torch.equal(p.log_prob(z), q.log_prob(z))
    assert (p.shape(), p.event_dim, p.has_rsample, p.batch_shape) == ((BATCH, DIM), 1, True, (BATCH,))
    assert p.expand_by((2,)).rsample().shape == (2, BATCH, DIM)
    torch.testing.assert_close(p.to_event(1).log_prob(z), q.log_prob(z).sum(-1))
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(p.mask(mask).log_prob(z), q.log_prob(z) * mask)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_its_kl_is_found_also_within_pyro_s_wrappers(name: str) -> None:
    q = small(name).at(features())
    p, other, wanted = as_pyro(q), prior().expand((BATCH,)), kl_divergence(q, prior())
    mask = torch.tensor([True, False, True, True, False])
    full = dist.MultivariateNormal(torch.zeros(DIM).double(), torch.eye(DIM).double())
    for found, value in {
        "normal": (kl_divergence(p, prior()), wanted),
        "full": (kl_divergence(p, full), wanted),
        "expanded": (kl_divergence(p.expand((2, BATCH)), other.expand((2, BATCH))), wanted.expand(2, BATCH)),
        "events": (kl_divergence(p.to_event(1), other.to_event(1)), wanted.sum()),
        "masked": (kl_divergence(p.mask(mask), other.mask(mask)), wanted * mask),
    }.values():
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError):
        kl_divergence(as_pyro(small("iaf").at(features())), prior())


@pytest.mark.parametrize("given", [lambda: small("iaf"), lambda: prior(), lambda: None])
def test_what_is_no_q_is_refused(given: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"^q: expected a FlowDistribution, as posterior\.at\(h\) gives it, got"):
        as_pyro(given())  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------- remembered


def drawn(name: str = "iaf") -> tuple[FlowPosterior, PyroFlow, Tensor]:
    posterior = small(name)
    q = as_pyro(posterior.at(features()))
    return posterior, q, q()


def _refill(posterior: FlowPosterior, q: PyroFlow, z: Tensor) -> Tensor:
    with torch.no_grad():
        z.add_(0.1)
    return z


def _step(posterior: FlowPosterior, q: PyroFlow, z: Tensor) -> Tensor:
    with torch.no_grad():
        next(posterior.flow.parameters()).add_(0.1)
    return z


def _step_fused(posterior: FlowPosterior, q: PyroFlow, z: Tensor) -> Tensor:
    """Which no parameter counts as a change."""
    sum(parameter.square().sum() for parameter in posterior.flow.parameters()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    torch.optim.Adam(posterior.flow.parameters(), lr=0.1, fused=True).step()
    return z


def _change_context(posterior: FlowPosterior, q: PyroFlow, z: Tensor) -> Tensor:
    assert q.context is not None
    with torch.no_grad():
        q.context.add_(0.1)
    return z


def _draw_another(posterior: FlowPosterior, q: PyroFlow, z: Tensor) -> Tensor:
    q.rsample()
    return z


CHANGES: dict[str, Callable[[FlowPosterior, PyroFlow, Tensor], Tensor]] = {
    "refilled": _refill,
    "an optimizer's step": _step,
    "a fused optimizer's step": _step_fused,
    "another context": _change_context,
    "a later draw": _draw_another,
    "a clone": lambda _, q, z: z.clone(),
    "a part": lambda _, q, z: z[:],
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_last_own_sample_is_remembered(change: str, inversions: list[int]) -> None:
    posterior, q, z = drawn()
    first = q.log_prob(z)
    assert inversions == []
    value = CHANGES[change](posterior, q, z)
    found = q.log_prob(value)
    assert inversions == [1]
    again = PyroFlow(q.flow, None if q.context is None else q.context.clone(), (BATCH,)).log_prob(value.clone())
    assert torch.equal(found, again)
    if change in ("a clone", "a part", "a later draw"):
        torch.testing.assert_close(found, first, rtol=1e-9, atol=1e-9)
    else:
        assert (found - first).abs().max() > 1e-3


@pytest.mark.parametrize("at_draw", [True, False])
def test_a_log_prob_is_remembered_for_its_grad_mode(at_draw: bool, inversions: list[int]) -> None:  # noqa: FBT001
    q = as_pyro(small("iaf").at(features()))
    with torch.set_grad_enabled(at_draw):
        z = q()
        assert q.log_prob(z).requires_grad is at_draw
        assert inversions == []
    with torch.set_grad_enabled(not at_draw):
        assert q.log_prob(z).requires_grad is not at_draw
    assert inversions == [1]


def test_others_remember_nothing_of_it(inversions: list[int]) -> None:
    _, q, z = drawn("maf")
    for other in (copy.copy(q), q.expand((2, BATCH)), as_pyro(q)):
        other.log_prob(z)
    assert inversions == [1, 1, 1]
    with torch.inference_mode():  # where changes are not counted
        q.log_prob(q())
    assert inversions == [1, 1, 1, 1]
    q = as_pyro(small("diagonal").at(features().detach()))
    z = q.sample()
    with torch.no_grad():
        q.entropy()
        q.log_prob(z)
    assert inversions == [1, 1, 1, 1]


def test_it_pickles_without_what_it_remembers() -> None:
    posterior = small("iaf")
    with torch.no_grad():
        q = as_pyro(posterior.at(features()))
        z = q()
        for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
            assert other._last is None
            torch.testing.assert_close(other.log_prob(z), q.log_prob(z), rtol=1e-9, atol=1e-9)


def test_the_remembered_log_prob_has_the_total_derivative() -> None:
    """That of the inverse at a z which depends on the parameters."""
    grads = []
    for touch in (lambda z: z, lambda z: z.view_as(z)):
        torch.manual_seed(2)
        posterior, q, z = drawn("iaf")
        (q.log_prob(touch(z)).sum() + z.sin().sum()).backward()
        grads.append(grads_of(posterior))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


def test_a_vae_s_q_in_a_guide(inversions: list[int]) -> None:
    encoder, posterior = nn.Linear(FEATURES, FEATURES).double(), small("iaf")
    q = as_pyro(posterior.at(encoder(features())))
    q.log_prob(q()).sum().backward()
    assert encoder.weight.grad is not None
    assert inversions == []
