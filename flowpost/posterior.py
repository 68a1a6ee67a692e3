"""The posterior: features of x in, a sample of z and its log q(z|x) out, in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from flowpost.bijectors.base import LINE, Bijector
from flowpost.bijectors.wrappers import Learned, linear_head
from flowpost.checks import active, check_finite, warn_moved
from flowpost.numerics.arguments import check_int, check_tensor
from flowpost.numerics.products import wide, wide_dtype

_LOG_2PI = math.log(2 * math.pi)


class Sample(NamedTuple):
    """What a posterior returns."""

    z: Tensor
    """``(*sample_shape, *batch, dim)``"""
    log_prob: Tensor
    """log q(z|x), ``(*sample_shape, *batch)``"""
    noise: Tensor
    """The draw from N(0, I) that was mapped to z, of z's shape."""


class FlowPosterior(nn.Module):
    """A posterior q(z|x) whose samples are a flow of standard normal noise: ``z = f(noise; head(h))``.

    ``log q(z|x) = log N(noise; 0, I) - log|det dz/dnoise|``, summed in float64 and returned in z's dtype. A sample is
    scored by the log-det of the pass that made it; nothing is inverted. A row that is not finite has log q = nan, and
    the other rows are exact. h may have any leading axes; samples come in front of them.

    Args:
        features: size of the encoder's features h; 0 for a posterior without an encoder, whose context is learned.
        flow: the bijector from noise to z; the last step listed acts last.
        head: from h to the flow's context; by default a linear layer that starts the flow near its identity.

    Raises:
        TypeError: if `flow` is no Bijector.
        ValueError: if `features` is negative, or the flow's domain is not the line.

    Reference:
        Rezende & Mohamed (2015); Kingma & Welling (2019), sections 2.5 and 3.1.

    Example:
        >>> posterior = FlowPosterior(16, Chain(Affine(2), Planar(2)))
        >>> h = torch.randn(8, 16)
        >>> z, log_prob, noise = posterior(h, sample_shape=(50,))
        >>> z.shape, log_prob.shape
        (torch.Size([50, 8, 2]), torch.Size([50, 8]))
    """

    def __init__(self, features: int, flow: Bijector, head: nn.Module | None = None) -> None:
        super().__init__()
        self.features = check_int("features", features, minimum=0)
        if not isinstance(flow, Bijector):
            raise TypeError(f"flow: expected a Bijector, got {type(flow).__name__}")
        if flow.domain != LINE:
            raise ValueError(f"flow: expected one from all real numbers, where noise lies, got domain {flow.domain}")
        self.flow = flow if features or not flow.context_size else Learned(flow)
        if head is None and features and flow.context_size:
            head = linear_head(features, flow)
        self.head = head

    @property
    def dim(self) -> int:
        """Size of the last axis of z."""
        return self.flow.dim

    @property
    def is_gaussian(self) -> bool:
        """Whether q(z|x) is Gaussian for every x, so that `gaussian` gives its mean and Cholesky factor."""
        return self.flow.triangular

    def forward(
        self, h: Tensor | None = None, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None
    ) -> Sample:
        """Draw z ~ q(z|x), reparameterized, with its log-density.

        Args:
            h: features ``(*batch, features)``; None for a posterior without an encoder.
            sample_shape: leading axes of independent samples for every h.
            noise: the standard normal draw to map, ``(*sample_shape, *batch, dim)``, instead of a fresh one.

        Returns:
            ``Sample(z, log_prob, noise)``.

        Raises:
            TypeError: for an h that is no floating tensor, or a `sample_shape` that is no tuple of ints.
            ValueError: for a wrong width or shape, or a negative sample axis.
        """
        return self.sample_at(self.context(h), sample_shape, noise, batch=_batch(h))

    def context(self, h: Tensor | None = None) -> Tensor | None:
        """The flow's context for features h, in the parameters' dtype; half-precision features are cast."""
        h = self._check_features(h)
        if h is None or self.head is None:
            return None
        # The head's outputs are the map's parameters: half a digit less there is a tenth of a nat in log q.
        with torch.autocast(h.device.type, enabled=False):
            return self.head(h)

    def log_prob(self, z: Tensor, h: Tensor | None = None) -> Tensor:
        """The log q(z|x) of any z, also one the posterior never drew, by the flow's inverse.

        Args:
            z: ``(*batch, dim)``; leading axes broadcast against h's.
            h: features ``(*batch, features)``; None for a posterior without an encoder.

        Returns:
            ``(*batch)``, exact up to the map's conditioning; nan where the inverse is not finite.

        Raises:
            TypeError: as the flow's ``inverse``.
            ValueError: as the flow's ``inverse``.
        """
        check_tensor("z", z, self.dim, self.flow.event_ndim)
        return self.log_prob_at(z, self.context(h))

    def log_prob_at(self, z: Tensor, context: Tensor | None) -> Tensor:
        """As `log_prob`, for a `context` that is known."""
        noise, log_det = self.flow.inverse(z, context)
        log_prob = _score(noise, -log_det)
        if active():
            warn_moved(log_prob.detach(), self._nudged(z, context))
        return log_prob

    def path_log_prob(self, sample: Sample, h: Tensor | None = None) -> Tensor:
        """The log q(z|x) of an own sample as a function of z alone: parameters and h are held fixed.

        The value is ``sample.log_prob``, the gradient ``dlog q/dz`` at ``sample.z``: in place of log q in an objective,
        it leaves out the score ``dlog q/dparameters``, whose mean is 0 (sticking the landing). For every posterior:
        nothing is searched, the preimage is ``sample.noise``. Costs an inverse at a known preimage and its gradient;
        where no gradient is asked for, nothing. First derivatives only.

        Args:
            sample: what this posterior returned for h.
            h: the same features; None for a posterior without an encoder.

        Returns:
            ``(*sample_shape, *batch)``.

        Raises:
            TypeError: if `sample` is no Sample, and as `forward`.
            ValueError: as `forward`.

        Reference:
            Roeder, Wu & Duvenaud (2017), Sticking the Landing: Simple, Lower-Variance Gradient Estimators for VI.
        """
        if not isinstance(sample, Sample):
            raise TypeError(f"sample: expected a flowpost.Sample, got {type(sample).__name__}")
        with torch.no_grad():
            context = self.context(h)
        return self.path_log_prob_at(sample, context)

    @torch.no_grad()
    def _nudged(self, z: Tensor, context: Tensor | None) -> list[Tensor]:
        """Log q a few roundings from z: where it moves, the flow has lost the digits that decide it."""
        eps = 4 * torch.finfo(z.dtype).eps
        nudged = [self.flow._inverse(z * (1 + sign * eps), context, None) for sign in (1, -1)]
        return [_score(noise, -log_det) for noise, log_det in nudged]

    def gaussian(self, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean ``(*batch, dim)`` and Cholesky factor ``(*batch, dim, dim)`` of a Gaussian posterior.

        Raises:
            TypeError: if the posterior is not Gaussian (`is_gaussian` tells).
        """
        return self.gaussian_at(self.context(h))

    def distribution(self, h: Tensor | None = None) -> FlowDistribution:
        """q(z|x) as a `torch.distributions.Distribution`, for code that wants one."""
        return FlowDistribution(self, h)

    def sample_at(
        self,
        context: Tensor | None,
        sample_shape: tuple[int, ...] = (),
        noise: Tensor | None = None,
        *,
        batch: tuple[int, ...] | None = None,
    ) -> Sample:
        """As `forward`, for a `context` that is known; `batch` is its leading axes unless said otherwise."""
        shape = (*_check_sample_shape(sample_shape), *(_batch(context) if batch is None else batch), self.dim)
        if noise is None:
            noise = torch.randn(shape, **self._like(context))
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
        z, log_det = self.flow._forward(noise, self.flow._check(noise, context))
        return Sample(z, _score(noise, log_det), noise)

    def path_log_prob_at(self, sample: Sample, context: Tensor | None) -> Tensor:
        """As `path_log_prob`, for a `context` that is known."""
        z, log_prob, noise = sample
        if not torch.is_grad_enabled():
            return log_prob

        def total(z: Tensor) -> Tensor:
            preimage, log_det = self.flow._inverse(z, fixed, noise)
            return _score(preimage, -log_det).sum()

        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            fixed = self.flow._check(z, context)
            if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                # It follows z and nothing else: no parameter has to be frozen, or un-frozen, for it.
                slope = torch.func.grad(total)(z)
            else:  # the same through the passes by hand, where nothing is searched; no parameter's grad is touched
                leaf = z.detach().requires_grad_()
                fixed = None if fixed is None else fixed.detach()
                with torch.enable_grad():
                    (slope,) = torch.autograd.grad(total(leaf), leaf)
        return log_prob.detach() + ((z - z.detach()) * slope).sum(-1)

    def gaussian_at(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `gaussian`, for a `context` that is known."""
        if not self.is_gaussian:
            raise TypeError(f"posterior: expected a Gaussian one, got a flow of {type(self.flow).__name__}")
        zeros = torch.zeros(self.dim, **self._like(context))
        loc, tril = self.flow._push_gaussian(zeros, None, context)
        return loc, cast(Tensor, tril)

    def _like(self, context: Tensor | None) -> dict:
        like = next(self.parameters(), context)
        return {} if like is None else {"dtype": like.dtype, "device": like.device}

    def _check_features(self, h: Tensor | None) -> Tensor | None:
        if not self.features:
            if h is not None:
                raise ValueError(f"h: this posterior takes none, got shape {tuple(h.shape)}")
            return None
        if h is None:
            raise ValueError(f"h: this posterior needs shape (*, {self.features}), got None")
        if not isinstance(h, Tensor):
            raise TypeError(f"h: expected a torch.Tensor, got {type(h).__name__}")
        if not h.is_floating_point():
            raise TypeError(f"h: expected a floating dtype, got {h.dtype}; call .float()")
        if h.ndim < 1 or h.shape[-1] != self.features:
            raise ValueError(f"h: expected shape (*, {self.features}), got {tuple(h.shape)}")
        if active():
            check_finite("h", h, "; the encoder's output is not finite")
        like = next(self.parameters(), h)
        if h.device != like.device:
            raise ValueError(f"h: expected device {like.device} like the parameters, got {h.device}")
        return h.to(like.dtype)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """The log N(z; 0, I) of z ``(*batch, dim)``, ``(*batch)``."""
    return _normal(z).to(z.dtype)


def _normal(z: Tensor) -> Tensor:
    return -0.5 * ((z * z).sum(-1, dtype=wide_dtype(z)) + z.shape[-1] * _LOG_2PI)


def _score(noise: Tensor, log_det: Tensor) -> Tensor:
    """The log N(noise; 0, I) - log_det, nan where it is not finite."""
    log_prob = _normal(noise) - wide(log_det)
    return torch.where(log_prob.isfinite(), log_prob, math.nan).to(noise.dtype)


def _batch(value: Tensor | None) -> tuple[int, ...]:
    return () if value is None else tuple(value.shape[:-1])


def _check_sample_shape(sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(sample_shape, tuple) or not all(isinstance(size, int) for size in sample_shape):
        raise TypeError(f"sample_shape: expected a tuple of ints, got {sample_shape!r}")
    if any(size < 0 for size in sample_shape):
        raise ValueError(f"sample_shape: expected non-negative ints, got {tuple(sample_shape)}")
    return tuple(sample_shape)


class FlowDistribution(Distribution):
    """A `FlowPosterior` at given features, as a `torch.distributions.Distribution`.

    It holds the posterior, not a copy: after an optimizer step it gives the new density. `log_prob` inverts the flow;
    `rsample_and_log_prob` does not.
    """

    arg_constraints = {}  # pyright: ignore[reportAssignmentType]
    has_rsample = True

    def __init__(self, posterior: FlowPosterior, h: Tensor | None = None, *, validate_args: bool | None = None) -> None:
        self.posterior, self.h = posterior, posterior._check_features(h)
        super().__init__(torch.Size(_batch(h)), torch.Size((posterior.dim,)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where z lies: the flow's codomain, in every variable."""
        low, high = self.posterior.flow.codomain
        if (low, high) == LINE:
            return constraints.real_vector
        if low == -math.inf:
            return constraints.independent(constraints.less_than(high), 1)
        each = constraints.greater_than(low) if high == math.inf else constraints.interval(low, high)
        return constraints.independent(each, 1)

    def expand(self, batch_shape: tuple[int, ...], _instance: Distribution | None = None) -> FlowDistribution:
        """The same distribution over a larger batch shape; needs an encoder's features to expand."""
        if self.h is None:
            raise ValueError("batch_shape: a posterior without features has none to expand; use sample_shape")
        return FlowDistribution(self.posterior, self.h.expand(*batch_shape, -1), validate_args=self._validate_args)

    def rsample_and_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A reparameterized sample and its log-density, in one pass."""
        z, log_prob, _ = self.posterior(self.h, sample_shape=tuple(sample_shape))
        return z, log_prob

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A reparameterized sample ``(*sample_shape, *batch_shape, dim)``."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A sample without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log q(value|x), by the flow's inverse."""
        if self._validate_args:
            self._validate_sample(value)
        return self.posterior.log_prob(value, self.h)
