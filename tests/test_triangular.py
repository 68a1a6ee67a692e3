"""The unit lower-triangular step: which entry is which, and that it is a matrix product."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flowpost
from flowpost import UnitLowerTriangular
from flowpost.numerics.rates import RatedNumbers


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
    third = UnitLowerTriangular(4, 1 / 3)
    third.load_state_dict({key: value.half() for key, value in UnitLowerTriangular(4, 1 / 3).state_dict().items()})
    assert third.rate == 1 / 3
    with pytest.raises(RuntimeError, match="constant_rate"):
        step.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="constant_rate"):
        plain.load_state_dict(step.state_dict())


def test_a_rate_is_a_positive_number() -> None:
    with pytest.raises(ValueError, match=r"^rate: expected a positive finite number, got 0$"):
        UnitLowerTriangular(3, 0)


@pytest.mark.parametrize("recipe", [flowpost.full_covariance, flowpost.cc_lin_iaf])
@pytest.mark.parametrize("rate", [0.3, 0.502, 0.4981])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_is_taken_over_to_the_last_bit(
    recipe: Callable[..., flowpost.FlowPosterior], rate: float, dtype: torch.dtype
) -> None:
    """Also one that is close to the own, and one that went through half precision: a state names it as it is used."""
    h, noise = torch.randn(5, 3, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    one = recipe(3, 4, rate=rate).to(dtype)
    for source in (one, copy.deepcopy(one).half().to(dtype), copy.deepcopy(one).bfloat16().to(dtype)):
        other = recipe(3, 4, rate=0.5).to(dtype)
        other.load_state_dict(source.state_dict())
        torch.testing.assert_close(other(h, noise=noise).z, source(h, noise=noise).z, rtol=0, atol=0)
    rounded = {key: value.bfloat16() for key, value in one.state_dict().items()}
    same = recipe(3, 4, rate=rate).to(dtype)
    same.load_state_dict(rounded)
    assert {part.rate for part in same.modules() if isinstance(part, RatedNumbers)} == {rate}


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: UnitLowerTriangular(3, 0.3), "constant_rate"),
        (lambda: flowpost.ConvexCombination(3, 2, 0.3), "constant_rate"),
        (lambda: flowpost.Autoregressive(3, hidden=(4,), gain=1.5), "step.constant_gain"),
        (lambda: flowpost.Masked(flowpost.Affine(3), hidden=(4,), rate=0.3), "net.output_rate"),
    ],
)
def test_a_state_s_rate_that_cannot_be_is_refused(make: Callable[[], nn.Module], name: str, value: float) -> None:
    """The difference of two states has a rate of 0, with which every number is lost."""
    step = make()
    before, state = repr(step), {**step.state_dict(), name: torch.tensor(value)}
    with pytest.raises(RuntimeError, match=rf"{name}: expected a positive finite number, got {value}"):
        step.load_state_dict(state)
    assert repr(step) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: flowpost.full_covariance(3, 4),
        lambda: flowpost.cc_lin_iaf(3, 4),
        lambda: flowpost.iaf(3, 4, steps=1, hidden=(4,)),
        lambda: flowpost.maf(3, 4, steps=1, hidden=(4,)),
    ],
)
def test_a_module_that_was_emptied_still_saves_its_numbers(make: Callable[[], flowpost.FlowPosterior]) -> None:
    """Its parameters set one by one: what lies in a buffer after `to_empty` is nobody's rate."""
    source = make()
    with torch.device("meta"):
        emptied = make()
    emptied = emptied.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in emptied.buffers():
            buffer.fill_(0.77)
        for own, other in zip(emptied.parameters(), source.parameters(), strict=True):
            own.copy_(other)
    emptied.load_state_dict({key: value for key, value in source.state_dict().items() if "order" in key}, strict=False)
    into = make()
    into.load_state_dict(emptied.state_dict())
    h, noise = torch.randn(5, 3), torch.randn(5, 4)
    assert torch.equal(into(h, noise=noise).z, source(h, noise=noise).z)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, dim=-1)


@pytest.mark.parametrize("dim", [1, 2, 20])
def test_full_covariance_has_a_rate_that_falls_with_dim(dim: int) -> None:
    def rate(posterior: flowpost.FlowPosterior) -> float:
        (step,) = (part for part in posterior.modules() if isinstance(part, UnitLowerTriangular))
        assert ("rate=" in repr(posterior)) == (step.rate != 1)
        return step.rate

    wrapped = flowpost.wrap(Pair(), dim, example=torch.zeros(1, 2 * dim), flow="full_covariance")
    assert rate(wrapped.posterior) == min(1, 256 / (2 * dim * dim))
    assert rate(flowpost.full_covariance(500, dim)) == min(1, 256 / (500 * dim))
    for features in (0, 3):  # there is no sum over many features that would move it fast
        assert rate(flowpost.full_covariance(features, dim)) == 1
    assert rate(flowpost.full_covariance(3, dim, rate=0.5)) == 0.5
