"""What figures may depend on besides the configuration: versions and hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import flowpost
from benchmarks.config import Config


def environment(config: Config) -> dict[str, object]:
    """What the figures may depend on besides the configuration: versions and hardware."""
    device = torch.device(config.device)
    cpu = _cpu_name()
    return {
        "python": platform.python_version(),
        **versions(),
        "commit": _commit(),
        "system": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
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


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
