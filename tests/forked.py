"""Python code in a process of its own, forked from one that has imported torch, for that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""``run(code, *args)``: the code's exit status, stdout and stderr; it finds the arguments in ``sys.argv[1:]``."""

NURSERY = """
import json, os, sys, traceback
import torch

def child(code, args, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.argv[1:], status = args, 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
        print(end.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(int(status))

while line := sys.stdin.readline():
    pid = os.fork()
    if not pid:
        os.close(0)
        child(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@contextmanager
def nursery() -> Iterator[Run]:
    """A function that runs code in a child of one process, which ends with the context."""
    command = [sys.executable, "-c", NURSERY]
    root = Path(__file__).parents[1]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process,
    ):
        asks, answers = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
        paths = [Path(folder, name) for name in ("out", "err")]

        def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
            for path in paths:
                path.write_text("")
            asks.write(json.dumps([textwrap.dedent(code), list(map(str, args)), *map(str, paths)]) + "\n")
            asks.flush()
            status = int(answers.readline())
            return subprocess.CompletedProcess(["python"], status, *(path.read_text() for path in paths))

        yield run
        asks.close()
