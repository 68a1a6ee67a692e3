"""The LU-parametrized linear map against the product of its matrices, written out."""

import math

import pytest
import torch
from torch import Tensor

from flowpost import LULinear


def matrix_by_the_book(numbers: Tensor, dim: int, order: list[int]) -> Tensor:
    """Kingma & Dhariwal (2018), eq. 12: ``W = P L (U + diag(s))``, entry by entry."""
    half = dim * (dim - 1) // 2
    lower, upper = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    place = 0
    for i in range(dim):
        for j in range(i):
            lower[i, j], upper[j, i] = numbers[place], numbers[half + place]
            place += 1
        raw = float(numbers[2 * half + i])
        upper[i, i] = math.log1p(math.exp(raw) * math.expm1(1 - 1e-3)) + 1e-3
    permutation = torch.zeros(dim, dim, dtype=torch.float64)
    for i, source in enumerate(order):
        permutation[i, source] = 1
    return permutation @ lower @ upper


@pytest.mark.parametrize(("dim", "order"), [(1, None), (2, [1, 0]), (5, None), (5, [3, 1, 4, 0, 2])])
def test_it_is_the_paper_s(dim: int, order: list[int] | None) -> None:
    step = LULinear(dim, order)
    z, context = torch.randn(50, 4, dim, dtype=torch.float64), torch.randn(4, step.context_size, dtype=torch.float64)
    image, log_det = step(z, context)
    back, log_det_back = step.inverse(image, context)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    assert torch.equal(log_det_back, -log_det)
    for i in range(4):
        matrix = matrix_by_the_book(context[i], dim, order or [*range(dim)])
        torch.testing.assert_close(image[:, i], z[:, i] @ matrix.T + context[i, -dim:], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_det[0, i], torch.linalg.slogdet(matrix)[1])


def test_at_the_zero_context_it_is_its_permutation() -> None:
    z = torch.randn(5, 3)
    for order in (None, [2, 0, 1]):
        step = LULinear(3, order)
        image, log_det = step(z, step.initial_context())
        torch.testing.assert_close(image, z if order is None else z[:, order])
        torch.testing.assert_close(log_det, torch.zeros(5))
    assert set(LULinear(3, [2, 0, 1]).state_dict()) == {"order", "back"}


def test_the_diagonal_has_a_floor() -> None:
    """Far below zero the log-det is dim log 1e-3, and the gradient of the numbers stays finite."""
    context = torch.cat([torch.zeros(6), torch.full((3,), -1e4), torch.zeros(3)]).requires_grad_()
    image, log_det = LULinear(3)(torch.ones(3), context)
    assert log_det.item() == pytest.approx(3 * math.log(1e-3), rel=1e-6)
    assert image.tolist() == pytest.approx([1e-3] * 3, rel=1e-6)
    assert torch.autograd.grad(image.sum() + log_det, context)[0].isfinite().all()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_are_finite_where_the_scale_is_flat(direction: str) -> None:
    """In float32 that of a scale overflows in a solve near the end of the range; there the context moves no scale."""
    step = LULinear(4)
    generator = torch.Generator().manual_seed(1_000_003 * 2 + 2)
    context = 1e4 * torch.randn(8, step.context_size, generator=generator)
    context[:, -8:-4] = -1e4
    z = torch.full((8, 4), 1e6)
    given = context.requires_grad_()
    image, log_det = step(z, given) if direction == "forward" else step.inverse(z, given)
    (slope,) = torch.autograd.grad(image.sum() + log_det.sum(), given)
    rows = image.isfinite().all(-1)
    assert rows.any()
    assert (slope[rows, -8:-4] == 0).all()
