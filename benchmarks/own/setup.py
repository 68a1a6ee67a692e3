"""A job on a file: its configuration from what the file holds, and its data, the same ones whenever it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.config import DEFAULTS, QUICK, Config, settle
from benchmarks.data import Data
from benchmarks.errors import ConfigError
from benchmarks.models import build
from benchmarks.own import archive, rows, values
from benchmarks.own.networks import answered, source_hash
from flowpost.vae import VAE

ELEMENTS = 400  # of an x: from here on a job has the sizes of MNIST's, below those of the digits'
STEPS = 15_000  # of a run at most: epochs are as many as that makes
NUMBERS = 50_000_000  # of the likelihood, evaluated at once: 200 MB


def configure_own(path: str, given: Mapping[str, Any], *, quick: bool) -> tuple[Config, list[str]]:
    """The job's configuration, and what is to be said of it before it begins.

    Args:
        path: of the file.
        given: the options that were given, by name; others are None.
        quick: whether a first look is all that is wanted.

    Raises:
        ConfigError: an option is out of range, or does not go with a file.
        DataError: the file cannot be used.
    """
    if asked := given.get("likelihood"):
        values.parse(asked)  # before what may be a large file is read
    found = rows.divide(archive.read(Path(path)))
    likelihood, reason = (asked, "as asked for") if asked else _guess(found)
    spec = values.parse(likelihood)
    values.check(found.parts, spec)
    base = replace(sizes(found, spec, path), data_hash=archive.sha256(Path(path)), likelihood=likelihood)
    quicker = {name: min(getattr(base, name), value) for name, value in QUICK.items() if isinstance(value, int)}
    config = settle(base, quicker if quick else {}, {**given, "data": None, "likelihood": None})
    counts = " / ".join(str(len(part)) for part in found.parts.values())
    networks = f"networks {config.networks}" if config.networks else f"two hidden layers of {config.width}"
    return config, [
        f"{path}: x of shape {found.train.shape[1:]}, {counts} rows train / valid / test; {found.origin}.",
        f"Likelihood: {likelihood}, {reason}.",
        f"z of {config.dim}, {config.epochs} epochs at most, {config.batch} rows a step, {networks}.",
    ]


def _guess(found: rows.Rows) -> tuple[str, str]:
    likelihood, seen = values.guess(found.parts)
    return likelihood, f"a guess, since x has {seen}; to take another: --likelihood {values.forms()}"


def sizes(found: rows.Rows, spec: values.Spec, path: str) -> Config:
    """What a job has if nothing is said: sizes of the bundled data set that is most like it, epochs by its steps."""
    count, elements = len(found.train), math.prod(found.train.shape[1:])
    like = DEFAULTS["digits" if elements < ELEMENTS else "mnist"]
    numbers = elements * {"gaussian": 2, "discretized-logistic": 2, "categorical": spec.levels + 1}.get(spec.kind, 1)
    batch = min(like.batch, max(8, count // 8))
    epochs = min(like.epochs, max(10, STEPS // math.ceil(count / batch)))
    return replace(
        like,
        data=path,
        dim=min(like.dim, max(2, elements // 4)),
        batch=batch,
        epochs=epochs,
        patience=max(5, epochs // 5),
        kl_warmup=epochs // 8,
        gap_images=min(like.gap_images, len(found.test)),
        samples=like.samples if len(found.test) <= 1000 else 500,
        pairs=min(like.pairs, max(100, NUMBERS // numbers)),
    )


def load_own(config: Config) -> Data:
    """The data of a job, as they were when it began.

    Raises:
        ConfigError: the file is another one now.
        DataError: the file cannot be used.
    """
    path = Path(config.data)
    now = archive.sha256(path)
    if now != config.data_hash:
        got = f"got SHA-256 {now[:12]}, not {config.data_hash[:12]}"
        raise ConfigError(f"data: expected {config.data} as it was when the job began, {got}; begin a new job")
    found, spec = rows.divide(archive.read(path)), values.parse(config.likelihood)
    train, valid, test = (torch.from_numpy(part.astype(np.float32)) for part in found.parts.values())
    labels = None if found.labels is None else torch.from_numpy(found.labels.astype(np.int64))
    scale = spec.number if spec.kind == "gaussian" else None
    return Data(path.name, train, valid, test, spec.levels, spec.kind, labels=labels, scale=scale, unit="example")


def check_networks(config: Config, data: Data) -> None:
    """Score two examples, so that networks that do not fit, or have changed, are told before training.

    Raises:
        ConfigError: their file is another one than when the job began, they raise something, or do not fit.
    """
    now = source_hash(config.networks)
    if now != config.networks_hash:
        got = f"got SHA-256 {now[:12]}, not {config.networks_hash[:12]}"
        raise ConfigError(f"networks: expected the file of {config.networks} as the job began, {got}; begin a new job")
    with torch.random.fork_rng(devices=[]), answered("two examples"):
        torch.manual_seed(0)
        name = config.posteriors[0]
        vae, other = (build(data, name, **config.model(name)) for _ in range(2))
        vae(data.train[:2])
    _check_new(vae, other)
    if len(data.train) % config.batch == 1 or config.batch == 1:  # batch norm cannot train on it
        with torch.random.fork_rng(devices=[]), answered(f"one example, as in a batch of --batch {config.batch}"):
            vae(data.train[:1])


def _check_new(one: VAE, other: VAE) -> None:
    """Refuse networks that are made once, and handed out again: a run would begin where the one before it ended."""
    learned = {id(weight) for weight in one.parameters() if weight.requires_grad}
    if again := [name for name, weight in other.named_parameters() if id(weight) in learned]:
        raise ConfigError(
            f"networks: expected new modules at each call, got {again[0]} again, which the run before would have "
            f"trained; make them within the function"
        )
