"""A table, written down once and shown twice: on the terminal, and in Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich import box
from rich.table import Table as Grid

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
LIST = 3
"""So many explained words of a caption are a list on a page."""
WORD = re.compile(r"^([^:(]{1,40}): ")


@dataclass(frozen=True)
class Table:
    """Cells under a header: ``console.print(table)`` shows it on a terminal, ``table.markdown()`` on a page."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    """What the cells are, without a full stop."""
    notes: Sequence[str] = ()
    """Lines below it on a page; a terminal has been told of them."""
    numbers: bool = True
    """Whether every column but the first has numbers, which lie to the right."""

    def __rich__(self) -> Grid:
        grid = Grid(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            caption=self.caption or None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        for index, name in enumerate(self.header):
            number, label = self.numbers and index > 0, self.numbers and index == 0
            # A terminal too narrow for a number breaks it; it never cuts digits off.
            grid.add_column(name, justify="right" if number else "left", no_wrap=label, overflow="fold")
        for row in self.rows:
            grid.add_row(*row)
        return grid

    def markdown(self) -> str:
        """Title, cells, caption and notes."""
        rule = ["---", *["---:" if self.numbers else "---"] * (len(self.header) - 1)]
        parts = [
            self.title and f"## {self.title[0].upper()}{self.title[1:]}",
            "\n".join(map(_line, (self.header, rule, *self.rows))),
            self.caption and _legend(self.caption),
            "\n".join(f"- {note}" for note in self.notes),
        ]
        return "\n\n".join(part for part in parts if part)


def _legend(caption: str) -> str:
    """A caption on a page: many words about columns, as in ``"nats; gap: of them; -: not run"``, are a list."""
    parts = caption.split("; ")
    words = [index for index, part in enumerate(parts) if WORD.match(part)]
    if len(words) < LIST:
        return f"{caption}."
    first = "; ".join(parts[: words[0]])
    rest = ["- " + WORD.sub(r"`\1`: ", part) for part in parts[words[0] :]]
    return "\n".join([*([f"{first}:", ""] if first else []), *rest])


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def mean_sd(values: Sequence[float]) -> str:
    """`mean (standard deviation)`, the latter where there are two values."""
    return f"{statistics.fmean(values):.2f}" + (f" ({statistics.stdev(values):.2f})" if len(values) > 1 else "")


def ranked(items: Sequence[Item], figure: Callable[[Item], float | None]) -> list[Item]:
    """The items by a figure, the lowest first; as they came where one of them has none."""
    figures = [value for value in map(figure, items) if value is not None]
    order = range(len(items))
    return [items[i] for i in (sorted(order, key=figures.__getitem__) if len(figures) == len(items) else order)]


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items of each key, keys in the order in which they first come."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
