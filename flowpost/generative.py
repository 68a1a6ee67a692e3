"""The generative half of a VAE: p(x, z) = p(x|z) p(z), drawn from and scored."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowpost.conditions import Prior, call, prior_at, reads, row_for_each, spread
from flowpost.density import like_of, standard_normal_log_prob
from flowpost.likelihoods import Likelihood
from flowpost.numerics.arguments import check_noise
from flowpost.numerics.watchers import changes, check_left
from flowpost.outputs import kind
from flowpost.posterior import FlowPosterior


class Generative(nn.Module):
    """``p(x, z) = p(x|z) p(z)``, or ``p(x|z, y) p(z|y)``, of a model that has a decoder, a likelihood and a prior."""

    decoder: nn.Module
    likelihood: Likelihood
    prior: Prior | None
    """None is N(0, I)."""
    posterior: FlowPosterior
    """It says how many latents there are, on which device and of which dtype."""

    def log_joint(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log p(x|z) and log p(z), each ``(*samples, B)``, for x ``(B, *event)`` and z ``(*samples, B, dim)``."""
        return self._log_likelihood(x, z, y), self.log_prior(z, y)

    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The log p(z), or log p(z|y), ``(*batch)``, of z ``(*batch, dim)``."""
        return standard_normal_log_prob(z) if self.prior is None else prior_at(self.prior, y).log_prob(z)

    def _has_given_prior(self) -> bool:
        """Whether p(z) is that of `prior`, or N(0, I): a model may have a `log_prior` or `log_joint` of its own."""
        names = {"log_prior": Generative.log_prior, "log_joint": Generative.log_joint}
        return not any(self._has_own(name, given) for name, given in names.items())

    def _has_own(self, name: str, given: Callable[..., object]) -> bool:
        """Whether a subclass, or this very model, has a method of its own in the place of the given one."""
        return name in self.__dict__ or getattr(type(self), name) is not given

    def sample_prior(self, count: int, y: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Draw z ~ p(z), ``(count, dim)``, or one of p(z|y) for each row of y, of which a single one serves all.

        `noise`, a standard normal draw of that shape, takes the place of a fresh one.

        Raises:
            NotImplementedError: of a model with a `log_prior` of its own and no ``sample_prior``.
            TypeError: for a noise of another dtype than the posterior's.
            ValueError: for a noise of another shape or device.
        """
        own = self._has_own("log_prior", Generative.log_prior)
        if own and not self._has_own("sample_prior", Generative.sample_prior):
            raise NotImplementedError(
                f"sample_prior: expected one of {type(self).__name__}'s own, as its log_prior is its own"
            )
        if self.prior is not None:
            shape = () if reads(self.prior) else (count,)
            return prior_at(self.prior, row_for_each(y, count)).draw(shape, noise).z
        shape, like = (count, self.posterior.dim), like_of(self.posterior.flow, None)
        if noise is None:
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        check_noise(noise, shape, like)
        return noise

    @torch.no_grad()
    def sample(self, count: int, shape: tuple[int, ...], y: Tensor | None = None) -> Tensor:
        """Draw x ~ p(x), or p(x|y), ``(count, *shape)``, for the shape of one x; y as in `sample_prior`."""
        y = row_for_each(y, count)
        numbers = self._numbers(self.sample_prior(count, y), shape, y)
        return self.likelihood.sample(numbers).view(count, *shape)

    def decode(self, z: Tensor, elements: int, y: Tensor | None = None) -> Tensor:
        """The likelihood's numbers ``(*batch, numbers, elements)`` for z ``(*batch, dim)`` and y ``(B, *event)``."""
        return self._decode(z, elements, y)

    def _numbers(self, z: Tensor, event: tuple[int, ...], y: Tensor | None) -> Tensor:
        """As `decode`, for the shape of one x: the decoder's axes are held to it, unless the model has its own."""
        elements = _elements_of(event)
        if self._has_own("decode", Generative.decode):
            return self.decode(z, elements, y)
        return self._decode(z, elements, y, tuple(event))

    def _decode(self, z: Tensor, elements: int, y: Tensor | None, event: tuple[int, ...] = ()) -> Tensor:
        y = None if y is None else spread(y, z.shape[:-1])
        outputs = call("decoder", self.decoder, z.flatten(0, -2), y)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"decoder: expected a tensor of the likelihood's numbers, got {kind(outputs)}; write a module whose "
                f"forward takes the tensor out of it"
            )
        if not outputs.is_floating_point():
            raise TypeError(f"decoder: expected numbers with a gradient, got {outputs.dtype}")
        numbers, rows = self.likelihood.numbers, z.shape[:-1].numel()
        if not outputs.ndim or len(outputs) != rows:
            raise ValueError(
                f"decoder: expected a row of numbers for each of {rows} z, got shape {tuple(outputs.shape)}; expand "
                f"what they share"
            )
        _check_axes(outputs, numbers, event)
        outputs = (outputs.flatten(1) if outputs.ndim > 1 else outputs.unsqueeze(-1)).to(z.dtype)
        if outputs.shape[1] != numbers * elements:
            name = type(self.likelihood).__name__
            raise ValueError(
                f"decoder: expected {numbers} x {elements} outputs per example for {name}, got {outputs.shape[1]}"
            )
        return outputs.view(*z.shape[:-1], numbers, elements)

    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        elements = x.flatten(1) if x.ndim > 1 else x.unsqueeze(-1)  # a number is an x too
        numbers = self._numbers(z, tuple(x.shape[1:]), y)
        before = changes(elements)
        found = self.likelihood.log_prob(numbers, elements)
        check_left("likelihood", elements, before)
        if found.shape != z.shape[:-1]:  # it would broadcast against log p(z)
            raise ValueError(
                f"likelihood: expected a log p(x|z) for each z, {tuple(z.shape[:-1])}, got shape {tuple(found.shape)} "
                f"for x of shape {tuple(x.shape)}; log_prob sums over the elements of x"
            )
        return found


def _elements_of(shape: tuple[int, ...]) -> int:
    """How many numbers there are in one x."""
    try:
        return math.prod(shape)
    except TypeError:
        raise TypeError(f"shape: expected the shape of one x, a tuple of ints, got {shape!r}") from None


def _check_axes(outputs: Tensor, numbers: int, event: tuple[int, ...]) -> None:
    """Refuse the numbers of each element side by side, or of each channel: they would be mixed up.

    A transformer gives logits ``(N, *event, levels)``, and a PixelCNN ``(N, channels, levels, height, width)``.
    """
    shape = tuple(outputs.shape[1:])
    if numbers == 1 or shape == (numbers, *event):
        return
    for axis in range(1, len(event) + 1):
        if shape == (*event[:axis], numbers, *event[axis:]) and _elements_of(event[:axis]) > 1:
            behind = axis == len(event)
            where, place = ("behind", -1) if behind else (f"behind {axis} of them", axis + 1)
            raise ValueError(
                f"decoder: expected the likelihood's {numbers} numbers in front of the axes of x, (N, "
                f"{', '.join(map(str, (numbers, *event)))}), got shape {tuple(outputs.shape)}, with them {where}; give "
                f"outputs.movedim({place}, 1)"
            )


def check_decoder(decoder: nn.Module, likelihood: Likelihood) -> None:
    """Refuse one that ends in a sigmoid where the likelihood reads logits."""
    last = decoder
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    if getattr(likelihood, "reads_logits", False) and isinstance(last, nn.Sigmoid):
        raise ValueError(
            f"decoder: expected logits for {type(likelihood).__name__}, got one that ends in a Sigmoid; leave it out, "
            f"for likelihood.mean applies it"
        )
