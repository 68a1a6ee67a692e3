"""What a run found: contests with every round's seconds, goals, and how both go into `speed.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from benchmarks.speed.timing import Spread, ratio, spread

OURS, DENSE, PRODUCTS = "flowpost", "dense", "matrix products alone"
EAGER = "eager"


@dataclass(frozen=True)
class Goal:
    """A bound that issue-sized claims are held to: ours over another's, in time or in memory."""

    bound: float
    other: str = ""
    """Whom to compare with; by default the fastest of the peers."""
    faster: bool = False
    """The bound is of (other / ours), from below, instead of (ours / other), from above."""

    def met(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        return value >= self.bound if self.faster else value <= self.bound

    def __str__(self) -> str:
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
    """Per call, one number for each round; rounds line up between names."""
    goal: Goal | None = None
    memory: dict[str, int] = field(default_factory=dict)
    """Peak bytes of a call."""
    memory_goal: MemoryGoal | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Who is not timed, and why."""
    at: dict[str, int] = field(default_factory=dict)
    """The size as numbers, for the plot."""

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

    def rival(self) -> str | None:
        """Whom the goal compares with, if here."""
        if self.goal is not None and self.goal.other:
            return self.goal.other if self.goal.other in self.seconds else None
        peers = [name for name in self.seconds if not name.startswith(OURS) and name not in (DENSE, PRODUCTS)]
        return min(peers, key=lambda name: self.time(name).median, default=None)

    def reached(self) -> Spread | None:
        """What the goal asks for, as measured."""
        rival = self.rival()
        if self.goal is None or rival is None:
            return None
        return self.ratio(rival, OURS) if self.goal.faster else self.ratio(OURS, rival)

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
        """What `as_json` wrote."""
        known = {each.name: content[each.name] for each in fields(cls)}
        goal, memory_goal = known.pop("goal"), known.pop("memory_goal")
        return cls(**known, goal=goal and Goal(**goal), memory_goal=memory_goal and MemoryGoal(**memory_goal))
