"""What looks on while a preset trains, besides the checkpoints: a log of the epochs, and samples at some of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.config import Config, ConfigError
from benchmarks.data import Data
from benchmarks.files import replace_text
from benchmarks.models import mean_images
from benchmarks.report import Report
from benchmarks.train import EVALUATION_SEED, Loop, Watcher
from flowpost import schedules

ALBUM = "samples"  # a job's folder of them
PICTURES = 12  # of an epoch


class Together(Watcher):
    """Several that look on, each in its turn; the first one tells."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        super().__init__(watchers[0].tell)
        self.watchers = watchers

    def start(self, loop: Loop) -> None:
        """Before the first epoch."""
        for watcher in self.watchers:
            watcher.start(loop)

    def end_epoch(self, loop: Loop) -> None:
        """After each epoch; who tells comes last, since a stop may be raised there."""
        for watcher in reversed(self.watchers):
            watcher.end_epoch(loop)


def watchers(keeper: Watcher, data: Data, report: Report, run: str) -> Watcher:
    """The keeper of checkpoints, and what a job's configuration asks for besides.

    Raises:
        ConfigError: the log needs a library that is not there.
    """
    config, folder = report.config, report.run.folder
    if report.run.silent:
        return keeper
    logs = {"csv": CSV, "tensorboard": TensorBoard}
    others: list[Watcher] = [logs[config.log](folder / "logs", run, config)] if config.log else []
    if config.preset:
        others.append(Album(folder / ALBUM, run, data))
    return Together([keeper, *others])


def rows(loop: Loop, config: Config) -> list[dict[str, float | None]]:
    """Of every epoch so far: its number, KL weight, learning rate, and the negative bound of both parts."""
    history = loop.history
    return [
        {
            "epoch": epoch + 1,
            "kl_weight": schedules.linear(epoch + 1, config.kl_warmup),
            "lr": config.rate(epoch),
            "train": train,
            "valid": valid,
        }
        for epoch, (train, valid) in enumerate(zip(history.train, history.valid, strict=True))
    ]


class CSV(Watcher):
    """A line for each epoch in a file that is written anew each time: a resumed run's is whole."""

    def __init__(self, folder: Path, run: str, config: Config) -> None:
        super().__init__(lambda _: None)
        self.path, self.config = folder / f"{run}.csv", config

    def end_epoch(self, loop: Loop) -> None:
        """Write."""
        lines, text = rows(loop, self.config), io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, text.getvalue())


class TensorBoard(Watcher):
    """The same for TensorBoard; what a run wrote beyond its last checkpoint is taken back when it is resumed.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, run: str, config: Config) -> None:
        super().__init__(lambda _: None)
        self.folder, self.config = folder / run, config
        try:
            from torch.utils.tensorboard import SummaryWriter  # only where it is asked for
        except ImportError as error:
            raise ConfigError("log: expected csv where TensorBoard is missing; or pip install tensorboard") from error
        self.open = SummaryWriter

    def start(self, loop: Loop) -> None:
        """Open the log."""
        self.writer = self.open(str(self.folder), purge_step=loop.epoch + 1)

    def end_epoch(self, loop: Loop) -> None:
        """Write the epoch's line."""
        *_, last = rows(loop, self.config)
        for name, value in last.items():
            if value is not None and name != "epoch":
                self.writer.add_scalar(name, value, loop.epoch)
        self.writer.flush()


class Album(Watcher):
    """What the model generates after epochs 1, 2, 4, 8, ..., always from the same z, to be drawn at the end."""

    def __init__(self, folder: Path, run: str, data: Data) -> None:
        super().__init__(lambda _: None)
        self.folder, self.run, self.shape = folder, run, data.test.shape[1:]

    def end_epoch(self, loop: Loop) -> None:
        """Keep a few pictures; the training's generators are left alone."""
        if loop.epoch & (loop.epoch - 1) == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.run}-{loop.epoch:06}.npy"
            with path.with_suffix(".part").open("wb") as part:
                np.save(part, self.pictures(loop).numpy())
            path.with_suffix(".part").replace(path)

    @torch.no_grad()
    def pictures(self, loop: Loop) -> Tensor:
        """E[x|z] of `PICTURES` draws from the prior."""
        vae = loop.judged
        noise = torch.randn(PICTURES, vae.posterior.dim, generator=torch.Generator().manual_seed(EVALUATION_SEED))
        return mean_images(vae, vae.sample_prior(PICTURES, noise=noise.to(loop.pixels.device)), self.shape).cpu()


def album(folder: Path, run: str) -> dict[int, Tensor]:
    """The pictures of a run, by epoch."""
    paths = sorted((folder / ALBUM).glob(f"{run}-*.npy"))
    return {int(path.stem.rpartition("-")[2]): torch.from_numpy(np.load(path, allow_pickle=False)) for path in paths}


def clear_album(folder: Path) -> None:
    """Remove the pictures of a job that was here before."""
    for path in (folder / ALBUM).glob("*.npy"):
        path.unlink()
