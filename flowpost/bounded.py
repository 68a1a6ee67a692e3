"""Likelihoods p(x|z) of data between two ends, such as pixels: real numbers, or levels that have an order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.checks import active, check_values
from flowpost.likelihoods import Likelihood, check_shapes, soft_log_scale, warn_of_shares
from flowpost.numerics.arguments import check_int


class ContinuousBernoulli(Likelihood):
    """Real x from 0 to 1, of the density ``exp(a x) a / (e^a - 1)`` with the logit a; one output an element.

    ``log p(x) = x a - softplus(a) + log C``, ``C = a / tanh(a / 2)``: what the cross-entropy of such x leaves out.

    Reference:
        Loaiza-Ganem & Cunningham (2019), The Continuous Bernoulli: Fixing a Pervasive Error in Variational
        Autoencoders.
    """

    reads_logits = True

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        check_shapes(self.numbers, outputs, x)
        if active():
            check_values("x", x, 0, 1, whole=False)
            warn_of_shares(outputs)
        logit = outputs.squeeze(-2)
        away, safe = _away(logit)
        square = logit * logit
        near = square * (1 / 12 - square * (7 / 1440 - square * (31 / 90720 - square * (127 / 4838400))))
        log_c = torch.where(away, torch.log(safe / torch.tanh(safe / 2)), math.log(2) + near)
        return (x.to(logit.dtype) * logit - F.softplus(logit) + log_c).sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``: ``1 / (1 - e^-a) - 1 / a``."""
        logit = outputs.squeeze(-2)
        away, safe = _away(logit)
        square = logit * logit
        near = logit * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
        return torch.where(away, -1 / torch.expm1(-safe) - 1 / safe, 0.5 + near)

    def sample(self, outputs: Tensor) -> Tensor:
        """An x ~ p(x|z), by the inverse of the falling density's distribution function; turned where it rises."""
        logit = outputs.detach().squeeze(-2)
        _, safe = _away(logit, 1e-4)
        share, rate = torch.rand_like(logit), safe.abs()
        falling = -torch.log1p(share * torch.expm1(-rate)) / rate
        return torch.where(logit > 0, 1 - falling, falling)


def _away(logit: Tensor, near: float = 0.1) -> tuple[Tensor, Tensor]:
    """Where a logit is not near 0, where differences cancel, and one that never is."""
    away = logit.abs() > near
    return away, torch.where(away, logit, near)


class DiscretizedLogistic(Likelihood):
    """Levels x from 0 to ``levels - 1``, each the mass that a logistic distribution has in its cell.

    The levels are the middles of equal cells; the first and the last cell reach on for ever. Two outputs an element:
    the logistic's loc and the logarithm of its scale, in units in which the levels run from -1 to 1, so that outputs
    near 0 are right for a start.

    Args:
        levels: number of levels, at least 2; 256 for bytes.

    Reference:
        Salimans, Karpathy, Chen & Kingma (2017), PixelCNN++, for one logistic; Kingma et al. (2016), Improving
        Variational Inference with Inverse Autoregressive Flow.
    """

    numbers = 2

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = check_int("levels", levels, minimum=2)

    def _numbers(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and log-scale in units of a cell, level 0 at 0."""
        loc, raw = outputs.unbind(-2)
        half = (self.levels - 1) / 2
        return (loc + 1) * half, soft_log_scale(raw) + math.log(half)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``; for the sigmoid s by ``s(b) - s(a) = s(b) s(-a) (1 - e^(a - b))``."""
        check_shapes(self.numbers, outputs, x)
        if active():
            check_values("x", x, 0, self.levels - 1, whole=True)
        loc, log_scale = self._numbers(outputs)
        rate = torch.exp(-log_scale)
        low, high = ((x.to(loc.dtype) + side - loc) * rate for side in (-0.5, 0.5))
        below = torch.where(x == self.levels - 1, 0, F.logsigmoid(high))
        above = torch.where(x == 0, 0, F.logsigmoid(-low))
        inside = (x > 0) & (x < self.levels - 1)
        return (below + above + torch.where(inside, torch.log(-torch.expm1(-rate)), 0)).sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``: the masses above each cell's end, added up."""
        loc, log_scale = self._numbers(outputs)
        rate, total = torch.exp(-log_scale), torch.zeros_like(loc)
        for level in range(1, self.levels):
            total = total + torch.sigmoid((loc - (level - 0.5)) * rate)
        return total

    def sample(self, outputs: Tensor) -> Tensor:
        """Levels x ~ p(x|z), ``(*batch, elements)``, in the outputs' dtype."""
        loc, log_scale = self._numbers(outputs.detach())
        value = loc + log_scale.exp() * torch.logit(torch.rand_like(loc), 1e-7)
        return value.round().clamp(0, self.levels - 1)
