"""q(.|x) in Pyro: as a guide's distribution, in plates, under both ELBOs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowpost.density import Sample
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import from_list
from flowpost.numerics.remembered import Remembered, remember

try:
    from pyro.distributions.torch_distribution import TorchDistributionMixin  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("flowpost.interop.pyro needs Pyro: pip install 'flowpost[pyro]'") from error


class PyroFlow(FlowDistribution, TorchDistributionMixin):
    """q(.|x) as a distribution of Pyro's, with event dim 1; `as_pyro` makes it.

    Pyro draws a sample first and asks for its log q later. The object remembers the log q of the last sample that it
    drew, so that nothing is inverted: for that tensor alone, and only while it, the context and the flow's parameters
    are as they were, and gradients are wanted or not as they were. Any other z is scored by the flow's inverse.

    The remembered log q has a gradient in the parameters and the features, through the pass that drew z: the total
    derivative, as reparameterization wants it. It is no function of z itself: for ``d log q / dz`` ask for the log q of
    ``z.clone()``, or for `path_log_prob`.

    A Gaussian q has its KL to a ``Normal(...).to_event(1)`` and to a ``MultivariateNormal`` in closed form, which
    `TraceMeanField_ELBO` finds; for any other it takes log q, as `Trace_ELBO` does.
    """

    _last: Remembered | None = None

    def draw(self, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None) -> Sample:
        """As `FlowDistribution.draw`; the log q of a fresh sample is remembered."""
        sample = super().draw(sample_shape, noise)
        if noise is None:
            self._last = remember(sample.log_prob, self._read(sample.z), self.flow)
        return sample

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A reparameterized sample ``(*sample_shape, *batch_shape, dim)``, whose log q is remembered."""
        return self.draw(from_list(sample_shape)).z

    def log_prob(self, value: Tensor) -> Tensor:
        """The log q(value|x): of the last own sample as it was drawn, of any other value by the flow's inverse."""
        if self._last is not None and self._last.fits(self._read(value), self.flow):
            return self._last.result
        return super().log_prob(value)

    @property
    def _is_of_flow(self) -> bool:
        return type(self).log_prob is PyroFlow.log_prob

    def _read(self, z: Tensor) -> list[Tensor]:
        """All that the flow makes log q(z|x) of."""
        return [z, *([] if self.context is None else [self.context])]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_last"}  # a copy has drawn nothing


def as_pyro(q: FlowDistribution) -> PyroFlow:
    """The q(.|x) as a distribution of Pyro's, for ``pyro.sample`` in a guide, or in a model.

    Its batch shape is q's, its event dim 1. Parameters are registered as Pyro does it: by ``pyro.module``.

    Args:
        q: what ``posterior.at(h)``, ``wrapped.at(x)`` or ``vae.encode(x)`` gives.

    Returns:
        The same q; the context is shared, nothing is computed.

    Raises:
        TypeError: if `q` is no `FlowDistribution`, or one of a subclass with a `log_prob` of its own.

    Example:
        >>> encoder, posterior = nn.Linear(9, 16), flowpost.planar(16, dim=2)
        >>> def guide(x):
        ...     pyro.module("encoder", encoder), pyro.module("posterior", posterior)
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("z", as_pyro(posterior.at(encoder(x))))
        >>> import pyro
        >>> guide(torch.ones(5, 9)).shape
        torch.Size([5, 2])
    """
    if not isinstance(q, FlowDistribution):
        raise TypeError(f"q: expected a FlowDistribution, as posterior.at(h) gives it, got {type(q).__name__}")
    if not q._is_of_flow:
        raise TypeError(
            f"q: expected one with the log q of its flow, got {type(q).__name__} with a log_prob of its own"
        )
    return PyroFlow(q.flow, q.context, tuple(q.batch_shape), validate_args=q._validate_args)
