"""The scoreboard's judge: what is tried on what, and what the outcome is called."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
Direction = Callable[[nn.Module, Tensor, Tensor | None], Pair]

SURVIVED, RAW, SILENT, NOT_APPLICABLE = "survived", "raw", "silent", "n.a."
CONTEXT = 5

# A clear error names an argument of the API and says what was wanted; the same words are asked of every library.
_ARGUMENT = r"(z|x|y|c|h|inputs?|context|features|values?|parameters?|checkpoint|noise|dim)"
_NAMED = re.compile(rf"(?<![\w.(]){_ARGUMENT}\b(?!\.)")
_WANTED = re.compile(
    r"expect|must|should|need|requir|takes|reads|missing|unexpected|at least|only support|"
    r"does not (match|broadcast)|non-finite",
    re.IGNORECASE,
)
_FROM_TORCH = re.compile(r"mat1 and mat2|size of tensor a|invalid for input of size|expected (scalar|m1|self)|\w\(\): ")


class Wrong(Exception):
    """A wrong answer that came without an error; the message is the reason on the scoreboard."""


class NotApplicable(Exception):
    """The use has no meaning for this model: no inverse, no context, no weights."""


@dataclass(frozen=True)
class Model:
    """One model of one library, behind the same few functions as all others.

    Attributes:
        name: as the table calls it.
        build: ``build(dim, context width)``, a fresh module; width 0 is the model without context.
        fast: ``fast(module, z, context)``, the one-pass direction, gives z' and log|det dz'/dz|.
        slow: the other direction, with the log-det of its own map; None where the library has none.
        plain: context width by dim in uses that are not about the context.
        conditional: context width by dim in uses that are; None where the model takes no context.
        optional_context: whether a call has a place for a context that the model does not read.
        changed: what importing the library changed in torch; given to its first model only.
        reload: ``reload(saved, fresh, path)``, the library's own file format; by default torch's.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    fast: Direction
    slow: Direction | None = None
    plain: Callable[[int], int] = lambda dim: 0
    conditional: Callable[[int], int | None] = lambda dim: CONTEXT
    optional_context: bool = True
    changed: tuple[str, ...] | None = None
    reload: Callable[[nn.Module, nn.Module, Path], None] | None = None


def forward(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    """A module that is called with (z, context)."""
    return module(z, context)


def inverse(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    """Its `inverse` method."""
    return cast("Any", module).inverse(z, context)


class Use(NamedTuple):
    """A hard use: it raises `Wrong` for a wrong answer, and lets the library's own errors through."""

    name: str
    check: Callable[[Model], None]
    refusable: bool = True
    """Whether a clear error is as good as an answer: for input, not for what torch's own transforms ask of a module."""


class Verdict(NamedTuple):
    """What became of one use of one model, and why."""

    outcome: str
    reason: str


def judge(use: Use, model: Model) -> Verdict:
    """Try one use on one model."""
    try:
        with torch.random.fork_rng(devices=[]):
            use.check(model)
    except NotApplicable as why:
        return Verdict(NOT_APPLICABLE, str(why))
    except Wrong as fault:
        return Verdict(SILENT, str(fault))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Verdict(SURVIVED if use.refusable and is_clear(error) else RAW, text)
    return Verdict(SURVIVED, "")


def is_clear(error: Exception) -> bool:
    """Whether the message names an argument and what was expected of it, and is not torch's own about its operands."""
    text = str(error)
    return bool(_NAMED.search(text) and _WANTED.search(text) and not _FROM_TORCH.search(text))
