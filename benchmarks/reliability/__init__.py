"""The scoreboard, `python -m benchmarks reliability`: the same hard uses of flowpost and of the public libraries.

*Survived* is the right answer, or an error that names the argument and what was expected; *raw* an internal error, or
no support; *silent* a wrong, stale, non-finite or mis-shaped answer without an error. Float64 decides what is right.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from benchmarks.reliability.board import Board, Library, Try, markdown, tables
from benchmarks.reliability.judge import RAW
from benchmarks.reliability.libraries import DISTRIBUTIONS, installed

MISSING = "Not installed, so not asked: {}. To add them: pip install -e '.[peers]'"
_DEATHS = 20  # a library whose process dies more often than this is given up


class ScoreboardError(Exception):
    """A library's models could not be built at all."""


def run(out: Path | None = None, libraries: Sequence[str] = (), *, quick: bool = False) -> int:
    """Try every hard use, print the scoreboard, and write `reliability.json` and `reliability.md`.

    Args:
        out: folder to write to; by default ``runs/<time>-reliability``.
        libraries: which of them; by default all that are installed.
        quick: leave out `torch.compile`, which takes most of the time.

    Returns:
        The exit code: 0 whatever was found, 1 if a library could not be tried, 2 for one that is not installed.
    """
    console, here = Console(), installed()
    unknown = [name for name in libraries if name not in here]
    if unknown:
        print(f"library: expected some of {', '.join(here)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    started, board = datetime.now().astimezone(), Board()
    folder = out or Path("runs") / f"{started:%Y%m%d-%H%M%S}-reliability"
    code = 0
    for name in libraries or here:
        try:
            board[name] = ask(name, console, quick=quick)
        except ScoreboardError as error:
            print(error, file=sys.stderr)
            code = 1
    write(folder, board, started, quick=quick)
    for table in tables(board):
        console.print(table)
    absent = [name for name in DISTRIBUTIONS if name not in here]
    if absent:
        console.print(MISSING.format(", ".join(absent)), soft_wrap=True, markup=False)
    console.print(f"Every try and its reason: {folder / 'reliability.json'}", soft_wrap=True)
    return code


def reliability(
    *,
    library: Annotated[
        list[str] | None, typer.Option(help="Ask this one only; repeat it for several.  [default: all installed]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.  [default: runs/<time>-reliability]", file_okay=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out torch.compile, which takes most of the time.")
    ] = False,
) -> None:
    """Try the same hard uses on flowpost and on the public libraries, and count what survived and what failed silently.

    The public libraries come with pip install -e '.[peers]'; without them flowpost is asked alone. Every try and its
    reason goes to reliability.json in the --out folder, the tables of docs/reliability.md to reliability.md.
    """
    raise typer.Exit(run(out, library or (), quick=quick))


def ask(name: str, console: Console, *, quick: bool = False) -> Library:
    """One library's results; a process that dies or hangs costs it that use, and the next one goes on from there."""
    tries: list[Try] = []
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name, total=None)
        for _ in range(_DEATHS):
            with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
                with _start(name, len(tries), log, quick=quick) as process:
                    lines = cast("IO[str]", process.stdout)
                    head = json.loads(lines.readline() or "null")
                    pairs = [(model, use) for model in head["models"] for use in head["uses"]] if head else []
                    progress.update(task, total=len(pairs))
                    for line in lines:
                        tries.append(json.loads(line))
                        progress.update(task, completed=len(tries))
                if head is None:
                    raise ScoreboardError(f"{name}: its models could not be built: {_last(log)}")
                if len(tries) < len(pairs):
                    model, use = pairs[len(tries)]
                    reason = f"the process ended with code {process.returncode}: {_last(log)}"
                    tries.append({"model": model, "use": use, "outcome": RAW, "reason": reason})
                if len(tries) == len(pairs):
                    return cast("Library", head | {"tries": tries})
    raise ScoreboardError(f"{name}: its process died {_DEATHS} times, last in '{tries[-1]['use']}'")


def _start(name: str, skip: int, log: IO[str], *, quick: bool) -> subprocess.Popen[str]:
    options = ["--skip", str(skip), *(["--quick"] if quick else [])]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability.worker", name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_VERBOSE": "0"}
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=root)


def _last(log: IO[str]) -> str:
    log.seek(0)
    return next((line.strip() for line in reversed(log.readlines()) if line.strip()), "no message")


def write(folder: Path, board: Board, started: datetime, *, quick: bool) -> None:
    """`reliability.json`, every try with its reason, and `reliability.md`, the page's tables."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now().astimezone() - started).total_seconds(), 1),
        "quick": quick,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "libraries": board,
    }
    _replace(folder / "reliability.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _replace(folder / "reliability.md", markdown(board))


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
