"""What the tests share is in `world`, a plugin of its own: a process that only hands tests to others needs no torch."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run: in a worker of pytest-xdist, or without workers."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("world")
