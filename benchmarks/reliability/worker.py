"""One library's share of the scoreboard, in a process of its own: a JSON line for the models, then one for each try.

The library is imported when its models are asked for, and watched: some change torch on import.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import itertools
import json
import os
import re
from dataclasses import replace
from functools import partial
from typing import TextIO

import torch
from torch import nn
from torch.distributions import Distribution

from benchmarks.peers import Family, Sizes, families, version
from benchmarks.reliability import inputs, numbers, state, transforms
from benchmarks.reliability.judge import CONTEXT, Model, Use, judge
from benchmarks.reliability.own import flowpost_models

LIMIT = 300  # seconds for one use of one model; naf's slow direction compiles for a hundred


def uses(*, quick: bool) -> list[Use]:
    """All of them, or those that are not slow."""
    everything = [*numbers.USES, *inputs.USES, *transforms.USES, *state.USES]
    return [use for use in everything if not (quick and use.name.startswith(transforms.COMPILE))]


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


def main() -> None:
    """Try every use on every model, from number `skip` on: what came before was tried by a process that died."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with _private_stdout() as out:
        models, tries = load(given.library), uses(quick=given.quick)
        head = {"version": version(given.library), "models": [m.name for m in models], "uses": [u.name for u in tries]}
        print(json.dumps(head), file=out, flush=True)
        for model, use in itertools.islice(itertools.product(models, tries), given.skip, None):
            _try(model, use, out)


def _try(model: Model, use: Use, out: TextIO) -> None:
    # The watchdog ends the process even where C++ hangs; the parent books the use as raw and starts another process.
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    verdict = judge(use, model)
    faulthandler.cancel_dump_traceback_later()
    line = {"model": model.name, "use": use.name, "outcome": verdict.outcome, "reason": placeless(verdict.reason)}
    print(json.dumps(line), file=out, flush=True)


def placeless(reason: str) -> str:
    """Without where on this machine a library lies, as the compiler's errors have it: the reasons are published."""
    return re.sub(r"[\w./-]*/site-packages/", "", reason)


def _private_stdout() -> TextIO:
    """The real stdout, while whatever a library prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


if __name__ == "__main__":
    main()
