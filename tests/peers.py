"""What the differential tests share: the process with the public libraries in it, a case, and its check.

The libraries run in a process of their own (`peer_worker`), since one of them changes torch when it is imported; where
the `peers` extra is not installed, their tests are skipped. What flowpost bounds or floors otherwise than a library is
undone on paper: a parameter goes to the library as the number that makes the same map.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import Pair, installed
from flowpost import Bijector

HERE = set(installed())
POINTS = 40
HIDDEN = (12, 12)  # of every network
FIXED = {"order", "passing", "bins"}  # numbers that say which map it is

Arrays = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)
Peer = Callable[..., Pair]


class Twin(NamedTuple):
    """A step of flowpost at a context, and the numbers that make a library's map the same."""

    step: Bijector
    context: Tensor | None
    arrays: Arrays


class Case(NamedTuple):
    """A map of a library's, and how to make its twin from dim and the numbers' scale."""

    map: str
    make: Callable[[int, float], Twin]
    tolerance: float = 1e-10
    invertible: bool = False
    """Whether the library has the inverse too."""
    least: int = 1
    """The smallest dim that it takes."""
    mirrored: bool = False
    """Whether its variables are in reverse."""

    @property
    def library(self) -> str:
        return self.map.split()[0]


@contextmanager
def libraries(folder: Path) -> Iterator[Peer]:
    """Ask the libraries for the image and log-det of a map."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("peer_worker.py"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # where `benchmarks` is
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        questions, answers = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)

        def ask(name: str, arrays: Arrays, *, inverse: bool = False) -> Pair:
            numbers, images = folder / "numbers.npz", folder / "images.npz"
            given: dict[str, Any] = {key: value.detach().numpy() for key, value in arrays.items()}
            np.savez(numbers, **given)
            asked = {"map": name, "numbers": str(numbers), "images": str(images), "inverse": inverse}
            print(json.dumps(asked), file=questions, flush=True)
            answer = json.loads(answers.readline() or '"the worker died"')
            assert answer == "done", answer
            with np.load(images) as found:
                return torch.from_numpy(found["image"]), torch.from_numpy(found["log_det"])

        yield ask
        questions.close()


def grid(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """Every case at dims and scales of the numbers; skipped where its library is not installed."""
    found = [
        pytest.param(
            case,
            dim,
            scale,
            id=f"{name}-{dim}-{scale}",
            marks=pytest.mark.skipif(case.library not in HERE, reason=f"{case.library} is not installed"),
        )
        for name, case in cases.items()
        for dim in (1, 2, 5)
        for scale in (0.3, 1.0, 3.0)
        if dim >= case.least
    ]
    return pytest.mark.parametrize(("case", "dim", "scale"), found)


def check(peer: Peer, case: Case, dim: int, scale: float) -> None:
    """The same z' and log-det, of the inverse too where the library has it; and moving any of the numbers is seen."""
    twin, z = case.make(dim, scale), draw(POINTS, dim, scale=2.0)

    def ask(arrays: Arrays, z: Tensor, *, inverse: bool = False) -> Pair:
        image, log_det = peer(case.map, arrays | {"z": z.flip(-1) if case.mirrored else z}, inverse=inverse)
        return image.flip(-1) if case.mirrored else image, log_det

    image, log_det = images(twin.step.double(), z, twin.context)
    close(ask(twin.arrays, z), (image, log_det), case.tolerance)
    if case.invertible:
        ours = images(twin.step.inverse, image, twin.context)
        close(ask(twin.arrays, image, inverse=True), ours, 1e-6)
    for name in sorted(twin.arrays.keys() - FIXED):  # the negative control
        moved = ask(twin.arrays | {name: nudged(name, twin.arrays[name])}, z)
        assert not agree(moved, (image, log_det), 1e-6), name


def images(call: Callable[..., Pair], z: Tensor, context: Tensor | None) -> Pair:
    image, log_det = call(z, context)
    return image.detach(), log_det.detach().expand(POINTS)


def close(theirs: Pair, ours: Pair, tolerance: float) -> None:
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def agree(theirs: Pair, ours: Pair, tolerance: float) -> bool:
    pairs = zip(theirs, ours, strict=True)
    return all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs)


def nudged(name: str, array: Tensor) -> Tensor:
    """Every number moved a little; a mask's ones and zeros exchanged."""
    if name.startswith("mask"):
        return 1 - array
    return array + 0.03 * (1 + array.abs()) * torch.randn_like(array)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def pushed(step: M, scale: float) -> M:
    step = step.double()
    for parameter in step.parameters():
        parameter.data.add_(draw(*parameter.shape, scale=scale / math.sqrt(parameter.shape[-1])))
    return step


def network_arrays(step: Bijector) -> Arrays:
    """A MADE's weights, and its masks by the paper's rule (Germain et al. 2015, eq. 8, 9) from the degrees.

    A hidden unit k of flowpost has the degree ``k dim // width``: it may read the first so many variables.
    """
    state, dim, reads = cast(nn.Module, step.net).state_dict(), step.dim, step.context_size
    order = torch.arange(dim) if step.order is None else cast(Tensor, step.order)
    places = torch.argsort(order)
    outputs = len(state[f"layers.{len(HIDDEN)}.bias"]) // dim
    degrees = [places + 1, *(torch.arange(width) * dim // width for width in HIDDEN), places.repeat(outputs)]
    arrays: Arrays = {"order": order.double()}
    for i in range(len(HIDDEN) + 1):
        mask = (degrees[i + 1].unsqueeze(-1) >= degrees[i]).double()
        weight = state[f"layers.{i}.weight"]
        if reads and i == 0:  # every unit of the first layer reads h
            weight = torch.cat([state["project.weight"], weight], 1)
            mask = torch.cat([mask.new_ones(len(mask), reads), mask], 1)
        arrays |= {f"weight{i}": weight, f"bias{i}": state[f"layers.{i}.bias"], f"mask{i}": mask}
    return arrays


def causal_twin(step: Bijector, scale: float) -> Twin:
    pushed(step, scale)
    context = draw(POINTS, step.context_size) if step.context_size else None
    return Twin(step, context, network_arrays(step) | ({} if context is None else {"h": context}))
