"""`python -m benchmarks.reliability`: the scoreboard by itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.reliability import run

parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description="The reliability scoreboard.")
parser.add_argument("--out", type=Path, help="folder to write to [runs/<time>-reliability]")
parser.add_argument("--quick", action="store_true", help="leave out torch.compile, which takes most of the time")
parser.add_argument("--library", action="append", default=[], help="ask this one only; repeat it for several")
given = parser.parse_args()
sys.exit(run(given.out, given.library, quick=given.quick))
