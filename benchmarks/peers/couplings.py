"""Spline couplings of the public libraries: half of the variables pass, in turn, as their documentation builds them."""

# ruff: noqa: ANN401 - the libraries are imported by name where they are installed, so they have no types here.

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.peers import Family, Sizes, module, nflows, pyro, zuko

BOUND, BINS = 3.0, 8


def families(library: str) -> dict[str, Family]:
    """A library's kind of spline coupling, by name."""
    kinds = {
        "zuko": Family("NSF coupling", _zuko, zuko.call),
        "nflows": Family("RQS coupling", _nflows, nflows.call, broadcasts=False),
        "pyro": Family("spline coupling", _pyro, pyro.call, amortized=False, optional_context=False),
    }
    return {kinds[library].name: kinds[library]}


def _zuko(sizes: Sizes) -> nn.Module:
    flows = module("zuko.flows")
    widths = (sizes.hidden, sizes.hidden)
    return flows.NSF(sizes.dim, sizes.context, bins=BINS, transforms=sizes.steps, passes=2, hidden_features=widths)


def _nflows(sizes: Sizes) -> nn.Module:
    transforms, masks = module("nflows.transforms"), module("nflows.utils")
    kind = partial(
        transforms.PiecewiseRationalQuadraticCouplingTransform, num_bins=BINS, tails="linear", tail_bound=BOUND
    )

    def network(inputs: int, outputs: int) -> Any:
        options = {"hidden_features": sizes.hidden, "context_features": sizes.context or None}
        return module("nflows.nn.nets").ResidualNet(inputs, outputs, num_blocks=1, **options)

    halves = [masks.create_alternating_binary_mask(sizes.dim, even=step % 2 == 0) for step in range(sizes.steps)]
    return transforms.CompositeTransform([kind(half, network) for half in halves])


def _pyro(sizes: Sizes) -> nn.Module:
    transforms = module(pyro.TRANSFORMS)
    widths, back = [sizes.hidden, sizes.hidden], torch.arange(sizes.dim).flip(0)
    parts = []
    for _ in range(sizes.steps):
        coupling = transforms.spline_coupling(sizes.dim, hidden_dims=widths, count_bins=BINS, bound=BOUND)
        parts += [coupling, transforms.Permute(back)]
    return pyro.chain(parts[:-1])
