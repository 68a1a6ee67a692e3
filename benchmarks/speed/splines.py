"""One element-wise rational-quadratic spline, given numbers for each example: flowpost beside three libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import flowpost as fp
from benchmarks.peers import module, pyro
from benchmarks.speed.flows import log_normal
from benchmarks.speed.others import Sampler

BINS, BOUND = 8, 2.0
"""The bound is where noise still falls."""
MANY = 1024
"""Examples of which some are in every bin, so that every number has a gradient."""

Element = Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor]]
"""Of z ``(batch, dim)`` and raw widths, heights and slopes ``(batch, dim, ...)`` to z' and the log of each slope."""


def spline(dim: int) -> fp.Bijector:
    """Ours; its numbers lie bin after bin, each for all variables, those of the libraries variable after variable."""
    return fp.Spline(dim, BINS, BOUND)


def _split(numbers: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    widths, heights, slopes = numbers.unflatten(-1, (dim, -1)).split([BINS, BINS, BINS - 1], -1)
    return widths, heights, slopes


def _sampler(element: Element, dim: int) -> Sampler:
    def sample(numbers: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.randn(len(numbers), dim, device=numbers.device) if noise is None else noise
        image, log_slope = element(z, _split(numbers, dim))
        return image, log_normal(z) - log_slope.sum(-1)

    return sample


def _nflows(z: Tensor, numbers: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    run = module("nflows.transforms.splines.rational_quadratic").unconstrained_rational_quadratic_spline
    return run(z, *numbers, tails="linear", tail_bound=BOUND)


def _zuko(z: Tensor, numbers: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return module("zuko.transforms").MonotonicRQSTransform(*numbers, bound=BOUND).call_and_ladj(z)


def _pyro(dim: int) -> Sampler:
    def numbers_of(numbers: Tensor) -> list[Tensor]:
        return [each.flatten(-2) for each in _split(numbers, dim)]  # as a network of its own gives them

    step = module(pyro.TRANSFORMS).ConditionalSpline(numbers_of, dim, BINS, BOUND, order="quadratic")

    def sample(numbers: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.randn(len(numbers), dim, device=numbers.device) if noise is None else noise
        image, log_det = pyro.call(step, z, numbers)
        return image, log_normal(z) - (log_det.sum(-1) if log_det.ndim == z.ndim else log_det)

    return sample


PEERS: dict[str, Callable[[int], Sampler]] = {
    "nflows": partial(_sampler, _nflows),
    "zuko": partial(_sampler, _zuko),
    "pyro": _pyro,
}
"""Those of the libraries, by the size of z."""
