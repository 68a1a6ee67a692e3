"""The likelihoods p(x|z) of the reference VAE."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.checks import active, check_values
from flowpost.density import standard_normal_log_prob
from flowpost.numerics.arguments import check_int, check_positive
from flowpost.numerics.products import wide_dtype

_MANY = 16
"""Numbers that say something where all of them lie between 0 and 1."""


class Likelihood(nn.Module, ABC):
    """p(x|z), independent over the elements of x, from `numbers` decoder outputs for each of them.

    One of your own says how many `numbers` it reads, sums ``log_prob`` over the elements, and gives ``mean`` and
    ``sample``. ``log_prob`` takes the decoder's outputs as ``(*batch, numbers, elements)`` and x as ``(*batch,
    elements)``, of any real dtype, leading axes broadcasting. Where it reads logits, `reads_logits` lets `VAE` refuse
    a decoder that ends in a sigmoid.

    Example:
        >>> class Laplace(Likelihood):
        ...     def log_prob(self, outputs, x):
        ...         return -((x - outputs.squeeze(-2)).abs() + math.log(2)).sum(-1)
        ...     def mean(self, outputs):
        ...         return outputs.squeeze(-2)
        ...     def sample(self, outputs):
        ...         return torch.distributions.Laplace(outputs.squeeze(-2), 1.0).sample()
    """

    numbers = 1
    reads_logits = False

    @abstractmethod
    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""

    @abstractmethod
    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""

    def sample(self, outputs: Tensor) -> Tensor:
        """An x ~ p(x|z), ``(*batch, elements)``, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no sample; write one, or take its mean")


def check_shapes(numbers: int, outputs: Tensor, x: Tensor) -> None:
    """Raise for outputs or an x that would broadcast into a mix of examples: an x of more axes, or of one element."""
    if outputs.ndim < 2 or outputs.shape[-2] != numbers:
        raise ValueError(f"outputs: expected shape (*, {numbers}, elements), got {tuple(outputs.shape)}")
    elements = outputs.shape[-1]
    if not 1 <= x.ndim < outputs.ndim or x.shape[-1] != elements:
        raise ValueError(
            f"x: expected shape (*, {elements}) of at most {outputs.ndim - 1} axes for outputs of shape "
            f"{tuple(outputs.shape)}, got {tuple(x.shape)}; flatten each example"
        )


def warn_of_shares(outputs: Tensor) -> None:
    """Warn where what should be logits looks like probabilities; its values are read, so under `checking` alone."""
    if outputs.numel() >= _MANY and bool(((outputs > 0) & (outputs < 1)).all()):
        warnings.warn(
            "decoder: all outputs lie from 0 to 1, as probabilities do; expected logits: leave a sigmoid out",
            UserWarning,
            stacklevel=3,
        )


class Binomial(Likelihood):
    """Counts from 0 to n, ``log p(x) = log C(n, x) + x a - n softplus(a)`` with the logit a; one output an element.

    Computed in float64, on a device that has it: the three terms are large where n is, and nearly cancel.

    Args:
        n: number of trials, at least 1.
    """

    reads_logits = True

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = check_int("n", n, minimum=1)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        check_shapes(self.numbers, outputs, x)
        if active():
            check_values("x", x, 0, self.n, whole=True)
            warn_of_shares(outputs)
        dtype = wide_dtype(outputs)
        logit, count = outputs.squeeze(-2).to(dtype), x.to(dtype)
        ways = math.lgamma(self.n + 1) - torch.lgamma(count + 1) - torch.lgamma(self.n - count + 1)
        odds = count * logit + self.n * F.logsigmoid(-logit)  # softplus drops exp(-20), n times
        return (odds.sum(-1) + ways.sum(-1)).to(outputs.dtype)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        return self.n * torch.sigmoid(outputs.squeeze(-2))

    def sample(self, outputs: Tensor) -> Tensor:
        """Counts x ~ p(x|z), ``(*batch, elements)``, in the outputs' dtype."""
        return torch.distributions.Binomial(self.n, logits=outputs.detach().squeeze(-2), validate_args=False).sample()


class Bernoulli(Binomial):
    """Binary x, ``log p(x) = x a - softplus(a)`` with the logit a; one output an element.

    The decoder gives logits: it does not end in a sigmoid. An x between 0 and 1 is taken as the probability of a 1, and
    log p(x) is the cross-entropy. For real x between 0 and 1 that are no probabilities, take `ContinuousBernoulli`,
    which is a density.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        check_shapes(self.numbers, outputs, x)
        if active():
            check_values("x", x, 0, 1, whole=False)
            warn_of_shares(outputs)
        logit = outputs.squeeze(-2)
        return (x.to(logit.dtype) * logit - F.softplus(logit)).sum(-1)


class Gaussian(Likelihood):
    """Real x, ``N(x; loc, exp(s)^2)``; two outputs an element, loc and s, softly bounded at +-10.

    Args:
        scale: the standard deviation of all elements, where it is not learned; then loc is the one output of an
            element, and log p(x) is the squared error over ``-2 scale^2``, less a constant: the VAE "with MSE". One
            that is learned, for all elements, takes a `Likelihood` of your own.
    """

    numbers = 2

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = None if scale is None else check_positive("scale", scale)
        self.numbers = 2 if scale is None else 1

    def _loc_log_scale(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        loc = outputs.select(-2, 0)
        if self.scale is not None:
            return loc, torch.full_like(loc, math.log(self.scale))
        return loc, soft_log_scale(outputs.select(-2, 1))

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The log p(x|z), ``(*batch)``."""
        check_shapes(self.numbers, outputs, x)
        loc, log_scale = self._loc_log_scale(outputs)
        return standard_normal_log_prob((x.to(loc.dtype) - loc) * torch.exp(-log_scale)) - log_scale.sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expectation of x, ``(*batch, elements)``."""
        return outputs.select(-2, 0)

    def sample(self, outputs: Tensor) -> Tensor:
        """An x ~ p(x|z), ``(*batch, elements)``."""
        loc, log_scale = self._loc_log_scale(outputs.detach())
        return torch.addcmul(loc, log_scale.exp(), torch.randn_like(loc))


def soft_log_scale(raw: Tensor) -> Tensor:
    """The logarithm of a scale, softly bounded at +-10."""
    return 10 * torch.tanh(raw / 10)


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
        check_shapes(self.numbers, outputs, x)
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

    def sample(self, outputs: Tensor) -> Tensor:
        """Levels x ~ p(x|z), ``(*batch, elements)``, in the outputs' dtype."""
        levels = torch.distributions.Categorical(logits=outputs.detach().movedim(-2, -1), validate_args=False)
        return levels.sample().to(outputs.dtype)
