"""From a file's arrays to the parts of a data set: what each row is for, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.download import DataError
from benchmarks.split import SPLIT_SEED, permuted_parts

PARTS = ("train", "valid", "test")
FEWEST = {"train": 50, "valid": 10, "test": 10}  # rows: with fewer, no figure would mean anything
SHARE = 10  # a part that is missing gets one of so many rows of train

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """The parts of a data set, and how they came about."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    labels: np.ndarray | None
    """Of the test rows."""
    origin: str
    """In words."""

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The three, by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def divide(arrays: Arrays) -> Rows:
    """The three parts: those of the file, and the missing ones as tenths of its training rows, by a fixed seed.

    Raises:
        DataError: an array is missing, has another shape or too few rows, or holds what is no finite number.
    """
    given = _named(arrays)
    for name, array in given.items():
        _check_array(name, array, given["train"])
    missing = [name for name in PARTS if name not in given]
    labels = _labels(arrays.get("labels"), given)
    parts, origin = dict(given), "as they are in the file"
    if missing:
        rows = len(given["train"])
        sizes = [rows - len(missing) * (rows // SHARE), *[rows // SHARE] * len(missing)]
        chosen = dict(zip(["train", *missing], permuted_parts(rows, sizes), strict=True))
        parts |= {name: given["train"][index] for name, index in chosen.items()}
        labels = labels[chosen["test"]] if labels is not None and "test" in chosen else labels
        origin = f"{' and '.join(missing)}: a tenth of {rows} rows each, drawn with seed {SPLIT_SEED}"
    if unread := [name for name in arrays if "train" in arrays and name not in (*PARTS, "labels")]:
        origin += f"; not read: {', '.join(unread)}"
    for name, fewest in FEWEST.items():
        if len(parts[name]) < fewest:
            raise DataError(f"{name}: expected at least {fewest} rows, got {len(parts[name])}; {origin}")
    return Rows(parts["train"], parts["valid"], parts["test"], labels, origin)


def _named(arrays: Arrays) -> dict[str, np.ndarray]:
    """The parts that a file has; its only array, whatever its name, is `train`."""
    found = {name: array for name, array in arrays.items() if name in PARTS}
    if "train" in found:
        return found
    others = [name for name in arrays if name != "labels"]
    if len(others) != 1 or found:
        got = ", ".join(arrays) or "none"
        raise DataError(f"data: expected an array train, or one array alone to be split, got {got}; name one train")
    return {"train": arrays[others[0]]}


def _check_array(name: str, array: np.ndarray, train: np.ndarray) -> None:
    if array.ndim < 2:
        got = f"got shape {array.shape}"
        raise DataError(f"{name}: expected a row for each example, (N, ...), {got}; write {name}[:, None]")
    if array.shape[1:] != train.shape[1:]:
        raise DataError(f"{name}: expected examples of shape {train.shape[1:]}, as in train, got {array.shape[1:]}")
    if not array.size:
        raise DataError(f"{name}: expected examples with elements in them, got shape {array.shape}")
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(array.astype(np.float32)).reshape(len(array), -1).all(1)
    if bad.any():
        first = f"the first is row {int(bad.argmax())}"
        raise DataError(
            f"{name}: expected finite numbers, got nan or infinity in {int(bad.sum())} of {len(array)} rows, {first}; "
            f"drop them or fill them in"
        )


def _labels(labels: np.ndarray | None, given: Arrays) -> np.ndarray | None:
    """Checked: whole numbers, one for each test row, or for each row that the test rows are drawn from."""
    if labels is None:
        return None
    of = "test" if "test" in given else "train"
    if labels.shape != (len(given[of]),) or labels.dtype.kind not in "biu":
        expected = f"a whole number for each of the {len(given[of])} rows of {of}"
        raise DataError(f"labels: expected {expected}, got shape {labels.shape} of {labels.dtype}")
    return labels
