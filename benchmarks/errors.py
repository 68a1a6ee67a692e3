"""What a command answers in one line, and what is checked of every configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run; one line says which value, what was expected and what came."""


def check_choice(name: str, value: str, choices: tuple[str, ...], cure: str = "") -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{cure}")


def check_range(name: str, value: int, minimum: int) -> None:
    """Refuse a value below the minimum."""
    if value < minimum:
        raise ConfigError(f"{name}: expected an integer of at least {minimum}, got {value}")


def check_limit(name: str, value: float) -> None:
    """Refuse a value below 0 or without end."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name}: expected a finite number >= 0, got {value}")


def tuples(value: Any) -> Any:  # noqa: ANN401 - whatever JSON has
    """JSON knows lists alone; every sequence of a configuration is a tuple."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
