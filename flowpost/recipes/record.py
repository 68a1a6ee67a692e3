"""How a recipe leaves its name on what it makes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import ParamSpec

from flowpost.posterior import FlowPosterior

P = ParamSpec("P")


def recorded(recipe: Callable[P, FlowPosterior]) -> Callable[P, FlowPosterior]:
    """Write a recipe's name and arguments on the posterior it returns, so that `flowpost.load` can build it again."""
    signature = inspect.signature(recipe)

    @functools.wraps(recipe)
    def build(*args: P.args, **kwargs: P.kwargs) -> FlowPosterior:
        posterior = recipe(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        vars(posterior)["recipe"] = {
            "name": recipe.__name__,
            "arguments": {key: _plain(value) for key, value in bound.arguments.items()},
        }
        return posterior

    return build


def _plain(value: object) -> object:
    return [*value] if isinstance(value, Sequence) and not isinstance(value, str) else value
