"""A run of a command: its folder, files that are never half written, where it was measured, the page that it fills.

A page of results is made of figures alone, and these lie beside it: between `<!-- tables -->` and
`<!-- end of tables -->` on `docs/speed.md` stands what `docs/_figures/speed/tables.json` says, the JSON file of a run.
`python -m benchmarks pages` fills every page anew.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from benchmarks.config import ConfigError
from benchmarks.environment import environment, versions

TABLES = "tables"  # what is marked on a page, unless it has several runs
FIGURES = "_figures"  # the folder beside the pages
INTERRUPTED = 130  # the shell's code for Ctrl-C
WIDTH = 150  # columns of what is printed into a file

Out = Annotated[Path | None, typer.Option(help="Folder to write to.  [default: a new one in runs/]", file_okay=False)]
Page = Annotated[
    Path | None, typer.Option(help="Put the tables on this page too, between its marks, and the picture beside it.")
]

T = TypeVar("T")
Content = Mapping[str, Any]
"""Of a run's JSON file: what it says of itself, and its figures."""
Shown = Callable[[Content, str], str]
"""What of a run's JSON file stands on a page; with the page's name, which its picture bears too."""


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


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A folder that cannot be written to, or a disk that is full, is one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"out: expected a folder that can be written to, got {folder}: {why}") from error


def as_json(content: Content) -> str:
    """As it stands in a file."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def finite(value: T) -> T | None:
    """None in the place of a float that is not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def publish(page: Path, figures: str, shown: Shown, mark: str = TABLES) -> None:
    """Keep a JSON file's text beside a page, and fill the page from it."""
    kept = page.parent / FIGURES / page.stem / f"{mark}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    replace_text(kept, figures)
    replace_text(page, filled(kept, shown))


def lasting(seconds: float) -> str:
    """A time in whole minutes, in words."""
    minutes = round(seconds / 60)
    return {0: "less than a minute", 1: "1 minute"}.get(minutes, f"{minutes} minutes")


def where(content: Content) -> str:
    """When, how long and on what a run was measured, in a sentence."""
    there = content["environment"]
    device = there["device"] if there["device"] == there["cpu"] else f"{there['device']} with {there['cpu']}"
    threads = f"{there['threads']} thread{'s' if there['threads'] > 1 else ''}"
    names = ("torch", "flowpost", *there["libraries"])
    versions = ", ".join(f"{name} {(there | there['libraries'])[name]}" for name in names)
    return (
        f"Measured on {content['started'][:10]}, {lasting(content['seconds'])}, on {device} "
        f"({there['cores']} cores, {threads}); Python {there['python']}, {versions}; commit {there['commit']}."
    )


def origin(content: Content) -> str:
    """`where`, and the command, for a page."""
    return f"{where(content)}\n\n```bash\n{content['command']}\n```"


def pictured(page: str, caption: str) -> str:
    """The Markdown of the picture beside a page of this name."""
    return f"![{caption}]({page}.png)"


def typed(words: Sequence[str]) -> str:
    """The command that was typed, without where it was to be written."""
    kept, skip = [], False
    for word in words:
        here = skip or word.partition("=")[0] in ("--out", "--page")
        skip = word in ("--out", "--page")
        kept += [] if here else [word]
    return shlex.join(["python", "-m", "benchmarks", *kept])


def fill(page: Path, text: str, mark: str = TABLES) -> str:
    """What is on the page, with `text` at the mark.

    Raises:
        ConfigError: there is no such page, or it is not marked.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    try:
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    except OSError as error:
        raise ConfigError(f"page: expected a page to put the tables on, got {page}: {error.strerror}") from error
    _, found, after = rest.partition(end)
    if not found:
        raise ConfigError(f"page: expected the marks {begin} and {end} in {page}, got none")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def page_of(kept: Path) -> Path:
    """The page of a file of figures."""
    return kept.parents[2] / f"{kept.parent.name}.md"


def filled(kept: Path, shown: Shown) -> str:
    """That page, filled from the file."""
    page = page_of(kept)
    return fill(page, shown(json.loads(kept.read_text(encoding="utf-8")), page.stem), kept.stem)


def replace_text(path: Path, text: str) -> None:
    """Write a file in one go: never half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


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
