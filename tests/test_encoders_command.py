"""`python -m benchmarks encoders`: equal trainings, the two tables, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import encoders
from benchmarks.data import load
from benchmarks.encoders.fitting import CONTESTS, Fit, Plan, fit, spaced
from benchmarks.encoders.starts import Start
from benchmarks.encoders.table import Trained, elbos, lines
from benchmarks.workers import side_by_side

PLAN = Plan(before=3, after=0, images=20, samples=100, dim=2)
GRU = replace(next(each for each in CONTESTS if each.library == "torch"), data="digits", plan=PLAN)


def figures(one: Fit) -> Fit:
    """Without what the clock says."""
    return replace(one, gaussian_ms=0.0, flow_ms=0.0)


def test_without_a_step_more_nothing_moves() -> None:
    one = fit(GRU, load("digits"), seed=0)
    assert one.gaussian == one.before
    assert one.flow == one.start
    assert one.start == pytest.approx(one.before, abs=0.5)  # log q - log p of 100 samples for the KL in closed form
    assert figures(fit(GRU, load("digits"), seed=0)) == figures(one)
    assert fit(GRU, load("digits"), seed=1).before != one.before


def test_both_go_on_from_the_same_weights_and_neither_moves_the_other() -> None:
    """With the Gaussian in the place of the flow, both are the same training."""
    same = replace(GRU, plan=replace(PLAN, after=3, flow="diagonal"))
    one = fit(same, load("digits"), seed=0)
    assert one.flow == one.gaussian != one.before
    assert one.start == one.before
    assert one.skipped_steps == 0
    flow = fit(replace(GRU, plan=replace(PLAN, after=3)), load("digits"), seed=0)
    assert (flow.before, flow.gaussian) == (one.before, one.gaussian)
    assert flow.flow not in (flow.start, flow.gaussian)


def test_the_images_are_of_the_whole_test_part() -> None:
    """Static MNIST's lie by class, at least at the start."""
    assert spaced(torch.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert spaced(torch.arange(3), 4).tolist() == [0, 1, 2]


def test_the_tables_say_what_was_found() -> None:
    first = Fit(GRU.name, 0, -100.0, -100.1, -98.0, -97.0, 1, 2.0, 5.0)
    second = Fit(GRU.name, 1, -102.0, -102.1, -100.0, -96.0, 0, 2.0, 6.0)
    table = elbos([first, second], {GRU.name: Trained(GRU.data, GRU.plan)})
    assert table.rows == [
        [GRU.name, "digits", "3 + 0", "-101.00 (1.41)", "-101.10 (1.41)", "-99.00 (1.41)", "-96.50 (0.71)"]
        + ["2.50 (2.12)", "2.8"]
    ]
    assert "over 2 seeds; of the test part 20 images at most, at equal distances, with 100" in table.caption
    assert table.caption.endswith("not finite: 1")
    rows = lines(
        [Start("a", "wrap(x)", {"iaf": 2e-7, "planar": 1e-7}, {"iaf": 1e-9}), Start("b", "-", None, None)]
    ).rows
    assert rows == [["a", "`wrap(x)`", "2.0e-07", "1.0e-09"], ["b", "`-`", "-", "-"]]


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(encoders, "CONTESTS", (GRU,))
    monkeypatch.setattr(
        encoders, "starts", lambda: [Start("a pair", "wrap(encoder, 4, example=x)", {"iaf": 2e-7}, None)]
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\n<!-- end of tables -->\nafter\n")
    assert cli.main(["encoders", "--seeds", "2", "--out", str(tmp_path / "run"), "--page", str(page)]) == 0
    told = capsys.readouterr().out
    assert f"{GRU.name}, seed 1: ELBO -" in told
    found = json.loads((tmp_path / "run" / "encoders.json").read_text())
    assert [one["seed"] for one in found["fits"]] == [0, 1]
    assert found["plans"][GRU.name]["data"] == "digits"
    assert found["starts"][0]["single"] == {"iaf": 2e-7}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (tmp_path / "run" / "encoders.md").read_text().strip() in text
    assert "| a pair | `wrap(encoder, 4, example=x)` | 2.0e-07 | - |" in text
    assert "python -m benchmarks" in text


@pytest.mark.long
def test_several_processes_come_to_the_same_figures() -> None:
    tasks = [(GRU, 0), (GRU, 1)]
    alone = [figures(one) for one in side_by_side(encoders.work, tasks, 1)]
    together = [figures(one) for one in side_by_side(encoders.work, tasks, 2)]
    assert sorted(together, key=lambda one: one.seed) == alone


def test_quick_trains_on_digits_and_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(encoders.CASES[0], library="no_such_library")
    slow = replace(GRU, data="mnist-static")
    monkeypatch.setattr(encoders, "CASES", (absent,))
    monkeypatch.setattr(encoders, "CONTESTS", (slow, replace(GRU, library="no_such_library")))
    monkeypatch.setattr(encoders, "starts", list)
    assert cli.main(["encoders", "--quick", "--out", str(tmp_path)]) == 0
    assert "no_such_library is not installed" in capsys.readouterr().out
    found = json.loads((tmp_path / "encoders.json").read_text())
    assert [plan["data"] for plan in found["plans"].values()] == ["digits"]
    assert len(found["fits"]) == 1
