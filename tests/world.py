"""A world stricter than production: one thread, the same examples on every run, a seed for every test."""

import os
from collections.abc import Iterator

import pytest
import torch
from forked import Run, nursery
from hypothesis import settings
from peers import Peer, libraries

from flowpost.masked import engine
from flowpost.testing.cases import reseed

settings.register_profile("flowpost", derandomize=True, deadline=None, database=None, max_examples=20)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=500, print_blob=True)
settings.load_profile("deep" if "FLOWPOST_DEEP" in os.environ else "flowpost")
torch.set_num_threads(1)  # pytest-xdist already fills the cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    reseed(0)


@pytest.fixture(scope="session", autouse=True)
def _shipped_data() -> Iterator[None]:
    """Whatever folder of larger data is set: a test that wants one sets it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLOWPOST_DATA", raising=False)
        yield


@pytest.fixture(autouse="FLOWPOST_PLAIN" in os.environ)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine, but the operations that the passes by hand stand in for; of every test in `make test-plain`."""
    monkeypatch.setattr(engine, "choose", lambda run, z: None)


@pytest.fixture(scope="session")
def python() -> Iterator[Run]:
    """``python(code, *args)`` runs code in a fresh process that has imported torch."""
    with nursery() as run:
        yield run


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """The public libraries' maps, in a process of their own."""
    with libraries(tmp_path_factory.mktemp("peers")) as ask:
        yield ask
