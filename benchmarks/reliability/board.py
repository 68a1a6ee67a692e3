"""What the scoreboard found, as numbers and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

from benchmarks.reliability.judge import NOT_APPLICABLE, RAW, SILENT, SURVIVED
from benchmarks.table import Table, grouped

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


def scoreboard(board: Board) -> Table:
    """A row for each library."""
    rows = []
    for name, library in board.items():
        found = count(library["tries"])
        share = f"{found[SURVIVED]} / {found['tried']} ({_percent(found[SURVIVED], found['tried'])})"
        title = f"{name} {library['version']}"
        rows.append([title, str(len(library["models"])), share, str(found[RAW]), str(found[SILENT])])
    return Table(HEADER, rows, caption="By hard uses of every model; uses that do not apply are left out")


def _percent(part: int, whole: int) -> str:
    # Rounded down: 100 % is said of nothing less.
    return f"{100 * part // whole} %" if whole else "n.a."


def by_use(board: Board) -> Table:
    """A row for each use, a column for each library."""
    names = list(dict.fromkeys(use for library in board.values() for use in library["uses"]))
    cells = [[name, *(_cell(library, name) for library in board.values())] for name in names]
    return Table(("use", *board), cells, "by use", "Survived / raw / silent, in models")


def _cell(library: Library, use: str) -> str:
    found = count([one for one in library["tries"] if one["use"] == use])
    return f"{found[SURVIVED]} / {found[RAW]} / {found[SILENT]}" if found["tried"] else "–"


def faults(board: Board, outcome: str) -> list[list[str]]:
    """Library, use, models and one of their reasons, for every use that ended so; equal ones share a row."""
    tries = [(name, one) for name, library in board.items() for one in library["tries"] if one["outcome"] == outcome]
    groups = grouped(tries, lambda each: (each[0], each[1]["use"]))
    return [[*key, "; ".join(one["model"] for _, one in group), group[0][1]["reason"]] for key, group in groups.items()]


def tables(board: Board) -> list[Table]:
    """For a terminal: the scoreboard, and where flowpost does not survive, what happened."""
    own = {name: library for name, library in board.items() if name == "flowpost"}
    wrong = [[outcome, *row[1:]] for outcome in (SILENT, RAW) for row in faults(own, outcome)]
    header = ("flowpost", "use", "models", "reason")
    found = [Table(header, wrong, caption="What flowpost does not survive", numbers=False)] if wrong else []
    return [scoreboard(board), *found]


def markdown(board: Board) -> str:
    """For a page: the scoreboard, every use, every silent fault."""
    header = ("library", "use", "models", "what came back (the first model's)")
    silent = Table(header, faults(board, SILENT), "silent faults", numbers=False)
    return "\n\n".join(table.markdown() for table in (scoreboard(board), by_use(board), silent))
