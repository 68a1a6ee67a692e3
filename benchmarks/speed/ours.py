"""flowpost as a contestant, through its public API alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

import flowpost as fp
from benchmarks.speed.flows import Flow
from benchmarks.speed.sizes import Size


class Flowpost(Flow):
    """Gated autoregressive steps, every other one in the reverse order; h is their context, without a head."""

    skips_zeros = True

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        orders = [None, range(size.dim)[::-1]]
        hidden = (size.hidden, size.hidden)
        self.steps = [
            fp.Autoregressive(size.dim, size.context, hidden, activation=F.relu, order=orders[index % 2])
            for index in range(size.steps)
        ]
        self.posterior = fp.FlowPosterior(size.context, fp.Shared(*self.steps), head=nn.Identity())

    def activations(self) -> Sequence[object]:
        """One for each hidden layer."""
        return [step.net.activation for step in self.steps for _ in range(2)]

    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The chain's `forward`."""
        return self.posterior.flow(noise, h)

    def sample(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's own way, its checks and its sum in float64 included."""
        z, log_q, _ = self.posterior(h, sample_shape=(self.size.samples,) if self.size.samples > 1 else ())
        return z, log_q

    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        """The posterior's."""
        return self.posterior.log_prob(z, h)
