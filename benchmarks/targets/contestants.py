"""What is fitted: flowpost's recipes and the public libraries' flows, and the learning rate of each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from benchmarks.peers import Family, Pair, Sizes, couplings, families, here
from flowpost import Affine, Bijector, Chain, FlowPosterior
from flowpost.recipes import RECIPES

WIDTH = 32  # of the two hidden layers of every network, where z is not wider
CONTEXT = 4  # size of c, where a recipe has one
RATE = 2e-2
RATES: Mapping[str, float] = {
    **dict.fromkeys(("spline_autoregressive", "zuko NSF"), 3e-3),
    **dict.fromkeys(("spline_coupling", "zuko NSF coupling", "nflows RQS coupling", "pyro spline coupling"), 6e-3),
}
"""Adam's learning rate at the start, where it is not `RATE`: a flow of a library has that of the recipe of its kind."""


class Peer(NamedTuple):
    """A flow of a public library."""

    library: str
    family: str
    splines: bool = False
    batches: bool = True
    """Whether `torch.func.vmap` can run it; else one set of weights follows the other."""


PEERS: Mapping[str, Peer] = {
    "zuko MAF": Peer("zuko", "MAF"),
    "zuko NSF": Peer("zuko", "NSF", splines=True),
    "zuko NSF coupling": Peer("zuko", "NSF coupling", splines=True),
    "nflows RQS coupling": Peer("nflows", "RQS coupling", splines=True, batches=False),
    "pyro IAF": Peer("pyro", "IAF, stable"),
    "pyro spline coupling": Peer("pyro", "spline coupling", splines=True, batches=False),
    "normflows IAF": Peer("normflows", "IAF"),
    "normflows planar": Peer("normflows", "Planar"),
}


def installed() -> tuple[str, ...]:
    """Those of `PEERS` that can be fitted here."""
    return tuple(name for name, peer in PEERS.items() if here(peer.library))


def has_steps(name: str) -> bool:
    """Whether it is a flow of K steps."""
    return name in PEERS or "steps" in inspect.signature(RECIPES[name]).parameters


def batches(name: str) -> bool:
    """Whether all its fits can be run in one `torch.func.vmap`."""
    return name not in PEERS or PEERS[name].batches


def rate(name: str) -> float:
    """Adam's learning rate at the start."""
    return RATES.get(name, RATE)


def build(name: str, steps: int | None, dim: int = 2) -> FlowPosterior:
    """A fresh posterior without an encoder, on the whole space."""
    width = max(WIDTH, dim)
    if name in PEERS:
        return foreign(PEERS[name], Sizes(dim, 0, steps or 1, width))
    known = inspect.signature(RECIPES[name]).parameters
    options = {"steps": steps, "hidden": (width, width), "context_size": CONTEXT}
    return RECIPES[name](0, dim, **{key: value for key, value in options.items() if key in known})


def foreign(peer: Peer, sizes: Sizes) -> FlowPosterior:
    """A library's flow with a diagonal Gaussian's loc and scale where the recipe of its kind has them.

    Splines act on the noise, which lies where their bins are; all others act on what has loc and scale.
    """
    known = couplings.families(peer.library) if peer.family.endswith("coupling") else families(peer.library)
    steps = [Affine(sizes.dim), Foreign(known[peer.family], sizes)]
    return FlowPosterior(0, Chain(*(reversed(steps) if peer.splines else steps)))


class Foreign(Bijector):
    """A public library's flow as a step without a context, in its direction of one pass."""

    def __init__(self, family: Family, sizes: Sizes) -> None:
        super().__init__(sizes.dim)
        self.call, self.flow = family.call, family.build(sizes)

    def _forward(self, z: Tensor, context: Tensor | None) -> Pair:
        # A fresh tensor for every call: pyro keeps the image of the last one that it saw.
        return self.call(self.flow, z.clone())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> Pair:
        return self.call(self.flow, z.clone(), inverse=True)
