"""Annealing on a real GPU: the evidence of a linear-Gaussian model, each temperature one launch, no wait in between."""

import json
from pathlib import Path

import pytest
import torch
from linear_gaussian import LinearGaussian, fitted
from on_device import evidence_in_graphs
from test_benchmarks import TINY
from test_sandwich_command import FEW
from torch import Tensor

import benchmarks.__main__ as cli
from flowpost._graphs import CUDAGraphs
from flowpost.evaluation import annealed_estimate, importance_estimate

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_bounds_are_those_of_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence_in_graphs(CUDAGraphs, monkeypatch)


def test_a_refined_proposal() -> None:
    model = LinearGaussian(2)
    x = model.draw(20)[1]
    vae = fitted(model, stretch=0.35, shift=0.2).float().cuda()
    found = importance_estimate(vae, x.float().cuda(), refine=10)
    torch.testing.assert_close(found.log_p.cpu(), model.evidence(x), rtol=0, atol=0.2)
    assert (found.k_hat < 0.7).all()


def test_draws_differ_from_replay_to_replay() -> None:
    """Two runs of the same shapes give different weights: a graph's noise is drawn anew."""
    model = LinearGaussian(2)
    x = model.draw(3)[1].float().cuda()
    vae = fitted(model, "diagonal", stretch=0.5).float().cuda()
    first, second = (annealed_estimate(vae, x, 4, 20, 2).log_p for _ in range(2))
    assert isinstance(first, Tensor)
    assert (first != second).all()


@pytest.mark.parametrize("dim", ["2", "3"])
def test_the_command_takes_a_cpu_s_model_to_the_gpu(dim: str, tmp_path: Path) -> None:
    job, out = tmp_path / "job", tmp_path / "out"
    assert cli.main([*TINY, "--posterior", "planar", "--dim", dim, "--out", str(job)]) == 0
    assert not cli.main(["sandwich", str(job), *FEW, "--device", "cuda", "--out", str(out)])
    found = json.loads((out / "sandwich.json").read_text())
    assert found["environment"]["device"] == torch.cuda.get_device_name()
    assert all(abs(row["gap"]) < 10 for row in found["rows"])
