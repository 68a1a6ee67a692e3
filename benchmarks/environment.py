"""What figures depend on besides the configuration: versions and hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

import flowpost
from benchmarks import peers


def environment(device: str = "cpu", threads: int = 1, libraries: Iterable[str] = ()) -> dict[str, object]:
    """Versions and hardware.

    Args:
        device: that is measured on.
        threads: of PyTorch on the CPU.
        libraries: import names of the public libraries that take part.
    """
    cpu = _cpu_name()
    return {
        "python": platform.python_version(),
        **versions(),
        "libraries": {name: peers.version(name) for name in libraries},
        "commit": _commit(),
        "system": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
    }


def versions() -> dict[str, str]:
    """The versions that a job must keep to: another one may change its figures' last bits."""
    return {"torch": str(torch.__version__), "numpy": np.__version__, "flowpost": flowpost.__version__}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip() or "unknown"
