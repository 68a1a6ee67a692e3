"""B21 by hand: what a chain and each wrapper hand to their steps, and what they make of the log-dets."""

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from registry import BY_NAME, ENTRIES, Case, backward, draw, push
from torch import Tensor

from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Conditioned,
    Inverse,
    Learned,
    Planar,
    Reverse,
    Shared,
    UnitLowerTriangular,
)

Map = Callable[..., tuple[Tensor, Tensor]]


def directions(step: Bijector) -> dict[str, Map]:
    """Both, for points of the domain."""
    return {"forward": step, "inverse": backward(step)}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def test_chain_applies_its_steps_in_list_order_each_on_its_own_context() -> None:
    affine, planar_, lower = Affine(3), Planar(3), UnitLowerTriangular(3)
    flow = Chain(affine, Reverse(3), planar_, lower).double()
    z, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, flow.context_size, dtype=torch.float64)
    assert flow.context_size == 6 + 7 + 3
    one, first = affine(z, context[:, :6])
    two, second = planar_(one.flip(-1), context[:, 6:13])
    three, third = lower(two, context[:, 13:])
    image, log_det = flow(z, context)
    torch.testing.assert_close(image, three)
    torch.testing.assert_close(log_det, first + second + third)
    initial = torch.cat([step.initial_context() for step in (affine, planar_, lower)])
    torch.testing.assert_close(flow.initial_context(), initial)


def test_shared_hands_every_step_the_same_context() -> None:
    steps = [Autoregressive(3, 2, (5,)), Reverse(3), Autoregressive(3, 2, (5,))]
    flow = push(Shared(*steps).double(), Case(seed=3, push=0.3))
    z, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    one, first = steps[0](z, context)
    two, second = steps[2](one.flip(-1), context)
    torch.testing.assert_close(flow(z, context), (two, first + second))


def test_learned_conditioned_and_inverse_hand_over_the_context() -> None:
    step, z = Planar(3), torch.randn(4, 3)
    learned, conditioned = Learned(step), Conditioned(step, 2)
    with torch.no_grad():
        learned.context.copy_(torch.randn(7))
        conditioned.head.weight.copy_(torch.randn(7, 2))
    torch.testing.assert_close(learned(z), step(z, learned.context))
    features = torch.randn(4, 2)
    context = features @ conditioned.head.weight.T + conditioned.head.bias
    torch.testing.assert_close(conditioned(z, features), step(z, context))
    torch.testing.assert_close(Inverse(step)(z, context), step.inverse(z, context))
    torch.testing.assert_close(cast(Bijector, Inverse(step)).inverse(z, context), step(z, context))


def test_a_chain_sums_log_dets_in_float64() -> None:
    """Fifty float32 terms near 1e4 and -1e4: summed in float32 they leave 1e-3 and more."""
    raw = [1e4 * torch.randn(1).item() for _ in range(50)]
    flow = Chain(*(_Constant(value) for value in raw))
    rounded = [torch.tensor(value).item() for value in raw]
    _, log_det = flow(torch.zeros(1))
    assert log_det.dtype == torch.float32
    assert log_det.item() == torch.tensor(math.fsum(rounded)).item()


class _Constant(Bijector):
    """The identity with a made-up log-det."""

    def __init__(self, value: float) -> None:
        super().__init__(1)
        self.value = value

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z, z.new_tensor(self.value)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z, z.new_tensor(-self.value)


def test_nested_chains_are_the_flat_chain() -> None:
    parts = [Affine(3), Planar(3), Reverse(3), UnitLowerTriangular(3)]
    flat, nested = Chain(*parts).double(), Chain(Chain(*parts[:2]), Chain(Chain(parts[2]), parts[3])).double()
    z, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, flat.context_size, dtype=torch.float64)
    for name, function in directions(flat).items():
        torch.testing.assert_close(function(z, context), directions(nested)[name](z, context))


@pytest.mark.parametrize("name", ["planar_flow", "full_covariance"])
def test_derivatives_that_are_written_out_have_derivatives(name: str) -> None:
    """Forward mode, reverse mode and their second derivatives, to the context too."""
    flow, z, context = draw(BY_NAME[name], Case(3, seed=3), batch=(2,))

    def both(z: Tensor, context: Tensor) -> Tensor:
        image, log_det = flow(z, context)
        return torch.cat([image, log_det.unsqueeze(-1)], -1)

    inputs = (leaf(z), leaf(cast(Tensor, context)))
    assert torch.autograd.gradcheck(both, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, inputs)


def test_inverse_of_an_inverse_is_the_step() -> None:
    for entry in ENTRIES:
        step = entry.make(3, 0)
        once = Inverse(step)
        if isinstance(step, Inverse):
            assert once is step.step
        else:
            assert Inverse(once) is step
            assert isinstance(once, Inverse)
