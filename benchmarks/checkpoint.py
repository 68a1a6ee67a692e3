"""Checkpoints of a run in hand: after a kill at any moment it goes on, and ends in the same bits.

A checkpoint is a file of `flowpost.save`: verified, atomic, without pickle. It holds what `PARTS` names, and nothing of
Python's or NumPy's generators, which training does not read.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import flowpost
from benchmarks.config import Config, ConfigError
from benchmarks.environment import versions
from benchmarks.team import Team
from benchmarks.train import NAMED, SKIPS, History, Loop, Watcher
from flowpost.files import CorruptFileError

CHECKPOINT_SECONDS = 20.0  # between two of them, at an epoch's end: what a kill costs at most
KEPT = 2  # the newest, and the one before it should the newest be damaged
IDENTITY_BYTES = 8192  # of JSON: every tensor of a file has a fixed shape

Tensors = dict[str, Tensor]
Say = Callable[[str], None]


class Part(NamedTuple):
    """One piece of a loop's state: into tensors, and back."""

    pack: Callable[[Loop, Config], Tensors]
    unpack: Callable[[Loop, Tensors], object]


def _unpack_best(loop: Loop, tensors: Tensors) -> None:
    loop.best, loop.best_state = tensors.pop("score").item(), tensors


def _double(figures: object) -> Tensor:
    return torch.tensor(figures, dtype=torch.float64)  # Python's floats, to the bit


def _pack_model(loop: Loop, _: Config) -> Tensors:
    average = {} if loop.average is None else loop.average.state_dict(prefix="average.")
    return {**loop.vae.state_dict(), **average}


def _unpack_model(loop: Loop, tensors: Tensors) -> None:
    averages = {name: tensors.pop(name) for name in list(tensors) if name.startswith("average.")}
    loop.vae.load_state_dict(tensors)
    if loop.average is not None:
        loop.average.load_state_dict({name.partition(".")[2]: tensor for name, tensor in averages.items()})


def _pack_optimizer(loop: Loop, config: Config) -> Tensors:
    """The optimizer's state; before a parameter's first step it is the zeros that the optimizer would begin with."""
    tensors = {}
    for i, parameter in enumerate(loop.vae.parameters()):
        zeros = dict.fromkeys(config.optimization.kind.state, torch.zeros_like(parameter)) | {"step": torch.zeros(())}
        state = {key: loop.optimizer.state.get(parameter, {}).get(key, zero) for key, zero in zeros.items()}
        tensors |= {f"{i}.{key}": value for key, value in state.items()}
    return tensors


def _unpack_optimizer(loop: Loop, tensors: Tensors) -> None:
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    loop.optimizer.load_state_dict({"state": state, "param_groups": loop.optimizer.state_dict()["param_groups"]})


def _pack_noise(loop: Loop, _: Config) -> Tensors:
    """The generators that noise and dropout are drawn from: the CPU's, and the device's own."""
    device = loop.pixels.device
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def _unpack_noise(loop: Loop, tensors: Tensors) -> None:
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], loop.pixels.device)


def _pack_history(loop: Loop, config: Config) -> Tensors:
    """An epoch without a finite step has no training figure: nan here, None there."""
    history, names = loop.history, [name for name, _ in loop.vae.named_parameters()]
    curves, skips = torch.full((2, config.epochs), math.nan, dtype=torch.float64), torch.full((SKIPS, 2 + NAMED), -1)
    train = [math.nan if figure is None else figure for figure in history.train]
    curves[:, : len(train)] = _double([train, history.valid])
    for i, skip in enumerate(history.skips):
        row = [skip["epoch"], skip["step"], *map(names.index, skip["tensors"])]
        skips[i, : len(row)] = torch.tensor(row)
    numbers = torch.tensor([loop.epoch, loop.steps, loop.bad, history.best_epoch, history.skipped_steps])
    return {"curves": curves, "skips": skips, "numbers": numbers, "seconds": _double(loop.seconds)}


def _unpack_history(loop: Loop, tensors: Tensors) -> None:
    history, names = loop.history, [name for name, _ in loop.vae.named_parameters()]
    loop.epoch, loop.steps, loop.bad, history.best_epoch, history.skipped_steps = tensors["numbers"].tolist()
    loop.seconds, history.resumed_after = tensors["seconds"].item(), loop.epoch
    train, history.valid = tensors["curves"][:, : loop.epoch].tolist()
    history.train = [None if math.isnan(figure) else figure for figure in train]
    rows = [[number for number in row if number >= 0] for row in tensors["skips"].tolist()]
    history.skips = [{"epoch": row[0], "step": row[1], "tensors": [names[i] for i in row[2:]]} for row in rows if row]


PARTS: dict[str, Part] = {
    "model": Part(_pack_model, _unpack_model),
    "best": Part(lambda loop, _: loop.best_state | {"score": _double(loop.best)}, _unpack_best),
    "optimizer": Part(_pack_optimizer, _unpack_optimizer),
    "order": Part(lambda loop, _: {"": loop.order.get_state()}, lambda loop, t: loop.order.set_state(t[""])),
    "pixels": Part(lambda loop, _: {"": loop.pixels.get_state()}, lambda loop, t: loop.pixels.set_state(t[""])),
    "noise": Part(_pack_noise, _unpack_noise),
    "history": Part(_pack_history, _unpack_history),
}


class Snapshot(nn.Module):
    """Copies of a loop's state, as buffers, and of which run it is, as JSON in bytes."""

    def __init__(self, loop: Loop, config: Config, identity: dict[str, object]) -> None:
        super().__init__()
        for part, (pack, _) in PARTS.items():
            for name, tensor in pack(loop, config).items():
                # A buffer's name has no dots.
                self.register_buffer(f"{part}:{name}".replace(".", ":"), tensor.detach().clone())
        text = json.dumps(identity).encode().ljust(IDENTITY_BYTES)
        self.register_buffer("run", torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def restore(self, loop: Loop) -> None:
        """Set a loop to the state."""
        for part, (_, unpack) in PARTS.items():
            named = [(name.split(":"), tensor) for name, tensor in self.named_buffers()]
            unpack(loop, {".".join(words[1:]): tensor for words, tensor in named if words[0] == part})


class Keeper(Watcher):
    """Looks on while a run trains, keeps its last checkpoints, and takes up the newest whole one at the start.

    Args:
        tell: called after each epoch.
        folder: of the job's checkpoints; made at the first one.
        posterior: of the run.
        seed: of the run.
        config: of the job.
        say: where a resumption or a fault is told.
    """

    def __init__(
        self, tell: Callable[[History], None], folder: Path, posterior: str, seed: int, config: Config, say: Say
    ) -> None:
        super().__init__(tell)
        self.folder, self.run, self.config, self.say = folder, f"{posterior}-{seed}", config, say
        # The lists of posteriors and seeds, and the log, change no run; all else of the configuration may.
        decisive = {key: value for key, value in asdict(config).items() if key not in ("posteriors", "seeds", "log")}
        identity = {"posterior": posterior, "seed": seed, **versions(), **decisive}
        self.identity: dict[str, object] = json.loads(json.dumps(identity))  # lists for tuples, as in the file
        self.saved_at, self.team = time.monotonic(), Team.on(config.device)

    def files(self) -> list[Path]:
        """The run's checkpoints, the oldest first."""
        return sorted(self.folder.glob(f"{self.run}-epoch*.safetensors"))

    def start(self, loop: Loop) -> None:
        """Take up the newest whole checkpoint, where there is one.

        Raises:
            ConfigError: a checkpoint is of another configuration or version.
        """
        with self.team.in_turn():  # the first process puts damaged ones away
            self._take_up(loop)

    def _take_up(self, loop: Loop) -> None:
        for path in reversed(self.files()):
            try:
                self._read(path, loop)
            except CorruptFileError as error:
                self.say(f"WARNING: checkpoint damaged, the one before it is tried: {_line(error)}")
                path.replace(path.with_suffix(".damaged"))  # else it would count as one of those to keep
                continue
            self.say(f"{self.run}: resumed after epoch {loop.epoch}, from {path.name}")
            return

    def end_epoch(self, loop: Loop) -> None:
        """Write a checkpoint if it is time, then tell."""
        if self.team.leads and time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
            self.save(loop)
        super().end_epoch(loop)

    def save(self, loop: Loop) -> None:
        """Write a checkpoint, and drop all but the last ones; a full disk is told, and training goes on."""
        path = self.folder / f"{self.run}-epoch{loop.epoch:06}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flowpost.save(Snapshot(loop, self.config, self.identity), path)
            for old in self.files()[:-KEPT]:
                old.unlink()
        except OSError as error:
            self.say(f"WARNING: no checkpoint of {self.run}, epoch {loop.epoch}: {_line(error)}")
        self.saved_at = time.monotonic()

    def _read(self, path: Path, loop: Loop) -> None:
        snapshot = Snapshot(loop, self.config, self.identity)
        try:
            flowpost.load(path, into=snapshot, allow_nonfinite=True)
        except CorruptFileError:
            raise
        except ValueError as error:  # of other tensors
            raise ConfigError(f"resume: {path} is of another configuration: {_line(error)}") from error
        theirs = json.loads(bytes(snapshot.get_buffer("run").tolist()))
        keys = [key for key in theirs | self.identity if theirs.get(key) != self.identity.get(key)]
        if keys:
            changes = ", ".join(f"{key} {theirs.get(key)} != {self.identity.get(key)}" for key in keys)
            raise ConfigError(f"resume: {path} is of another configuration (checkpoint != job): {changes}")
        snapshot.restore(loop)


def clear(folder: Path, run: str = "*") -> None:
    """Remove the checkpoints of a run or of all, what a kill left half written, and the folder if nothing is left."""
    for path in [*folder.glob(f"{run}-epoch*"), *folder.glob(".*.tmp")]:
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
