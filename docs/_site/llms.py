"""A Sphinx extension: `llms.txt`, a table of contents for readers that are programs, with the pages' own Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TREE = re.compile(r"^```\{toctree\}\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


def sections(index: str) -> Iterator[tuple[str, list[str]]]:
    """The captions of the tables of contents, each with its pages."""
    for match in TREE.finditer(index):
        lines = [line.strip() for line in match["body"].splitlines()]
        caption = next(line.removeprefix(":caption:").strip() for line in lines if line.startswith(":caption:"))
        yield caption, [line for line in lines if line and not line.startswith(":")]


def described(page: str) -> tuple[str, str]:
    """A page's title, and its first paragraph of prose on one line."""
    title = re.findall(r"^# (.+)$", page, re.MULTILINE)[0]
    prose = [part for part in FENCED.sub("", page).split("\n\n")[1:] if re.match(r"[A-Za-z*`\[(]", part)]
    return title, re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(prose[0].split()) if prose else "")


def written(source: Path) -> str:
    """All of `llms.txt`."""
    index = (source / "index.md").read_text(encoding="utf-8")
    title, summary = described(index)
    lines = [f"# {title}", "", f"> {summary}"]
    for caption, pages in sections(index):
        lines += ["", f"## {caption}", ""]
        for page in pages:
            name, first = described((source / f"{page}.md").read_text(encoding="utf-8"))
            lines.append(f"- [{name}](_sources/{page}.md.txt): {first}")
    return "\n".join(lines) + "\n"


def finish(app: Sphinx, error: Exception | None) -> None:
    """Write it beside the built pages."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "llms.txt").write_text(written(Path(app.srcdir)), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Enter it in Sphinx."""
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
