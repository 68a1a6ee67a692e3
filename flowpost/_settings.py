"""What a file says of a module beside its tensors: of which kind each step is, and with what arguments it was made."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from types import BuiltinFunctionType, FunctionType

from torch import nn

from flowpost.bijectors._from_transform import TransformStep
from flowpost.bijectors.base import Bijector
from flowpost.likelihoods import Likelihood

Settings = Mapping[str, Mapping[str, object]]
"""By a module's path, its ``kind`` and its arguments by name."""
_OWN = "a function of your own"


def settings_of(module: nn.Module) -> dict[str, dict[str, object]]:
    """The settings of every part that is flowpost's, or a user's subclass of one, in JSON's types.

    Settings are the arguments of the class of flowpost's that the part has kept as plain attributes: a bound, an
    activation. Of a subclass its parent's are settings, and what is its own is not. What the state dict names too, as
    an order, a gain or a rate, is none: a load takes it over.
    """
    found = {}
    for path, part in module.named_modules(remove_duplicate=False):
        ours = next((each for each in type(part).__mro__ if each.__module__.split(".")[0] == "flowpost"), None)
        if ours is not None:
            kind = {"kind": ours.__name__} if isinstance(part, (Bijector, Likelihood)) else {}
            found[path] = {**kind, **_arguments(part, ours)}
    return {path: each for path, each in found.items() if each}


def differences(theirs: Settings, ours: Settings) -> Iterator[str]:
    """Where the settings of two modules differ, and the cure: ``flow.steps.0: bound 2.0 != 3.0; make it with ...``.

    An argument that only one of them names is no difference: another release may name more. A step where the other has
    none is one, within a part that both have.
    """
    both = theirs.keys() & ours.keys()
    for path in {**theirs, **ours}:
        if both.intersection([path, *_above(path)]):
            for each in _differ(theirs.get(path, {}), ours.get(path, {})):
                yield f"{_shown(path)}: {each}" if path else each


def _arguments(part: nn.Module, ours: type) -> dict[str, object]:
    held = {**vars(part), **{name: each for name, each in part._modules.items() if name == "activation"}}
    if isinstance(part, TransformStep):
        held |= part.settings()
    named = {name: held[name] for name in inspect.signature(ours).parameters if name in held}
    in_state = [name for name in named for buffer in part._buffers if buffer.endswith(f"_{name}")]  # constant_gain
    return {name: _plain(each) for name, each in named.items() if name not in in_state and _is_plain(each)}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (str, Real)) or callable(value)


def _plain(value: object) -> object:
    """The same in JSON; a function by its name, since nothing else of it is the same in every process."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        number = int(value) if isinstance(value, Integral) else float(value)
        return number if abs(number) < 2**53 else repr(number)  # nan and inf too
    named = value if isinstance(value, (FunctionType, BuiltinFunctionType)) else type(value)
    of_torch = (named.__module__ or "").split(".")[0] in ("torch", "flowpost")
    return named.__name__ if of_torch else _OWN


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _differ(his: Mapping[str, object], mine: Mapping[str, object]) -> Iterator[str]:
    if not _same(*(each.get("kind", "nothing") for each in (his, mine))):
        wanted = _shown(his["kind"]) if "kind" in his else ""
        cure = f"make it a {wanted}" if wanted and mine else f"put a {wanted} there" if wanted else "leave it out"
        yield f"{wanted or 'nothing'} != {_shown(mine.get('kind', 'nothing'))}; {cure}"
        return
    for name, value in mine.items():
        if name in his and not _same(his[name], value):
            cure = "the same" if his[name] == _OWN else f"{name}={_shown(his[name])}"
            yield f"{name} {_shown(his[name])} != {_shown(value)}; make it with {cure}"


def _same(his: object, mine: object) -> bool:
    """Whether two values are alike; what this release does not write is like anything."""
    if isinstance(his, str) and isinstance(mine, str):
        return his.replace("_", "").lower() == mine.replace("_", "").lower()  # nn.LeakyReLU() is F.leaky_relu
    if isinstance(his, (int, float)) and isinstance(mine, (int, float)):
        return math.isclose(his, mine, rel_tol=1e-9)  # an exponential is rounded otherwise on other machines
    return his == mine or isinstance(his, (list, dict))


def _shown(value: object) -> str:
    """A value of a file in short, without what a terminal obeys."""
    plain = value == _OWN or isinstance(value, str) and len(value) < 200 and value.replace(".", "_").isidentifier()
    return str(value) if plain else reprlib.repr(value)
