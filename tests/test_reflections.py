"""Householder reflections and their products, against explicit matrices."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowpost.numerics.reflections import Reflected, orthonormal, pivoted, reflect

SIZES = [(1, 1, 1), (2, 2, 2), (3, 5, 2), (5, 3, 3), (8, 16, 16), (4, 16, 4)]
"""Reflections, dim, rank."""


def matrix(v: Tensor) -> Tensor:
    """``H_1 ... H_K``, one after the other."""
    product = torch.eye(v.shape[-1], dtype=v.dtype)
    for row in v:
        product = product @ (torch.eye(len(row), dtype=v.dtype) - 2 * torch.outer(row, row) / (row @ row))
    return product


@pytest.mark.parametrize(("count", "dim", "rank"), SIZES)
def test_the_columns_are_those_of_the_product(count: int, dim: int, rank: int) -> None:
    v = torch.randn(6, count, dim, dtype=torch.float64)
    found = orthonormal(v, rank)
    for q, rows in zip(found, v, strict=True):
        torch.testing.assert_close(q, matrix(rows)[:, :rank], rtol=0, atol=1e-13)
    points = torch.randn(6, dim, dtype=torch.float64)
    for z, row, image in zip(points, v[:, 0], reflect(points, v[:, 0]), strict=True):
        torch.testing.assert_close(image, matrix(row.unsqueeze(0)) @ z, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("count", "dim", "rank"), [*SIZES, (70, 40, 33)])
def test_vectors_are_turned_as_by_the_columns(count: int, dim: int, rank: int) -> None:
    """In several runs, too; both ways, with their gradients at the vectors."""
    v = torch.randn(6, count, dim, dtype=torch.float64, requires_grad=True)
    z, y = (torch.randn(6, size, dtype=torch.float64) for size in (dim, rank))
    q, columns = Reflected.of(v, rank), orthonormal(v, rank)
    pairs = [
        (q.along(z), (columns.mT @ z.unsqueeze(-1)).squeeze(-1)),
        (q.out_of(y), (columns @ y.unsqueeze(-1)).squeeze(-1)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sin().sum(), v, retain_graph=True)[0] for x in (found, expected))
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-20, 1.0, 1e4, 1e30])
def test_they_are_orthonormal_whatever_the_numbers(scale: float, dtype: torch.dtype) -> None:
    """Random ones, all the same one, and all nearly the same one; with finite gradients."""
    v = torch.randn(3, 16, 20, dtype=dtype)
    v[1], v[2] = v[1, :1], v[2, :1] + 1e-4 * v[2]
    v = (scale * v).requires_grad_()
    q = orthonormal(v, 12)
    unit = torch.eye(12, dtype=dtype).expand(3, 12, 12)
    torch.testing.assert_close(q.mT @ q, unit, rtol=0, atol=64 * torch.finfo(dtype).eps)
    z = torch.randn(3, 20, dtype=dtype)
    image = reflect(z, v[:, 0])
    torch.testing.assert_close(image.norm(dim=-1), z.norm(dim=-1), rtol=8 * torch.finfo(dtype).eps, atol=0)
    (gradient,) = torch.autograd.grad((q * torch.randn_like(q)).sum() + image.sin().sum(), v)
    assert gradient.isfinite().all()


def test_a_vector_of_zeros_reflects_along_the_first_axis() -> None:
    image = reflect(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    assert torch.equal(image, torch.tensor([-1.0, 2.0, 3.0]))


def test_the_length_does_not_matter() -> None:
    v = torch.randn(3, 4, 5, dtype=torch.float64)
    lengths = torch.tensor([1e-3, 1.0, -7.0, 1e5], dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(orthonormal(lengths * v, 3), orthonormal(v, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", [lambda v: orthonormal(v, 2), lambda v: reflect(v[:, 0], v[:, 1])])
def test_derivatives(function: Callable[[Tensor], Tensor]) -> None:
    v = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, v)
    assert torch.autograd.gradgradcheck(function, v)


def test_pivots() -> None:
    numbers = torch.arange(2.0, 14.0).view(4, 3)
    expected = [[1, 2, 3, 4], [5, 1, 6, 7], [8, 9, 1, 10], [11, 12, 13, 1]]
    assert pivoted(numbers).tolist() == expected
    assert pivoted(numbers[:, :1]).tolist() == [[1, 2], [5, 1], [1, 8], [11, 1]]
    assert pivoted(torch.zeros(2, 0)).tolist() == [[1], [1]]


def test_pivots_of_variance_one_over_dim_are_nearly_uniform() -> None:
    """The mean square of each entry of the first column is 1 / dim, to a tenth, and to a half in the pivot's own."""
    dim = 32
    v = pivoted(torch.randn(4000, 1, dim - 1) / math.sqrt(dim))
    square = orthonormal(v, 1).square().mean(0).squeeze(-1)
    assert 0.5 < square[0] * dim < 1.5
    assert (square[1:] * dim - 1).abs().max() < 0.1
