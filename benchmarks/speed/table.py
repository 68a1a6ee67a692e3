"""A run's findings as tables: goals, and everyone's times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.speed.growth import GROWTH, growth_tables
from benchmarks.speed.results import DENSE, OURS, SECONDS, Contest, digits, shown
from benchmarks.speed.timing import Spread
from benchmarks.table import Table, grouped

GOALS = ("what", "size", "mode", "goal", "beside", "measured (quartiles)", "met")
TIMES = ("size", "who", "time (quartiles)", "over dense", "over flowpost", "peak MB", "masks MB")
NOBODY = "–"


def _spread(value: Spread | None, show: Callable[[float], str] = digits) -> str:
    return NOBODY if value is None else f"{show(value.median)} ({show(value.low)} to {show(value.high)})"


def goal_rows(contests: Iterable[Contest]) -> list[list[str]]:
    """A row for each goal whose contest has somebody to compare with; without ours it is not met."""
    rows = []
    for one in contests:
        for goal in one.goals:
            rival, reached = one.rival(goal), one.reached(goal)
            if goal.unit or rival is not None:
                met = "yes" if reached is not None and goal.met(reached.median) else "no"
                beside = NOBODY if goal.unit else rival or NOBODY
                found = _spread(reached, partial(shown, unit=goal.unit) if goal.unit else digits)
                mode = one.mode if goal.name == OURS else goal.name.removeprefix(f"{OURS}, ")
                rows.append([one.what, one.size, mode, str(goal), beside, found, met])
        flat = one.memory_goal
        if flat is not None and {flat.name, flat.other} <= one.memory.keys():
            value = one.memory[flat.name] / one.memory[flat.other]
            met = "yes" if value <= flat.bound else "no"
            what = f"{one.what}: peak memory"
            rows.append([what, one.size, one.mode, f"<= {flat.bound:g}", flat.other, digits(value), met])
    return rows


def time_rows(contests: Iterable[Contest]) -> list[list[str]]:
    """A row for each contestant of each contest: ours first, then the others by time."""
    rows = []
    for one in contests:
        show = partial(shown, unit=one.unit)
        for name in sorted(one.seconds, key=lambda name: (name != OURS, one.time(name).median)):
            ratios = [_spread(one.ratio(name, other)) if name != other else "1" for other in (DENSE, OURS)]
            rows.append([one.size, name, _spread(one.time(name), show), *ratios, *_held(one, name)])
        for name in sorted(one.memory.keys() - one.seconds.keys()):
            rows.append([one.size, name, *[NOBODY] * 3, *_held(one, name)])
    return rows


def _held(one: Contest, name: str) -> list[str]:
    """Memory in MB, of a call and of what is kept between calls."""
    return [f"{held[name] / 1e6:.1f}" if name in held else NOBODY for held in (one.memory, one.masks)]


def absences(contests: Iterable[Contest]) -> list[str]:
    """Who is not timed in what, and why: what was found at the first size, where others fail in the same check."""
    found: dict[tuple[str, str], tuple[list[str], str]] = {}
    for one in contests:
        for name, why in one.left_out.items():
            whats, _ = found.setdefault((name, why.partition(": expected")[0]), ([], why))
            whats += [one.what] if one.what not in whats else []
    return [f"{name} is left out of: {'; '.join(whats)}. {why}" for (name, _), (whats, why) in sorted(found.items())]


def goals(contests: Iterable[Contest]) -> list[Table]:
    """What was to be reached, and what was, in one table; none where nothing was."""
    rows = goal_rows(contests)
    return [Table(GOALS, rows, "goals", numbers=False)] if rows else []


def times(contests: Sequence[Contest]) -> list[Table]:
    """What is timed, a table each."""
    tables = []
    timed = [one for one in contests if one.what != GROWTH]
    for title, group in grouped(timed, lambda one: f"{one.what}, {one.mode}").items():
        counts = [str(one.rounds) for one in group]
        rounds = "/".join(counts if len(set(counts)) > 1 else counts[:1])
        caption = f"Median and quartiles over {rounds} rounds; ratios within rounds"
        header = [name if group[0].unit == SECONDS else name.replace("time", "mean") for name in TIMES]
        tables.append(Table(*_filled(header, time_rows(group)), title, caption, numbers=False))
    return [*tables, *growth_tables(contests)]


def markdown(contests: Sequence[Contest], origin: str) -> str:
    """`speed.md`: where and how it was measured, the goals, and every table."""
    parts = [origin, *(table.markdown() for table in (*goals(contests), *times(contests)))]
    if absent := absences(contests):
        parts += ["## Left out", "\n".join(f"- {line}" for line in absent)]
    return "\n\n".join(parts)


def _filled(header: Sequence[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which nobody has anything."""
    kept = [i for i in range(len(header)) if any(row[i] not in (NOBODY, "1") for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
