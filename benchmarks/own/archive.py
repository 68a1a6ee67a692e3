"""The arrays of an .npz: numbers alone, no pickle, and refused by their headers where memory would not hold them."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from pathlib import Path

import numpy as np

from benchmarks.download import DataError

COPIES = 8  # bytes a number beside those in the file: its part of the split, and the float32 that is trained on
CHUNK = 1 << 20  # bytes hashed at once
CONTAINER = Path("/sys/fs/cgroup/memory.max")  # where Linux tells what a container may use

Header = tuple[tuple[int, ...], np.dtype]


def read(path: Path) -> dict[str, np.ndarray]:
    """Every array of a file, by name.

    Raises:
        DataError: there is no such file, it is damaged, holds something else than numbers, or does not fit in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {Path(name).stem: _header(archive, name) for name in archive.namelist()}
        _check(path, headers)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in headers}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"data: expected a file, got {path}: {error.strerror or error}") from error
    except Exception as error:  # zip and numpy raise a dozen kinds for damaged bytes; the cause is chained
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"data: expected arrays that numpy.savez wrote, got {path}: {found}") from error


def sha256(path: Path) -> str:
    """Of the file's bytes.

    Raises:
        DataError: there is no such file.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    except OSError as error:
        raise DataError(f"data: expected a file, got {path}: {error.strerror}") from error
    return found.hexdigest()


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    with archive.open(name) as member:
        if np.lib.format.read_magic(member) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    return shape, dtype


def _check(path: Path, headers: dict[str, Header]) -> None:
    """Refuse what numpy would need a pickle for, what are no numbers, and what is too large."""
    for name, (_, dtype) in headers.items():
        if dtype.hasobject:
            raise DataError(f"data: expected numbers in {path}, got {name} of Python objects, a pickle; save numbers")
        if dtype.kind not in "biuf":
            raise DataError(f"data: expected real numbers in {path}, got {name} of {dtype}; save numbers")
    needed = sum(math.prod(shape) * (dtype.itemsize + COPIES) for shape, dtype in headers.values())
    free = free_memory()
    if free is not None and needed > free:
        shapes = ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in headers.items())
        got = f"{shapes}, which take {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"
        raise DataError(f"data: expected arrays that fit in memory, got {got}; take fewer rows")


def free_memory() -> int | None:
    """Bytes that may still be taken, where the system tells."""
    try:
        found = _available()
        limit = CONTAINER.read_text().strip() if CONTAINER.exists() else ""
        return min(found, int(limit)) if limit.isdecimal() else found
    except (OSError, ValueError, AttributeError, StopIteration):
        return None


def _available() -> int:
    """What Linux could give; elsewhere all that there is."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
