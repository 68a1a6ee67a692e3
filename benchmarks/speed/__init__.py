"""The stopwatch, `python -m benchmarks speed`: flowpost beside dense layers and public libraries, doing equal work.

Everyone's work is checked before it is timed: the same widths, both outputs used, a gradient in every weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks.config import ConfigError, configure
from benchmarks.files import Content, as_json
from benchmarks.filling import origin, pictured
from benchmarks.peers import installed, missing
from benchmarks.run import Out, Page, Run, terminal
from benchmarks.speed import counted
from benchmarks.speed.hall import Hall
from benchmarks.speed.plot import Curves, draw
from benchmarks.speed.programme import Held, curves, programme
from benchmarks.speed.results import Contest
from benchmarks.speed.sizes import FULL, ON_GPU, QUICK
from benchmarks.speed.table import absences, goals, markdown, times
from benchmarks.workers import cpu_threads

MODES = ("default", "reduce-overhead", "max-autotune")


def speed(
    *,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: smaller sizes, few rounds, no compiler.")
    ] = False,
    reps: Annotated[
        int | None, typer.Option(min=1, help="Rounds of every contest.  [default: as many as its seconds allow]")
    ] = None,
    compile_all: Annotated[
        bool, typer.Option("--compile-all", help="Compile every size, which takes minutes.")
    ] = False,
    seconds: Annotated[
        int | None, typer.Option(min=1, help="Begin no contest after so many. Those with goals come first.")
    ] = None,
    mode: Annotated[str, typer.Option(help=f"Of torch.compile: {', '.join(MODES)}.")] = "default",
    only: Annotated[str, typer.Option(help="Hold only the contests whose title has this in it; no plot.")] = "",
    launches: Annotated[
        bool, typer.Option("--launches", help="Time nothing: count the operations that every recipe launches.")
    ] = False,
    out: Out = None,
    page: Page = None,
) -> None:
    """Time training steps and log q at any z of flowpost, of unmasked dense layers and of public libraries, in turns.

    The public libraries come with pip install -e '.[peers]'; without them flowpost is timed beside dense layers alone.
    In each round everyone has a turn, in random order; ratios are taken within rounds. speed.json in the --out folder
    has every round, speed.md the tables, speed.png cost against dim, hidden width and samples.

    With --launches nothing is timed: what each recipe and library would run on a GPU is counted on the meta device,
    within a minute, into launches.json and launches.md.
    """
    if launches:
        counted.publish(Run.begin("launches", out, libraries=installed(), page=page, mark=counted.MARK))
        return
    if mode not in MODES:
        raise ConfigError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    configure(device=device, threads=threads)  # refuses what a job would refuse
    plan = QUICK if quick else ON_GPU if device.startswith("cuda") else FULL
    if compile_all:
        plan = replace(plan, compiled=plan.training)
    if reps is not None:
        plan = replace(plan, least=reps, most=reps, budget=math.inf, curve_budget=math.inf)
    hall = Hall(torch.device(device), plan, None if mode == "default" else mode)
    if not any(only in title for title, _ in programme(hall)):
        raise ConfigError(f"only: expected a part of a contest's title, got {only!r}")
    run = Run.begin("speed", out, device=device, threads=threads, libraries=installed(), page=page)
    with cpu_threads(threads):
        failed = hold(run, hall, only, math.inf if seconds is None else seconds)
    raise typer.Exit(int(failed > 0))


def hold(run: Run, hall: Hall, only: str, seconds: float) -> int:
    """Hold every contest that begins within these seconds, and write after each, so that a stop loses nothing.

    One that fails is told of, and the others are held: how many failed is returned.
    """
    console = terminal()
    contests: list[Contest] = []
    drawn: Curves = {}
    late: list[str] = []
    failed: list[str] = []

    def tried(title: str, held: Held) -> list[Contest]:
        if run.seconds() > seconds:
            late.append(title)
            return []
        console.print(title)
        try:
            found = held()
            as_json(found.as_json())  # a file takes neither nan nor a ratio to 0
        except Exception as error:  # a compiler's, say, or the device's
            failed.append(title)
            console.print(f"{title} failed: {type(error).__name__}: {error}", soft_wrap=True)
            return []
        return [found]

    for title, held in programme(hall):
        if only in title and (found := tried(title, held)):
            contests += found
            write(run, contests, drawn)
    for what, axis, held in () if only else curves(hall):
        drawn.setdefault((what, axis), []).extend(tried(f"{what} against {axis}", held))
    drawn = {key: group for key, group in drawn.items() if group}
    if drawn:
        draw(drawn, run.folder / "speed.png")
    write(run, contests, drawn)
    for each in filter(None, (*times(contests), *goals(contests), *absences(contests), missing("timed"))):
        console.print(each, soft_wrap=isinstance(each, str))
    if late:
        console.print(f"No time was left for {len(late)} contests; the first is: {late[0]}", soft_wrap=True)
    console.print(f"Every round, tables and the plot: {run.folder}", soft_wrap=True)
    return len(failed)


def write(run: Run, contests: Sequence[Contest], drawn: Curves) -> None:
    """`speed.json`, `speed.md` and the page."""
    plotted = [{"axis": axis} | one.as_json() for (_, axis), group in drawn.items() for one in group]
    run.write("speed.json", {"contests": [one.as_json() for one in contests], "curves": plotted})
    run.write("speed.md", markdown(contests, origin(run.head())))
    run.publish("speed.json", shown, "speed.png")


def shown(content: Content, page: str) -> str:
    """The page's text: the tables and the plot."""
    text = markdown([Contest.from_json(each) for each in content["contests"]], origin(content))
    plot = pictured(page, "Time of one call against dim, hidden width and samples")
    return f"{text}\n\n{plot}" if content["curves"] else text
