"""The libraries on the scoreboard: which are here, their models, and what importing them does to torch.

Each library is imported only when its models are asked for, and in a process of its own: some change torch on import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import replace

import torch
from torch.distributions import Distribution

from benchmarks.reliability import peers
from benchmarks.reliability.judge import Model
from benchmarks.reliability.own import flowpost_models

DISTRIBUTIONS = {
    "flowpost": "flowpost",
    "zuko": "zuko",
    "nflows": "nflows",
    "normflows": "normflows",
    "pyro": "pyro-ppl",
}
"""Import name and what pip calls it."""


def installed() -> list[str]:
    """The libraries that can be asked here."""
    return [name for name in DISTRIBUTIONS if importlib.util.find_spec(name) is not None]


def load(library: str) -> list[Model]:
    """A library's models; importing it is watched, and what it changed is told to the first."""
    before = _settings()
    importlib.import_module(library)
    after = _settings()
    changed = tuple(name for name in before if before[name] != after[name])
    first, *others = flowpost_models() if library == "flowpost" else getattr(peers, library)()
    return [replace(first, changed=changed), *others]


def _settings() -> dict[str, object]:
    """What a library has no business to change: it would change other people's answers or checks."""
    return {
        "the default dtype": torch.get_default_dtype(),
        "Distribution's validation of arguments": Distribution._validate_args,  # pyright: ignore[reportAttributeAccessIssue]
        "Normal's constraints": str(torch.distributions.Normal.arg_constraints),
        "the number of threads": torch.get_num_threads(),
        "the precision of matrix products": torch.get_float32_matmul_precision(),
        "the global random state": torch.random.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
    }
