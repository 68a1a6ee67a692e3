"""The public libraries as contestants: the autoregressive flow of each at the size that is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from benchmarks.peers import Pair, Sizes, families
from benchmarks.speed.flows import Flow
from benchmarks.speed.sizes import Size

FAMILIES = {"zuko": "MAF", "nflows": "MAF", "pyro": "IAF, stable", "normflows": "IAF"}
"""By import name: affine or gated steps; whether they do the work that is timed is checked before."""


class Peer(Flow):
    """A library's flow in its direction of one pass, which is from noise to z here."""

    def __init__(self, library: str, size: Size) -> None:
        super().__init__(size)
        self.name, self.family = library, families(library)[FAMILIES[library]]
        self.flow = self.family.build(Sizes(size.dim, size.context, size.steps, size.hidden))

    def activations(self) -> Sequence[object]:
        """As the library's module has them."""
        return self.family.activations(self.flow)

    def push(self, noise: Tensor, h: Tensor) -> Pair:
        """One pass; features are expanded to the samples' rows for a library that takes rows alone."""
        if self.family.broadcasts or noise.ndim == h.ndim:
            return self.family.call(self.flow, noise, h)
        rows = h.expand(*noise.shape[:-1], h.shape[-1]).flatten(0, -2)
        z, log_det = self.family.call(self.flow, noise.flatten(0, -2), rows)
        return z.view(noise.shape), log_det.view(noise.shape[:-1])

    def pull(self, z: Tensor, h: Tensor) -> Pair:
        """The other direction."""
        return self.family.call(self.flow, z, h, inverse=True)


PEERS: dict[str, Callable[[Size], Flow]] = {name: partial(Peer, name) for name in FAMILIES}
"""By import name."""
