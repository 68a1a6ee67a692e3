"""The unit lower-triangular step: which entry is which, and that it is a matrix product."""

import pytest
import torch
from torch import Tensor, nn

import flowpost
from flowpost import UnitLowerTriangular


def test_unit_lower_triangular_fills_row_by_row() -> None:
    entries = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    image, log_det = UnitLowerTriangular(3)(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), entries)
    assert image.tolist() == [1.0, 2.0 + 10.0, 3.0 + 50.0 + 100.0]  # a transpose would give 1 + 20 + 300, ...
    assert log_det == 0


def test_unit_lower_triangular_is_a_matrix_product() -> None:
    dim = 7
    z, entries = torch.randn(5, dim, dtype=torch.float64), torch.randn(5, dim * (dim - 1) // 2, dtype=torch.float64)
    matrix = torch.eye(dim, dtype=torch.float64).repeat(5, 1, 1)
    index = 0
    for row in range(dim):
        for column in range(row):
            matrix[:, row, column] = entries[:, index]
            index += 1
    image, _ = UnitLowerTriangular(dim)(z, entries)
    torch.testing.assert_close(image, (matrix @ z.unsqueeze(-1)).squeeze(-1))
    back, _ = UnitLowerTriangular(dim).inverse(image, entries)
    torch.testing.assert_close(back, z)


@pytest.mark.parametrize("samples", [(), (2,)], ids=str)
def test_a_rate_multiplies_the_entries(samples: tuple[int, ...]) -> None:
    """Where the matrix is assembled and where it is not; in both directions, and in the Gaussian that it makes."""
    step, plain = UnitLowerTriangular(4, 0.25), UnitLowerTriangular(4)
    z, entries = torch.randn(*samples, 5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(step(z, entries)[0], plain(z, entries / 4)[0])
    torch.testing.assert_close(step.inverse(z, entries)[0], plain.inverse(z, entries / 4)[0])
    for found, wanted in zip(
        step._push_gaussian(z, None, entries), plain._push_gaussian(z, None, entries / 4), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_a_state_tells_its_rate() -> None:
    """That of another rate is taken over; that of no rate is refused, since it would be another map."""
    z, entries = torch.randn(5, 4), torch.randn(5, 6)
    step, other, plain = UnitLowerTriangular(4, 0.25), UnitLowerTriangular(4, 0.5), UnitLowerTriangular(4)
    step.load_state_dict(other.state_dict())
    assert torch.equal(step(z, entries)[0], other(z, entries)[0])
    other.load_state_dict({key: value.half() for key, value in UnitLowerTriangular(4, 0.501).state_dict().items()})
    assert other.rate == 0.5
    with pytest.raises(RuntimeError, match="constant_rate"):
        step.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="constant_rate"):
        plain.load_state_dict(step.state_dict())


def test_a_rate_is_a_positive_number() -> None:
    with pytest.raises(ValueError, match=r"^rate: expected a positive finite number, got 0$"):
        UnitLowerTriangular(3, 0)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, dim=-1)


@pytest.mark.parametrize("dim", [1, 2, 9])
def test_full_covariance_has_a_rate_that_falls_with_dim(dim: int) -> None:
    def rate(posterior: flowpost.FlowPosterior) -> float:
        (step,) = (part for part in posterior.modules() if isinstance(part, UnitLowerTriangular))
        assert ("rate=" in repr(posterior)) == (step.rate != 1)
        return step.rate

    wrapped = flowpost.wrap(Pair(), dim, example=torch.zeros(1, 2 * dim), flow="full_covariance")
    for posterior in (flowpost.full_covariance(3, dim), wrapped.posterior):
        assert rate(posterior) == 1 / dim
    assert rate(flowpost.full_covariance(0, dim)) == 1  # there is no sum over features that would move it fast
    assert rate(flowpost.full_covariance(3, dim, rate=0.5)) == 0.5
