"""Run the ```python blocks of a page, one after another in one namespace, and keep what they print and draw.

A page is plain Markdown, so that it also reads well where nothing runs it. What is its own:

- ```` ```python picture WORDS ```` is code of a picture: the site folds it, and shows the picture, with the words for
  those who cannot see it. In the same way ```` ```python table ```` prints a table in Markdown.
- A line that ends in ``# smoke: 20`` takes that value in place of its own in smoke mode, which is for a quick build.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SMOKE = "FLOWPOST_DOCS_SMOKE" in os.environ
BLOCK = re.compile(r"^```python[ ]?(?P<info>[^\n]*)\n(?P<code>.*?)^```[ ]*\n", re.MULTILINE | re.DOTALL)
OTHERS = {
    "pyro": "pyro",
    "arviz": "arviz_base",
    "lightning": "lightning",
    "zuko": "zuko",
    "nflows": "nflows",
    "normflows": "normflows",
}
"""What a block may import, itself or by `flowpost.interop`, beyond the documentation's own needs; and its package."""
STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "figure.facecolor": "white",  # so that a picture reads in the dark, too
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


class Output(NamedTuple):
    """What one block printed, and its pictures as PNG files."""

    text: str
    pictures: list[bytes]


def smoked(text: str, *, smoke: bool = SMOKE) -> str:
    """The text with its smoke marks taken away; in smoke mode their values are in force."""
    if smoke:
        text = re.sub(r"=( ?)[^=\n#]+?\s*# smoke: (.+)$", r"=\1\2", text, flags=re.MULTILINE)
    return re.sub(r"\s*# smoke: .+$", "", text, flags=re.MULTILINE)


def digest(*texts: str) -> str:
    """A short name of what texts say."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def blocks(text: str) -> list[str]:
    """The Python blocks of a page."""
    return [match["code"] for match in BLOCK.finditer(text)]


def needs(block: str) -> set[str]:
    """The packages that a block imports and the documentation's environment need not have."""
    imported = {name for name in OTHERS if re.search(rf"^\s*(import|from) (flowpost\.interop\.)?{name}\b", block, re.M)}
    return {OTHERS[name] for name in imported}


def missing(text: str) -> set[str]:
    """Of these, for all blocks of a page, the packages that are not installed."""
    return {name for block in blocks(text) for name in needs(block) if importlib.util.find_spec(name) is None}


def run(name: str, text: str) -> list[Output]:
    """Run a page from its first block to its last.

    Args:
        name: of the page; it stands in a traceback.
        text: the page.

    Returns:
        What each block printed and drew.

    Raises:
        Exception: whatever a block raises; a warning is an error.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import torch
    from matplotlib import pyplot

    pyplot.close("all")
    module = types.ModuleType(re.sub(r"\W", "_", f"page_{name}"))  # where pickle finds the classes that a page defines
    sys.modules[module.__name__] = module
    with mpl.rc_context(STYLE), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", message="__array(_wrap)?__ ")  # a tensor handed to matplotlib
        torch.manual_seed(0)
        with _workplace():
            return [_output(name, smoked(block), module) for block in blocks(text)]


@contextlib.contextmanager
def _workplace() -> Iterator[None]:
    """A folder of its own for what a page writes, from which it sees the documentation as from the repository."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "docs").symlink_to(Path(__file__).resolve().parents[1])
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(home)


def _output(name: str, block: str, module: types.ModuleType) -> Output:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, f"{name}.md", "exec", dont_inherit=True), vars(module))
    return Output(printed.getvalue(), _pictures())


def _pictures() -> list[bytes]:
    from matplotlib import pyplot

    files = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png")
        files.append(file.getvalue())
    pyplot.close("all")
    return files
