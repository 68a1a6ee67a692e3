"""normflows: autoregressive flows, planar, radial and LU layers, called one after the other."""

# ruff: noqa: ANN401 - the library is imported by name where it is installed, so it has no types here.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import Family, Pair, Sizes, module


class Layers(nn.Module):
    """Layers one after the other, log-dets added in the layers' own dtype: the library's container takes float32.

    Args:
        layers: the library's.
        reverse: call the layers' inverses, which are the direction of one pass.
    """

    def __init__(self, layers: list[Any], *, reverse: bool = False) -> None:
        super().__init__()
        self.layers, self.reverse = nn.ModuleList(layers), reverse


def call(flow: Any, z: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Pair:
    """Of `Layers` or of a layer of the library."""
    given = {} if context is None else {"context": context}
    if not isinstance(flow, Layers):
        return (flow.inverse if inverse else flow)(z, **given)
    layers = list(flow.layers)[::-1] if inverse else flow.layers
    z, total = call(layers[0], z, context, inverse=inverse is not flow.reverse)
    for layer in layers[1:]:
        z, log_det = call(layer, z, context, inverse=inverse is not flow.reverse)
        total = total + log_det
    return z, total


def families() -> list[Family]:
    """IAF, RQS-AR, planar (two kinds), radial, LU."""
    return [
        Family("IAF", _repeated(affine), call, activations=activations),
        Family("RQS-AR", _repeated(spline, reverse=True), call),
        _unconditional("Planar", lambda dim: module("normflows.flows").Planar((dim,)), invertible=False),
        _unconditional("Planar, leaky ReLU", lambda dim: module("normflows.flows").Planar((dim,), act="leaky_relu")),
        _unconditional("Radial", lambda dim: module("normflows.flows").Radial((dim,)), invertible=False),
        _unconditional("LU", lambda dim: module("normflows.flows").LULinearPermute(dim), optional_context=False),
    ]


def _repeated(layer: Callable[[Sizes], Any], *, reverse: bool = False) -> Callable[[Sizes], nn.Module]:
    return lambda sizes: Layers([layer(sizes) for _ in range(sizes.steps)], reverse=reverse)


def _unconditional(name: str, layer: Callable[[int], Any], **options: Any) -> Family:
    return Family(name, _repeated(lambda sizes: layer(sizes.dim)), call, amortized=False, **options)


def affine(sizes: Sizes) -> Any:
    """One residual block, which has a hidden layer more: the feed-forward network refuses a context."""
    kind = module("normflows.flows").MaskedAffineAutoregressive
    return kind(sizes.dim, sizes.hidden, context_features=sizes.context or None, num_blocks=1, activation=F.relu)


def spline(sizes: Sizes) -> Any:
    """One residual block."""
    kind = module("normflows.flows").AutoregressiveRationalQuadraticSpline
    return kind(sizes.dim, 1, sizes.hidden, sizes.context or None, tail_bound=3.0)


def activations(flow: Any) -> list[object]:
    """Of every block."""
    return [block.activation for layer in flow.layers for block in layer.autoregressive_net.blocks]
