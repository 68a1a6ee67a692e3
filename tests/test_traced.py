"""``torch.jit.trace`` records numbers of one call: it is refused by name, with what to use instead."""

from collections.abc import Callable

import pytest
import torch
from small import DIM, FEATURES, small
from torch import Tensor, nn

from flowpost import FlowPosterior
from flowpost.recipes import RECIPES


class Used(nn.Module):
    """What is traced is a forward."""

    def __init__(self, posterior: FlowPosterior, use: Callable[[FlowPosterior, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.posterior, self.use = posterior, use

    def forward(self, h: Tensor, z: Tensor) -> object:
        return self.use(self.posterior, h, z)


USES: dict[str, Callable[[FlowPosterior, Tensor, Tensor], object]] = {
    "sample": lambda posterior, h, z: posterior(h, noise=z).z,
    "log_prob": lambda posterior, h, z: posterior.log_prob(z, h),
    "forward": lambda posterior, h, z: posterior.flow(z, posterior.context(h)),
    "inverse": lambda posterior, h, z: posterior.flow.inverse(z, posterior.context(h)),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_refused_by_name(name: str, use: str) -> None:
    inputs = [torch.randn(3, size, dtype=torch.float64) for size in (FEATURES, DIM)]
    module = Used(small(name), USES[use])
    expected = module(*inputs)
    with pytest.raises((RuntimeError, TypeError), match=r"(?s)torch\.jit\.trace.*torch\.(export|compile)"):
        torch.jit.trace(module, tuple(inputs))
    torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=0)  # the refusal leaves nothing behind
