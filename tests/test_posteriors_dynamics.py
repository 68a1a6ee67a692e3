"""The posteriors that integrate an equation: the paths, their gradients by hand, draws far away."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from benchmarks.posteriors.collection import posterior
from benchmarks.posteriors.models import dynamics, elimination, orbits
from benchmarks.posteriors.models.elimination import concentrations, lengths, plain_path
from benchmarks.posteriors.models.orbits import KICKS, plain_walk

MODULES = {"orbits": orbits, "elimination": elimination}
THETA = torch.tensor([[0.55, 0.028, 0.8, 0.024], [0.7, 0.03, 0.6, 0.02]], dtype=torch.float64)
START = torch.tensor([[34.0, 6.0], [20.0, 9.0]], dtype=torch.float64).log()


def shifts(count: int) -> Tensor:
    """Of so many draws through one year, those of kicks of very unlike lengths."""
    return torch.linspace(-2.5, -1.0, len(KICKS) * count, dtype=torch.float64).reshape(-1, count).requires_grad_()


def drug(most: list[float], half: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `concentrations` takes, of an inflow that dies out."""
    steps = torch.tensor(lengths(20, 0.5), dtype=torch.float64)
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    grid = torch.stack([ends[:-1], ends[:-1] + 0.5 * steps], 1).flatten()
    inflow = 11 * torch.exp(-0.75 * torch.cat([grid, ends[-1:]]))
    rows = [torch.tensor(each, dtype=torch.float64).requires_grad_() for each in (most, half)]
    return inflow.unsqueeze(-1).expand(-1, len(most)), rows[0], rows[1], steps


def test_populations_are_those_of_an_adaptive_solver() -> None:
    found = dynamics.populations(THETA, START, 20)
    for theta, start, path in zip(THETA.tolist(), START.numpy(), found.numpy(), strict=True):
        a, b, d, c = theta

        def slope(_: float, y: np.ndarray, a: float = a, b: float = b, c: float = c, d: float = d) -> list[float]:
            return [a - b * math.exp(y[1]), c * math.exp(y[0]) - d]

        exact = solve_ivp(slope, (0, 20), start, method="DOP853", rtol=1e-12, atol=1e-12, t_eval=np.arange(21)).y.T
        np.testing.assert_allclose(path, exact, atol=2e-6)


def test_concentrations_are_those_of_an_adaptive_solver() -> None:
    most, half = [0.45, 0.6], [2.0, 0.9]
    found = concentrations(*drug(most, half)).T.detach().numpy()
    for m, k, path in zip(most, half, found, strict=True):

        def slope(t: float, c: np.ndarray, m: float = m, k: float = k) -> np.ndarray:
            return 11 * math.exp(-0.75 * t) - m * c / (k + c)

        exact = solve_ivp(slope, (0, 10), [0.0], rtol=1e-11, atol=1e-12, t_eval=np.arange(1, 21) / 2).y[0]
        np.testing.assert_allclose(path, exact, rtol=2e-6)


@pytest.mark.parametrize("operations", [np, torch], ids=["numpy", "torch"])
def test_passes_by_hand_are_the_plain_ones(operations: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, with numpy's loops and with those that another device takes."""
    if operations is torch:
        for module in MODULES.values():
            monkeypatch.setattr(module, "operations", lambda like: torch)
            monkeypatch.setattr(module, "raw", Tensor.detach)
    given = shifts(3), torch.tensor([[0.1, -0.3, 0.2], [-0.5, 0.4, 0.0]], dtype=torch.float64).requires_grad_()
    agree(orbits._Walk.apply(*given), plain_walk(*given), given)
    inflow, most, half, steps = drug([0.45, 0.6, 5.0], [2.0, 0.001, 0.3])
    rows = (torch.stack([(inflow - most)[:-1:2]] * 4, 1) * steps[:, None, None]).detach().requires_grad_()
    products = (steps[:, None] * most * half).detach().requires_grad_()
    agree(elimination._Path.apply(rows, products, half), plain_path(rows, products, half), (rows, products, half))


def agree(found: object, expected: Tensor, given: tuple[Tensor, ...]) -> None:
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    pairs = (torch.autograd.grad(each, given, weights) for each in (found, expected))
    for own, other in zip(*pairs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["one_comp_mm_elim_abs", pytest.param("lotka_volterra", marks=pytest.mark.full)])
def test_second_derivatives_are_those_of_torch_func(name: str) -> None:
    one = posterior(name)
    point = one.free(one.reference[:1])
    hessian = torch.autograd.functional.hessian(lambda free: one.log_density(free).sum(), point)
    assert isinstance(hessian, Tensor)
    rows = torch.func.jacrev(torch.func.grad(lambda free: one.log_density(free[None]).sum()))(point[0])
    torch.testing.assert_close(hessian[0, :, 0], rows, rtol=1e-8, atol=1e-8)
    shift = 1e-4 * torch.eye(one.dim, dtype=torch.float64)
    both = torch.cat([point + shift, point - shift]).requires_grad_()
    (gradients,) = torch.autograd.grad(one.log_density(both).sum(), both)
    difference = (gradients[: one.dim] - gradients[one.dim :]) / 2e-4
    torch.testing.assert_close(hessian[0, :, 0], difference, rtol=1e-4, atol=1e-3)


def test_an_overshot_drug_stays_at_0_without_a_gradient() -> None:
    """An elimination far too fast for the steps: that draw alone, and no number of the batch is not finite."""
    inflow, most, half, steps = drug([0.45, 60.0], [2.0, 1e-3])
    found = concentrations(inflow, most, half, steps)
    assert found.isfinite().all()
    assert (found >= 0).all()
    of_most, of_half = torch.autograd.grad(found.sum(), (most, half))
    assert of_most[1] == of_half[1] == 0
    assert of_most[0] < 0 < of_half[0]


@pytest.mark.parametrize("name", ["lotka_volterra", "one_comp_mm_elim_abs", "arma11", "gp_pois_regr", "gp_regr"])
def test_draws_of_a_standard_normal_have_a_density(name: str) -> None:
    """Where a fit may begin: finite density and gradient in the free coordinates."""
    one = posterior(name)
    points = torch.randn(500, one.dim, dtype=torch.float64).requires_grad_()
    values = one.log_density(points)
    (gradients,) = torch.autograd.grad(values.sum(), points)
    assert values.isfinite().all()
    assert gradients.isfinite().all()
