"""Processes side by side end with the one that began them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.workers import side_by_side

# SIGINT is ignored in what a shell began in the background.
CODE = "import signal, sys, test_workers; signal.signal(signal.SIGINT, signal.default_int_handler); "
CODE += "[*test_workers.side_by_side(test_workers.sleep, [(sys.argv[1],), (sys.argv[1],)], 2)]"


def sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def is_there(pid: int) -> bool:
    """Whether a process runs; not one that has ended, of which nobody has asked yet."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def until(done: float, what: str, holds: Callable[[], bool]) -> None:
    while not holds():
        assert time.monotonic() < done, what
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for as on Linux")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_they_end_with_the_one_that_began_them(sent: signal.Signals, tmp_path: Path) -> None:
    """They worked on as orphans, beside the job that was resumed; of an interrupt the first waited for them."""
    first = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path)], cwd=Path(__file__).parent)
    try:
        until(time.monotonic() + 50, "no processes", lambda: len([*tmp_path.iterdir()]) == 2)
        first.send_signal(sent)
        first.wait(20)
        others = [int(path.name) for path in tmp_path.iterdir()]
        until(time.monotonic() + 10, "orphans", lambda: not any(map(is_there, others)))
    finally:
        first.kill()
        first.wait()


def test_they_do_what_one_does() -> None:
    assert {*side_by_side(abs, [(-1,), (-2,)], 2)} == {1, 2}
