"""The posteriors by name: `posterior("wells_dist")`, `POSTERIORS`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.config import ConfigError
from benchmarks.posteriors.model import Arrays, Model, Spec, Tensors
from benchmarks.posteriors.models import dynamics, hierarchical, linear, logistic, mixtures, processes
from flowpost.variational.parameters import Parameters

DATA = Path(__file__).with_name("data")
MODELS: dict[str, Model] = {
    name: model
    for file in (hierarchical, linear, logistic, mixtures, processes, dynamics)
    for name, model in file.MODELS.items()
}


class Gaussian(NamedTuple):
    """What the best Gaussian found of one family leaves, in the free coordinates."""

    gap: float
    """Log evidence minus its ELBO."""
    k_hat: float
    standard_error: float
    """Of the ELBO."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """A model with its data, and what is known of its posterior.

    Attributes:
        name: of the model and its data, as the collection that it is from has it.
        model: the log joint without its data.
        figures: what `figures.json` has of it.
    """

    name: str
    model: Model
    figures: Mapping[str, Any]
    _moved: dict[tuple[torch.dtype, torch.device], Tensors] = field(default_factory=dict, repr=False)

    @property
    def short(self) -> str:
        """The model's part of the name."""
        return self.name.partition("-")[2] or self.name

    @property
    def spec(self) -> Spec:
        """Shape and support of each parameter, for `flowpost.fit`."""
        return self.model.spec

    @property
    def dim(self) -> int:
        """Of the free coordinates, and as many columns in the reference draws."""
        return self.figures["dim"]

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the reference draws, such as `beta[2]`."""
        return self.figures["columns"]

    @property
    def log_evidence(self) -> float:
        """``log p(data)``, the log of the integral of the joint."""
        return self.figures["log_evidence"]

    @property
    def log_evidence_se(self) -> float:
        """Its Monte Carlo standard error; 0 where it is from quadrature."""
        return self.figures["log_evidence_se"]

    @property
    def mean_field(self) -> Gaussian:
        """The best Gaussian of independent coordinates that is known."""
        return self._gaussian("mean_field")

    @property
    def full_rank(self) -> Gaussian:
        """The best Gaussian that is known."""
        return self._gaussian("full_rank")

    def _gaussian(self, family: str) -> Gaussian:
        known = self.figures[family]
        return Gaussian(known["gap"], known["k_hat"], known["elbo_se"])

    def log_joint(self, values: Tensors) -> Tensor:
        """``log p(values, data)`` of S draws at once, every normalizing constant kept.

        Args:
            values: every parameter of `spec`, constrained, ``(S, *shape)``.

        Returns:
            ``(S,)``, of the values' dtype and on their device.
        """
        first = next(iter(values.values()))
        return self.model.log_joint(values, self._data(first.dtype, first.device))

    def log_density(self, free: Tensor) -> Tensor:
        """The log joint of the free coordinates ``(S, dim)``, with the log-det of the map to the parameters."""
        values, log_det = self.parameters.constrain(free)
        return self.log_joint(cast(Tensors, values)) + log_det

    def free(self, rows: Tensor) -> Tensor:
        """The free coordinates of rows ``(S, dim)`` in the order of `columns`."""
        return self.parameters.free(self.values(rows))

    def _data(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        """What the log joint reads; it is moved to a dtype and device once."""
        if (dtype, device) not in self._moved:
            moved = {name: torch.as_tensor(array).to(device, dtype) for name, array in self._prepared.items()}
            self._moved[dtype, device] = moved
        return self._moved[dtype, device]

    @cached_property
    def _prepared(self) -> Arrays:
        return self.model.prepare(published_data(self.name))

    @cached_property
    def reference(self) -> Tensor:
        """1,000 reference draws, constrained, ``(1000, dim)``; all of them where `FLOWPOST_DATA` holds them."""
        found = _all_draws(self.name, self.figures["collection"])
        if found is None:
            with np.load(DATA / "draws.npz", allow_pickle=False) as draws:
                found = draws[self.name]
        return torch.from_numpy(found).double()

    @cached_property
    def mean(self) -> Tensor:
        """Of each column over all reference draws, ``(dim,)``."""
        return torch.tensor(self.figures["draws"]["mean"], dtype=torch.float64)

    @cached_property
    def sd(self) -> Tensor:
        """Of each column over all reference draws, ``(dim,)``."""
        return torch.tensor(self.figures["draws"]["sd"], dtype=torch.float64)

    @cached_property
    def parameters(self) -> Parameters:
        """The bijection from the free coordinates, in which the Gaussians' gaps are."""
        return Parameters(self.spec)

    def values(self, rows: Tensor) -> dict[str, Tensor]:
        """The parameters ``(S, *shape)`` of rows ``(S, dim)`` of the reference draws; `parameters.flat` undoes it."""
        shapes = self.parameters.shapes
        parts = rows.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        named = zip(shapes.items(), parts, strict=True)
        return {name: part.reshape(*rows.shape[:-1], *shape) for (name, shape), part in named}


def published_data(name: str) -> Arrays:
    """The fields of the data as published, but for those that the model does not read."""
    with np.load(DATA / "data.npz", allow_pickle=False) as data:
        return {key.partition("/")[2]: _widest(data[key]) for key in data if key.partition("/")[0] == name}


def _widest(array: np.ndarray) -> np.ndarray:
    """The file's smaller integers would overflow in a product."""
    return array.astype(np.int64 if array.dtype.kind == "i" else np.float64)


def _all_draws(name: str, collection: str) -> np.ndarray | None:
    folder = os.environ.get("FLOWPOST_DATA")
    path = Path(folder or "").expanduser() / collection / name / "reference_draws.npz"
    if not folder or not path.exists():
        return None
    with np.load(path, allow_pickle=False) as draws:
        return draws["draws"]


@cache
def collection() -> dict[str, Posterior]:
    """Every posterior, the smallest first."""
    figures = json.loads((DATA / "figures.json").read_text(encoding="utf-8"))
    found = [Posterior(name, MODELS[name], figures[name]) for name in figures]
    return {each.name: each for each in sorted(found, key=lambda each: each.dim)}


def posterior(name: str) -> Posterior:
    """A posterior by its name or by its `short` one.

    Raises:
        ConfigError: there is none of this name.
    """
    for each in collection().values():
        if name in (each.name, each.short):
            return each
    known = ", ".join(each.short for each in collection().values())
    raise ConfigError(f"posterior: expected one of {known}, got {name!r}")
