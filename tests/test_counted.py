"""The counted table: every recipe is in it, what it says is what is launched, and targets that are reached stay so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as cli
from benchmarks.filling import fill
from benchmarks.peers import here
from benchmarks.speed import counted
from benchmarks.speed.launches import Launches, launched, launches
from benchmarks.speed.sizes import SMALL, Size
from flowpost import Bijector, Planar, Spline
from flowpost.recipes import RECIPES

ROOT = Path(__file__).parents[1]
TINY = Size(3, 12, 5, 2, 4)


@pytest.fixture(scope="module")
def counts() -> dict[bool, counted.Counts]:
    return counted.count(TINY)


@pytest.mark.long
@pytest.mark.parametrize("kernels", [True, False])
def test_every_recipe_is_in_the_table(counts: dict[bool, counted.Counts], kernels: bool) -> None:  # noqa: FBT001
    peers = [name for name in counted.PEERS if here(name)]
    assert list(counts[kernels]) == [*RECIPES, *peers]
    assert all(len(row) == len(counted.USES) for row in counts[kernels].values())
    for name in RECIPES:
        sample, sampled, score, scored, step = counts[kernels][name]
        assert 0 < (sample or 0) < (sampled or 0) < (step or 0)
        assert 0 < (score or 0) < (scored or 0)
    text = counted.table(counts[kernels], TINY, kernels=kernels).markdown()
    assert text.startswith(f"## Operations launched, with{'' if kernels else 'out'} Triton's kernels")
    assert all(f"| {name} | " in text for name in counts[kernels])


@pytest.mark.long
def test_kernels_launch_fewer_of_masked_steps_and_change_nothing_else(counts: dict[bool, counted.Counts]) -> None:
    for name in RECIPES:
        pairs = zip(counts[True][name], counts[False][name], strict=True)
        assert all((few or 0) <= (more or 0) for few, more in pairs)
    assert sum(map(int, counts[True]["iaf"])) < sum(map(int, counts[False]["iaf"]))  # pyright: ignore
    assert counts[True]["realnvp"] == counts[False]["realnvp"]


def test_who_reads_a_number_back_has_a_dash() -> None:
    assert "| a | 3 | – | 1,000 |" in counted.table({"a": [3, None, 1000]}, kernels=True).markdown()


def test_operations_are_counted_and_views_are_not() -> None:
    x = torch.empty(4, 3, device="meta", requires_grad=True)

    def call() -> list[Tensor]:
        return [(2 * x.t()).exp().unsqueeze(0)]

    assert launches(call, [x], kernels=True) == (2, 4)
    assert launched(lambda: torch.zeros(3) + 1, kernels=True) == 0  # on the CPU


def test_what_was_worked_out_once_is_what_torch_gives() -> None:
    x = torch.empty(4, 3, 2, device="meta").transpose(0, 2)
    for _ in range(2):
        with Launches() as counted_here:
            found = [x + 1, x.sum(1), *torch._foreach_mul([x, x], 2.0), x.max(0)[1], torch.cat([x, x]), x.double()]  # pyright: ignore
        assert counted_here.count == 6
        expected = [x + 1, x.sum(1), x * 2.0, x * 2.0, x.max(0)[1], torch.cat([x, x]), x.double()]
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def forward(step: Bijector) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return step.forward


def inverse(step: Bijector) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return step.inverse


@pytest.mark.parametrize(
    ("make", "direction", "most"), [(Planar, inverse, 78), (Spline, forward, 51)], ids=["planar", "spline"]
)
def test_a_step_launches_no_more_than_it_did(
    make: Callable[[int], Bijector], direction: Callable[[Bijector], Callable], most: int
) -> None:
    step = make(SMALL.dim).to("meta")
    inputs = [torch.empty(SMALL.batch, size, device="meta") for size in (step.dim, step.context_size)]
    assert launched(lambda: direction(step)(*inputs), kernels=True) <= most


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("planar", 103),  # of 8 steps
        ("orthogonal_sylvester", 449),
        ("householder_sylvester", 445),
        ("triangular_sylvester", 365),
    ],
)
def test_a_posterior_of_ridges_log_prob_launches_no_more_than_it_did(name: str, most: int) -> None:
    posterior = RECIPES[name](SMALL.context, SMALL.dim).to("meta")
    z, h = (torch.empty(SMALL.batch, size, device="meta") for size in (SMALL.dim, SMALL.context))
    assert launched(lambda: posterior.log_prob(z, h), kernels=True) <= most


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"planar": [1, 2, 3, 4, 5], "pyro": [1, 2, None, None, 6]}
    monkeypatch.setattr(counted, "count", lambda: {True: rows, False: rows})
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- launches -->\nof an earlier count\n<!-- end of launches -->\nbelow\n")
    assert cli.main(["speed", "--launches", "--out", str(tmp_path / "run"), "--page", str(page)]) == 0
    assert "without Triton's kernels" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "launches.json").read_text())["kernels"] == rows
    text = page.read_text()
    assert "| pyro | 1 | 2 | – | – | 6 |" in text
    assert "of an earlier count" not in text
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")


def test_the_committed_page_has_every_recipe() -> None:
    page = ROOT / "docs" / "speed-gpu.md"
    _, _, section = page.read_text(encoding="utf-8").partition("<!-- launches -->")
    section, _, _ = section.partition("<!-- end of launches -->")
    assert "Operations launched, without Triton's kernels" in section
    missing = [name for name in RECIPES if section.count(f"\n| {name} | ") != 2]
    assert not missing, f"{missing}: run `python -m benchmarks speed --launches --page docs/speed-gpu.md`"
    assert "LAUNCHES" in fill(page, "LAUNCHES", counted.MARK)
