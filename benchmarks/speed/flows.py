"""What all contestants share: how they are asked, the loss of a training step, and how their weights are drawn."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.speed.sizes import Size

LOG_2PI = math.log(2 * math.pi)


class Flow(nn.Module, ABC):
    """An amortized flow posterior of noise N(0, I): what a library, or dense layers, make of a size.

    A library gives `push` and `pull`; the noise and its density are then the same code for all of them.
    """

    skips_zeros = False
    """Whether fewer products are computed than weights times rows."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, self.name = size, type(self).__name__.lower()

    @abstractmethod
    def activations(self) -> Sequence[object]:
        """What follows each hidden layer, read from the model."""

    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Noise ``(*samples, batch, dim)`` to z and the map's log-det, in one pass."""
        raise NotImplementedError

    def pull(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Any z ``(batch, dim)`` to its noise and the inverse map's log-det."""
        raise NotImplementedError

    def sample(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Draw z ``(*samples, batch, dim)`` and its log q for features h ``(batch, context)``."""
        samples = (self.size.samples,) if self.size.samples > 1 else ()
        noise = torch.randn(*samples, self.size.batch, self.size.dim, device=h.device)
        z, log_det = self.push(noise, h)
        return z, log_normal(noise) - log_det

    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        """The log q of a z that was not drawn here."""
        noise, log_det = self.pull(z, h)
        return log_normal(noise) + log_det


def log_normal(noise: Tensor) -> Tensor:
    """The log N(noise; 0, I)."""
    return -0.5 * (noise.square() + LOG_2PI).sum(-1)


def training_loss(z: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || N(0, I)) up to a constant: both outputs are used, as in an ELBO."""
    return (log_q + 0.5 * z.square().sum(-1)).mean()


def draw(module: nn.Module, seed: int = 0) -> None:
    """Every weight and bias anew, as a linear layer's are drawn: no library gains by starting at zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def features(size: Size, device: torch.device, seed: int = 1) -> Tensor:
    """An encoder's features h ``(batch, context)``, a leaf that wants its gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size.batch, size.context, generator=generator).to(device).requires_grad_()
