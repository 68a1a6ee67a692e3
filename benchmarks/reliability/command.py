"""`python -m benchmarks reliability`: every library in a process of its own, and what became of every use.

*Survived* is the right answer, or an error that names the argument and what was expected; *raw* an internal error, or
no support; *silent* a wrong, stale, non-finite or mis-shaped answer without an error. Float64 decides what is right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
from rich.console import Console

from benchmarks.config import ConfigError
from benchmarks.display import live
from benchmarks.files import Content
from benchmarks.filling import origin, where
from benchmarks.peers import installed, missing
from benchmarks.reliability.board import Board, Library, Try, markdown, tables
from benchmarks.reliability.judge import RAW
from benchmarks.run import Out, Page, Run, terminal

_DEATHS = 20  # a library whose process dies more often than this is given up


class ScoreboardError(Exception):
    """A library's models could not be built at all."""


def reliability(
    *,
    library: Annotated[
        list[str] | None, typer.Option(help="Ask this one only; repeat it for several.  [default: all installed]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out torch.compile, which takes most of the time.")
    ] = False,
    out: Out = None,
    page: Page = None,
) -> None:
    """Try the same hard uses on flowpost and on the public libraries, and count what survived and what failed silently.

    The public libraries come with pip install -e '.[peers]'; without them flowpost is asked alone. Every try and its
    reason goes to reliability.json in the --out folder, the tables of docs/reliability.md to reliability.md.
    """
    here = ["flowpost", *installed()]
    names = library or here
    if unknown := [name for name in names if name not in here]:
        raise ConfigError(f"library: expected some of {', '.join(here)}, got {', '.join(unknown)}")
    run = Run.begin("reliability", out, libraries=[name for name in names if name != "flowpost"], page=page)
    raise typer.Exit(hold(run, names, terminal(), quick=quick))


def hold(run: Run, names: list[str], console: Console, *, quick: bool) -> int:
    """Ask every library, print the scoreboard, write it and put it on the page; 1 if one could not be asked."""
    board, code = Board(), 0
    for name in names:
        try:
            board[name] = ask(name, console, quick=quick)
        except ScoreboardError as error:
            print(error, file=sys.stderr)
            code = 1
    content = run.head() | {"quick": quick, "libraries": board}
    run.write("reliability.json", content)
    run.write("reliability.md", shown(content))
    run.publish("reliability.json", shown)
    for each in filter(None, (*tables(board), where(content), missing("asked"))):
        console.print(each, soft_wrap=isinstance(each, str))
    console.print(f"Every try and its reason: {run.folder / 'reliability.json'}", soft_wrap=True)
    return code


def shown(content: Content, page: str = "") -> str:
    """The page's text."""
    return f"{markdown(content['libraries'])}\n\n{origin(content)}"


def ask(name: str, console: Console, *, quick: bool = False) -> Library:
    """One library's results; a process that dies or hangs costs it that use, and the next one goes on from there."""
    tries: list[Try] = []
    with live(console, "{task.completed}/{task.total}") as progress:
        task = progress.add_task(name, total=None)
        tell = lambda total: progress.update(task, total=total, completed=len(tries))  # noqa: E731
        for _ in range(_DEATHS):
            head, total = _go_on(name, tries, tell, quick=quick)
            if len(tries) == total:
                return cast("Library", head | {"tries": tries})
    raise ScoreboardError(f"{name}: its process died {_DEATHS} times, last in '{tries[-1]['use']}'")


def _go_on(name: str, tries: list[Try], tell: Callable[[int], None], *, quick: bool) -> tuple[dict[str, Any], int]:
    """Add what one more process tries before it ends; what it says of its library, and how many tries there are."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        with _start(name, len(tries), log, quick=quick) as process:
            lines = cast("IO[str]", process.stdout)
            head = json.loads(lines.readline() or "null")
            pairs = [(model, use) for model in head["models"] for use in head["uses"]] if head else []
            tell(len(pairs))
            for line in lines:
                tries.append(json.loads(line))
                tell(len(pairs))
        if head is None:
            raise ScoreboardError(f"{name}: its models could not be built: {_last(log)}")
        if len(tries) < len(pairs):
            model, use = pairs[len(tries)]
            reason = f"the process ended with code {process.returncode}: {_last(log)}"
            tries.append({"model": model, "use": use, "outcome": RAW, "reason": reason})
    return head, len(pairs)


def _start(name: str, skip: int, log: IO[str], *, quick: bool) -> subprocess.Popen[str]:
    options = ["--skip", str(skip), *(["--quick"] if quick else [])]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability.worker", name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_VERBOSE": "0"}
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=root)


def _last(log: IO[str]) -> str:
    log.seek(0)
    return next((line.strip() for line in reversed(log.readlines()) if line.strip()), "no message")
