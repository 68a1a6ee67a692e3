"""Networks of one's own, `--networks module:function`: found, and tried on two examples before anything is trained."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.errors import ConfigError
from benchmarks.models import Networks
from benchmarks.own.archive import sha256

SIGNATURE = "networks(shape, dim, numbers) -> (encoder, decoder)"


def find(name: str) -> Networks:
    """The function that `module:function` names; the working directory is looked into first.

    Raises:
        ConfigError: there is none, or its module cannot be imported.
    """
    module, _, function = name.partition(":")
    if not module or not function.isidentifier():
        raise ConfigError(f"networks: expected module:function, got {name!r}; write nets:networks for nets.py")
    with answered(f"import of {module}"), _working_directory():
        found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ConfigError(f"networks: expected a function {SIGNATURE} in {module}, got no {function}")

    def networks(shape: torch.Size, dim: int, numbers: int) -> tuple[nn.Module, nn.Module]:
        made: Any = found(tuple(shape), dim, numbers)
        if not isinstance(made, tuple) or [isinstance(part, nn.Module) for part in made] != [True, True]:
            raise ConfigError(f"networks: expected {SIGNATURE}, two modules, got {_kinds(made)} from {name}")
        return made

    return networks


def source_hash(name: str) -> str:
    """SHA-256 of the module's file, and of the function's where that is another; others would train other networks."""
    module, _, function = name.partition(":")
    with answered(f"import of {name}"), _working_directory():
        found = importlib.import_module(module)
        defined = sys.modules.get(getattr(getattr(found, function), "__module__", module), found)
        files = [file for file in map(getsourcefile, (found, defined)) if file]
    return "+".join(sha256(Path(file)) for file in dict.fromkeys(files))


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Whatever somebody's code raises is one line, with the place in that code."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        said = "".join(traceback.format_exception_only(error)).splitlines()[0]
        raise ConfigError(f"networks: {what}: {said}{_place(error)}") from error


def _place(error: Exception) -> str:
    """The last line of the working directory's code that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


@contextmanager
def _working_directory() -> Iterator[None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def _kinds(made: object) -> str:
    return f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
