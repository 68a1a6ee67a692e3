"""The convex combination linear IAF against its formula, matrix by matrix."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor

import flowpost
from flowpost import ConvexCombination, UnitLowerTriangular


def matrix_by_the_book(numbers: Tensor, dim: int, count: int) -> Tensor:
    """``sum_k y_k L_k`` of one example, entry by entry, the weights' softmax included."""
    below = dim * (dim - 1) // 2
    powers = [math.exp(float(v)) for v in numbers[count * below :]]
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for k in range(count):
        weight, place = powers[k] / sum(powers), k * below
        for i in range(dim):
            total[i, i] += weight
            for j in range(i):
                total[i, j] += weight * float(numbers[place])
                place += 1
    return total


@pytest.mark.parametrize(("dim", "count"), [(2, 2), (4, 3), (5, 7)])
def test_it_is_the_paper_s(dim: int, count: int) -> None:
    step = ConvexCombination(dim, count)
    assert step.context_size == count * (dim * (dim - 1) // 2 + 1)
    z, context = torch.randn(50, 4, dim, dtype=torch.float64), torch.randn(4, step.context_size, dtype=torch.float64)
    image, log_det = step(z, context)
    back, _ = step.inverse(image, context)
    assert (log_det == 0).all()
    torch.testing.assert_close(back, z)
    for i in range(4):
        matrix = matrix_by_the_book(context[i], dim, count)
        torch.testing.assert_close(torch.diagonal(matrix), torch.ones(dim, dtype=torch.float64))
        torch.testing.assert_close(image[:, i], z[:, i] @ matrix.T, rtol=1e-12, atol=1e-12)


def test_one_matrix_is_the_triangular_step() -> None:
    one, lower = ConvexCombination(4, 1), UnitLowerTriangular(4)
    z, context = torch.randn(5, 4), torch.randn(5, 6)
    assert one.context_size == 6
    torch.testing.assert_close(one(z, context)[0], lower(z, context)[0])


def test_equal_matrices_need_no_weights() -> None:
    """A convex combination of one and the same matrix is that matrix, whatever the weights."""
    step, lower = ConvexCombination(3, 4).double(), UnitLowerTriangular(3)
    entries, logits = torch.randn(3, dtype=torch.float64), 5 * torch.randn(9, 4, dtype=torch.float64)
    context = torch.cat([entries.repeat(4).expand(9, -1), logits], -1)
    z = torch.randn(9, 3, dtype=torch.float64)
    torch.testing.assert_close(step(z, context)[0], lower(z, entries)[0])


def test_a_fresh_step_is_exactly_the_identity_and_its_matrices_can_part() -> None:
    step = ConvexCombination(3, 4)
    z, context = torch.randn(5, 3), step.initial_context().requires_grad_()
    image, _ = step(z, context)
    assert torch.equal(image, z)
    (gradient,) = torch.autograd.grad((image * torch.randn(5, 3)).sum(), context)
    rows = gradient[:12].view(4, 3)
    assert (rows != 0).all()
    assert len({round(float(row[0]), 6) for row in rows}) == 4


def test_the_recipe_is_a_gaussian_whose_covariance_is_the_combination_s() -> None:
    """``z = L (scale * noise) + loc``: mean loc, covariance L diag(scale^2) L^T."""
    posterior = flowpost.cc_lin_iaf(4, 3, combinations=2, rate=1 / 3).double()
    for parameter in posterior.parameters():
        torch.nn.init.normal_(parameter)
    h = torch.randn(6, 4, dtype=torch.float64)
    loc, tril = posterior.gaussian(h)
    context = cast(Tensor, posterior.context(h)).detach()
    for i in range(6):
        scale, mean = flowpost.functional.softplus_scale(context[i, :3]), context[i, -3:]
        entries = torch.cat([context[i, 3:9] / 3, context[i, 9:11]])
        matrix = matrix_by_the_book(entries, 3, 2)
        torch.testing.assert_close(loc[i], mean)
        torch.testing.assert_close(tril[i] @ tril[i].T, matrix @ torch.diag(scale**2) @ matrix.T)
    sample = posterior(h, (7,))
    normal = torch.distributions.MultivariateNormal(loc, scale_tril=tril)
    torch.testing.assert_close(sample.log_prob, normal.log_prob(sample.z), rtol=1e-9, atol=1e-9)
