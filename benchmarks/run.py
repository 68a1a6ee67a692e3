"""A run of a command: its folder, where it was measured, the page that it fills, and what it says on a terminal."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.config import ConfigError
from benchmarks.environment import environment, versions
from benchmarks.files import Content, as_json, replace_text, written
from benchmarks.filling import TABLES, Shown, fill, publish

INTERRUPTED = 130  # the shell's code for Ctrl-C
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
        what: it is a run of, by which a page finds the tables.
        page: where the tables go too, if anywhere.
        mark: where on the page.
        started: when the first process of the run began.
        seconds_before: of the processes that went before this one.
        silent: whether this process writes nothing, because another one does.
    """

    folder: Path
    environment: Mapping[str, Any]
    command: str = ""
    what: str = ""
    page: Path | None = None
    mark: str = TABLES
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
        name: str = "",
        device: str = "cpu",
        threads: int = 1,
        libraries: Sequence[str] = (),
        page: Path | None = None,
        mark: str = TABLES,
        goes_on: bool = False,
    ) -> Run:
        """A new run; a page that cannot be filled is refused here, before anything is measured.

        Args:
            what: it is a run of.
            folder: to write to; by default ``runs/<time>-<name>``.
            name: by default `what`.
            device: that is measured on.
            threads: of PyTorch on the CPU.
            libraries: import names of the public libraries that are measured beside flowpost.
            page: where the tables go too.
            mark: where on the page.
            goes_on: whether a run of before in this folder is gone on with, by `resume`; else it is refused.

        Raises:
            ConfigError: there is no such page, or it has no marks; the folder has figures already.
        """
        if page is not None:
            fill(page, "", mark)
        folder = folder or Path("runs") / f"{_now():%Y%m%d-%H%M%S}-{name or what}"
        figures = folder / f"{what}.json"
        if figures.exists() and not goes_on:
            has = f"has {figures.name}; take another folder, or remove this one"
            raise ConfigError(f"out: expected a folder without figures, got {folder}, which {has}")
        return cls(folder, environment(device, threads, libraries), typed(sys.argv[1:]), what, page, mark)

    def resume(self) -> Content | None:
        """What a process before this one wrote into the folder, whose time counts too; None if there was none.

        Raises:
            ConfigError: it is no file of this command, or of other versions of torch, numpy or flowpost.
        """
        path = self.folder / f"{self.what}.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.started, self.seconds_before = datetime.fromisoformat(content["started"]), float(content["seconds"])
            then = dict(content["environment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"out: expected a folder of this command, got {path}: {error}") from error
        check_versions("out", path, then)
        return content

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """A file of the folder, replaced in one go: a text, or as JSON a mapping after what the run says of itself."""
        if self.silent:
            return
        if not isinstance(content, str):
            content = as_json(self.head() | dict(content))
        with written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / name, content.rstrip("\n") + "\n")

    def head(self) -> dict[str, Any]:
        """What the run says of itself in its JSON files."""
        return {
            "what": self.what,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds(), 1),
            "command": self.command,
            "environment": self.environment,
        }

    def seconds(self) -> float:
        """Since it began, of all its processes."""
        return self.seconds_before + (_now() - self._begun).total_seconds()

    def publish(self, name: str, shown: Shown, picture: str = "") -> None:
        """Fill the page, if there is one, from a JSON file of the folder, and keep the file beside the page.

        Args:
            name: of the file.
            shown: makes the page's text of it.
            picture: a PNG of the folder, if there is such a file, that is to lie beside the page too.
        """
        if self.page is None:
            return
        if picture and (self.folder / picture).exists():
            shutil.copyfile(self.folder / picture, self.page.with_suffix(".png"))
        publish(self.page, (self.folder / name).read_text(encoding="utf-8"), shown, self.mark)


def check_versions(argument: str, path: Path, then: Mapping[str, Any]) -> None:
    """Refuse to go on with what other versions of torch, numpy or flowpost began."""
    changed = [f"{name} {then.get(name)} != {now}" for name, now in versions().items() if then.get(name) != now]
    if changed:
        began = f"the versions that {path} began with (then != now)"
        raise ConfigError(f"{argument}: expected {began}: {', '.join(changed)}")


def typed(words: Sequence[str]) -> str:
    """The command that was typed, without where it was to be written."""
    kept, skip = [], False
    for word in words:
        here = skip or word.partition("=")[0] in ("--out", "--page")
        skip = word in ("--out", "--page")
        kept += [] if here else [word]
    return shlex.join(["python", "-m", "benchmarks", *kept])


def check_alone(context: typer.Context, name: str, *others: str) -> None:
    """Refuse what stands on the command line beside an option that leaves nothing to the rest, but for `others`.

    Raises:
        ConfigError: something does.
    """
    sources = {
        param.name: (param.opts[0], context.get_parameter_source(param.name)) for param in context.command.params
    }
    given = {
        each: opt for each, (opt, source) in sources.items() if source is not None and source.name == "COMMANDLINE"
    }
    if ignored := [opt for each, opt in given.items() if each not in (name, *others)]:
        why = "since the job goes on as it began" if name == "resume" else "which it would not read"
        raise ConfigError(f"{name}: expected no other option, {why}, got {', '.join(ignored)}")


def terminal(*, quiet: bool = False) -> Console:
    """Where a command prints: what it says is text, not markup."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH, quiet=quiet)
