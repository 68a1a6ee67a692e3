"""From a step to a `torch.distributions.Transform`, and back: two methods of every bijector."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from torch import Tensor
from torch.distributions import Transform

from flowpost.bijectors._as_transform import StepTransform
from flowpost.numerics.watchers import first_parameter

if TYPE_CHECKING:
    from flowpost.bijectors.base import Bijector


class Interchange:
    """What makes a `Bijector` and a `torch.distributions.Transform` of one another."""

    def as_transform(self, context: Tensor | None = None) -> StepTransform:
        """The step at one context as a `torch.distributions.Transform` of event dim 1, from noise to posterior.

        A `Transform` is asked for image and log-det one after the other; each is a pass of the step. ``with_cache()``
        remembers the last pair and its log-det, while nothing that they were made of changes. The parameters stay the
        step's: a `TransformedDistribution` holds none.

        Args:
            context: ``(*batch, context_size)``; its batch broadcasts with the base distribution's. None where the step
                reads none.

        Returns:
            The transform, of this very step: nothing is copied.

        Raises:
            TypeError: for a context that is no floating tensor.
            ValueError: for a wrong or missing context, or a step of events with more than one axis.

        Example:
            >>> step, base = Planar(2), torch.distributions.Normal(torch.zeros(2), 1.0)
            >>> transform = step.as_transform(torch.randn(5, step.context_size))
            >>> q = torch.distributions.TransformedDistribution(base, [transform])
            >>> q.log_prob(q.rsample((3,))).shape
            torch.Size([3, 5])
        """
        step = cast("Bijector", self)
        if step.event_ndim != 1:
            raise ValueError(f"step: expected one of vectors, got event_ndim={step.event_ndim}")
        like = first_parameter(step)
        if like is None:
            like = context if isinstance(context, Tensor) and context.is_floating_point() else step._like
        return StepTransform(step, step._check(like.new_empty(step.dim), context))

    @staticmethod
    def from_transform(
        transform: Transform | Callable[..., Transform],
        dim: int,
        context_size: int = 0,
        *,
        start: Tensor | None = None,
    ) -> Bijector:
        """A `torch.distributions.Transform`, or a zuko transform, as a step.

        - A `Transform` as it is: its tensors are constants of the step, which follow z's device and dtype. The step
          copies it and never fills its cache.
        - A module whose call gives a `Transform`, such as zuko's lazy ones: its parameters are the step's. With a
          `context_size` it is called with the context, ``(*batch, context_size)``, else with nothing.
        - Any other function of the context, which has no parameters of its own.

        The step's inverse is the transform's, and costs what that costs, also where the preimage is known; its log-det
        is the transform's, summed over the variables where that acts on each by itself. It is as exact as the transform
        is: `flowpost.testing.check_bijector` tells.

        Args:
            transform: bijective, of event dim 0 or 1, onto vectors of the same size.
            dim: size of z.
            context_size: how many numbers per example the module or function reads.
            start: the step's ``initial_context``, where a head's bias starts; zeros by default.

        Returns:
            The step, whose `domain` and `codomain` are the transform's.

        Raises:
            TypeError: if `transform` is neither a `Transform` nor makes one, or a method of a module with parameters.
            ValueError: for one that is not bijective, of larger events, of another size, from or onto anything but one
                interval for all variables, or with parameters outside of a module.

        Warns:
            UserWarning: for a function that names a module with parameters, which would not be the step's.

        Example:
            >>> from torch.distributions.transforms import AffineTransform, TanhTransform
            >>> step = Bijector.from_transform(TanhTransform(), dim=2)
            >>> step.codomain
            (-1.0, 1.0)
            >>> affine = lambda c: AffineTransform(c[..., :2], c[..., 2:].exp())
            >>> posterior = FlowPosterior(16, Bijector.from_transform(affine, dim=2, context_size=4))
        """
        from flowpost.bijectors._from_transform import TransformStep  # it is a Bijector, and stands on the base

        return TransformStep(transform, dim, context_size, start)
