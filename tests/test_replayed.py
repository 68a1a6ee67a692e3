"""Transforms of ``torch.func`` and forward mode through a way back alone, of a graph that was made outside of them."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from flowpost import Autoregressive, Bijector, Spline, Sylvester, UnitLowerTriangular
from flowpost.bijectors import _by_hand
from flowpost.masked import engine

STEPS: dict[str, Callable[[], Bijector]] = {
    "autoregressive": lambda: Autoregressive(4, 3, (8, 8)),
    "sylvester": lambda: Sylvester(4, 3),
    "spline": lambda: Spline(4),
    "unit lower triangular": lambda: UnitLowerTriangular(4),
}
Pull = Callable[..., tuple[Tensor, ...]]


def made(name: str, direction: str) -> tuple[Pull, Tensor]:
    """What pulls a gradient at the image back to z and context, and three such gradients."""
    torch.manual_seed(5)
    step = STEPS[name]().double()
    inputs = [torch.randn(5, size, dtype=torch.float64, requires_grad=True) for size in (4, step.context_size)]
    image, log_det = getattr(step, direction)(*inputs)
    outputs = image + log_det.unsqueeze(-1)

    def pull(v: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, v, retain_graph=True, **options)

    return pull, torch.randn(3, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", STEPS)
def test_a_transform_goes_through_the_way_back(name: str, direction: str) -> None:
    """It is linear: mapped over, and its derivative, it is itself; the last is held to the plain operations."""
    pull, grads = made(name, direction)
    each = [pull(v) for v in grads]
    torch.testing.assert_close(vmap(pull)(grads), tuple(torch.stack(parts) for parts in zip(*each, strict=True)))
    torch.testing.assert_close(jvp(pull, (grads[0],), (grads[1],)), (each[0], each[1]))
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(part) for part in pull(forward_ad.make_dual(grads[0], grads[1]))]
        torch.testing.assert_close([dual.tangent for dual in duals], list(each[1]))

    def square(pull: Pull) -> Callable[[Tensor], Tensor]:
        return lambda v: pull(v, create_graph=True)[0].square().sum()

    found = grad(square(pull))(grads[0])
    plainly = [mock.patch.object(*place, return_value=None) for place in ((engine, "choose"), (_by_hand, "fits"))]
    with plainly[0], plainly[1]:
        plain = made(name, direction)[0]
        torch.testing.assert_close(found, torch.autograd.functional.vjp(square(plain), grads[0])[1])
