"""The likelihoods p(x|z) of the reference VAE."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.checks import active, check_values
from flowpost.density import standard_normal_log_prob
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import wide_dtype


class Likelihood(nn.Module, ABC):
    """p(x|z), independent over the elements of x, from `numbers` decoder outputs for each of them.

    ``log_prob`` takes the decoder's outputs as ``(*batch, numbers, elements)`` and x as ``(*batch, elements)``, of any
    real dtype, leading axes broadcasting, and sums over the elements; ``mean`` gives E[x|z], ``(*batch, elements)``.
    """

    numbers = 1

    @abstractmethod
    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""

    @abstractmethod
    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""


class Binomial(Likelihood):
    """Counts from 0 to n, ``log p(x) = log C(n, x) + x a - n softplus(a)`` with the logit a; one output an element.

    Computed in float64, on a device that has it: the three terms are large where n is, and nearly cancel.

    Args:
        n: number of trials, at least 1.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = check_int("n", n, minimum=1)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        if active():
            check_values("x", x, 0, self.n, whole=True)
        dtype = wide_dtype(outputs)
        logit, count = outputs.squeeze(-2).to(dtype), x.to(dtype)
        ways = math.lgamma(self.n + 1) - torch.lgamma(count + 1) - torch.lgamma(self.n - count + 1)
        odds = count * logit + self.n * F.logsigmoid(-logit)  # softplus drops exp(-20), n times
        return (odds.sum(-1) + ways.sum(-1)).to(outputs.dtype)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        return self.n * torch.sigmoid(outputs.squeeze(-2))


class Bernoulli(Binomial):
    """Binary x, ``log p(x) = x a - softplus(a)`` with the logit a; one output an element.

    An x between 0 and 1 is taken as the probability of a 1: the cross-entropy.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        if active():
            check_values("x", x, 0, 1, whole=False)
        logit = outputs.squeeze(-2)
        return (x.to(logit.dtype) * logit - F.softplus(logit)).sum(-1)


class Gaussian(Likelihood):
    """Real x, ``N(x; loc, exp(s)^2)``; two outputs an element, loc and s, softly bounded at +-10."""

    numbers = 2

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        loc, raw = outputs.unbind(-2)
        log_scale = 10 * torch.tanh(raw / 10)
        return standard_normal_log_prob((x.to(loc.dtype) - loc) * torch.exp(-log_scale)) - log_scale.sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        return outputs.select(-2, 0)


class Categorical(Likelihood):
    """One of the levels 0 to ``levels - 1``, by a softmax over ``levels`` outputs an element.

    Args:
        levels: number of levels, at least 2.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.numbers = check_int("levels", levels, minimum=2)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        if active():
            check_values("x", x, 0, self.numbers - 1, whole=True)
        index = x.long().unsqueeze(-2)
        batch = torch.broadcast_shapes(outputs.shape[:-2], index.shape[:-2])
        chosen = outputs.expand(*batch, -1, -1).gather(-2, index.expand(*batch, -1, -1)).squeeze(-2)
        return (chosen - outputs.logsumexp(-2)).sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        levels = torch.arange(self.numbers, dtype=outputs.dtype, device=outputs.device)
        return (outputs.softmax(-2) * levels.unsqueeze(-1)).sum(-2)
