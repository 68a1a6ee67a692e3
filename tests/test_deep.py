"""What takes too long for every change: inductor, both directions. `make test-deep` runs it."""

import os

import pytest
import torch
from torch import Tensor

import flowpost
from flowpost.testing import push

pytestmark = pytest.mark.skipif("FLOWPOST_DEEP" not in os.environ, reason="minutes of compilation: make test-deep")

FLOWS = {
    "full_covariance": lambda: flowpost.full_covariance(8, dim=5).flow,
    "planar": lambda: flowpost.planar(8, dim=5, steps=2).flow,
    "sylvester": lambda: flowpost.orthogonal_sylvester(8, dim=5, steps=2).flow,
    "iaf": lambda: flowpost.iaf(8, dim=5, steps=2, hidden=(16,), context_size=4).flow,
    "permuted": lambda: flowpost.Chain(flowpost.Permute([2, 0, 1]), flowpost.Affine(3), flowpost.Reverse(3)),
}


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", FLOWS)
def test_inductor_gives_the_values_and_gradients_of_eager(name: str, direction: str) -> None:
    """Inductor has had silent wrong gradients where values were right, so both are compared."""
    flow = push(FLOWS[name](), 0.3, seed=0)
    z, context = torch.randn(6, flow.dim), flow.initial_context() + 0.3 * torch.randn(6, flow.context_size)
    torch._dynamo.reset()
    eager = getattr(flow, direction)
    compiled = torch.compile(eager, fullgraph=True)

    def run(function: object) -> list[Tensor]:
        inputs = [z.clone().requires_grad_(), context.clone().requires_grad_()]
        image, log_det = function(*inputs)  # pyright: ignore[reportCallIssue]
        grads = torch.autograd.grad(
            image.square().sum() + log_det.sum(), [*inputs, *flow.parameters()], allow_unused=True
        )
        return [image, log_det, *(grad for grad in grads if grad is not None)]

    for found, wanted in zip(run(compiled), run(eager), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
