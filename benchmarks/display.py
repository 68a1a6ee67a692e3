"""The live line of a command, where there is a terminal, and a job's line for each finished run."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from benchmarks.train import History


def live(console: Console, last: str) -> Progress:
    """A line that says how far something is, where there is a terminal: description, bar and `last`."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn(last))
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


class Display:
    """One live line for the run in hand, where there is a terminal, and a line for each finished run."""

    def __init__(self, console: Console, runs: int, epochs: int, done: int = 0, bound: str = "-ELBO") -> None:
        self.progress = live(console, "{task.fields[left]}")
        self.task = self.progress.add_task("", total=runs, left="", completed=done)
        self.epochs, self.done, self.begun, self.start = epochs, done, done, time.perf_counter()
        self.bound = bound

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def watch(self, name: str, seed: int) -> Callable[[History], None]:
        """What training calls after each epoch."""

        def on_epoch(history: History) -> None:
            epoch = len(history.valid)
            share = self.done + epoch / self.epochs
            left = (self.progress.tasks[0].total or 0) - share
            seconds = (time.perf_counter() - self.start) * left / (share - self.begun)
            train = history.train[-1]
            text = f"{name} seed {seed}  epoch {epoch}/{self.epochs}  {self.bound} train {train or float('nan'):.2f} "
            text += f"valid {history.valid[-1]:.2f}"
            time_left = f"at most {seconds // 60:.0f}:{seconds % 60:02.0f} left"
            self.progress.update(self.task, completed=share, description=text, left=time_left)

        return on_epoch

    def finish(self, line: str) -> None:
        """A run has ended."""
        self.done += 1
        self.progress.update(self.task, completed=self.done)
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the live one."""
        self.progress.console.print(line, soft_wrap=True)
