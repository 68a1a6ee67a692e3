"""For `peer_worker`: splines and couplings of the public libraries."""

# ruff: noqa: ANN401 - the libraries are imported by name where they are installed, so they have no types here.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peer_networks import nflows_network, perceptron, soft
from peer_steps import Arrays, Map
from torch import Tensor, nn

from benchmarks.peers import Pair, module, nflows, zuko

ZUKO_SLOPE = 1e-30  # its floor, moved out of the way
ZUKO_LOG_SLOPE = float(np.log(ZUKO_SLOPE))


def numbers_of_spline(a: Arrays) -> tuple[Tensor, Tensor, Tensor]:
    """Raw widths and heights, and slopes whose bound is taken, ``(points, dim, bins)``."""
    return a["widths"].mT, a["heights"].mT, soft(a["slopes"].mT, 100.0)


def nflows_spline(a: Arrays, *, inverse: bool) -> Pair:
    """Its function, which has the same floors as arguments, and a shift that makes the slope 1 at 0 as its tails'."""
    spline = module("nflows.transforms.splines").unconstrained_rational_quadratic_spline
    widths, heights, slopes = numbers_of_spline(a)
    shift = float(np.log(np.exp(1 - 1e-3) - 1))
    options = {"tail_bound": 3.0, "min_bin_width": 1e-2, "min_bin_height": 1e-2, "inverse": inverse}
    image, log_det = spline(a["z"], widths, heights, slopes + shift, **options)
    return image, log_det.sum(-1)


def zuko_numbers(raw: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """What zuko's softly bounded softmax and exponential take to the same shares and slopes."""
    widths, heights, slopes = raw
    count = widths.shape[-1]
    shift = float(np.log(np.exp(1 - 1e-3) - 1))
    logs = [torch.log(1e-2 + (1 - 1e-2 * count) * F.softmax(each, -1)) for each in (widths, heights)]
    logs = [2 * (each - each.mean(-1, keepdim=True)) for each in logs]
    bounded = [*logs, torch.log(F.softplus(slopes + shift) + 1e-3)]
    unbounded = [each / (1 - (each / ZUKO_LOG_SLOPE).abs()) for each in bounded]
    return 0.5 * unbounded[0], 0.5 * unbounded[1], unbounded[2]


def zuko_spline_of(raw: tuple[Tensor, Tensor, Tensor]) -> Any:
    return module("zuko.transforms").MonotonicRQSTransform(*zuko_numbers(raw), bound=3.0, slope=ZUKO_SLOPE)


def zuko_spline(a: Arrays, *, inverse: bool) -> Pair:
    spline = module("zuko.transforms").DependentTransform(zuko_spline_of(numbers_of_spline(a)), 1)
    return zuko.call(spline, a["z"], inverse=inverse)


def raw_spline(outputs: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """A network's outputs ``(points, 3 bins - 1, dim)`` as widths, heights and slopes, bins last."""
    widths, heights, slopes = outputs.mT.split([bins, bins, bins - 1], -1)
    return widths, heights, soft(slopes, 100.0)


def zuko_autoregressive_spline(a: Arrays, *, inverse: bool) -> Pair:
    """`AutoregressiveTransform`, dim passes back; nflows' network."""
    bins, dim = int(a["bins"]), a["z"].shape[-1]
    network, parts = nflows_network(a, 3 * bins - 1), module("zuko.transforms")
    kind = parts.AutoregressiveTransform(
        lambda z: parts.DependentTransform(zuko_spline_of(raw_spline(network(z), bins)), 1), passes=dim
    )
    return zuko.call(kind, a["z"], inverse=inverse)


def zuko_coupling(a: Arrays, make: Callable[[Tensor], Any], *, inverse: bool) -> Pair:
    """`CouplingTransform`: a perceptron of what passes and h gives the numbers of `make`'s map."""
    network, parts = perceptron(a), module("zuko.transforms")
    kind = parts.CouplingTransform(
        lambda passed: parts.DependentTransform(make(network(torch.cat([passed, a["h"]], -1))), 1), a["passing"] > 0
    )
    return zuko.call(kind, a["z"], inverse=inverse)


def zuko_affine_coupling(a: Arrays, *, inverse: bool) -> Pair:
    def make(numbers: Tensor) -> Any:
        loc, raw = numbers.chunk(2, -1)
        log_scale = soft(raw, 4.0)
        scale = log_scale / (1 - (log_scale / ZUKO_LOG_SLOPE).abs())
        return module("zuko.transforms").MonotonicAffineTransform(loc, scale, slope=ZUKO_SLOPE)

    return zuko_coupling(a, make, inverse=inverse)


def zuko_spline_coupling(a: Arrays, *, inverse: bool) -> Pair:
    bins = int(a["bins"])
    return zuko_coupling(
        a, lambda numbers: zuko_spline_of(raw_spline(numbers.unflatten(-1, (3 * bins - 1, -1)), bins)), inverse=inverse
    )


def nflows_additive_coupling(a: Arrays, *, inverse: bool) -> Pair:
    network = perceptron(a)

    class Conditioner(nn.Module):
        def forward(self, passed: Tensor, context: Tensor) -> Tensor:
            return network(torch.cat([passed, context], -1))

    kind = module("nflows.transforms").AdditiveCouplingTransform
    step = kind(1 - a["passing"], lambda *_: Conditioner())
    return nflows.call(step, a["z"], a["h"], inverse=inverse)


MAPS: dict[str, Map] = {
    "nflows spline": nflows_spline,
    "zuko spline": zuko_spline,
    "zuko autoregressive spline": zuko_autoregressive_spline,
    "zuko affine coupling": zuko_affine_coupling,
    "zuko spline coupling": zuko_spline_coupling,
    "nflows additive coupling": nflows_additive_coupling,
}
