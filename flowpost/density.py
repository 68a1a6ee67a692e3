"""z and its log q: what a flow of standard normal noise and its context give."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.bijectors._within import apply, apply_inverse
from flowpost.bijectors.base import Bijector
from flowpost.checks import active, check_own, warn_moved
from flowpost.numerics.along import along
from flowpost.numerics.arguments import check_noise, check_sample_shape
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.repeated import refuse_random
from flowpost.numerics.watchers import changes, check_left, exporting, first_parameter, full_precision, watched

_LOG_2PI = math.log(2 * math.pi)


class Sample(NamedTuple):
    """What a posterior returns."""

    z: Tensor
    """``(*sample_shape, *batch, dim)``"""
    log_prob: Tensor
    """log q(z|x), ``(*sample_shape, *batch)``"""
    noise: Tensor
    """The draw from N(0, I) that was mapped to z, of z's shape."""


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """The log N(z; 0, I) of z ``(*batch, dim)``, ``(*batch)``."""
    return _normal(z).to(z.dtype)


def draw(
    flow: Bijector, context: Tensor | None, batch: tuple[int, ...], sample_shape: tuple[int, ...], noise: Tensor | None
) -> Sample:
    """Map noise to z, with the log-density of z that the same pass gives."""
    z, log_det, noise = push(flow, context, batch, sample_shape, noise)
    return Sample(z, _score(noise, log_det, -1), noise)


def push(
    flow: Bijector, context: Tensor | None, batch: tuple[int, ...], sample_shape: tuple[int, ...], noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Map noise to z, with the log-det of the map and the noise."""
    shape, like = (*check_sample_shape(sample_shape), *batch, flow.dim), like_of(flow, context)
    if noise is None:
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
    else:
        check_noise(noise, shape, like)
    before = changes(noise)
    z, log_det = apply(flow, noise, flow._check(noise, context))
    check_left("flow", noise, before)
    return z, log_det, noise


def log_density(flow: Bijector, z: Tensor, context: Tensor | None, batch: tuple[int, ...]) -> Tensor:
    """The log q of any z, by the flow's inverse; over `batch`, which the context may have as axes of size 1, or not."""
    fixed = flow._check(z, context)
    before = changes(z)
    noise, log_det = apply_inverse(flow, z, fixed, None)
    check_left("flow", z, before)
    log_prob = _score(noise, log_det, 1)
    if active():
        flow.inverse(z, context)  # holds the values to its checks
        warn_moved(log_prob.detach(), _nudged(flow, z, fixed))
    if batch_of(context) != batch:
        log_prob = log_prob.expand(torch.broadcast_shapes(log_prob.shape, batch))
    return log_prob


@torch.no_grad()
def _nudged(flow: Bijector, z: Tensor, context: Tensor | None) -> list[Tensor]:
    """Log q a few roundings from z: where it moves, the flow has lost the digits that decide it."""
    eps = 4 * torch.finfo(z.dtype).eps
    return [_score(*apply_inverse(flow, z * (1 + sign * eps), context, None), 1) for sign in (1, -1)]


def path_log_density(flow: Bijector, sample: Sample, context: Tensor | None) -> Tensor:
    """The log q of an own sample, as a function of its z alone."""
    if not isinstance(sample, Sample):
        raise TypeError(f"sample: expected a flowpost.Sample, got {type(sample).__name__}")
    z, log_prob, noise = sample
    # A sample of `torch.inference_mode` has no gradient to anything.
    if not torch.is_grad_enabled() or (not watched() and z.is_inference()):
        return log_prob
    if exporting():
        raise RuntimeError(
            "path_log_prob: expected a call without gradients under torch.export, which leaves out those within a "
            "program; export it under torch.no_grad(), where it is sample.log_prob"
        )
    refuse_random("flow", flow, 'call eval() on it, or take the log q of the sample, gradient="standard"', of_rows=True)

    with torch.no_grad(), full_precision(z.device.type):
        fixed = flow._check(z, None if context is None else context.detach())
        if active():
            check_own(z.detach(), apply(flow, noise.detach(), fixed)[0])

    def score(z: Tensor) -> Tensor:
        return _score(*apply_inverse(flow, z, fixed, noise), 1)

    with full_precision(z.device.type):
        return along(log_prob, z, score, flow)


def like_of(flow: Bijector, context: Tensor | None) -> Tensor:
    """What a draw has the dtype and device of: the flow's parameters, where it has none the context, or its buffer."""
    parameter = first_parameter(flow)
    if parameter is not None:
        return parameter
    return flow._like if context is None else context


def batch_of(value: Tensor | None) -> tuple[int, ...]:
    """The leading axes of features or of a context."""
    return () if value is None else tuple(value.shape[:-1])


def _normal(z: Tensor) -> Tensor:
    """The log N(z; 0, I), wide: constant and factor in one operation, for a step on a GPU is bound by their number."""
    return torch.rsub((z * z).sum(-1, dtype=wide_dtype(z)), -0.5 * z.shape[-1] * _LOG_2PI, alpha=0.5)


def _score(noise: Tensor, log_det: Tensor, sign: int) -> Tensor:
    """The log N(noise; 0, I) + sign log_det in noise's dtype, nan where it is not finite."""
    log_prob = torch.add(_normal(noise), log_det, alpha=sign)
    if log_prob.shape != noise.shape[:-1]:  # as of one that was summed over no axis
        raise ValueError(
            f"flow: expected a log-det for each z, {tuple(noise.shape[:-1])}, got shape {tuple(log_det.shape)}; a step "
            f"sums it over the variables"
        )
    return torch.nan_to_num(log_prob, nan=math.nan, posinf=math.nan, neginf=math.nan).to(noise.dtype)
