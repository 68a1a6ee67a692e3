"""The yardsticks: the same chain without masks, and the products that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.flows import Flow
from benchmarks.speed.sizes import Size


class Dense(Flow):
    """The same layers, activation and gate with full weight matrices, which is no flow but costs what one could.

    Plain eager modules without checks, sums in float32, and no reversals, which full matrices do not need.
    """

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.nets = nn.ModuleList(DenseStep(size) for _ in range(size.steps))

    def activations(self) -> Sequence[object]:
        """One for each hidden layer."""
        return [F.relu] * (2 * len(self.nets))

    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The map and what would be its log-det, were it triangular."""
        z, total = noise, noise.new_zeros(())
        for net in self.nets:
            z, log_det = net(z, h)
            total = total + log_det
        return z, total


class DenseStep(nn.Module):
    """One gated step, ``z' = s z + (1 - s) m``, of a network of two hidden layers."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.first = nn.Linear(size.dim, size.hidden)
        self.project = nn.Linear(size.context, size.hidden, bias=False)
        self.second = nn.Linear(size.hidden, size.hidden)
        self.last = nn.Linear(size.hidden, 2 * size.dim)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The gate's formula is flowpost's, written plainly."""
        x = F.relu(self.first(z) + self.project(h))
        raw, mean = self.last(F.relu(self.second(x))).chunk(2, dim=-1)
        logit = 2 + 4 * torch.tanh(raw / 4)
        mean = 1e3 * torch.tanh(mean / 1e3)
        return torch.lerp(mean, z, torch.sigmoid(logit)), F.logsigmoid(logit).sum(-1)


def products(size: Size, device: torch.device) -> Callable[[], None]:
    """The matrix products of a dense training step and nothing else: forward, to the inputs, to the weights."""
    widths = [(size.context, size.hidden), (size.dim, size.hidden), (size.hidden, size.hidden),
              (size.hidden, 2 * size.dim)]  # fmt: skip
    layers = [
        [torch.randn(shape, device=device) for shape in ((rows, a), (b, a), (rows, b))]
        for _ in range(size.steps)
        for rows, (a, b) in zip((size.batch, *[size.rows] * 3), widths, strict=True)
    ]

    @torch.no_grad()
    def call() -> None:
        for x, weight, gradient in layers:
            torch.mm(x, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, x)

    return call
