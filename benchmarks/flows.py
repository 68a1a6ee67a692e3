"""The flows of a job: their sizes as posteriors, and which of them may be a prior."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from inspect import signature

import torch

from benchmarks.errors import ConfigError, tuples
from flowpost.recipes import RECIPES

PRIORS = ("full_covariance", "nice", "realnvp", "maf", "spline_coupling")  # those that score any z fast


def _flows(steps: int, network_steps: int, **sizes: object) -> dict[str, dict[str, object]]:
    """Each recipe's options: those of `sizes` that it has, and fewer steps where each has a network of its own."""
    found = {}
    for name, recipe in RECIPES.items():
        known = signature(recipe).parameters
        given = sizes | {"steps": network_steps if "hidden" in known else steps}
        found[name] = {option: value for option, value in given.items() if option in known}
    return {name: options for name, options in found.items() if options}


# Flows are sized like the net they sit in. Chosen on validation data, for all posteriors at once.
SMALL_FLOWS = _flows(steps=4, network_steps=2, hidden=(64, 64), context_size=32)
LARGE_FLOWS = _flows(steps=8, network_steps=2, hidden=(320, 320), context_size=64)


def parse_prior(text: str) -> tuple[str, dict[str, object]]:
    """From `maf:3` to the recipe's name and its options; nothing stands for N(0, I).

    Raises:
        ConfigError: there is no such prior, or it has no such number of steps.
    """
    name, colon, steps = text.partition(":")
    if not text:
        return "", {}
    if name not in PRIORS:
        raise ConfigError(f"prior: expected one of {', '.join(PRIORS)}, or NAME:STEPS, got {text!r}")
    if not colon:
        return name, {}
    if not steps.isdecimal() or not int(steps) or "steps" not in signature(RECIPES[name]).parameters:
        raise ConfigError(f"prior: expected NAME, or NAME:STEPS of a flow that has steps, got {text!r}")
    return name, {"steps": int(steps)}


def parse_options(given: Iterable[str]) -> dict[str, dict[str, object]]:
    """From `iaf.gain=1` and `iaf.hidden=[128,128]` to each recipe's options; a value is JSON, or a word.

    Raises:
        ConfigError: there is no such recipe, or it has no such option.
    """
    found: dict[str, dict[str, object]] = {}
    for text in given:
        path, equals, value = text.partition("=")
        name, _, option = path.partition(".")
        known = list(signature(RECIPES[name]).parameters)[2:] if name in RECIPES else []
        if not equals or option not in known:
            has = f"; {name} has {', '.join(known) or 'none'}" if name in RECIPES else f", one of {', '.join(RECIPES)}"
            raise ConfigError(f"option: expected RECIPE.OPTION=VALUE of a recipe{has}, got {text!r}")
        found.setdefault(name, {})[option] = _value(value)
    return found


def _value(text: str) -> object:
    try:
        return tuples(json.loads(text))
    except ValueError:
        return text


def try_options(name: str, dim: int, options: Mapping[str, object]) -> None:
    """Refuse what a recipe refuses, before anything runs.

    Raises:
        ConfigError: it does, with its own words.
    """
    try:
        with torch.device("meta"):
            RECIPES[name](1, dim, **options)
    except (TypeError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError(f"option: expected what {name} takes, got {options_words(options)}: {what}") from error


def options_words(options: Mapping[str, object]) -> str:
    """As they were asked for."""
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return ", ".join(f"{name}={value}" for name, value in words.items())
