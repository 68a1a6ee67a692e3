"""One library's share of the scoreboard, in a process of its own: a JSON line for the models, then one for each try."""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
from typing import TextIO

import torch

from benchmarks.peers import version
from benchmarks.reliability import inputs, numbers, state, transforms
from benchmarks.reliability.judge import Model, Use, judge
from benchmarks.reliability.libraries import load

LIMIT = 120  # seconds for one use of one model


def uses(*, quick: bool) -> list[Use]:
    """All of them, or those that are not slow."""
    everything = [*numbers.USES, *inputs.USES, *transforms.USES, *state.USES]
    return [use for use in everything if not (quick and use.name.startswith(transforms.COMPILE))]


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
    line = {"model": model.name, "use": use.name, "outcome": verdict.outcome, "reason": verdict.reason}
    print(json.dumps(line), file=out, flush=True)


def _private_stdout() -> TextIO:
    """The real stdout, while whatever a library prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


if __name__ == "__main__":
    main()
