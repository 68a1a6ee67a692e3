"""Densities integrate to one (B15): in one dimension for every scale of the weights, in two near the start."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from registry import BY_NAME, ENTRIES, Case, Entry, by_level, cases, draw
from scipy import integrate
from torch import Tensor

from flowpost import Bijector
from flowpost.bijectors.base import LINE
from flowpost.testing.cases import place

# Those that noise can go through; but a wide network's density costs a minute, and is a narrow one's.
NOISY = [entry for entry in ENTRIES if entry.make(1, 0).domain == LINE and entry.name != "autoregressive_wide"]
every = by_level(NOISY, pytest.mark.full)
# A deep sigmoid of two variables is two of one, and takes a search for each point; `learned_deep_sigmoid` is here.
of_two = by_level([entry for entry in NOISY if entry.name != "deep_sigmoid"], pytest.mark.full)


def density(step: Bijector, z: Tensor, context: Tensor | None) -> Tensor:
    """The density at z ``(n, dim)`` of the image of N(0, I), by the inverse."""
    noise, log_det = step.inverse(z, context)
    log_prob = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) + log_det
    return log_prob.exp().detach()


def mass_1d(step: Bijector, context: Tensor | None) -> float:
    """By adaptive Gauss-Legendre between the images of a grid of noise: a cell whose halves disagree with it is cut.

    In the deep run the grid is finer, for the halves of a cell of several of a spline's bins may agree with it by
    chance: with 601 points one of 500 inverse splines lost 0.3 % of its mass.
    """
    points = 2401 if "FLOWPOST_DEEP" in os.environ else 601
    with torch.no_grad():
        knots = step(torch.linspace(-9, 9, points, dtype=torch.float64).unsqueeze(-1), context)[0].squeeze(-1)
    knots = torch.where(knots[0] < knots[-1], knots, knots.flip(0))  # a reflection turns them
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(8))

    def masses(ends: Tensor) -> Tensor:
        half = ends.diff(dim=-1) / 2
        points = ends[..., :1] + half * (1 + nodes)
        return (density(step, points.reshape(-1, 1), context).view(points.shape) * weights * half).sum(-1)

    cells, total = torch.stack([knots[:-1], knots[1:]], -1), 0.0
    for _ in range(30):
        if not len(cells):
            break
        halves = torch.stack([cells[:, 0], cells.mean(-1), cells[:, 1]], -1).unfold(-1, 2, 1)
        finer = masses(halves).sum(-1)
        rough = (finer - masses(cells)).abs() > 1e-8
        total += finer[~rough].sum().item()
        cells = halves[rough].flatten(0, 1)
    return total + masses(cells).sum().item()


@every
@given(case=cases(dim=1))
def test_one_dimension_at_every_scale(entry: Entry, case: Case) -> None:
    step, _, context = draw(entry, case, batch=())
    assert mass_1d(step, context) == pytest.approx(1, abs=1e-3)


@by_level([entry for entry in ENTRIES if entry.identity], pytest.mark.full)
def test_one_dimension_by_adaptive_quadrature(entry: Entry) -> None:
    """Over the whole line, which knows nothing of where the flow puts its mass."""
    step, _, context = draw(entry, Case(dim=1, push=0.3, context=0.3), batch=())
    points = [-10.0, -1.0, 0.0, 1.0, 10.0]

    def value(z: float) -> float:
        return density(step, torch.tensor([[z]], dtype=torch.float64), context).item()

    inner = integrate.quad(value, -30, 30, points=points, epsabs=1e-5, limit=200)[0]
    assert inner == pytest.approx(1, abs=1e-3)


def mass_2d(step: Bijector, context: Tensor | None, size: int = 301) -> float:
    """On a grid of `size` points squared, even in asinh; in the logarithm near the ends of an interval."""
    t = torch.linspace(-6, 6, size, dtype=torch.float64, requires_grad=True)
    z = t.sinh() if step.codomain == LINE else place(1.9 * t, step.codomain)
    (slope,) = torch.autograd.grad(z.sum(), t)
    z, slope = z.detach(), slope * (t[1] - t[0]).detach()
    points = torch.cartesian_prod(z, z)
    return (density(step, points, context) * torch.outer(slope, slope).flatten()).sum().item()


def test_one_dimension_where_a_density_is_steep() -> None:
    """A spike a hundredth of the noise wide: on fixed cells the quadrature was short by 1e-3, the flow by nothing."""
    step, _, context = draw(BY_NAME["planar_flow"], Case(dim=1, seed=147, push=0.0, context=3.0), batch=())
    assert mass_1d(step, context) == pytest.approx(1, abs=1e-6)


@of_two
@pytest.mark.parametrize(
    ("push", "seed"), [(0.3, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in ((0.0, 0), (0.3, 2)))]
)
def test_two_dimensions_near_the_start(entry: Entry, push: float, seed: int) -> None:
    step, _, context = draw(entry, Case(dim=2, seed=seed, push=push, context=0.3), batch=())
    mass = mass_2d(step, context)
    if abs(mass - 1) > 1e-2:  # steeper than the grid, or wrong: a finer one tells
        mass = mass_2d(step, context, size=901)
    assert mass == pytest.approx(1, abs=1e-2)


def test_a_wrong_log_det_is_noticed() -> None:
    """The negative control: a tenth of a nat, constant, is a mass of 1.1."""
    step, _, context = draw(ENTRIES[4], Case(dim=1), batch=())

    class Wrong(torch.nn.Module):
        def inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            noise, log_det = step.inverse(z, context)
            return noise, log_det + 0.1

        def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            return step(z, context)

    assert mass_1d(Wrong(), context) == pytest.approx(math.exp(0.1), abs=1e-3)  # pyright: ignore[reportArgumentType]
