"""Products with packed unit lower-triangular matrices, beside the matrix written out."""

import pytest
import torch
from torch import Tensor

from flowpost import UnitLowerTriangular
from flowpost.numerics import triangles as lower
from flowpost.numerics.triangles import multiply


def naive(z: Tensor, entries: Tensor) -> Tensor:
    """Row by row, one number after the other."""
    below = iter(entries.unbind(-1))
    rows = []
    for i in range(z.shape[-1]):
        rows.append(z[..., i] + sum(next(below) * z[..., j] for j in range(i)))
    return torch.stack(torch.broadcast_tensors(*rows), -1)


BATCHES = [((4,), (4,)), ((1,), (4,)), ((), (4,)), ((), ()), ((3, 1), (2, 3, 4)), ((5, 4), (4,)), ((5,), ())]


@pytest.mark.parametrize(("z_batch", "batch"), BATCHES)
@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_product_and_its_gradients(dim: int, z_batch: tuple[int, ...], batch: tuple[int, ...]) -> None:
    """For one point an example, where no matrix is assembled, and for several."""
    z = torch.randn(*z_batch, dim, dtype=torch.float64, requires_grad=True)
    entries = torch.randn(*batch, dim * (dim - 1) // 2, dtype=torch.float64, requires_grad=True)
    found, expected = multiply(z, entries), naive(z, entries)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-13, atol=1e-13)
    outputs = (found, expected.expand_as(found))
    gradients = [torch.autograd.grad(y.sin().sum(), (z, entries), materialize_grads=True) for y in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_second_derivatives() -> None:
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    entries = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(multiply, (z, entries))


def test_one_point_an_example_assembles_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a matrix was assembled")

    monkeypatch.setattr(lower, "strict_tril", refuse)
    step, context = UnitLowerTriangular(4), torch.randn(5, 6, requires_grad=True)
    step(torch.randn(5, 4), context)[0].sum().backward()
    with pytest.raises(AssertionError, match="assembled"):
        step(torch.randn(2, 5, 4), context)


def test_what_is_not_finite_warns_nobody_and_stays_in_its_row() -> None:
    z = torch.tensor([[1.0, 1.0, 1.0], [torch.inf, 1.0, 1.0]])
    entries = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 1.0]])
    found = multiply(z, entries)
    assert found[0].tolist() == [1.0, 2.0, 6.0]
    assert not found[1].isfinite().all()
