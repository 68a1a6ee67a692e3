"""The script for a machine with a GPU, tried without one: its parts, their order, their time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "benchmarks" / "gpu_check.sh"
STAND_IN = """#!/usr/bin/env bash
[ "$1" = -m ] && echo "$*" >>"$0.log"
case "$*" in *"-m pytest"*) exit 1 ;; *zuko*) exit 1 ;; esac
"""


def run(python: str, page: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run([SCRIPT, page], env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_its_parts_run_one_after_the_other_within_eight_minutes(tmp_path: Path) -> None:
    python, page = tmp_path / "python", tmp_path / "page.md"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = run(str(python), page)
    assert done.returncode == 1
    assert "failed: tests of CUDA\n" in done.stdout
    install, tests, job, timed = (tmp_path / "python.log").read_text().splitlines()
    assert install.endswith("-e .[bench,files,test,peers]")
    marked = {file.name for file in TESTS.glob("test_*.py") if "pytest.mark.cuda" in file.read_text()}
    assert set(tests.rpartition("-m cuda ")[2].split()) == {f"tests/{name}" for name in marked - {Path(__file__).name}}
    assert job == "-m benchmarks --quick --device cuda"
    assert 380 < int(timed.partition("--seconds ")[2]) <= 400
    assert "<!-- end of tables -->" in page.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_it_refuses_where_there_is_no_gpu(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = run(sys.executable, page)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: expected a Python whose PyTorch finds a CUDA device")
    assert not page.exists()
