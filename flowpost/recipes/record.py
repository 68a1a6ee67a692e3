"""What makes a function a recipe: `RECIPES` has it, and what it returns says how it was built."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec

from flowpost.bijectors.gate import Gate
from flowpost.posterior import FlowPosterior

P = ParamSpec("P")

RECIPES: dict[str, Callable[..., FlowPosterior]] = {}
"""Every recipe by its name, in the order of definition; each takes ``(features, dim, **options)``."""
BEFORE: Mapping[str, Mapping[str, object]] = {
    "iaf": {"gain": 1.0},
    "cc_lin_iaf": {"rate": 1.0, "centred": False},
    "householder": {"centred": False},
    **dict.fromkeys(("full_covariance", "affine_iaf", "maf", "naf", "realnvp"), {"rate": 1.0}),
    **dict.fromkeys(("spline_autoregressive", "spline_coupling"), {"rate": 1.0, "activation": "elu"}),
}
"""What an older release built, where that is not what a younger option's default builds now."""


def recipe(build: Callable[P, FlowPosterior]) -> Callable[P, FlowPosterior]:
    """Enter a function in `RECIPES`, and write its name and arguments on every posterior that it returns.

    The rest follows from `RECIPES`: the names that `flowpost` exports, the flows that `wrap` knows by name, and what
    `flowpost.load` can build. The function takes ``(features, dim, **options)`` of what JSON has. Its chain has exactly
    one `Affine` among its steps, or a `Scaling` first and a `Shift` last: `wrap` puts an encoder's own Gaussian in the
    place of it.
    """
    signature = inspect.signature(build)
    numbers = {name for name, taken in signature.parameters.items() if "float" in str(taken.annotation)}

    @functools.wraps(build)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> FlowPosterior:
        posterior = build(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        vars(posterior)["recipe"] = {
            "name": build.__name__,
            "arguments": {key: _plain(value, number=key in numbers) for key, value in bound.arguments.items()},
        }
        return posterior

    RECIPES[build.__name__] = recorded
    return recorded


def arguments(record: Mapping) -> dict[str, object]:
    """The arguments of a posterior's record, with those that the record is too old to name."""
    return {**BEFORE.get(record["name"], {}), **record["arguments"]}


def record_of(posterior: FlowPosterior) -> dict | None:
    """What built a posterior, None where no recipe did; a gain is the gates' own, which an older state may have set."""
    record = vars(posterior).get("recipe")
    gains = {leaf.gain for leaf in posterior.flow.leaves() if isinstance(leaf, Gate)}
    if record is None or len(gains) != 1:
        return record
    return {**record, "arguments": {**record["arguments"], "gain": gains.pop()}}


def check_recipe(name: str, options: Iterable[str]) -> list[str]:
    """The names of a recipe's options; raise for a recipe that there is not, or options that it does not take."""
    if name not in RECIPES:
        raise ValueError(f"flow: expected one of {', '.join(RECIPES)}, got {name!r}")
    taken = [*inspect.signature(RECIPES[name]).parameters][2:]  # after features and dim
    if unknown := [option for option in options if option not in taken]:
        raise TypeError(f"flow_options: {name} takes {', '.join(taken) or 'none'}; got {', '.join(unknown)}")
    return taken


def names(module: str) -> list[str]:
    """The names of the recipes that a module defines: its ``__all__``."""
    return [name for name, build in RECIPES.items() if build.__module__ == module]


def _plain(value: object, *, number: bool = False) -> object:
    """The same in JSON's types; numpy's numbers and arrays too. A number is no int, which would be read as a size."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return float(value) if number and isinstance(value, int) else value
