"""A run's tables on a page of `docs`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.config import ConfigError

MARKS = ("<!-- tables -->", "<!-- end of tables -->")


def command(typed: Sequence[str]) -> str:
    """What was typed, without where it was to be written."""
    kept, skip = [], False
    for word in typed:
        here = skip or word.partition("=")[0] in ("--out", "--page")
        skip = word in ("--out", "--page")
        kept += [] if here else [word]
    return shlex.join(["python", "-m", "benchmarks", *kept])


def fill(page: Path, tables: str) -> str:
    """The page's text with `tables` between its marks.

    Raises:
        ConfigError: there is no such page, or it has no marks.
    """
    try:
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    except OSError as error:
        raise ConfigError(f"page: expected a page to put the tables on, got {page}: {error.strerror}") from error
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ConfigError(f"page: expected the marks {' and '.join(MARKS)} in {page}, got none")
    return f"{before}{MARKS[0]}\n\n{tables}\n{MARKS[1]}{after}"
