"""Files that are never half written, and what stands in them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.config import ConfigError

T = TypeVar("T")
Content = Mapping[str, Any]
"""Of a run's JSON file: what it says of itself, and its figures."""


def replace_text(path: Path, text: str) -> None:
    """Write a file in one go: never half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A folder that cannot be written to, or a disk that is full, is one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"out: expected a folder that can be written to, got {folder}: {why}") from error


def as_json(content: Content) -> str:
    """As it stands in a file."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def finite(value: T) -> T | None:
    """None in the place of a float that is not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
