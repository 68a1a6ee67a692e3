"""Where contests are held, and who may take part: nobody whose work has not been checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.peers import here
from benchmarks.speed.dense import Dense
from benchmarks.speed.flows import Flow, draw
from benchmarks.speed.ours import Flowpost
from benchmarks.speed.peers import PEERS
from benchmarks.speed.results import DENSE, OURS
from benchmarks.speed.sizes import Plan, Size
from benchmarks.speed.timing import Rounds
from benchmarks.speed.work import UnequalWork


@dataclass(frozen=True)
class Hall:
    """Where the contests are held, and how much is measured."""

    device: torch.device
    plan: Plan
    mode: str | None = None
    """A mode of `torch.compile`, for the compiled contests."""
    peers: bool = True
    """Whether the libraries that are installed take part."""

    @property
    def rounds(self) -> Rounds:
        """Of an ordinary contest."""
        return Rounds(self.plan.budget, self.plan.least, self.plan.most)

    @property
    def contestants(self) -> dict[str, Callable[[Size], Flow]]:
        """Ours, the yardstick, and the libraries that are installed."""
        peers = {name: make for name, make in PEERS.items() if self.peers and here(name)}
        return {OURS: Flowpost, DENSE: Dense, **peers}


def build(
    hall: Hall, size: Size, check: Callable[[Flow], None], names: Mapping[str, Callable[[Size], Flow]]
) -> tuple[dict[str, Flow], dict[str, str]]:
    """The flows that do the work at this size, and why the others do not, be it that they raise an error there."""
    flows, left_out = {}, {}
    for name, make in names.items():
        try:
            flow = make(size)
            draw(flow)
            flow.to(hall.device)
            check(flow)
        except (UnequalWork, RuntimeError) as error:
            left_out[name] = str(error).partition("\n")[0]
        else:
            flows[name] = flow
    return flows, left_out
