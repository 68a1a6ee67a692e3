"""What is measured at which size, in full and in a first look."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """One amortized IAF: z, two equal hidden layers a step, features h, steps, examples, samples of z for each."""

    dim: int
    hidden: int
    context: int
    steps: int
    batch: int
    samples: int = 1

    def __str__(self) -> str:
        tail = f", {self.samples} samples" if self.samples > 1 else ""
        return f"({self.dim}, {self.hidden}, {self.context}, {self.steps}, {self.batch}){tail}"

    @property
    def rows(self) -> int:
        """How many z one pass makes."""
        return self.batch * self.samples

    @property
    def weights(self) -> int:
        """Entries of all weight matrices, those under a mask too."""
        return self.steps * self.hidden * (self.dim + self.context + self.hidden + 2 * self.dim)


SMALL = Size(32, 320, 64, 4, 128)
WIDE = Size(64, 1920, 256, 4, 128)
DEEP = Size(256, 1024, 256, 8, 128)
PAIR = Size(2, 64, 16, 4, 1024)
"""Of two variables: what calls cost beside the arithmetic of few weights and many rows."""
MANY, WIDE_MANY = (replace(size, batch=4096) for size in (SMALL, WIDE))
MINI = Size(6, 24, 5, 2, 16)
"""Where answers, not times, are compared: small enough to invert any flow at once."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. A budget is the seconds given to the rounds of one contest."""

    training: tuple[Size, ...] = (SMALL, WIDE, DEEP, PAIR)
    captured: tuple[Size, ...] = (SMALL, WIDE, DEEP, MANY, WIDE_MANY)  # on a GPU
    compiled: tuple[Size, ...] = (SMALL, WIDE)  # compiling the third takes minutes
    external: tuple[Size, ...] = (SMALL, WIDE)
    dim: int = 64  # of the full covariance and of planar, with 16 steps
    batch: int = 128
    samples: int = 5000  # of the NLL
    curves: tuple[tuple[str, str, tuple[Size, ...]], ...] = (
        ("training", "dim", tuple(replace(SMALL, dim=dim) for dim in (8, 16, 32, 64, 128))),
        ("training", "hidden", tuple(replace(SMALL, hidden=hidden) for hidden in (128, 320, 640, 1280))),
        ("training", "samples", tuple(replace(SMALL, batch=32, samples=s) for s in (1, 4, 16, 64))),
        ("external", "dim", tuple(replace(SMALL, dim=dim) for dim in (8, 16, 32, 64))),
    )
    growth: tuple[int, ...] = (16, 64, 256)  # dims at which every recipe is timed
    growth_budget: float = 0.5
    budget: float = 15.0
    curve_budget: float = 1.5
    least: int = 5  # rounds, unless that takes several times the budget
    most: int = 100  # rounds, however fast they are


FULL = Plan()
ON_GPU = replace(
    FULL, training=(SMALL, WIDE, DEEP), growth=(16, 64), growth_budget=0.2, budget=2.0, curve_budget=0.3, most=20
)
"""Within the minutes of `gpu_check.sh`. A loop over 256 variables is slow on a GPU."""
QUICK = Plan(
    training=(SMALL, replace(WIDE, hidden=640)),
    captured=(SMALL,),
    compiled=(),
    external=(replace(SMALL, dim=16, hidden=128), replace(SMALL, steps=2)),
    samples=500,
    curves=(
        ("training", "dim", tuple(replace(SMALL, dim=dim, hidden=128) for dim in (8, 32))),
        ("training", "hidden", tuple(replace(SMALL, hidden=hidden) for hidden in (128, 512))),
        ("training", "samples", tuple(replace(SMALL, batch=32, samples=s) for s in (1, 8))),
        ("external", "dim", tuple(replace(SMALL, dim=dim, hidden=128, steps=2) for dim in (8, 16))),
    ),
    growth=(8, 32),
    growth_budget=0.05,
    budget=0.7,
    curve_budget=0.1,
    least=3,
    most=20,
)
