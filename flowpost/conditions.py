"""A condition y on its way to the parts of a conditional VAE, and its prior p(z|y)."""

from __future__ import annotations

import inspect
import warnings
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.bijectors.autoregressive import Masked
from flowpost.directions import slow_steps
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import check_module
from flowpost.numerics.watchers import changes, check_left, recordable
from flowpost.posterior import FlowPosterior
from flowpost.wrapped import WrappedPosterior

Prior = FlowPosterior | WrappedPosterior
"""p(z), of a posterior without features; p(z|y), of one that reads y as its features, or of a wrapped encoder of y."""

Data = tuple[Tensor, Tensor | None]
"""The x, and y where there is a condition."""

_OF_A_DEVICE = ("synchronizing", "CUDA error")
"""In what a GPU says of itself, such as of a host read or a step that cannot be captured, whatever the numbers are."""


def check_prior(prior: Prior, posterior: FlowPosterior) -> None:
    """Refuse a prior over another space than the posterior's, and warn of one that takes a sweep to score any z."""
    dim, (low, high) = posterior.dim, posterior.flow.codomain
    if not isinstance(prior, (FlowPosterior, WrappedPosterior)):
        raise TypeError(f"prior: expected a posterior, such as realnvp(0, dim={dim}), got {type(prior).__name__}")
    _check_asked("prior", prior)
    if prior.dim != dim:
        raise ValueError(f"prior: expected one of dim={dim}, the posterior's, got dim={prior.dim}")
    flow = (prior.posterior if isinstance(prior, WrappedPosterior) else prior).flow
    if low < flow.codomain[0] or high > flow.codomain[1]:
        raise ValueError(
            f"prior: expected one of all z that the posterior gives, numbers between {low} and {high}, got one of "
            f"numbers between {flow.codomain[0]} and {flow.codomain[1]}, elsewhere of no density; end both in one step"
        )
    if count := sum(isinstance(step, Masked) for step in slow_steps(flow, inverse=True)):
        warnings.warn(
            f"prior: log p(z) takes a sweep over the variables in each of {count} autoregressive steps, whose fast "
            f"direction is to draw; expected steps that score any z fast, as maf(0, dim={dim}) and realnvp(0, "
            f"dim={dim}) have",
            UserWarning,
            stacklevel=3,
        )


def check_part(name: str, part: object) -> None:
    """Refuse a part of a VAE that is no module, or a posterior with methods of its own that nobody would call."""
    check_module(name, part)
    if name == "posterior" and not hasattr(part, "at"):
        raise TypeError(
            f"posterior: expected a FlowPosterior, such as flowpost.iaf(features, dim), got {type(part).__name__}, "
            f"which has no at(h); one within another module is put in as it is, and the whole VAE into such a module"
        )
    _check_asked(name, part, apart=isinstance(part, WrappedPosterior))


def check_bare(encoder: object, others: int) -> None:
    """Refuse a wrapped encoder within another module, as of a compiler, where it stands for encoder and posterior."""
    inner = getattr(encoder, "_orig_mod", getattr(encoder, "module", None))
    if others < 3 and isinstance(inner, WrappedPosterior):
        kind = type(encoder).__name__
        raise TypeError(
            f"encoder: expected what flowpost.wrap made, got {kind} around it, of which a VAE cannot take encoder and "
            f"posterior; give the wrapped encoder itself, and then the whole VAE to {kind}"
        )


def _check_asked(name: str, part: object, *, apart: bool = False) -> None:
    """Refuse a subclass whose draws and log q are not those of its ``at``; or if it is taken apart, of its parts."""
    if not isinstance(part, (FlowPosterior, WrappedPosterior)):
        return
    kind = FlowPosterior if isinstance(part, FlowPosterior) else WrappedPosterior
    if type(part).at is not kind.at and not apart:
        return
    names = ["forward", "log_prob", "path_log_prob", "gaussian", "is_gaussian", *(["at", "features"] if apart else [])]
    for own in names:
        if getattr(type(part), own) is not getattr(kind, own):
            cure = "write an encode of the VAE's own" if apart else "write an at(h) that gives such a q"
            raise TypeError(
                f"{name}: expected draws and log q as {kind.__name__} has them, got {type(part).__name__} with a {own} "
                f"of its own, which a VAE does not call; {cure}"
            )


def reads(prior: Prior | None) -> bool:
    """Whether it is a p(z|y)."""
    return isinstance(prior, WrappedPosterior) or (prior is not None and prior.features > 0)


def prior_at(prior: Prior, y: Tensor | None) -> FlowDistribution:
    """The p(z), or p(z|y) of each row of y."""
    return prior.at(condition(y)) if reads(prior) else cast(FlowPosterior, prior).at()


def condition(y: Tensor | None) -> Tensor:
    """The condition that a prior p(z|y) reads."""
    if y is None:
        raise ValueError("y: expected the condition that the prior p(z|y) reads, got None; pass y=")
    return y


def check_rows(y: Tensor, count: int, of: str) -> None:
    """Refuse a condition that has not one row for each."""
    if not isinstance(y, Tensor) or not y.ndim or len(y) != count:
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: expected a tensor ({count}, ...), a row for each {of}, got {got}")


def row_for_each(y: Tensor | None, count: int) -> Tensor | None:
    """A row of y for each draw; one row serves all of them."""
    if y is None:
        return None
    y = y.expand(count, *y.shape[1:]) if isinstance(y, Tensor) and y.ndim and len(y) == 1 else y
    check_rows(y, count, "draw")
    return y


def call(name: str, part: nn.Module, given: Tensor, y: Tensor | None) -> Tensor:
    """What a part makes of its input and of y, each row of which goes to one row of the input."""
    if y is not None and not torch.compiler.is_compiling():
        _check_takes_two(name, part)
    before = changes(given)
    made = part(given) if y is None else part(given, y)
    check_left(name, given, before)
    return made


def encode(encoder: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """What an encoder makes of x; an embedding reads integers, of which other layers say no more than `mat1`."""
    if x.is_floating_point():
        return call("encoder", encoder, x, y)
    try:
        return call("encoder", encoder, x, y)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if any(word in reason for word in _OF_A_DEVICE):
            raise
        raise TypeError(f"x: expected what the encoder takes, got {x.dtype} ({reason}); write x.float()") from error


def spread(y: Tensor, batch: tuple[int, ...]) -> Tensor:
    """The rows of y ``(B, *event)`` for each of z's leading axes ``(*samples, B)``, those in one: ``(N, *event)``."""
    check_rows(y, batch[-1], "z along its last axis but one")
    return y.expand(*batch, *y.shape[1:]).flatten(0, len(batch) - 1)


def split(x: Tensor, y: Tensor | None, size: int) -> list[Data]:
    """Both in parts of `size` rows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor of all examples, (B, *event), got {type(x).__name__}")
    parts = x.split(size)
    if y is None:
        return [(part, None) for part in parts]
    check_rows(y, len(x), "x")
    return list(zip(parts, y.split(size), strict=True))


def kept(data: Data) -> Data:
    """The rows as autograd can keep them, which it cannot do with tensors that ``torch.inference_mode`` made."""
    x, y = data
    with torch.inference_mode(mode=False):
        return recordable(x), None if y is None else recordable(y)


def _check_takes_two(name: str, part: nn.Module) -> None:
    try:
        signature = inspect.signature(part.forward)
    except ValueError:  # a scripted module says so itself, when it is called
        return
    try:
        signature.bind(None, None)
    except TypeError:
        takes = ", ".join(signature.parameters) or "nothing"
        first = "x" if name == "encoder" else "z"
        raise TypeError(
            f"{name}: expected a forward({first}, y), for a condition y is given, got {type(part).__name__}, whose "
            f"forward takes {takes}; write a module that takes both, and uses y or leaves it"
        ) from None
