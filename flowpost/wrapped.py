"""An encoder and the posterior on its output, as one module."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowpost.checks import active, check_finite
from flowpost.density import Sample
from flowpost.distribution import FlowDistribution
from flowpost.numerics.repeated import refuse_random
from flowpost.outputs import Read, Reading
from flowpost.posterior import FlowPosterior

E = TypeVar("E", bound="Encoding")


class Encoding(nn.Module):
    """A module with an encoder, which stays in eval mode if it is frozen and rests there."""

    _resting = False  # as a module has it that was pickled before

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._resting = not encoder.training

    def train(self: E, mode: bool = True) -> E:  # noqa: FBT001, FBT002
        """Set the mode, but leave in eval mode an encoder that rests there and none of whose parameters is trained."""
        if self.training:  # else the encoder is in eval mode because the whole is
            self._resting = not self.encoder.training
        super().train(mode)
        wanting = [parameter.requires_grad for parameter in self.encoder.parameters()]
        if self._resting and wanting and not any(wanting):
            self.encoder.eval()
        return self


class WrappedPosterior(Encoding):
    """An encoder and the posterior on its output, as one module; made by `wrap`.

    Inputs and keywords go to the encoder. Whatever needs more than one thing of q(z|x) takes them from one and the same
    pass of the encoder (with dropout, a second pass would give others): ``q = wrapped.at(x)``, ``sample = q.draw()``,
    and then ``q.path_log_prob(sample)``.
    """

    def __init__(self, encoder: nn.Module, posterior: FlowPosterior, *, pair: bool, read: Read | None = None) -> None:
        super().__init__(encoder)
        self.posterior, self.reading = posterior, Reading(read, pair, posterior.dim)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Another encoder may have other arguments of the posterior's names."""
        super().__setattr__(name, value)
        if name == "encoder":
            arguments = _arguments(value)
            self._taken = tuple(each for each in ("sample_shape", "noise") if each in arguments)

    @property
    def dim(self) -> int:
        """Size of the last axis of z."""
        return self.posterior.dim

    @property
    def is_gaussian(self) -> bool:
        """Whether q(z|x) is Gaussian for every x."""
        return self.posterior.is_gaussian

    def forward(
        self, *inputs: object, sample_shape: tuple[int, ...] = (), noise: Tensor | None = None, **kwargs: object
    ) -> Sample:
        """Draw z ~ q(z|x) with its log-density; inputs and keywords go to the encoder."""
        if self._taken and (sample_shape != () or noise is not None):
            raise TypeError(
                f"{self._taken[0]}: the encoder has an argument of this name, so whose it is cannot be told; "
                f"pass the encoder's to at(), and the posterior's to at(...).draw(sample_shape, noise)"
            )
        return self.posterior(self.features(*inputs, **kwargs), sample_shape, noise)

    def at(self, *inputs: object, **kwargs: object) -> FlowDistribution:
        """The q(.|x) as a `torch.distributions.Distribution`; the encoder runs here, and once."""
        return self.posterior.at(self.features(*inputs, **kwargs))

    def log_prob(self, z: Tensor, /, *inputs: object, **kwargs: object) -> Tensor:
        """The log q(z|x) of any z."""
        return self.posterior.log_prob(z, self.features(*inputs, **kwargs))

    def path_log_prob(self, sample: Sample, /, *inputs: object, **kwargs: object) -> Tensor:
        """The log q(z|x) of an own sample as a function of z alone, as `FlowPosterior.path_log_prob`.

        Raises:
            ValueError: as that, and with dropout in train mode in the encoder, which is run again.
        """
        if torch.is_grad_enabled():
            refuse_random("encoder", self.encoder, "q = wrapped.at(x) runs it once: q.path_log_prob(q.draw())")
        return self.posterior.path_log_prob(sample, self.features(*inputs, **kwargs))

    def gaussian(self, *inputs: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of a Gaussian posterior, as `FlowPosterior.gaussian`."""
        return self.at(*inputs, **kwargs).gaussian()

    def features(self, *inputs: object, **kwargs: object) -> Tensor:
        """The encoder's output, as `read`; a pair ``(loc, log_var)`` side by side."""
        h = self.reading(self.encoder(*inputs, **kwargs))
        if active() and all(bool(x.isfinite().all()) for x in inputs if isinstance(x, Tensor)):
            check_finite("context", h, "; the encoder output is not finite, its input was finite")
        return h

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        own = [*self.encoder.state_dict()]
        found = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if own and set(found) == set(own) and not any(key.startswith("posterior.") for key in found):
            for key in own:  # it is of the encoder alone, from before it was wrapped
                state_dict[f"{prefix}encoder.{key}"] = state_dict.pop(f"{prefix}{key}")
            state_dict.update(self.posterior.state_dict(prefix=f"{prefix}posterior."))
        elif own and not any(key.startswith("encoder.") for key in found):
            warnings.warn(
                f"load_state_dict: nothing of the encoder was loaded; expected keys such as {prefix}encoder.{own[0]}, "
                f"or those of the encoder alone, such as {prefix}{own[0]}",
                UserWarning,
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _arguments(encoder: nn.Module) -> list[str]:
    """The names of what its ``forward`` takes; none where that cannot be told, as of a scripted module."""
    encoder = getattr(encoder, "_orig_mod", encoder)  # of a compiled one, which says that it takes anything
    try:
        return list(inspect.signature(encoder.forward).parameters)
    except ValueError:
        return []
