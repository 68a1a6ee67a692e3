"""A run of a command: its folder, files that are never half written, where it was measured, the page that it fills."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.config import ConfigError
from benchmarks.environment import environment

MARKS = ("<!-- tables -->", "<!-- end of tables -->")
WIDTH = 150  # columns of what is printed into a file

Out = Annotated[Path | None, typer.Option(help="Folder to write to.  [default: a new one in runs/]", file_okay=False)]
Page = Annotated[
    Path | None, typer.Option(help="Put the tables on this page too, between its marks, and the picture beside it.")
]


def _now() -> datetime:
    return datetime.now().astimezone()


@dataclass
class Run:
    """The folder of one run and what all its files say of it.

    Attributes:
        folder: of the files; made at the first one.
        environment: what the figures depend on besides the options.
        command: what was typed.
        page: where the tables go too, if anywhere.
        marks: between which of the page's they go.
        started: when the first process of the run began.
        seconds_before: of the processes that went before this one.
        silent: whether this process writes nothing, because another one does.
    """

    folder: Path
    environment: Mapping[str, Any]
    command: str = ""
    page: Path | None = None
    marks: tuple[str, str] = MARKS
    started: datetime = field(default_factory=_now)
    seconds_before: float = 0.0
    silent: bool = False
    _begun: datetime = field(default_factory=_now)

    @classmethod
    def begin(
        cls,
        what: str,
        folder: Path | None = None,
        *,
        device: str = "cpu",
        threads: int = 1,
        libraries: Sequence[str] = (),
        page: Path | None = None,
        marks: tuple[str, str] = MARKS,
    ) -> Run:
        """A new run; a page that cannot be filled is refused here, before anything is measured.

        Args:
            what: the end of the folder's name where none is given.
            folder: to write to; by default ``runs/<time>-<what>``.
            device: that is measured on.
            threads: of PyTorch on the CPU.
            libraries: import names of the public libraries that are measured beside flowpost.
            page: where the tables go too.
            marks: between which of the page's they go.

        Raises:
            ConfigError: there is no such page, or it has no marks.
        """
        if page is not None:
            fill(page, "", marks)
        folder = folder or Path("runs") / f"{_now():%Y%m%d-%H%M%S}-{what}"
        return cls(folder, environment(device, threads, libraries), typed(sys.argv[1:]), page, marks)

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """A file of the folder, replaced in one go: a text, or as JSON a mapping after what the run says of itself."""
        if self.silent:
            return
        if not isinstance(content, str):
            head = {
                "started": self.started.isoformat(timespec="seconds"),
                "seconds": round(self.seconds(), 1),
                "command": self.command,
                "environment": self.environment,
            }
            content = json.dumps(head | dict(content), indent=1, ensure_ascii=False, allow_nan=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / name, content.rstrip("\n") + "\n")

    def seconds(self) -> float:
        """Since it began, of all its processes."""
        return self.seconds_before + (_now() - self._begun).total_seconds()

    def where(self) -> str:
        """When, how long and on what it was measured, in a sentence."""
        there = self.environment
        device = there["device"] if there["device"] == there["cpu"] else f"{there['device']} with {there['cpu']}"
        threads = f"{there['threads']} thread{'s' if there['threads'] > 1 else ''}"
        names = ("torch", "flowpost", *there["libraries"])
        versions = ", ".join(f"{name} {(there | there['libraries'])[name]}" for name in names)
        return (
            f"Measured on {self.started:%Y-%m-%d}, {self.seconds() / 60:.0f} minutes, on {device} "
            f"({there['cores']} cores, {threads}); Python {there['python']}, {versions}; commit {there['commit']}."
        )

    def origin(self) -> str:
        """`where`, and the command, for a page."""
        return f"{self.where()}\n\n```bash\n{self.command}\n```"

    def publish(self, text: str) -> None:
        """Put a text between the marks of the page, if there is one."""
        if self.page is not None:
            replace_text(self.page, fill(self.page, text, self.marks))

    def picture(self, name: str, caption: str) -> str:
        """The Markdown of a picture of the folder, which is copied beside the page; nothing where either is missing."""
        if self.page is None or not (self.folder / name).exists():
            return ""
        beside = self.page.with_suffix(Path(name).suffix)
        shutil.copyfile(self.folder / name, beside)
        return f"![{caption}]({beside.name})"


def typed(words: Sequence[str]) -> str:
    """The command that was typed, without where it was to be written."""
    kept, skip = [], False
    for word in words:
        here = skip or word.partition("=")[0] in ("--out", "--page")
        skip = word in ("--out", "--page")
        kept += [] if here else [word]
    return shlex.join(["python", "-m", "benchmarks", *kept])


def fill(page: Path, text: str, marks: tuple[str, str] = MARKS) -> str:
    """What is on the page, with `text` between the marks.

    Raises:
        ConfigError: there is no such page, or it has no marks.
    """
    try:
        before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    except OSError as error:
        raise ConfigError(f"page: expected a page to put the tables on, got {page}: {error.strerror}") from error
    _, end, after = rest.partition(marks[1])
    if not end:
        raise ConfigError(f"page: expected the marks {' and '.join(MARKS)} in {page}, got none")
    return f"{before}{marks[0]}\n\n{text.strip()}\n\n{marks[1]}{after}"


def replace_text(path: Path, text: str) -> None:
    """Write a file in one go: never half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def terminal(*, quiet: bool = False) -> Console:
    """Where a command prints: what it says is text, not markup."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH, quiet=quiet)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads of PyTorch inside, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
