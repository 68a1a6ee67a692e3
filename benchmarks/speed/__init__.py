"""The stopwatch, `python -m benchmarks speed`: flowpost beside dense layers and public libraries, doing equal work.

Everyone's work is checked before it is timed: the same widths, both outputs used, a gradient in every weight.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import flowpost
from benchmarks.config import Config, ConfigError, configure
from benchmarks.environment import environment
from benchmarks.page import command, fill
from benchmarks.reliability.libraries import DISTRIBUTIONS
from benchmarks.report import replace_text
from benchmarks.speed.hall import Hall
from benchmarks.speed.peers import PEERS
from benchmarks.speed.plot import Curves, draw
from benchmarks.speed.programme import curves, programme
from benchmarks.speed.results import Contest
from benchmarks.speed.sizes import FULL, QUICK
from benchmarks.speed.table import absences, markdown, tables

MISSING = "Not installed, so not timed: {}. To add them: pip install -e '.[peers]'"
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
        bool, typer.Option("--compile-all", help="Compile the largest size too, which takes minutes.")
    ] = False,
    mode: Annotated[str, typer.Option(help=f"Of torch.compile: {', '.join(MODES)}.")] = "default",
    only: Annotated[str, typer.Option(help="Hold only the contests whose title has this in it; no plot.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.  [default: runs/<time>-speed]", file_okay=False)
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Put the tables on this page too, between its marks, and the plot beside it.")
    ] = None,
) -> None:
    """Time training steps and log q at any z of flowpost, of unmasked dense layers and of public libraries, in turns.

    The public libraries come with pip install -e '.[peers]'; without them flowpost is timed beside dense layers alone.
    In each round everyone has a turn, in random order; ratios are taken within rounds. speed.json in the --out folder
    has every round, speed.md the tables, speed.png cost against dim, hidden width and samples.
    """
    if mode not in MODES:
        raise ConfigError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    config = configure(device=device, threads=threads)  # of a job's configuration, these two apply
    plan = QUICK if quick else FULL
    if compile_all:
        plan = replace(plan, compiled=plan.training)
    if reps is not None:
        plan = replace(plan, least=reps, most=reps, budget=math.inf, curve_budget=math.inf)
    hall = Hall(torch.device(device), plan, None if mode == "default" else mode)
    if not any(only in title for title, _ in programme(hall)):
        raise ConfigError(f"only: expected a part of a contest's title, got {only!r}")
    if page is not None:
        fill(page, "")  # before anything is measured
    started = datetime.now().astimezone()
    folder = out or Path("runs") / f"{started:%Y%m%d-%H%M%S}-speed"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(hall, config, folder, started, only)
        if page is not None:
            publish(folder, page)
    finally:
        torch.set_num_threads(before)


def run(hall: Hall, config: Config, folder: Path, started: datetime, only: str = "") -> None:
    """Hold every contest, print its table, and write after each, so that a stop loses nothing."""
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 150)
    folder.mkdir(parents=True, exist_ok=True)
    contests: list[Contest] = []
    drawn: Curves = {}
    for title, hold in programme(hall):
        if only in title:
            console.print(title)
            contests.append(hold())
            write(folder, hall, config, started, contests, drawn)
    for what, axis, hold in () if only else curves(hall):
        drawn.setdefault((what, axis), []).append(hold())
    if drawn:
        draw(drawn, folder / "speed.png")
    write(folder, hall, config, started, contests, drawn)
    for table in tables(contests):
        console.print(table)
    for line in absences(contests):
        console.print(line, soft_wrap=True)
    absent = [name for name in PEERS if name not in versions()]
    if absent:
        console.print(MISSING.format(", ".join(absent)), soft_wrap=True)
    console.print(f"Every round, tables and the plot: {folder}", soft_wrap=True)


def write(
    folder: Path, hall: Hall, config: Config, started: datetime, contests: Sequence[Contest], drawn: Curves
) -> None:
    """`speed.json` and `speed.md`."""
    seconds = (datetime.now().astimezone() - started).total_seconds()
    content: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "command": command(sys.argv[1:]),
        "threads": config.threads,
        "environment": environment(config) | {"libraries": versions()},
        "contests": [one.as_json() for one in contests],
        "curves": [{"axis": axis} | one.as_json() for (_, axis), group in drawn.items() for one in group],
    }
    replace_text(folder / "speed.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    replace_text(folder / "speed.md", markdown(contests, head(content)))


def publish(folder: Path, page: Path) -> None:
    """Put a run's tables and its plot on a page."""
    text = (folder / "speed.md").read_text(encoding="utf-8")
    plot = folder / "speed.png"
    if plot.exists():
        shutil.copyfile(plot, page.with_suffix(".png"))
        text += f"\n![Time of one call against dim, hidden width and samples]({page.stem}.png)\n"
    replace_text(page, fill(page, text))


def head(content: dict[str, Any]) -> str:
    """Where and how it was measured, as a paragraph."""
    there, libraries = content["environment"], content["environment"]["libraries"]
    threads = f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"
    where = there["device"] if there["device"] == there["cpu"] else f"{there['device']} with {there['cpu']}"
    others = ", ".join(f"{name} {version}" for name, version in libraries.items())
    return (
        f"Measured on {content['started'][:10]}, {content['seconds'] / 60:.0f} minutes, on {where} "
        f"({there['cores']} cores, {threads}); Python {there['python']}, torch {there['torch']}, "
        f"{others}; commit {there['commit']}.\n\n```bash\n{content['command']}\n```"
    )


def versions() -> dict[str, str]:
    """Of flowpost and of the libraries that are installed."""
    found = {"flowpost": flowpost.__version__}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(DISTRIBUTIONS[name])
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
