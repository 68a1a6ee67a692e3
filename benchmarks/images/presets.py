"""A preset: a small file that says what is trained and how, and what was published of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.config import DEFAULTS, Config, ConfigError
from benchmarks.errors import tuples
from benchmarks.flows import options_words
from benchmarks.optimizers import Optimization

# The same reader: Python has it from 3.11 on.
toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

FOLDER = Path(__file__).with_name("presets")
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.toml")))
OPTIMIZATION = tuple(asdict(Optimization()))
# How a run is stopped or evaluated, or where: a run that differs here alone is of the preset's model.
FREE = ("posteriors", "seeds", "threads", "device", "eager", "pairs", "log", "data", "trusted_images")
OF_RECIPES = ("flows", "options")  # named by recipe, not by field


@dataclass(frozen=True)
class Preset:
    """What a file says."""

    name: str
    source: str
    config: Config
    published: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """What was published, by data set and posterior; `iaf-2-320` is of 2 steps and width 320, `iaf` of the file's."""

    def row(self, config: Config, posterior: str) -> Mapping[str, Any]:
        """What was published of a posterior on a configuration's data; nothing where nothing was."""
        rows, options = self.published.get(config.data, {}), config.options_of(posterior)
        sizes = f"{posterior}-{options.get('steps')}-{_width(options)}"
        as_here = options == self.config.options_of(posterior)
        return rows.get(sizes, rows.get(posterior, {}) if as_here else {})

    def sizes(self, config: Config, posterior: str) -> str:
        """A posterior's steps, and the width of its networks where it is not the file's."""
        options, width = config.options_of(posterior), _width(config.options_of(posterior))
        other = f"of {width}" if width != _width(self.config.options_of(posterior)) else ""
        return f"{options.get('steps', '')} {other}".strip()

    def changes(self, config: Config) -> list[str]:
        """In what a run's protocol differs from the file's, in words."""
        mine, theirs = _flat(self.config), _flat(config)
        changed = [
            f"{key.replace('_', ' ')} {theirs[key]:g} ({mine[key]:g})"
            if isinstance(mine[key], (int, float))
            else f"{key} {theirs[key]} ({mine[key]})"
            for key in mine
            if theirs[key] != mine[key]
        ]
        return [*changed, *(f"{name} {options_words(options)}" for name, options in config.options.items())]


def _width(options: Mapping[str, Any]) -> int | None:
    """Units of the first hidden layer of a posterior's networks."""
    return options["hidden"][0] if "hidden" in options else None


def _flat(config: Config) -> dict[str, Any]:
    values = asdict(config)
    values |= values.pop("optimization")
    return {key: value for key, value in values.items() if key not in (*FREE, *OF_RECIPES)}


def load(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigError: there is none, or its file is wrong.
    """
    if name not in NAMES:
        raise ConfigError(f"preset: expected one of {', '.join(NAMES)}, got {name!r}")
    content = _read(name)
    try:
        return Preset(name, content.pop("source"), _config(name, content), content.pop("published", {}))
    except (TypeError, KeyError, ConfigError) as error:
        raise ConfigError(f"preset {name}: {error}") from error


def _read(name: str) -> dict[str, Any]:
    """A file, on top of the one that it extends."""
    content = toml.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    base = content.pop("extends", None)
    return content if base is None else _merged(_read(base), content)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], top[key]) for key in base.keys() & top.keys() if isinstance(top[key], dict)}
    return {**base, **top, **both}


def _config(name: str, content: Mapping[str, Any]) -> Config:
    posterior, optimizer = dict(content["posterior"]), dict(content["optimizer"])
    recipe, dim = posterior.pop("name"), posterior.pop("dim")
    optimization = Optimization(**{key: optimizer.pop(key) for key in OPTIMIZATION if key in optimizer})
    sections = content.get("objective", {}) | optimizer | content["schedule"] | content["evaluation"]
    flows = {**DEFAULTS["mnist-static"].flows, recipe: tuples(posterior)}
    return Config(
        data=content["data"],
        posteriors=(recipe,),
        seeds=(0,),
        dim=dim,
        flows=flows,
        optimization=optimization,
        preset=name,
        encoder=tuples(content["encoder"]),
        decoder=tuples(content["decoder"]),
        **sections,
    )


def adapt(preset: Preset, /, depth: int | None, *, hidden: int | None = None, **given: object) -> Config:
    """The preset's configuration with those of the options given on the command line that are its own and not None.

    Raises:
        ConfigError: a value is out of range, or the posterior has no steps, or no networks.
    """
    known = {item.name for item in fields(Config)}
    values = {key: value for key, value in given.items() if value is not None}
    optimization = {key: values.pop(key) for key in OPTIMIZATION if key in values}
    config = replace(preset.config, **{key: value for key, value in values.items() if key in known})  # pyright: ignore
    config = replace(config, optimization=replace(config.optimization, **optimization))
    if depth is not None:
        config = _resized(config, "steps", depth, "depth: expected at least 1 step", "of several steps")
    if hidden is not None:
        config = _resized(config, "hidden", hidden, "hidden: expected at least 1 unit", "with networks")
    return config


def _resized(config: Config, option: str, size: int, least: str, kind: str) -> Config:
    """With a posterior of so many steps, or of networks with so many units in each hidden layer."""
    if size < 1:
        raise ConfigError(f"{least}, got {size}")
    flows = dict(config.flows)
    for name in config.posteriors:
        options = flows.get(name, {})
        if option not in options:
            raise ConfigError(f"{least.partition(':')[0]}: expected a posterior {kind}, got {name}")
        before = options[option]
        flows[name] = {**options, option: (size,) * len(before) if isinstance(before, tuple) else size}
    return replace(config, flows=flows)
