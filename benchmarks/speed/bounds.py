"""What is to be reached, on a CPU and on a GPU: bounds by what is timed, at which size or of which recipe."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.speed.others import STEPS
from benchmarks.speed.results import Goal
from benchmarks.speed.sizes import DEEP, MANY, PAIR, SMALL, WIDE, WIDE_MANY, Size
from benchmarks.speed.splines import BINS

TRAINING, FORWARD, BACKWARD = "training step", "log q at an external z", "log q at an external z, and its gradients"
CAPTURED, MEMORY = "captured training step", "peak memory"
FULL_COVARIANCE, PLANAR, SPLINE = "full covariance", f"planar, {STEPS} steps", f"spline, {BINS} bins"
STEP, REPLAYED = "VAE step", "captured VAE step"

Bounds = Mapping[str, Mapping[Size | str | None, float]]
"""A ratio, or the seconds of a VAE step."""

ON_CPU: Bounds = {
    TRAINING: {SMALL: 0.95, WIDE: 0.75, DEEP: 0.85, PAIR: 1.0},
    MEMORY: {SMALL: 1.0, WIDE: 1.0, DEEP: 1.0},
    FORWARD: {SMALL: 20.0, WIDE: 40.0},
    BACKWARD: {SMALL: 20.0, WIDE: 40.0},
    FULL_COVARIANCE: {None: 3.0},
    PLANAR: {None: 3.0},
    SPLINE: {None: 1.0},
}
ON_GPU: Bounds = {
    TRAINING: {SMALL: 0.75, WIDE: 0.75, DEEP: 0.60},
    CAPTURED: {SMALL: 0.60, WIDE: 0.90, DEEP: 0.80, MANY: 1.05, WIDE_MANY: 1.05},
    MEMORY: {SMALL: 1.3, WIDE: 1.3, DEEP: 1.3},
    FORWARD: {SMALL: 50.0, WIDE: 25.0},
    BACKWARD: {SMALL: 40.0, WIDE: 40.0},
    STEP: {"maf": 10e-3},
    REPLAYED: {"iaf": 1e-3},
}


def bound(device: torch.device, what: str, at: Size | str | None = None) -> float | None:
    """The bound, where there is one on such a device."""
    bounds = ON_GPU if device.type == "cuda" else ON_CPU
    return bounds.get(what, {}).get(at)


def goals(
    device: torch.device, what: str, at: Size | None = None, *, other: str = "", faster: bool = False
) -> tuple[Goal, ...]:
    """The goal of a contest, beside `other` or the fastest peer; none where it has no bound."""
    found = bound(device, what, at)
    return () if found is None else (Goal(found, other, faster),)
