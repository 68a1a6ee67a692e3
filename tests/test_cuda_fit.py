"""A fit on a real GPU: the evidence that is known, its steps one graph, but where a log joint reads the host."""

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

import flowpost
from flowpost._graphs import CUDAGraphs
from flowpost.variational.mixture import Mixture

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EVIDENCE = math.log(1.5)
OPTIONS = {"steps": 2, "hidden": (16, 16)}


def two_modes(theta: Tensor) -> Tensor:
    """Of weights 2/3 and 1/3, at +-4. A scale of 1.0 would be copied from the host, which no graph can."""
    normal = torch.distributions.Normal(torch.zeros((), device="cuda"), torch.ones((), device="cuda"))
    left = normal.log_prob(theta + 4).sum(-1) - math.log(2)
    return torch.logaddexp(normal.log_prob(theta - 4).sum(-1), left)


def curved(theta: Tensor) -> Tensor:
    """Of log evidence log 2 pi. No Gaussian is near it, so that a flow has steps to make."""
    return -0.5 * (theta[:, 0].square() + (theta[:, 1] - theta[:, 0].square()).square())


def reading(theta: Tensor) -> Tensor:
    """The same, and a value on the host."""
    return curved(theta) * (1.0 if float(theta.detach().abs().max()) >= 0 else 2.0)


@pytest.mark.parametrize("flow", ["full_covariance", "realnvp", "spline_coupling"])
def test_a_mixture_has_its_evidence(flow: str) -> None:
    options = OPTIONS if flow != "full_covariance" else {}
    fitted = flowpost.fit(two_modes, 2, flow, budget=60_000, device="cuda", **options)
    assert fitted.log_evidence == pytest.approx(EVIDENCE, abs=0.02)
    assert isinstance(fitted.posterior, Mixture)
    assert fitted.posterior.log_weights.exp().max().item() == pytest.approx(2 / 3, abs=0.05)
    assert cast(Tensor, fitted.sample(10)).is_cuda


@pytest.mark.parametrize("flow", ["realnvp", "iaf"])
@pytest.mark.parametrize(("log_joint", "graphs"), [(curved, 1), (reading, 0)])
def test_steps_are_one_graph_where_a_log_joint_reads_nothing(
    flow: str, log_joint: Callable[[Tensor], Tensor], graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []
    right = CUDAGraphs.capture
    monkeypatch.setattr(CUDAGraphs, "capture", lambda self, call: (captured.append(1), right(self, call))[1])
    fitted = flowpost.fit(log_joint, 2, flow, budget=100_000, device="cuda", **OPTIONS)
    assert len(captured) == graphs
    assert fitted.log_evidence == pytest.approx(math.log(2 * math.pi), abs=0.05)


def test_draws_are_moved_on_the_device() -> None:
    fitted = flowpost.fit(two_modes, 2, "full_covariance", budget=20_000, device="cuda")
    moved = fitted.refine(500, steps=5, leapfrogs=3)
    assert isinstance(moved, Tensor)
    assert moved.is_cuda
    assert (moved[:, 0] > 0).double().mean().item() == pytest.approx(2 / 3, abs=0.1)
