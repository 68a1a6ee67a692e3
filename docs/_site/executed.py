"""A Sphinx extension: what a page's blocks print and draw stands below them, and a block that fails ends the build.

A page whose blocks need a library that is not installed shows the outputs that `make docs-full` committed for it; where
its code has changed since, the build fails and says so.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from runner import BLOCK, SMOKE, Output, blocks, digest, missing, needs, run, smoked
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

HERE = Path(__file__).resolve().parents[1]
PICTURES = HERE / "_pictures"
COMMITTED = HERE / "_outputs"
OUTSIDE = re.compile(r"\[[^\]]*\]\(\.\./((?:benchmarks|flowpost|tests)/[^)#]*)\)")
FOLDED = {"picture", "table"}
UNSEEN = "A picture that the code above draws"


def library() -> str:
    """A short name of the state of the code that pages run."""
    files = [path for room in ("flowpost", "benchmarks", "docs/_site") for path in (HERE.parent / room).rglob("*.py")]
    return digest(*(path.read_text(encoding="utf-8") for path in sorted(files)))


def commit() -> str:
    """The commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Run a page as Sphinx reads it; a link to a file outside of the site becomes that file's name."""
    text = source[0] = OUTSIDE.sub(r"`\1`", source[0])
    if blocks(text):
        source[0] = shown(name, text, *_outputs(app, name, text))


def _outputs(app: Sphinx, name: str, text: str) -> tuple[list[Output], str]:
    """What a page's blocks put out, and a note of where that is from, if not from this build."""
    others = {package for block in blocks(text) for package in needs(block)}
    if missing(text):
        return _committed(name, text)
    outputs = _cached(app, name, text)
    if others and app.config.executed_commit:
        _commit(name, text, outputs)
    return outputs, ""


def _cached(app: Sphinx, name: str, text: str) -> list[Output]:
    store = Path(app.doctreedir) / "executed" / f"{digest(name, text, app.config.executed_state)}.json"
    if store.exists():
        return [Output(text, [bytes.fromhex(p) for p in pictures]) for text, pictures in json.loads(store.read_text())]
    try:
        outputs = run(name, text)
    except Exception as error:
        raise ExtensionError(f"{name}.md: {type(error).__name__}: {error}", error) from error
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps([[output.text, [p.hex() for p in output.pictures]] for output in outputs]))
    return outputs


def _file(name: str) -> Path:
    return COMMITTED / f"{name.replace('/', '-')}.json"


def _commit(name: str, text: str, outputs: list[Output]) -> None:
    if any(output.pictures for output in outputs):
        raise ExtensionError(f"{name}.md: expected text alone of a page that needs another library, got a picture")
    record = {"code": digest(*blocks(text)), "commit": commit(), "date": date.today().isoformat()}
    _file(name).parent.mkdir(exist_ok=True)
    _file(name).write_text(json.dumps({**record, "texts": [output.text for output in outputs]}, indent=1) + "\n")


def _committed(name: str, text: str) -> tuple[list[Output], str]:
    record = json.loads(_file(name).read_text()) if _file(name).exists() else {}
    if record.get("code") != digest(*blocks(text)):
        lacking = ", ".join(sorted(missing(text)))
        changed = f"{name}.md has changed since its outputs were committed, and needs {lacking}"
        raise ExtensionError(f"{changed}: run `make docs-full`")
    note = f"The outputs on this page are of {record['date']}, commit {record['commit']}, by `make docs-full`."
    return [Output(text, []) for text in record["texts"]], note


def shown(name: str, text: str, outputs: list[Output], note: str) -> str:
    """The page as the site shows it, each block with what it put out."""
    left = iter(outputs)
    index = iter(range(10**6))

    def one(match: re.Match[str]) -> str:
        code = f"```python\n{smoked(match['code'])}```\n"
        output = next(left)
        kind, _, words = match["info"].strip().partition(" ")
        parts = [_folded(code) if kind in FOLDED else code]
        parts += [f"\n{output.text}\n"] if kind == "table" else _printed(output.text)
        return "\n".join([*parts, *_drawn(name, output, index, words or UNSEEN)])

    page = BLOCK.sub(one, text)
    return f"{page}\n{note}\n" if note else page


def _folded(code: str) -> str:
    return f'<details class="code"><summary>The code of what follows</summary>\n\n{code}\n</details>\n'


def _printed(text: str) -> Iterator[str]:
    if text.strip():
        yield f"\n````{{code-block}} text\n:class: output\n\n{text.rstrip()}\n````\n"


def _drawn(name: str, output: Output, index: Iterator[int], words: str) -> Iterator[str]:
    for picture in output.pictures:
        file = PICTURES / f"{name.replace('/', '-')}-{next(index)}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture)
        yield f"\n![{words}](/{PICTURES.name}/{file.name})\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Enter it in Sphinx."""
    import torch

    torch.set_num_threads(1)  # pages are read in several processes
    app.add_config_value("executed_commit", default=False, rebuild="")
    app.add_config_value("executed_state", default=digest(library(), str(SMOKE)), rebuild="env")
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
