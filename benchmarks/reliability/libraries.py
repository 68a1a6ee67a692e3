"""The libraries on the scoreboard: their models, and what importing them does to torch.

Each library is imported only when its models are asked for, and in a process of its own: some change torch on import.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributions import Distribution

from benchmarks.peers import Family, Sizes, families
from benchmarks.reliability.judge import CONTEXT, Model
from benchmarks.reliability.own import flowpost_models


def load(library: str) -> list[Model]:
    """A library's models; importing it is watched, and what it changed is told to the first."""
    before = _settings()
    importlib.import_module(library)
    after = _settings()
    changed = tuple(name for name in before if before[name] != after[name])
    own = library == "flowpost"
    first, *others = flowpost_models() if own else [_model(one) for one in families(library).values()]
    return [replace(first, changed=changed), *others]


def _model(family: Family) -> Model:
    """A public library's, of two steps."""

    def build(dim: int, width: int) -> nn.Module:
        return family.build(Sizes(dim, width))

    slow = partial(family.call, inverse=True) if family.invertible else None
    width = CONTEXT if family.amortized else None
    return Model(family.name, build, family.call, slow, conditional=lambda dim: width,
                 optional_context=family.optional_context)  # fmt: skip


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
