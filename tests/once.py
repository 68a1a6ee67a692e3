"""What the tests' processes share: the first one that asks for it makes it, the others wait."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, once for all processes of a run; it is to be read, not written."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with FileLock(f"{folder}.lock"):
        made = folder.with_suffix(".made")
        if not made.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            made.touch()
    return folder


def leave() -> NoReturn:
    """End a process of a group, all of them together and at once: gloo's threads now and then abort an orderly exit."""
    dist.barrier()
    os._exit(0)
