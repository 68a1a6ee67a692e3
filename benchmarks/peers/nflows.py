"""nflows: autoregressive flows of feed-forward networks, and LU."""

# ruff: noqa: ANN401 - the library is imported by name where it is installed, so it has no types here.

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import Family, Pair, Sizes, module


def call(flow: Any, z: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Pair:
    """Image and log-det at once; z and features are rows ``(B, dim)``."""
    return (flow.inverse if inverse else flow)(z, context)


def families() -> list[Family]:
    """MAF, RQS-AR, LU; reversals between the steps."""
    spline = {"tails": "linear", "tail_bound": 3.0, "num_bins": 8}
    return [
        Family("MAF", lambda sizes: _autoregressive("Affine", sizes), call, broadcasts=False,
               activations=activations),
        Family("RQS-AR", lambda sizes: _autoregressive("PiecewiseRationalQuadratic", sizes, **spline), call),
        # Linear layers take a context and ignore it by design.
        Family("LU", lu, call, amortized=False, optional_context=False),
    ]  # fmt: skip


def _autoregressive(name: str, sizes: Sizes, **options: Any) -> nn.Module:
    transforms = module("nflows.transforms")
    options |= {"context_features": sizes.context or None, "num_blocks": 1, "use_residual_blocks": False}
    kind = getattr(transforms, f"Masked{name}AutoregressiveTransform")
    steps = [kind(sizes.dim, sizes.hidden, activation=F.relu, **options) for _ in range(sizes.steps)]
    chain = [part for step in steps for part in (transforms.ReversePermutation(sizes.dim), step)]
    return transforms.CompositeTransform(chain[1:])


def lu(sizes: Sizes) -> nn.Module:
    """Linear maps alone."""
    transforms = module("nflows.transforms")
    return transforms.CompositeTransform([transforms.LULinear(sizes.dim) for _ in range(sizes.steps)])


def activations(flow: Any) -> list[object]:
    """Of the first layer of each network, and of the block after it."""
    nets = [step.autoregressive_net for step in flow._transforms if hasattr(step, "autoregressive_net")]
    return [activation for net in nets for activation in (net.activation, *(b.activation for b in net.blocks))]
