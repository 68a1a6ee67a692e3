"""Whoever alters a step after it was made, by an attribute, a part or a subclass, gets one map, the same everywhere."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Conditioned,
    Coupling,
    FlowDistribution,
    FlowPosterior,
    Gate,
    Inverse,
    Masked,
    Permute,
    Planar,
    Radial,
    Reverse,
    Scale,
    Softplus,
    Spline,
    Tanh,
    UnitLowerTriangular,
    checking,
)


def altered(step: Bijector, name: str, value: object) -> Bijector:
    setattr(step, name, value)
    return step


@pytest.mark.parametrize(
    ("found", "made"),
    [
        (altered(Spline(2, bins=4), "bound", 5), Spline(2, bins=4, bound=5.0)),
        (altered(Spline(2, bins=4, bound=1.0), "bound", 3.0), Spline(2, bins=4)),
        (altered(Gate(2), "forget_bias", -1), Gate(2, -1.0)),
        (altered(Gate(2), "gain", 1.5), Gate(2, gain=1.5)),
    ],
    ids=["a wider spline", "from a narrow spline", "a gate's bias", "a gate's gain"],
)
def test_an_attribute_that_is_set_is_as_if_the_step_had_been_made_with_it(found: Bijector, made: Bijector) -> None:
    z, context = 3 * torch.randn(50, 2), torch.randn(50, made.context_size)
    torch.testing.assert_close(found(z, context), made(z, context), rtol=0, atol=0)
    torch.testing.assert_close(found.inverse(z, context), made.inverse(z, context), rtol=0, atol=0)


def test_a_gate_that_is_altered_within_an_autoregressive_step_is_undone_as_it_was_done() -> None:
    step = Autoregressive(3, hidden=(5,))
    assert isinstance(step.step, Gate)
    step.step.forget_bias = -1.0
    z = torch.randn(20, 3)
    image, log_det = step(z)
    assert log_det[0].item() == pytest.approx(-3 * torch.tensor(1.0).exp().log1p().item())
    torch.testing.assert_close(step.inverse(image), (z, -log_det), rtol=1e-5, atol=1e-5)


def test_a_spline_that_is_altered_within_a_masked_step_is_undone_as_it_was_done() -> None:
    step = Masked(Spline(3), hidden=(5,)).double()
    for parameter in step.parameters():
        torch.nn.init.normal_(parameter)
    assert isinstance(step.step, Spline)
    step.step.bound = 1.0
    z = torch.randn(20, 3, dtype=torch.float64)
    image, log_det = step(z)
    torch.testing.assert_close(step.inverse(image), (z, -log_det), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("step", "name", "value", "error"),
    [
        (Spline(2), "bound", 0.0, ValueError),
        (Spline(2), "bound", float("nan"), ValueError),
        (Gate(2), "forget_bias", "2", TypeError),
    ],
)
def test_a_bad_value_is_refused_and_changes_nothing(
    step: Bijector, name: str, value: object, error: type[Exception]
) -> None:
    before = getattr(step, name)
    with pytest.raises(error, match=rf"{name}: expected a .*number, got"):
        setattr(step, name, value)
    assert getattr(step, name) == before


class Wide(Planar):
    """Reads its numbers in a way of its own."""

    def _numbers(self, context: Tensor | None) -> tuple[Tensor, ...]:
        u, w, b = super()._numbers(context)
        return 2 * u, w, b


class Far(Radial):
    """Reads its numbers in a way of its own."""

    def _numbers(self, context: Tensor | None) -> tuple[Tensor, ...]:
        center, alpha, beta = super()._numbers(context)
        return 2 * center, alpha, beta


@pytest.mark.parametrize(
    "steps",
    [(Planar(3), Wide(3)), (Wide(3), Planar(3)), (Radial(3), Far(3)), (Far(3), Radial(3))],
    ids=["Wide last", "Wide first", "Far last", "Far first"],
)
def test_a_step_that_reads_its_numbers_in_a_way_of_its_own_does_so_beside_others(
    steps: tuple[Bijector, Bijector],
) -> None:
    chain = Chain(*steps)
    z, context = torch.randn(20, 3), torch.randn(20, chain.context_size)
    first, second = context.chunk(2, -1)
    expected = steps[1](steps[0](z, first)[0], second)[0]
    torch.testing.assert_close(chain(z, context)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chain.inverse(expected, context)[0], z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "wrap", [lambda flow: flow, lambda flow: Conditioned(flow, 4), lambda flow: Chain(flow, Affine(2))]
)
def test_a_posterior_is_gaussian_while_all_its_steps_are(wrap: Callable[[Bijector], Bijector]) -> None:
    chain = Chain(UnitLowerTriangular(2), Affine(2))
    posterior = FlowPosterior(5, wrap(chain))
    q = posterior.at(torch.randn(3, 5))
    assert posterior.is_gaussian
    assert q.entropy().isfinite().all()
    chain.steps.append(Tanh(2))
    assert not posterior.is_gaussian
    for ask in (q.entropy, lambda: q.mean, lambda: q.variance):
        with pytest.raises(NotImplementedError, match="only a Gaussian has"):
            ask()
    chain.steps[2] = Scale(2, 3.0)
    assert q.is_gaussian
    sample = q.draw((2,))
    torch.testing.assert_close(sample.log_prob, torch.distributions.MultivariateNormal(*_moments(q)).log_prob(sample.z))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda flow: flow,
        lambda flow: Conditioned(flow, 4),
        lambda flow: Inverse(Inverse(flow)),
        lambda flow: Chain(flow),
    ],
)
def test_z_lies_where_the_last_step_that_there_is_puts_it(wrap: Callable[[Bijector], Bijector]) -> None:
    """The support was that of the step of before, and values were refused that the new one gives."""
    chain, z = Chain(Affine(2), Tanh(2)), torch.full((3, 2), 3.0)
    posterior = FlowPosterior(5, wrap(chain))
    q = posterior.at(torch.randn(3, 5), validate_args=True)
    assert not q.support.check(z).any()
    chain.steps[1] = Reverse(2)
    assert q.support.check(z).all()
    with checking():
        assert q.log_prob(z).isfinite().all()
    chain.steps.append(Softplus(2))
    assert q.support.check(z).all()
    assert not q.support.check(-z).any()
    assert Inverse(posterior.flow).domain == posterior.flow.codomain == (0.0, math.inf)
    with pytest.raises(ValueError, match="within the support"):
        q.log_prob(-z)


def _moments(q: FlowDistribution) -> tuple[Tensor, None, None, Tensor]:
    loc, scale_tril = q.gaussian()
    return loc, None, None, scale_tril


def test_a_step_that_reads_more_than_the_one_it_replaces_is_refused() -> None:
    chain, fixed = Chain(Affine(2), Planar(2)), Chain(Scale(2, 2.0), Reverse(2))
    chain.steps[0], fixed.steps[0] = Spline(2, bins=2), Affine(2)
    with pytest.raises(ValueError, match="steps: expected ones that read 9 .*, got 15; make a new chain"):
        chain(torch.zeros(2), torch.zeros(9))
    with pytest.raises(ValueError, match="steps: expected ones that read 0 .*, got 4"):
        fixed.inverse(torch.zeros(2))


@pytest.mark.parametrize("order", [[2, 1, 0], (2, 1, 0), torch.tensor([2, 1, 0])])
def test_another_order_may_be_set(order: Sequence[int] | Tensor) -> None:
    step = Permute([1, 2, 0])
    step.order = order
    assert step(torch.tensor([1.0, 2.0, 3.0]))[0].tolist() == [3.0, 2.0, 1.0]
    assert step.state_dict()["order"].tolist() == [2, 1, 0]


@pytest.mark.parametrize(("order", "to"), [(None, [1, 0]), ([0, 1], None)])
def test_where_there_is_no_order_none_is_set(order: list[int] | None, to: list[int] | None) -> None:
    step = Coupling(2, Affine(1), order=order)
    with pytest.raises(
        ValueError, match="order: expected an order in the place of the one that the step was made with"
    ):
        step.order = to  # pyright: ignore[reportAttributeAccessIssue]
