"""Pages of results, which are made of figures alone, and these lie beside them.

Between `<!-- tables -->` and `<!-- end of tables -->` on `docs/speed.md` stands what `docs/_figures/speed/tables.json`
says, the JSON file of a run. `python -m benchmarks pages` fills every page anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.config import ConfigError
from benchmarks.files import Content, replace_text

TABLES = "tables"  # what is marked on a page, unless it has several runs
FIGURES = "_figures"  # the folder beside the pages

Shown = Callable[[Content, str], str]
"""What of a run's JSON file stands on a page; with the page's name, which its picture bears too."""


def publish(page: Path, figures: str, shown: Shown, mark: str = TABLES) -> None:
    """Keep a JSON file's text beside a page, and fill the page from it."""
    kept = page.parent / FIGURES / page.stem / f"{mark}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    replace_text(kept, figures)
    replace_text(page, filled(kept, shown))


def filled(kept: Path, shown: Shown) -> str:
    """That page, filled from the file."""
    page = page_of(kept)
    return fill(page, shown(json.loads(kept.read_text(encoding="utf-8")), page.stem), kept.stem)


def page_of(kept: Path) -> Path:
    """The page of a file of figures."""
    return kept.parents[2] / f"{kept.parent.name}.md"


def fill(page: Path, text: str, mark: str = TABLES) -> str:
    """What is on the page, with `text` at the mark.

    Raises:
        ConfigError: there is no such page, or it is not marked.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    try:
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    except OSError as error:
        raise ConfigError(f"page: expected a page to put the tables on, got {page}: {error.strerror}") from error
    _, found, after = rest.partition(end)
    if not found:
        raise ConfigError(f"page: expected the marks {begin} and {end} in {page}, got none")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def origin(content: Content) -> str:
    """`where`, and the command, for a page."""
    return f"{where(content)}\n\n```bash\n{content['command']}\n```"


def where(content: Content) -> str:
    """When, how long and on what a run was measured, in a sentence."""
    there = content["environment"]
    device = there["device"] if there["device"] == there["cpu"] else f"{there['device']} with {there['cpu']}"
    threads = f"{there['threads']} thread{'s' if there['threads'] > 1 else ''}"
    names = ("torch", "flowpost", *there["libraries"])
    versions = ", ".join(f"{name} {(there | there['libraries'])[name]}" for name in names)
    return (
        f"Measured on {content['started'][:10]}, {lasting(content['seconds'])}, on {device} "
        f"({there['cores']} cores, {threads}); Python {there['python']}, {versions}; commit {there['commit']}."
    )


def lasting(seconds: float) -> str:
    """A time in whole minutes, in words."""
    minutes = round(seconds / 60)
    return {0: "less than a minute", 1: "1 minute"}.get(minutes, f"{minutes} minutes")


def pictured(page: str, caption: str) -> str:
    """The Markdown of the picture beside a page of this name."""
    return f"![{caption}]({page}.png)"
