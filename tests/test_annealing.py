"""Hamiltonian Monte Carlo: reversible, of unit volume, exact in its ratio, and the target stays what it was."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.utils import prune

import flowpost
from flowpost import Affine, FlowPosterior
from flowpost.annealing import State, adapt, hamiltonian_step, leapfrog, noise_target
from flowpost.density import standard_normal_log_prob

COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(position: Tensor) -> tuple[Tensor, Tensor]:
    away = position - MEAN
    return -0.5 * (away @ PRECISION * away).sum(-1), -away @ PRECISION


def quartic(position: Tensor) -> tuple[Tensor, Tensor]:
    """No Gaussian: its path has no closed form, and far out it overflows."""
    return -0.25 * position.pow(4).sum(-1), -(position**3)


def at(position: Tensor, gradient: Callable) -> State:
    return State(position, *gradient(position))


def step(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("gradient", [gaussian, quartic])
@pytest.mark.parametrize("leapfrogs", [1, 2, 9])
def test_a_path_leads_back_and_keeps_its_volume(gradient: Callable, leapfrogs: int) -> None:
    start, momentum = at(double(5, 2), gradient), double(5, 2)
    sizes = torch.linspace(0.05, 0.3, 5, dtype=torch.float64)
    end, last = leapfrog(start, momentum, gradient, sizes, leapfrogs)
    assert ((end.position - start.position).norm(dim=-1) > 1e-2).all()
    back, first = leapfrog(end, -last, gradient, sizes, leapfrogs)
    for got, due in zip((*back, first), (*start, -momentum), strict=True):
        torch.testing.assert_close(got, due, rtol=0, atol=1e-12)

    def moved(phase: Tensor) -> Tensor:
        end, last = leapfrog(at(phase[:2], gradient), phase[2:], gradient, sizes[-1], leapfrogs)
        return torch.cat([end.position, last])

    jacobian = torch.autograd.functional.jacobian(moved, double(4))
    torch.testing.assert_close(torch.linalg.det(jacobian), step(1.0), rtol=1e-12, atol=0)


def test_a_step_is_the_textbook_s() -> None:
    """Written again, one chain at a time, in plain numbers: energies, the ratio, and who is accepted."""
    position, momentum, uniform = double(60, 2), double(60, 2), torch.rand(60, dtype=torch.float64)
    sizes = torch.linspace(0.1, 2.1, 60, dtype=torch.float64)
    state, acceptance = hamiltonian_step(at(position, quartic), quartic, sizes, 3, momentum, uniform.log())
    taken = 0
    for i in range(60):
        q, p, h = position[i].clone(), momentum[i].clone(), sizes[i]
        before = 0.25 * (q**4).sum() + 0.5 * (p**2).sum()
        for _ in range(3):
            p -= h / 2 * q**3
            q += h * p
            p -= h / 2 * q**3
        change = 0.25 * (q**4).sum() + 0.5 * (p**2).sum() - before
        ratio = min(1.0, math.exp(min(0.0, -change.item()))) if change.isfinite() else 0.0
        assert acceptance[i].item() == pytest.approx(ratio, rel=1e-9, abs=1e-300)
        accepted = uniform[i].item() < ratio
        taken += accepted
        torch.testing.assert_close(state.position[i], q if accepted else position[i], rtol=1e-9, atol=1e-9)
    assert 10 < taken < 50
    for got, due in zip(state, at(state.position, quartic), strict=True):
        torch.testing.assert_close(got, due)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_overflows_stays_and_the_others_move(dtype: torch.dtype) -> None:
    """From 1e9 the quartic's first step is out of all numbers; one where the value alone is nan stays too."""

    def holed(position: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = quartic(position)
        return torch.where(position[..., 0] < -5, math.nan, value), slope

    position = torch.tensor([[1e9, 1.0], [0.5, 0.5], [-4.9, 0.0], [0.2, -0.3]], dtype=dtype)
    state = at(position, holed)
    momentum = torch.tensor([[1.0, 1.0], [0.5, 0.1], [-300.0, 0.0], [0.1, 0.1]], dtype=dtype)
    size, log_uniform = torch.tensor(0.1, dtype=dtype), torch.full((4,), -1.0, dtype=dtype)
    after, acceptance = hamiltonian_step(state, holed, size, 6, momentum, log_uniform)
    assert acceptance[[0, 2]].tolist() == [0, 0]
    assert (acceptance[[1, 3]] > 0.99).all()
    for new, old in zip(after, state, strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert (new[[1, 3]] != old[[1, 3]]).all()
        assert new.dtype == dtype


def test_the_energy_s_error_falls_with_the_square_of_the_step() -> None:
    start, momentum, errors = at(double(200, 2), quartic), double(200, 2), []
    for leapfrogs in (20, 40):
        end, last = leapfrog(start, momentum, quartic, step(1.0 / leapfrogs), leapfrogs)
        change = start.value - end.value + 0.5 * (last.square() - momentum.square()).sum(-1)
        errors.append(change.abs().median())
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.2)


def run(state: State, gradient: Callable, size: Tensor, leapfrogs: int, steps: int) -> tuple[State, Tensor]:
    shares = []
    for _ in range(steps):
        log_uniform = torch.rand_like(state.value).log()
        state, share = hamiltonian_step(state, gradient, size, leapfrogs, torch.randn_like(state.position), log_uniform)
        shares.append(share)
    return state, torch.stack(shares)


def test_the_target_stays_what_it_is() -> None:
    """40,000 exact draws, and a step so large that a third is rejected: each moment within 4.5 standard errors.

    Control: with every proposal accepted the variances are off by far more.
    """
    count = 40_000
    start = MultivariateNormal(MEAN, COVARIANCE).sample((count,))
    state, shares = run(at(start, gaussian), gaussian, step(1.1), 3, 8)
    assert 0.3 < shares.mean() < 0.85
    away = state.position - MEAN
    assert (away.mean(0).abs() < 4.5 * (COVARIANCE.diagonal() / count).sqrt()).all()
    products = (away.unsqueeze(-1) * away.unsqueeze(-2)).flatten(1)
    error = products.std(0) / math.sqrt(count)
    assert ((products.mean(0) - COVARIANCE.flatten()).abs() < 4.5 * error).all()
    always = at(start, gaussian)
    for _ in range(8):
        always = leapfrog(always, torch.randn_like(start), gaussian, step(1.1), 3)[0]
    assert (((always.position - MEAN).var(0) - COVARIANCE.diagonal()).abs() > 20 * error[[0, 3]]).any()


@pytest.mark.parametrize("guess", [0.3, 30.0])
@pytest.mark.parametrize("shape", [(), (3,), (200, 3)])
def test_adapt_reaches_the_acceptance(shape: tuple[int, ...], guess: float) -> None:
    """Three widths of a Gaussian in 5 dimensions: each its own step size, in proportion; in common the narrowest's."""
    widths = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)

    def wide(position: Tensor) -> tuple[Tensor, Tensor]:
        scaled = position / widths.unsqueeze(-1)
        return -0.5 * scaled.square().sum(-1), -scaled / widths.unsqueeze(-1)

    start = at(double(200, 3, 5) * widths.unsqueeze(-1), wide)
    generator = torch.Generator().manual_seed(1)
    before = torch.get_rng_state()
    found = adapt(start, wide, torch.full(shape, guess, dtype=torch.float64), 3, steps=150, generator=generator)
    assert torch.equal(before, torch.get_rng_state())
    assert found.shape == shape
    shares = run(start, wide, found, 3, 40)[1].mean(0)
    if shape == ():
        assert shares.mean().item() == pytest.approx(0.8, abs=0.05)
        return
    ratio = (found / widths).reshape(-1, 3).log().mean(0)
    torch.testing.assert_close(ratio, ratio[1].expand(3), rtol=0, atol=0.1)
    torch.testing.assert_close(shares.mean(0), torch.full_like(widths, 0.8), rtol=0, atol=0.06)


def some(name: str, features: int) -> FlowPosterior:
    posterior = getattr(flowpost, name)(features, 3).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return posterior


@pytest.mark.parametrize("features", [0, 4])
@pytest.mark.parametrize("name", ["full_covariance", "realnvp", "iaf"])
def test_the_noise_of_q_itself_is_normal(name: str, features: int) -> None:
    """With p = q the target is log N(e; 0, I), whose gradient is -e."""
    posterior = some(name, features)
    h = double(2, features) if features else None
    noise = double(7, *((2,) if features else ()), 3)
    value, slope = noise_target(posterior.at(h), lambda z: posterior.log_prob(z, h))(noise)
    torch.testing.assert_close(value, standard_normal_log_prob(noise))
    torch.testing.assert_close(slope, -noise, rtol=0, atol=1e-9)
    assert not value.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in posterior.parameters())


@pytest.mark.parametrize(
    "hook", [torch.nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)]
)
def test_weights_that_a_hook_makes_are_no_hindrance(hook: Callable[[nn.Module], object]) -> None:
    """Once such a layer was called its weight has a graph, and torch copies no such tensor."""
    posterior, h, noise = some("realnvp", 4), double(2, 4), double(7, 2, 3)
    for layer in [part for part in posterior.flow.modules() if isinstance(part, nn.Linear)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the older weight norm
            hook(layer)
    posterior(h).log_prob.sum().backward()
    value, slope = noise_target(posterior.at(h), lambda z: posterior.log_prob(z, h))(noise)
    torch.testing.assert_close(value, standard_normal_log_prob(noise))
    torch.testing.assert_close(slope, -noise, rtol=0, atol=1e-9)


def test_the_noise_of_another_p() -> None:
    """Value and gradient of log p(f(e)) + log|det df/de|, the log-det by autograd's Jacobian."""
    posterior = some("realnvp", 0)
    noise = double(4, 3)

    def due(e: Tensor) -> Tensor:
        jacobian = torch.func.jacrev(lambda e: posterior.flow(e)[0])(e)
        return -posterior.flow(e)[0].pow(4).sum() + torch.linalg.slogdet(jacobian)[1]

    value, slope = noise_target(posterior.at(), lambda z: -z.pow(4).sum(-1))(noise)
    torch.testing.assert_close(value, torch.stack([due(e) for e in noise]))
    torch.testing.assert_close(slope, torch.stack([torch.func.grad(due)(e) for e in noise]))


@pytest.mark.parametrize("rows", [(), (4,)])
def test_a_density_of_another_shape_is_refused(rows: tuple[int, ...]) -> None:
    """It would broadcast: one value for each draw to all examples, one in an axis of its own to a square."""
    q = flowpost.diagonal(3, dim=2).at(torch.randn(*rows, 3))
    for wrong in (lambda z: z.sum(-1, keepdim=True), lambda z: z.sum((-2, -1), keepdim=True)[..., 0], Tensor.sum):
        gradient = noise_target(q, wrong)
        with pytest.raises(ValueError, match="^log_density: expected a value for each z, "):
            gradient(torch.randn(5, *rows, 2))


def test_a_wrong_q_is_moved_to_p() -> None:
    """From 20,000 draws of N(0, 1) to N(0.5, 1.2^2), within 4.5 standard errors; q itself is 60 away."""
    posterior, count = FlowPosterior(0, Affine(1)).double(), 20_000
    q = posterior.at()
    gradient = noise_target(q, lambda z: -0.5 * ((z - 0.5) / 1.2).square().sum(-1))
    with torch.no_grad():
        start = q.draw((count,))
        state = run(at(start.noise, gradient), gradient, step(0.9), 2, 25)[0]
        z = q.rsample((count,), noise=state.position)
    assert (z.mean() - 0.5).abs() < 4.5 * 1.2 / math.sqrt(count)
    assert (z.var() - 1.44).abs() < 4.5 * 1.44 * math.sqrt(2 / count)
    assert (start.z.mean() - 0.5).abs() > 0.4


def test_nothing_is_read_on_the_host() -> None:
    """On the meta device there is nothing to read."""

    def flat(position: Tensor) -> tuple[Tensor, Tensor]:
        return position.sum(-1), torch.ones_like(position)

    start = at(torch.zeros(4, 2, device="meta"), flat)
    found = adapt(start, flat, torch.ones((), device="meta"), 2, steps=3)
    draws = (torch.zeros(4, 2, device="meta"), torch.zeros(4, device="meta"))
    state, acceptance = hamiltonian_step(start, flat, found, 2, *draws)
    assert state.position.shape == (4, 2)
    assert acceptance.is_meta


def test_bad_numbers_are_refused() -> None:
    start = at(double(4, 2), gaussian)
    with pytest.raises(ValueError, match="^leapfrogs: expected an int >= 1, got 0$"):
        leapfrog(start, start.position, gaussian, step(0.1), 0)
    with pytest.raises(ValueError, match="^steps: expected an int >= 1, got 0$"):
        adapt(start, gaussian, step(0.1), 1, steps=0)
    with pytest.raises(ValueError, match="^acceptance: expected a number between 0 and 1, got 1.0$"):
        adapt(start, gaussian, step(0.1), 1, acceptance=1.0)
