"""How far a wrapped posterior starts from the encoder's own Gaussian, for every encoder of the collection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.encoders.collection import CASES, Case
from benchmarks.train import seeded

FLOWS = ("iaf", "planar", "realnvp", "full_covariance")
SEED = 0


@dataclass(frozen=True)
class Start:
    """What the table says of an encoder."""

    name: str
    line: str
    single: Mapping[str, float] | None
    """The largest |dz| over inputs and latents, by flow; None where the encoder has no Gaussian of its own."""
    double: Mapping[str, float] | None
    """The same of the encoder in float64; None also where it is one of half precision."""


def starts(cases: Iterable[Case] = CASES) -> list[Start]:
    """Of every encoder whose library is installed."""
    return [start(case) for case in cases if not case.missing()]


def start(case: Case) -> Start:
    """Of one encoder, in float32 and in float64."""
    if case.own is None:
        return Start(case.name, case.line, None, None)
    with case.around():
        single = {flow: distance(case, flow, torch.float32) for flow in FLOWS}
        double = None if case.half else {flow: distance(case, flow, torch.float64) for flow in FLOWS}
    return Start(case.name, case.line, single, double)


@torch.no_grad()
def distance(case: Case, flow: str, dtype: torch.dtype) -> float:
    """The largest |dz| of the posterior with one flow on a fresh encoder, which is of another dtype if it is half."""
    if case.own is None:
        raise ValueError(f"case: expected an encoder with a Gaussian of its own, got {case.name}")
    with seeded(SEED, torch.device("cpu")):
        encoder, inputs = case.make().eval(), case.inputs()
        if not case.half:
            encoder, inputs = encoder.to(dtype), inputs.to(dtype)
        posterior = case.wrapped(encoder, inputs, flow).eval()
        sample = call(posterior, inputs)
        loc, std = case.own(call(encoder, inputs))
    return (loc + std * sample.noise - sample.z).abs().max().item()


def call(module: nn.Module, inputs: Tensor | Mapping[str, Tensor], **keywords: object) -> Any:  # noqa: ANN401
    """The module's output; a dict of inputs goes in by keywords."""
    if isinstance(inputs, Mapping):
        return module(**inputs, **keywords)
    return module(inputs, **keywords)
