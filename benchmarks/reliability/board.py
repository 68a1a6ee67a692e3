"""What the scoreboard found, as numbers, as tables on the terminal, and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

from rich import box
from rich.table import Table

from benchmarks.reliability.judge import NOT_APPLICABLE, RAW, SILENT, SURVIVED

HEADER = ("library", "models", "survived / tried", "raw or unsupported", "silent")


class Try(TypedDict):
    """One use of one model."""

    model: str
    use: str
    outcome: str
    reason: str


class Library(TypedDict):
    """One library's results."""

    version: str
    models: list[str]
    uses: list[str]
    tries: list[Try]


Board = dict[str, Library]


def count(tries: Sequence[Try]) -> Counter[str]:
    """How often each outcome came, and under `tried` how many uses applied."""
    outcomes = Counter(one["outcome"] for one in tries)
    return outcomes + Counter(tried=len(tries) - outcomes[NOT_APPLICABLE])


def rows(board: Board) -> list[list[str]]:
    """The scoreboard: a row for each library."""
    lines = []
    for name, library in board.items():
        found = count(library["tries"])
        share = f"{found[SURVIVED]} / {found['tried']} ({_percent(found[SURVIVED], found['tried'])})"
        title = f"{name} {library['version']}"
        lines.append([title, str(len(library["models"])), share, str(found[RAW]), str(found[SILENT])])
    return lines


def _percent(part: int, whole: int) -> str:
    # Rounded down: 100 % is said of nothing less.
    return f"{100 * part // whole} %" if whole else "n.a."


def by_use(board: Board) -> list[list[str]]:
    """A row for each use: survived / raw / silent for every library, uses that do not apply left out."""
    names = list(dict.fromkeys(use for library in board.values() for use in library["uses"]))
    return [[name, *(_cell(library, name) for library in board.values())] for name in names]


def _cell(library: Library, use: str) -> str:
    found = count([one for one in library["tries"] if one["use"] == use])
    return f"{found[SURVIVED]} / {found[RAW]} / {found[SILENT]}" if found["tried"] else "–"


def faults(board: Board, outcome: str) -> list[list[str]]:
    """Library, use, models and one of their reasons, for every use that ended so; equal ones share a row."""
    groups: dict[tuple[str, str], list[Try]] = {}
    for name, library in board.items():
        for one in library["tries"]:
            if one["outcome"] == outcome:
                groups.setdefault((name, one["use"]), []).append(one)
    return [[*key, "; ".join(t["model"] for t in group), group[0]["reason"]] for key, group in groups.items()]


def tables(board: Board) -> list[Table]:
    """The scoreboard, and where flowpost does not survive, what happened."""
    result = [_table(HEADER, rows(board), "by hard uses of every model; uses that do not apply are left out")]
    own = {name: library for name, library in board.items() if name == "flowpost"}
    wrong = [[outcome, *row[1:]] for outcome in (SILENT, RAW) for row in faults(own, outcome)]
    if wrong:
        result.append(_table(("flowpost", "use", "models", "reason"), wrong, "what flowpost does not survive"))
    return result


def _table(header: Sequence[str], body: list[list[str]], caption: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    for title in header:
        numeric = title in HEADER[1:]
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*row)
    return table


def markdown(board: Board) -> str:
    """The tables of the page: the scoreboard, every use, every silent fault."""
    parts = [
        _markdown(HEADER, rows(board)),
        "## By use\n\nsurvived / raw / silent, in models.\n\n" + _markdown(("use", *board), by_use(board)),
        "## Silent faults\n\n" + _markdown(("library", "use", "models", "what came back (the first model's)"),
                                           faults(board, SILENT)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _markdown(header: Sequence[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
