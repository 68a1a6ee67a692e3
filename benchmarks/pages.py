"""`python -m benchmarks pages`: every page of results, filled anew from the figures that lie beside it.

The commands with `--page` put them there; of the main job it is `results.json`, copied by hand. Several runs of
`targets` with one plan, or of `posteriors`, each without the rows of the others, may stand in one file as its `runs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import compare, encoders, report, sandwich, speed, targets
from benchmarks.config import ConfigError
from benchmarks.files import replace_text
from benchmarks.filling import FIGURES, Shown, filled, page_of
from benchmarks.images import page as images
from benchmarks.posteriors import command as posteriors
from benchmarks.reliability import command as reliability
from benchmarks.run import terminal
from benchmarks.speed import counted

SHOWN: Mapping[str, Shown] = {
    "compare": compare.shown,
    "encoders": encoders.shown,
    "images": images.shown,
    report.JOB: report.shown,
    "launches": counted.shown,
    "posteriors": posteriors.shown,
    "reliability": reliability.shown,
    "sandwich": sandwich.shown,
    "speed": speed.shown,
    "targets": targets.shown,
}


def pages(
    docs: Annotated[Path, typer.Argument(help="Folder of the pages.", file_okay=False)] = Path("docs"),
) -> None:
    """Fill every page of results from the figures beside it: the words of a table have changed, nothing is measured."""
    found = kept(docs)
    if not found:
        raise ConfigError(f"docs: expected a folder with {FIGURES}, got {docs}")
    for each in found:
        replace_text(page_of(each), text(each))
        terminal().print(f"{page_of(each)}: {each.stem}")


def kept(docs: Path) -> list[Path]:
    """The files of figures."""
    return sorted(docs.glob(f"{FIGURES}/*/*.json"))


def text(figures: Path) -> str:
    """The page of these figures, as it has to be."""
    what = json.loads(figures.read_text(encoding="utf-8"))["what"]
    return filled(figures, SHOWN[what])
