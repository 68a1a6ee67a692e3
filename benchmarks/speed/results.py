"""What a run found: contests with every round's seconds, goals, and how both go into `speed.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from benchmarks.speed.timing import Spread, ratio, spread

OURS, DENSE, PRODUCTS = "flowpost", "dense", "matrix products alone"
EAGER, GRAPH = "eager", "CUDA graph"
SECONDS, NATS = "s", "nats"


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def shown(value: float, unit: str) -> str:
    """Three digits and the unit; of seconds, that of their size."""
    if unit != SECONDS:
        return f"{value:.3g} {unit}"
    for each, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{digits(value / size)} {each}"
    return f"{digits(value / 1e-9)} ns"


@dataclass(frozen=True)
class Goal:
    """A bound that issue-sized claims are held to: ours over another's, in time or in memory."""

    bound: float
    other: str = ""
    """Whom to compare with; by default the fastest of the peers."""
    faster: bool = False
    """The bound is of (other / ours), from below, instead of (ours / other), from above."""
    name: str = OURS
    """Whose time it is."""
    unit: str = ""
    """The bound is of that time itself, in the contest's unit, and of no ratio."""

    def met(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        return value >= self.bound if self.faster else value <= self.bound

    def __str__(self) -> str:
        if self.unit:
            return f"<= {shown(self.bound, self.unit)}"
        return f">= {self.bound:g} x faster" if self.faster else f"<= {self.bound:g}"


@dataclass(frozen=True)
class MemoryGoal:
    """A bound on the ratio of two peaks."""

    bound: float
    name: str
    other: str


@dataclass
class Contest:
    """One thing that was timed, of everyone who does that work."""

    what: str
    size: str
    mode: str
    seconds: dict[str, list[float]]
    """Per call, one number for each round; rounds line up between names. In another unit, what it says instead."""
    goals: tuple[Goal, ...] = ()
    memory: dict[str, int] = field(default_factory=dict)
    """Peak bytes of a call."""
    memory_goal: MemoryGoal | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Who is not timed, and why."""
    at: dict[str, int] = field(default_factory=dict)
    """The size as numbers, for the plot."""
    masks: dict[str, int] = field(default_factory=dict)
    """Bytes that a model keeps between calls besides its parameters."""
    unit: str = SECONDS

    @property
    def rounds(self) -> int:
        """How many."""
        return len(next(iter(self.seconds.values()), ()))

    def time(self, name: str) -> Spread:
        """Seconds a call."""
        return spread(self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread | None:
        """Of two contestants' times, where both were timed."""
        return ratio(self.seconds[name], self.seconds[other]) if {name, other} <= self.seconds.keys() else None

    def rival(self, goal: Goal) -> str | None:
        """Whom the goal compares with, if here."""
        if goal.other:
            return goal.other if goal.other in self.seconds else None
        peers = [name for name in self.seconds if not name.startswith(OURS) and name not in (DENSE, PRODUCTS)]
        return min(peers, key=lambda name: self.time(name).median, default=None)

    def reached(self, goal: Goal) -> Spread | None:
        """What the goal asks for, as measured; None where somebody is missing."""
        if goal.unit:
            return self.time(goal.name) if goal.name in self.seconds else None
        rival = self.rival(goal)
        if rival is None:
            return None
        return self.ratio(rival, goal.name) if goal.faster else self.ratio(goal.name, rival)

    def as_json(self) -> dict[str, Any]:
        """Every round, and what the tables say of them."""
        names = list(self.seconds)
        summary = {
            name: {
                "seconds": self.time(name)._asdict(),
                "over": {other: ratio(self.seconds[name], self.seconds[other])._asdict() for other in names},
            }
            for name in names
        }
        return {**asdict(self), "rounds": self.rounds, "summary": summary}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Contest:
        """What `as_json` wrote, perhaps before a field was there."""
        known = {each.name: content[each.name] for each in fields(cls) if each.name in content}
        found, memory_goal = (Goal(**each) for each in known.pop("goals")), known.pop("memory_goal")
        return cls(**known, goals=tuple(found), memory_goal=memory_goal and MemoryGoal(**memory_goal))
