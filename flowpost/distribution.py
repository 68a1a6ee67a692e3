"""q(.|x) as a `torch.distributions.Distribution`, and its KL in closed form where it is Gaussian."""

from __future__ import annotations

from copy import copy
from typing import cast

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    constraints,
    kl_divergence,
    register_kl,
)

from flowpost.bijectors._as_transform import vectors_in
from flowpost.bijectors.base import Bijector
from flowpost.density import Sample, draw, like_of, log_density, path_log_density, push
from flowpost.kl import gaussian_kl
from flowpost.numerics.arguments import expands, from_list


class FlowDistribution(Distribution):
    """q(.|x), a `torch.distributions.Distribution` that draws z with its log q: ``q = posterior.at(h)``.

    The features have been read: whatever is asked of it, the head runs no more. So it is q(.|x) of the parameters that
    the head had then. Make a new one after an optimizer step. A sample is scored by the pass that makes it; `log_prob`
    of any other z inverts the flow.

    For a Gaussian family (`is_gaussian`) `mean`, `variance`, `stddev` and `entropy` are exact, and so is
    `torch.distributions.kl_divergence` with another one, an ``Independent(Normal(...), 1)`` and a `MultivariateNormal`,
    either way round. No other family has them in closed form.

    A subclass with a `log_prob` of its own is another q than the flow's: it is not Gaussian and has no path gradient,
    unless it writes `is_gaussian` and what hangs on it, or `path_log_prob`.

    Where q is too far from p(z|x), `flowpost.evaluation.refine` draws from p(z|x) itself, by chains that start at q.

    Args:
        flow: the bijector from noise to z.
        context: what it reads, ``(*batch, context_size)``; None where it reads nothing.
        batch_shape: what the context's leading axes broadcast to.
        validate_args: whether `log_prob` looks at its argument's values, for which the host waits.
    """

    arg_constraints = {}  # pyright: ignore[reportAssignmentType]
    has_rsample = True

    def __init__(
        self,
        flow: Bijector,
        context: Tensor | None = None,
        batch_shape: tuple[int, ...] = (),
        *,
        validate_args: bool = False,
    ) -> None:
        self.flow, self.context = flow, context
        super().__init__(torch.Size(batch_shape), torch.Size((flow.dim,)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where z lies: the flow's codomain, in every variable."""
        return vectors_in(self.flow.codomain)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.flow).__name__}, batch_shape={tuple(self.batch_shape)})"

    def expand(self, batch_shape: tuple[int, ...], _instance: Distribution | None = None) -> FlowDistribution:
        """The same q over a larger batch shape, of the same class; the context is not copied."""
        old, shape = self.batch_shape, torch.Size(batch_shape)
        if not expands(old, shape):
            raise ValueError(f"batch_shape: expected one that {tuple(old)} expands to, got {tuple(shape)}")
        new = cast(FlowDistribution, copy(self) if _instance is None else _instance)
        new.flow, new.context = self.flow, self.context
        Distribution.__init__(new, shape, self.event_shape, validate_args=self._validate_args)
        return new

    def draw(self, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None) -> Sample:
        """Draw z ~ q(z|x), reparameterized, with its log-density and its noise.

        Args:
            sample_shape: leading axes of independent samples for every x.
            noise: the standard normal draw to map, ``(*sample_shape, *batch_shape, dim)``, instead of a fresh one.

        Returns:
            ``Sample(z, log_prob, noise)``.
        """
        return draw(self.flow, self.context, self.batch_shape, sample_shape, noise)

    def rsample_and_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A reparameterized sample and its log-density, in one pass."""
        return self.draw(from_list(sample_shape))[:2]

    def rsample(self, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None) -> Tensor:
        """A reparameterized sample ``(*sample_shape, *batch_shape, dim)``, without its log q; `noise` as in `draw`."""
        if type(self).draw is not FlowDistribution.draw:
            return self.draw(from_list(sample_shape), noise).z
        return push(self.flow, self.context, self.batch_shape, from_list(sample_shape), noise)[0]

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A sample without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log q(value|x) of any value, by the flow's inverse."""
        if self._validate_args:
            self._validate_sample(value)
        return log_density(self.flow, value, self.context, self.batch_shape)

    def path_log_prob(self, sample: Sample) -> Tensor:
        """The log q(z|x) of an own sample as a function of z alone, as `FlowPosterior.path_log_prob`.

        Raises:
            NotImplementedError: of a subclass with a `log_prob` of its own and no ``path_log_prob``.
        """
        if not self._is_of_flow:
            raise NotImplementedError(
                f"path_log_prob: expected one of {type(self).__name__}'s own, which has a log_prob of its own"
            )
        return path_log_density(self.flow, sample, self.context)

    @property
    def is_gaussian(self) -> bool:
        """Whether q is Gaussian for every context."""
        return self._is_of_flow and self.flow._is_triangular()

    @property
    def _is_of_flow(self) -> bool:
        """Whether q is what the flow makes of noise, and not what a subclass says."""
        return type(self).log_prob is FlowDistribution.log_prob

    def _of_flow(self) -> FlowDistribution:
        """What the flow makes of noise, whatever a subclass says: the map by which chains walk in its noise space."""
        return FlowDistribution(self.flow, self.context, tuple(self.batch_shape))

    def _require_of_flow(self, flow: Bijector) -> None:
        """Raise for a q that is not of this flow alone, where one of a known context is to be made again."""
        if not self._is_of_flow or self.flow is not flow:
            raise TypeError(
                f"posterior: expected a q(z|x) that is what the posterior's own flow makes of noise, got a "
                f"{type(self).__name__} with a log_prob or a flow of its own, which would be left out"
            )

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean ``(*batch_shape, dim)`` and Cholesky factor ``(*batch_shape, dim, dim)`` of a Gaussian q.

        Raises:
            TypeError: if q is not Gaussian (`is_gaussian` tells).
        """
        if not self.is_gaussian:
            raise TypeError(f"posterior: expected a Gaussian one, got a flow of {type(self.flow).__name__}")
        zeros = like_of(self.flow, self.context).new_zeros(self.flow.dim)
        loc, tril = self.flow._push_gaussian(zeros, None, self.flow._check(zeros, self.context))
        return loc.expand(*self.batch_shape, -1), cast(Tensor, tril).expand(*self.batch_shape, -1, -1)

    @property
    def _is_factorized(self) -> bool:
        """Whether q is Gaussian for every context, its variables independent."""
        return self.is_gaussian and all(step.elementwise for step in self.flow.leaves())

    def _loc_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each variable of a factorized q, ``(*batch_shape, dim)``: without a matrix."""
        shape, like = (*self.batch_shape, self.flow.dim), like_of(self.flow, self.context)
        context = self.flow._check(like.new_empty(self.flow.dim), self.context)
        loc, scale = (
            each.expand(shape) if isinstance(each, Tensor) else like.new_full(shape, each)
            for each in self.flow._line(context)
        )
        return loc, scale

    @property
    def mean(self) -> Tensor:
        """The mean of a Gaussian q, ``(*batch_shape, dim)``."""
        self._require_gaussian("mean")
        return (self._loc_scale() if self._is_factorized else self.gaussian())[0]

    @property
    def variance(self) -> Tensor:
        """The variance of each variable of a Gaussian q, ``(*batch_shape, dim)``."""
        self._require_gaussian("variance")
        return self._loc_scale()[1].square() if self._is_factorized else self.gaussian()[1].square().sum(-1)

    def entropy(self) -> Tensor:
        """The entropy of a Gaussian q in nats, ``(*batch_shape)``: ``dim / 2 - log q(mean)``."""
        self._require_gaussian("entropy")
        zeros = like_of(self.flow, self.context).new_zeros((*self.batch_shape, self.flow.dim))
        return 0.5 * self.flow.dim - self.draw(noise=zeros).log_prob

    def _require_gaussian(self, name: str) -> None:
        if not self.is_gaussian:
            raise NotImplementedError(
                f"{name}: a flow of {type(self.flow).__name__} has none in closed form, only a Gaussian has; "
                f"estimate it from samples, q.rsample_and_log_prob((1000,))"
            )


@register_kl(FlowDistribution, FlowDistribution)
@register_kl(FlowDistribution, MultivariateNormal)
@register_kl(FlowDistribution, Independent)
@register_kl(FlowDistribution, Normal)
@register_kl(MultivariateNormal, FlowDistribution)
@register_kl(Independent, FlowDistribution)
@register_kl(Normal, FlowDistribution)
def _kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(p || q) of two Gaussians; between factorized ones no matrix is made."""
    normals = [_as_normal("p", p), _as_normal("q", q)]
    if p.event_shape != q.event_shape:  # one of size 1 would be taken for each variable's
        raise ValueError(f"q: expected one over {tuple(p.event_shape)} like p, got {tuple(q.event_shape)}")
    if not any(isinstance(each, MultivariateNormal) for each in normals):
        return kl_divergence(*normals)
    one, other = (_with_matrix(each) for each in normals)
    unit = other.scale_tril  # both in the units of q; torch's own formula cannot do it for no rows
    away = torch.linalg.solve_triangular(unit, (one.loc - other.loc).unsqueeze(-1), upper=False).squeeze(-1)
    tril = torch.linalg.solve_triangular(unit, one.scale_tril, upper=False)
    return gaussian_kl(away, tril)


def _as_normal(name: str, given: Distribution) -> MultivariateNormal | Independent:
    """The Gaussian over vectors that a distribution is, independent in each variable where that is known."""
    if isinstance(given, MultivariateNormal):
        return given
    if isinstance(given, FlowDistribution) and given.is_gaussian:
        if given._is_factorized:
            return Independent(Normal(*given._loc_scale(), validate_args=False), 1, validate_args=False)
        loc, scale_tril = given.gaussian()
        return MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)
    if isinstance(given, Independent) and _is_diagonal(given):
        return given
    if isinstance(given, Normal):
        raise TypeError(
            f"{name}: expected a distribution over vectors, got a bare Normal; wrap it in Independent(..., 1)"
        )
    raise NotImplementedError(
        f"kl_divergence: {name} is {_named(given)}, and only two Gaussians over vectors have a KL in closed form; "
        f"estimate it from samples z of p, (p.log_prob(z) - q.log_prob(z)).mean(0)"
    )


def _with_matrix(given: MultivariateNormal | Independent) -> MultivariateNormal:
    if isinstance(given, MultivariateNormal):
        return given
    loc, scale = given.base_dist.loc, given.base_dist.scale
    return MultivariateNormal(loc, scale_tril=torch.diag_embed(scale), validate_args=False)


def _is_diagonal(given: Independent) -> bool:
    return isinstance(given.base_dist, Normal) and given.reinterpreted_batch_ndims == 1


def _named(given: Distribution) -> str:
    if isinstance(given, FlowDistribution):
        return f"a flow of {type(given.flow).__name__}"
    if isinstance(given, Independent):
        return f"Independent({type(given.base_dist).__name__}, {given.reinterpreted_batch_ndims})"
    return f"a {type(given).__name__}"
