"""The posterior: features of x in, a sample of z and its log q(z|x) out, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import LINE, Bijector, check_step
from flowpost.bijectors.wrappers import Learned, linear_head
from flowpost.checks import active, check_finite
from flowpost.density import Sample, batch_of, draw, log_density, path_log_density
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import (
    FLOATS,
    check_int,
    check_module,
    check_untraced,
    check_wide,
    expands,
    refuse_shards,
)
from flowpost.numerics.constants import follow
from flowpost.numerics.repeated import refuse_random
from flowpost.numerics.states import keep_constants
from flowpost.numerics.watchers import changes, check_left, first_parameter, full_precision


class FlowPosterior(nn.Module):
    """A posterior q(z|x) whose samples are a flow of standard normal noise: ``z = f(noise; head(h))``.

    ``log q(z|x) = log N(noise; 0, I) - log|det dz/dnoise|``, summed in float64 and returned in z's dtype. A sample is
    scored by the log-det of the pass that made it; nothing is inverted. A row that is not finite has log q = nan, and
    the other rows are exact. h may have any leading axes; samples come in front of them.

    A call is the short way to a sample. `at` gives q(.|x) as an object, for whatever needs more than one thing of it:
    the head runs once. A VAE calls `at`: forward hooks of `head` and `flow` run then, those of the posterior do not.

    Args:
        features: size of the encoder's features h; 0 for a posterior without an encoder, whose context is learned.
        flow: the bijector from noise to z; the last step listed acts last.
        head: from h to the flow's context; by default a linear layer that starts the flow near its identity, on the
            flow's device and of its dtype.

    Raises:
        TypeError: if `flow` is no Bijector, or `head` no module.
        ValueError: if `features` is negative, or the flow's domain is not the line.

    Reference:
        Rezende & Mohamed (2015); Kingma & Welling (2019), sections 2.4.4 and 3.2.2, eq. 3.10 to 3.16.

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
        check_step("flow", flow)
        if flow.domain != LINE:
            raise ValueError(f"flow: expected one from all real numbers, where noise lies, got domain {flow.domain}")
        self.flow = flow if features or not flow.context_size else Learned(flow)
        if head is not None:
            check_module("head", head)
        elif features and flow.context_size:
            head = linear_head(features, flow)
        self.head = head
        self.register_load_state_dict_pre_hook(keep_constants)
        self.register_load_state_dict_post_hook(follow)

    @property
    def dim(self) -> int:
        """Size of the last axis of z."""
        return self.flow.dim

    @property
    def is_gaussian(self) -> bool:
        """Whether q(z|x) is Gaussian for every x, so that `gaussian` gives its mean and Cholesky factor.

        Of a subclass with an `at` of its own, nobody knows, unless it says so.
        """
        return self.flow._is_triangular() and type(self).at is FlowPosterior.at

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
            TypeError: for an h that is no floating tensor, a `sample_shape` that is no tuple of ints, or a noise of
                another dtype than the posterior's.
            ValueError: for a wrong width, shape or device, or a negative sample axis.
        """
        return draw(self.flow, self.context(h), batch_of(h), sample_shape, noise)

    def at(self, h: Tensor | None = None, *, validate_args: bool = False) -> FlowDistribution:
        """The q(.|x) of features h, as a `torch.distributions.Distribution`; the head runs here, and once.

        It draws (`draw`, `sample`, `rsample`, `rsample_and_log_prob`), scores (`log_prob`, `path_log_prob`) and, where
        it is Gaussian, has `gaussian`, `mean`, `variance`, `entropy` and an exact ``kl_divergence``.

        Args:
            h: features ``(*batch, features)``; None for a posterior without an encoder.
            validate_args: whether `log_prob` looks at its argument's values, for which the host waits.

        Returns:
            The distribution, of batch shape ``(*batch)``.

        Raises:
            TypeError: for an h that is no floating tensor.
            ValueError: for a wrong width or device.

        Example:
            >>> q = flowpost.planar(16, dim=2).at(torch.randn(8, 16))
            >>> sample = q.draw((50,))
            >>> q.path_log_prob(sample).shape
            torch.Size([50, 8])
        """
        return FlowDistribution(self.flow, self.context(h), batch_of(h), validate_args=validate_args)

    def context(self, h: Tensor | None = None) -> Tensor | None:
        """What the head makes of features h, ``(*batch, context_size)``: the numbers that the flow reads.

        h is cast to the head's dtype, and the head runs without autocast.

        Args:
            h: features ``(*batch, features)``; None for a posterior without an encoder.

        Returns:
            The context, of the head's dtype; None where the flow reads none, or has learned it.

        Raises:
            TypeError: for an h that is no floating tensor.
            ValueError: for a wrong width or device, or a head that gives no row for each of h.
        """
        check_untraced()
        refuse_shards(self)
        h = self._check_features(h)
        if h is None or self.head is None:
            return None
        # The head's outputs are the map's parameters: half a digit less there is a tenth of a nat in log q.
        before = changes(h)
        with full_precision(h.device.type):
            context = self.head(h)
        check_left("head", h, before)
        if isinstance(context, Tensor) and not expands(context.shape[:-1], h.shape[:-1]):  # one more axis mixes rows
            rows = ", ".join(map(str, h.shape[:-1]))
            raise ValueError(
                f"head: expected a row for each of h, ({rows}, {self.flow.context_size}), got {tuple(context.shape)}"
            )
        return context

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
        return log_density(self.flow, z, self.context(h), batch_of(h))

    def path_log_prob(self, sample: Sample, h: Tensor | None = None) -> Tensor:
        """The log q(z|x) of an own sample as a function of z alone: parameters and h are held fixed.

        The value is ``sample.log_prob``, the gradient ``dlog q/dz`` at ``sample.z``: in place of log q in an objective,
        it leaves out the score ``dlog q/dparameters``, whose mean is 0 (sticking the landing). For every posterior:
        nothing is searched, the preimage is ``sample.noise``. Costs an inverse at a known preimage and its gradient;
        where no gradient is asked for, nothing. First and second derivatives are exact; a further one, and under
        ``torch.func`` a second one, raises.

        Args:
            sample: what this posterior returned for h.
            h: the same features; None for a posterior without an encoder.

        Returns:
            ``(*sample_shape, *batch)``.

        Raises:
            TypeError: if `sample` is no Sample, and as `forward`.
            ValueError: as `forward`; with dropout in train mode in the flow or the head, which would be other ones now,
                or batch norm in the flow, whose rows it mixes.
            RuntimeError: under `torch.export`, unless under `torch.no_grad`; where its gradient is differentiated more
                often than above.

        Reference:
            Roeder, Wu & Duvenaud (2017), Sticking the Landing: Simple, Lower-Variance Gradient Estimators for VI.
        """
        if self.head is not None and torch.is_grad_enabled():
            refuse_random("head", self.head, "q = posterior.at(h) runs it once: q.path_log_prob(q.draw())")
        with torch.no_grad():
            context = self.context(h)
        return path_log_density(self.flow, sample, context)

    def gaussian(self, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean ``(*batch, dim)`` and Cholesky factor ``(*batch, dim, dim)`` of a Gaussian posterior.

        Raises:
            TypeError: if the posterior is not Gaussian (`is_gaussian` tells).
        """
        return self.at(h).gaussian()

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
        like = None if self.head is None else first_parameter(self.head)
        like = first_parameter(self) if like is None else like
        if like is None:
            return h if h.dtype in FLOATS else h.float()
        check_wide(like)
        if h.device != like.device:
            raise ValueError(f"h: expected device {like.device} like the parameters, got {h.device}")
        return h.to(like.dtype)
