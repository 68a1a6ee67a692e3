"""The public libraries behind one interface: their flows by family and size, called as their documentation calls them.

Nothing of flowpost is imported here, and a library only when one of its flows is built: some change torch on import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributions import Distribution

DISTRIBUTIONS = {"zuko": "zuko", "nflows": "nflows", "normflows": "normflows", "pyro": "pyro-ppl"}
"""Import name and what pip calls it."""
MISSING = "Not installed, so {}: {}. To add them: pip install -e '.[peers]'"

Pair = tuple[Tensor, Tensor]


class Call(Protocol):
    """A flow of a library at points, with its log-det: in the direction of one pass, or back."""

    def __call__(self, flow: Any, z: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Pair:  # noqa: ANN401
        """The image and the log-det of that direction."""
        ...


class Sizes(NamedTuple):
    """Of a flow: z, the features it reads (0: none), its steps, and the width of two hidden layers of a network."""

    dim: int
    context: int = 0
    steps: int = 2
    hidden: int = 16


@dataclass(frozen=True)
class Family:
    """A kind of flow of one library.

    Attributes:
        name: as its documentation calls it.
        build: a fresh module of these sizes.
        call: how such a module is called.
        invertible: whether the library has the other direction too.
        amortized: whether it can read features.
        optional_context: whether a call has a place for features that the module was not built to read.
        broadcasts: whether features need not have the samples' axes.
        activations: what follows each hidden layer, read from the module.
    """

    name: str
    build: Callable[[Sizes], nn.Module]
    call: Call
    invertible: bool = True
    amortized: bool = True
    optional_context: bool = True
    broadcasts: bool = True
    activations: Callable[[Any], Sequence[object]] = lambda flow: ()


def families(library: str) -> dict[str, Family]:
    """A library's kinds of flow, by name."""
    return {one.name: one for one in importlib.import_module(f"benchmarks.peers.{library}").families()}


def here(name: str) -> bool:
    """Whether a library is installed."""
    return importlib.util.find_spec(name) is not None


def installed() -> list[str]:
    """The public libraries that can be asked here."""
    return [name for name in DISTRIBUTIONS if here(name)]


def missing(what: str) -> str:
    """The sentence on those that are not; nothing where all are."""
    absent = [name for name in DISTRIBUTIONS if not here(name)]
    return MISSING.format(what, ", ".join(absent)) if absent else ""


def version(name: str) -> str:
    """Of a library, by its import name."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))


def module(name: str) -> Any:  # noqa: ANN401 - it has no types here
    """A module of a library; torch's validation of distributions stays as it was, which zuko turns off on import."""
    before = Distribution._validate_args  # pyright: ignore[reportAttributeAccessIssue]
    found = importlib.import_module(name)
    Distribution.set_default_validate_args(before)
    return found
