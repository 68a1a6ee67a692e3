"""Likelihoods by name, `binomial:16`: which one fits the values of a data set, and whether a given one does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.download import DataError
from benchmarks.errors import ConfigError

FEW = 30  # the largest whole number up to which values are taken as counts, rather than as levels
BYTES = 255
LARGEST = 2**24  # whole number that float32 holds exactly
DEVIATIONS = (1e-3, 1e4)  # of an element, within reach of a learned scale
ROUNDED = 0.01  # of the scale: by so much may float32, in which models are trained, round an element

Parts = Mapping[str, np.ndarray]


class Kind(NamedTuple):
    """A likelihood that may be asked for."""

    number: str
    """What stands behind the colon; empty where nothing does."""
    usual: float | None
    """That number if nothing is said; nan where it has to be said."""
    least: float
    """The smallest number that makes sense."""
    largest: Callable[[float], float]
    """From the number to the largest value of an element; infinity for real numbers."""
    whole: bool = True
    """Whether the values are whole numbers."""


KINDS: dict[str, Kind] = {
    "bernoulli": Kind("", None, 0, lambda _: 1),
    "binomial": Kind("N", math.nan, 1, lambda n: n),
    "categorical": Kind("N", math.nan, 2, lambda n: n - 1),
    "discretized-logistic": Kind("N", BYTES + 1, 2, lambda n: n - 1),
    "continuous-bernoulli": Kind("", None, 0, lambda _: 1, whole=False),
    "gaussian": Kind("SCALE", None, 0, lambda _: math.inf, whole=False),
}


class Spec(NamedTuple):
    """A likelihood with its number."""

    kind: str
    number: float | None

    @property
    def levels(self) -> int:
        """The largest value of an element; 1 where values are real."""
        largest = KINDS[self.kind].largest(self.number or 0)
        return int(largest) if math.isfinite(largest) else 1


def forms() -> str:
    """All that may be asked for, in a line."""
    shown = []
    for name, kind in KINDS.items():
        must = kind.usual is not None and math.isnan(kind.usual)
        shown += ([] if must else [name]) + ([f"{name}:{kind.number}"] if kind.number else [])
    return " | ".join(shown)


def parse(text: str) -> Spec:
    """From `binomial:16` to the likelihood.

    Raises:
        ConfigError: there is no such one, or its number is missing or makes no sense.
    """
    name, _, number = text.partition(":")
    kind = KINDS.get(name)
    if kind is None or (number and not kind.number):
        raise ConfigError(f"likelihood: expected one of {forms()}, got {text!r}")
    counted = kind.number == "N"
    try:
        found = kind.usual if not number else int(number) if counted else float(number)
    except ValueError:
        found = math.nan
    if found is not None and not (kind.least < found < math.inf or (counted and found == kind.least)):
        wanted = f"a whole number N of at least {kind.least:.0f}" if counted else "a positive SCALE"
        raise ConfigError(f"likelihood: expected {wanted} in {name}:{kind.number}, got {text!r}")
    return Spec(name, found)


def guess(parts: Parts) -> tuple[str, str]:
    """The likelihood that values look like, and what of them says so."""
    low, high = min(float(part.min()) for part in parts.values()), max(float(part.max()) for part in parts.values())
    span = f"from {low:g} to {high:g}"
    whole = all(_whole(part) for part in parts.values())
    if whole and low >= 0 and high <= BYTES:
        if high <= 1:
            return "bernoulli", "zeros and ones"
        if high <= FEW:
            return f"binomial:{high:.0f}", f"whole numbers {span}, taken as counts"
        return "discretized-logistic", f"whole numbers {span}, taken as levels of a byte"
    if whole:
        levels = high - low + 1
        instead = f"; from 0 on they would do for discretized-logistic:{levels:.0f}" if levels <= LARGEST else ""
        return "gaussian", f"whole numbers {span}, taken as real, though a density has no bound at them{instead}"
    if low == 0 and high == 1:
        return "continuous-bernoulli", "real numbers from 0 to 1, both among them"
    return "gaussian", f"real numbers {span}"


def check(parts: Parts, spec: Spec) -> None:
    """Refuse values that a likelihood gives no probability, or a density without bound.

    Raises:
        DataError: there are such values.
    """
    kind = KINDS[spec.kind]
    largest = kind.largest(spec.number or 0)
    if largest > LARGEST and kind.whole:
        raise DataError(f"likelihood: expected N of at most {LARGEST}, got {spec.kind}:{spec.number:.0f}")
    for name, part in parts.items() if math.isfinite(largest) else ():
        bad = (part < 0) | (part > largest)
        if kind.whole and part.dtype.kind == "f":
            bad |= part != np.round(part)
        if bad.any():
            wanted = f"{'whole ' if kind.whole else ''}numbers from 0 to {largest:.0f} for {spec.kind}"
            row = int(bad.reshape(len(part), -1).any(1).argmax())
            got = f"got {int(bad.sum())} others (the first is {float(part[bad][0]):g} in row {row})"
            raise DataError(f"{name}: expected {wanted}, {got}; choose a --likelihood that has them")
    _check_spread(parts["train"].reshape(len(parts["train"]), -1), spec)


def _check_spread(train: np.ndarray, spec: Spec) -> None:
    """Refuse data that never vary, and elements whose learned scale would fall or rise for ever."""
    deviations = train.std(0, dtype=np.float64)
    if not deviations.max():
        raise DataError(f"train: expected rows that differ, got {len(train)} equal ones")
    if spec.kind == "gaussian":
        _check_rounding(train, deviations if spec.number is None else spec.number)
        if spec.number is None:
            _check_scales(deviations)


def _check_rounding(train: np.ndarray, scales: np.ndarray | float) -> None:
    """Refuse elements far from 0, of whose differences float32 would leave little."""
    off = np.abs(train.astype(np.float32).astype(np.float64) - train).max(0)
    if got := _others(off > ROUNDED * scales, off, "rounded by {:g}: element {}"):
        wanted = f"expected elements that float32 rounds by less than {ROUNDED} of their scale"
        raise DataError(f"train: {wanted}, {got}; subtract their means")


def _check_scales(deviations: np.ndarray) -> None:
    low, high = DEVIATIONS
    if got := _others((deviations < low) | (deviations > high), deviations, "{:g} of element {}"):
        raise DataError(
            f"train: expected elements of a deviation from {low:g} to {high:g}, for gaussian learns their scales, "
            f"{got}; drop or rescale these, or fix the scale: --likelihood gaussian:{0.1 * deviations.max():.2g}"
        )


def _others(out: np.ndarray, values: np.ndarray, first: str) -> str:
    """How many elements are `out`, and which is the first, with its value; empty where none is."""
    at = int(out.argmax())
    return f"got {out.sum()} of {len(out)} others (the first is {first.format(values[at], at)})" if out.any() else ""


def _whole(part: np.ndarray) -> bool:
    return part.dtype.kind != "f" or bool((part == np.round(part)).all())
