"""Whose parameters a function reads: those of a module in its hands are found by no optimizer, nor by `Module.to`."""

from __future__ import annotations

import dis
import warnings
from collections.abc import Iterator
from functools import partial
from types import FunctionType

from torch import nn


def check_owned(name: str, function: object, owner: nn.Module | None, cure: str, depth: int) -> None:
    """Raise for a function that is a module, or a method of one, whose parameters its owner has not; warn of a mention.

    What mentions a module need not use its parameters; those that want no gradient are nobody's loss.

    Args:
        name: of the argument.
        function: any, a module too.
        owner: the module beside which the function stands, if any.
        cure: what to write instead.
        depth: how many calls above this one the user's is.
    """
    owned = set() if owner is None else {id(parameter) for parameter in owner.parameters()}
    for modules, expected in ((modules_of(function), "is"), (_named_by(function), "names")):
        for module in modules:
            if any(parameter.requires_grad and id(parameter) not in owned for parameter in module.parameters()):
                message = (
                    f"{name}: expected a function without parameters of its own, got one that {expected} a "
                    f"{type(module).__name__} whose parameters would not be trained; {cure}"
                )
                if expected == "is":
                    raise TypeError(message)
                warnings.warn(message, UserWarning, stacklevel=depth + 1)
                return


def modules_of(value: object) -> Iterator[nn.Module]:
    """The modules that a value is, or that a function is a method of."""
    bound = getattr(value, "__self__", None)
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(bound, nn.Module):
        yield bound
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from modules_of(part)


def _named_by(function: object) -> Iterator[nn.Module]:
    """Those that its variables stand for.

    `inspect.getclosurevars` of Python 3.11 takes an attribute's name for a global's, and refuses a cell not set yet.
    """
    if not isinstance(function, FunctionType):
        return
    for cell in function.__closure__ or ():
        try:
            found = cell.cell_contents
        except ValueError:  # not set yet
            continue
        if isinstance(found, nn.Module):
            yield found
    for each in dis.get_instructions(function):
        found = function.__globals__.get(each.argval) if each.opname == "LOAD_GLOBAL" else None
        if isinstance(found, nn.Module):
            yield found
