"""The speed benchmark's goals by device, and what it holds on a GPU alone, tried on the CPU as far as that goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tape import Tape
from test_speed import CPU, TINY, Deeper, drawn, example
from torch import nn

import benchmarks.speed as speed
from benchmarks import __main__ as cli
from benchmarks.speed import bounds, contests, half, vae
from benchmarks.speed.bounds import BACKWARD, CAPTURED, FORWARD, MEMORY, TRAINING
from benchmarks.speed.hall import Hall
from benchmarks.speed.memory import mask_bytes
from benchmarks.speed.ours import Flowpost
from benchmarks.speed.programme import programme
from benchmarks.speed.results import DENSE, NATS, OURS, SECONDS, Contest, Goal, MemoryGoal
from benchmarks.speed.sizes import DEEP, FULL, MANY, MINI, ON_GPU, PAIR, SMALL, WIDE, Size
from benchmarks.speed.table import goal_rows, markdown, time_rows
from benchmarks.speed.timing import Call, Rounds
from flowpost import training
from flowpost.masked import device, engine
from flowpost.masked.network import MaskedLinear
from flowpost.recipes import RECIPES

GPU = torch.device("cuda")


def test_a_gpu_has_goals_of_its_own() -> None:
    for what, most in ((TRAINING, [0.75, 0.75, 0.60]), (CAPTURED, [0.60, 0.90, 0.80])):
        assert [bounds.bound(GPU, what, size) for size in (SMALL, WIDE, DEEP)] == most
    assert bounds.bound(GPU, CAPTURED, MANY) == 1.05
    assert [bounds.bound(GPU, MEMORY, SMALL), bounds.bound(CPU, MEMORY, SMALL)] == [1.3, 1.0]
    assert bounds.goals(GPU, FORWARD, SMALL, faster=True) == (Goal(50.0, faster=True),)
    assert [bounds.bound(GPU, what, WIDE) for what in (FORWARD, BACKWARD)] == [25.0, 40.0]
    assert bounds.goals(CPU, TRAINING, PAIR, other=DENSE) == (Goal(1.0, DENSE),)
    assert bounds.goals(CPU, CAPTURED, SMALL) == ()
    assert PAIR in FULL.training


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the smallest size, as if the CPU were a GPU."""
    ratios = {TRAINING: 0.5, MEMORY: 1.3, CAPTURED: 0.6, FORWARD: 50.0}
    steps = {bounds.STEP: {"maf": 10e-3}, bounds.REPLAYED: {"maf": 1e-3}}
    monkeypatch.setattr(bounds, "ON_CPU", {what: {MINI: bound} for what, bound in ratios.items()} | steps)


def test_contests_have_the_goals_of_their_device(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hall = Hall(CPU, TINY, peers=False)
    held = contests.training(hall, MINI)
    assert held.goals == (Goal(0.5, DENSE),)
    assert held.memory_goal == MemoryGoal(1.3, OURS, DENSE)
    assert contests.external(hall, MINI, backward=False).goals == (Goal(50.0, faster=True),)
    assert contests.external(hall, MINI, backward=True).goals == ()
    monkeypatch.setattr(contests, "captured", lambda step: step)
    held = contests.training_captured(hall, MINI)
    assert held.goals == (Goal(0.6, DENSE),)
    assert held.reached(held.goals[0]) is not None
    curve = Rounds(0.0, 1, 1)
    for held in (
        contests.training(hall, MINI, rounds=curve),
        contests.external(hall, MINI, backward=False, rounds=curve),
    ):
        assert (held.goals, held.memory, held.masks) == ((), {}, {})


def test_a_goal_in_seconds_and_one_whose_contestant_failed() -> None:
    one = replace(example(), goals=(Goal(1.5, unit=SECONDS), Goal(2.5, name=DENSE, unit=SECONDS)))
    assert [row[2] for row in goal_rows([one])] == ["eager", "dense"]
    assert [row[3:] for row in goal_rows([one])] == [
        ["<= 1.50 s", "–", "1.00 s (1.00 s to 1.00 s)", "yes"],
        ["<= 2.50 s", "–", "3.00 s (2.50 s to 3.50 s)", "no"],
    ]
    without = replace(one, seconds={"dense": [1.0]}, goals=(Goal(0.01, unit=SECONDS), Goal(1.0, DENSE)))
    assert [row[3:] for row in goal_rows([without])] == [["<= 10.0 ms", "–", "–", "no"], ["<= 1", "dense", "–", "no"]]
    assert [row[1] for row in time_rows([without])] == ["dense"]


def test_masks_are_counted_once_and_shown_beside_the_peak() -> None:
    flow = drawn(Flowpost)
    stairs = [layer.staircase for layer in flow.modules() if isinstance(layer, MaskedLinear)]
    held = [mask.value for stair in stairs for mask in (stair.mask, *stair._edges)]
    assert mask_bytes(flow, CPU) == sum(mask.nbytes for mask in held) > 0
    before = mask_bytes(flow, CPU)
    flow.double()
    assert mask_bytes(flow, CPU) == before + 8 * before // 5  # bools, and numbers of 4 bytes; now of 8 as well
    assert mask_bytes(nn.Linear(2, 2), CPU) == mask_bytes(flow, GPU) == 0
    one = replace(example(), memory={OURS: 2_000_000, DENSE: 1_000_000}, masks={OURS: 500_000})
    text = markdown([one], "head")
    assert "| peak MB | masks MB |" in text
    assert "| 1 | 2.0 | 0.5 |" in text


def test_on_a_gpu_what_has_goals_comes_first() -> None:
    titles = [title for title, _ in programme(Hall(GPU, ON_GPU))]
    assert len(set(titles)) == len(titles)
    after = titles.index(f"{TRAINING} {SMALL}, compiled")
    recipes = [title for title in titles if title.startswith(vae.VAE_STEP)]
    assert sorted(recipes[:2]) == [f"{vae.VAE_STEP}: {name}" for name in ("iaf", "maf")]
    assert len(recipes) == len(RECIPES)
    last = (f"{TRAINING} {MANY}, CUDA graph", f"{BACKWARD} {WIDE}", recipes[-1])
    for title in (*last, f"{half.HALF} {DEEP}, eager", f"{half.ERROR}, pushed by 1.0"):
        assert titles.index(title) < after
    assert all(title.startswith(("cost of", f"{TRAINING} {WIDE}, compiled")) for title in titles[after + 1 :])
    on_cpu = [title for title, _ in programme(Hall(CPU, FULL))]
    assert not [title for title in on_cpu if "graph" in title or "bfloat16" in title or "VAE" in title]


def test_a_library_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Deeper):
        def __init__(self, size: Size) -> None:
            super().__init__(size)
            raise RuntimeError("tensors on two devices\nand more")

    monkeypatch.setattr("benchmarks.speed.hall.PEERS", {"torch": Elsewhere})
    assert contests.training(Hall(CPU, TINY), MINI).left_out == {"torch": "tensors on two devices"}


def test_what_no_file_takes_has_failed_and_what_is_late_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, now = tmp_path / "page.md", [0.0]
    page.write_text("<!-- tables -->\n<!-- end of tables -->\n")

    def bad() -> Contest:
        return replace(example(), seconds={OURS: [float("nan")]})

    def slow() -> Contest:
        now[0] = 3.0
        return example(Goal(0.4, DENSE))

    held = [("first", bad), ("second", slow), ("third", lambda: pytest.fail("late"))]
    monkeypatch.setattr(speed, "programme", lambda hall: held)
    monkeypatch.setattr(speed, "curves", lambda hall: [("training", "dim", held[2][1])])
    monkeypatch.setattr(speed.Run, "seconds", lambda run: now[0])
    monkeypatch.setattr(speed, "write", after_each := Writes(speed.write, page))
    arguments = ["speed", "--quick", "--seconds", "2", "--out", str(tmp_path / "run"), "--page", str(page)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "first failed: ValueError" in out
    assert "No time was left for 2 contests; the first is: third" in out
    assert "training step" in after_each.texts[0]  # before the run ends


class Writes:
    """`write`, and what was on the page after each call."""

    def __init__(self, write: Callable[..., None], page: Path) -> None:
        self.inner, self.page, self.texts = write, page, []

    def __call__(self, *given: object) -> None:
        self.inner(*given)
        self.texts.append(self.page.read_text())


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For CUDA's graphs; and a small model."""

    def captured(step: Call) -> Call:
        for _ in range(2):
            step()
        return Tape(CPU, []).capture(step)

    monkeypatch.setattr(engine, "engine_on", lambda z: device)
    monkeypatch.setitem(training._BACKENDS, "cpu", Tape)
    for module in (vae, half):
        monkeypatch.setattr(module, "captured", captured)
    for name, value in {"PIXELS": 6, "WIDTHS": (5, 4), "DIM": 3, "BATCH": 4}.items():
        monkeypatch.setattr(vae, name, value)


@pytest.mark.parametrize("name", ["planar", "maf"])
def test_a_vae_s_step_is_timed_three_times_over(name: str, on_gpu: None, tapes: None) -> None:
    held = vae.vae_step(Hall(CPU, replace(TINY, most=2, least=2)), name)
    assert set(held.seconds) == {OURS, vae.BARE, vae.BY_OPERATIONS}
    assert held.left_out == {}
    own = (Goal(1e-3, unit=SECONDS), Goal(10e-3, name=vae.BY_OPERATIONS, unit=SECONDS)) if name == "maf" else ()
    assert held.goals == (*own, Goal(1.15, vae.BARE))
    assert all(held.reached(goal) is not None for goal in held.goals)
    assert Contest.from_json(json.loads(json.dumps(held.as_json()))) == held


def test_a_step_that_cannot_be_captured_is_timed_by_operations(tapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step_of = vae.step_of
    monkeypatch.setattr(vae, "step_of", lambda *given: lambda x: torch.tensor(step_of(*given)(x).item()))
    monkeypatch.setattr(vae, "captured", lambda step: Tape(CPU, []).run(step, strict=True))
    held = vae.vae_step(Hall(CPU, TINY), "diagonal")
    assert list(held.seconds) == [vae.BY_OPERATIONS]
    assert set(held.left_out) == {OURS, vae.BARE}
    assert all(why.startswith("cannot be captured: called a synchronizing") for why in held.left_out.values())
    assert [row[-2:] for row in goal_rows([held])] == []  # nobody to compare with


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "captured"])
def test_half_precision_is_timed_beside_float32(graph: bool, tapes: None) -> None:  # noqa: FBT001
    held = half.half(Hall(CPU, TINY), MINI, graph=graph)
    assert set(held.seconds) == {OURS, half.FULL}
    assert held.mode == ("CUDA graph" if graph else "eager")
    assert held.reached(held.goals[0]) is not None


def test_the_forward_pass_alone_is_in_half_precision() -> None:
    step = half.training_step(drawn(Flowpost))
    low = half.halved(step, CPU)
    results = []
    for each in (step, low):
        torch.manual_seed(0)
        each()
        results.append([leaf.grad for leaf in each.leaves])
    assert not torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1], results[0], rtol=0.1, atol=0.05)
    assert not torch.is_autocast_enabled("cpu")


def test_the_error_of_half_precision_is_in_nats_and_beside_the_plain_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "engine_on", lambda z: device)
    monkeypatch.setattr(half, "ROWS", 64)
    held = half.error(Hall(CPU, TINY), MINI, 0.3)
    assert (held.unit, held.rounds) == (NATS, half.SEEDS)
    assert all(0 < value < 0.1 for values in held.seconds.values() for value in values)
    reached = held.reached(held.goals[0])
    assert reached is not None
    assert 0.5 < reached.median < 1.2
    text = markdown([held], "head")
    assert "| mean (quartiles) |" in text
    assert " nats (" in text


def test_the_error_of_a_trained_posterior_is_bounded_in_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "EPOCHS", 1)
    monkeypatch.setattr(half, "WIDE", MINI)
    held = half.trained_error(Hall(CPU, TINY))
    assert held.goals == (Goal(0.01, unit=NATS), Goal(1.2, half.PLAIN))
    assert [row[3:5] for row in goal_rows([held])] == [["<= 0.01 nats", "–"], ["<= 1.2", "plain operations"]]
    assert held.rounds == half.SEEDS
