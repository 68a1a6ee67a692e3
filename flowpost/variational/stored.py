"""The file of a fitted posterior: q, its weighed draws and how the fit went, in the format of `flowpost.save`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowpost._format import read_header, read_tensors
from flowpost.files import File, check_same, load, save
from flowpost.numerics.alone import DrawsApart
from flowpost.variational.bound import Fitted, draw, noise_for
from flowpost.variational.calling import LogJoint
from flowpost.variational.families import Flow, assemble, build_flow
from flowpost.variational.gaussian import standard_gaussian
from flowpost.variational.parameters import Parameters, Spec
from flowpost.variational.target import Target
from flowpost.variational.weighing import Progress, Weighed, device_of

PROBES = 8
"""Draws in a file, with their noise and log p/q, by which a loaded flow and log joint are known again."""
SAME = 1e-3
"""How far those may be off, in standard deviations and in nats: what rounding makes of them on another machine."""


class Course(NamedTuple):
    """How a fit went."""

    evaluations: int
    seconds: float
    history: list[Progress]
    notes: list[str]
    left_out: list[str]


class Stored(NamedTuple):
    """What a file says."""

    posterior: Fitted
    target: Target
    weighed: Weighed
    course: Course


class _Record(nn.Module):
    """What `flowpost.save` writes: q, and tensors beside it."""

    def __init__(self, posterior: Fitted, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.posterior = posterior
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def write_fitted(path: File, stored: Stored) -> None:
    """Write a fit to one file."""
    posterior, target = stored.posterior, stored.target
    noise = noise_for(posterior, PROBES, torch.Generator(device_of(posterior)).manual_seed(0))
    z, ratio = _probed(posterior, target, noise)
    about = {
        "parameters": repr(target.parameters),
        "steps": _steps(posterior),
        "course": stored.course._asdict() | {"history": [list(each) for each in stored.course.history]},
    }
    text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    tensors = {"text": text, "noise": noise, "probe": z, "probe_ratio": ratio, **stored.weighed._asdict()}
    save(_Record(posterior, tensors), path)


@torch.inference_mode(mode=False)  # a fit may go on from it
@torch.enable_grad()
def read_fitted(
    path: File,
    log_joint: LogJoint,
    dim_or_spec: Spec,
    flow: Flow,
    options: Mapping[str, object],
    device: torch.device,
) -> Stored:
    """Read a fit, and make sure that it is one of these parameters, this flow and this log joint."""
    parameters, name = Parameters(dim_or_spec), os.fspath(path)
    with open(path, "rb") as file:
        header = read_header(file, name)
        tensors = read_tensors(file, header)
    beside = {key: tensor for key, tensor in tensors.items() if not key.startswith("posterior.")}
    if not {"text", "noise", "probe", "probe_ratio", *Weighed._fields} <= set(beside):
        raise ValueError(f"path: expected a file that FittedPosterior.save wrote, got another: {name!r}")
    about = json.loads(bytes(beside["text"].tolist()))
    if about["parameters"] != repr(parameters):
        raise ValueError(f"dim_or_spec: expected {about['parameters']}, of {name!r}, got {parameters!r}")
    posterior = _blank(tensors, flow, parameters.dim, options)
    _check_steps(about["steps"], _steps(posterior), name)
    record = _Record(posterior, {key: torch.empty_like(tensor) for key, tensor in beside.items()})
    check_same(header, record, "flow")
    load(path, record, allow_nonfinite=True)  # draws outside the support have a ratio of -inf
    tensors = dict(record.to(device).named_buffers())
    target = Target(log_joint, parameters, device=device, dtype=tensors["z"].dtype)
    weighed = Weighed(*(tensors[field] for field in Weighed._fields))
    _check_probes(posterior, target, tensors, name)
    course = about["course"] | {"history": [Progress(*each) for each in about["course"]["history"]]}
    return Stored(posterior, target, weighed, Course(**course))


def _blank(tensors: Mapping[str, Tensor], flow: Flow, dim: int, options: Mapping[str, object]) -> Fitted:
    """A posterior of this flow with as many components as the file has, to be filled."""
    parts = {key.split(".")[2] for key in tensors if key.startswith("posterior.posteriors.")}
    start = standard_gaussian(torch.zeros(dim, dtype=tensors["z"].dtype, device="cpu"))
    with DrawsApart():
        built = build_flow(flow, dim, options)
    return assemble(built, [start] * max(1, len(parts)), [0.0] * max(1, len(parts)))


def _steps(posterior: Fitted) -> list[str]:
    return [type(part).__name__ for part in posterior.modules()]


def _check_steps(theirs: Sequence[str], ours: Sequence[str], name: str) -> None:
    if theirs != ours:
        place = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
        place = min(len(theirs), len(ours)) if place is None else place
        his, mine = (f"{', '.join(steps[place : place + 3]) or 'no more'}" for steps in (theirs, ours))
        raise ValueError(
            f"flow: expected the {len(theirs)} modules of {name!r}, got {len(ours)}; from module {place} on it has "
            f"{his}, and flow has {mine}"
        )


@torch.no_grad()
def _probed(posterior: Fitted, target: Target, noise: Tensor) -> tuple[Tensor, Tensor]:
    z, log_q, _ = draw(posterior, noise)
    return z, target(z) - log_q


def _check_probes(posterior: Fitted, target: Target, tensors: Mapping[str, Any], name: str) -> None:
    """Refuse a flow of the same sizes that is another map, and another log joint."""
    z, ratio = _probed(posterior, target, tensors["noise"])
    rounding = 100 * torch.finfo(z.dtype).eps
    off = (z - tensors["probe"]).abs() > SAME * tensors["z"].std(0) + rounding * z.abs()
    if off.any():
        raise ValueError(f"flow: expected the map of {name!r}, got another one of the same sizes; pass its options")
    due = tensors["probe_ratio"]
    differ = ~torch.isclose(ratio, due, rtol=rounding, atol=SAME, equal_nan=True)
    if differ.any():
        row = int(differ.int().argmax())
        raise ValueError(
            f"log_joint: expected that of {name!r}, whose log p/q is {due[row].item():.6g} at "
            f"{target.describe(z[row])}, got {ratio[row].item():.6g}; for another model write flowpost.fit(..., "
            f"resume=...)"
        )
