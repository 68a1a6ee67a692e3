"""The stopwatch: equal work is asserted and the assertion has teeth, rounds and ratios, memory, tables, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import benchmarks.speed as speed
from benchmarks import __main__ as cli
from benchmarks.filling import fill, origin
from benchmarks.peers import here
from benchmarks.run import Run, typed
from benchmarks.speed import contests, others, splines, timing
from benchmarks.speed.contests import external, training, training_captured
from benchmarks.speed.dense import Dense, products
from benchmarks.speed.flows import Flow, draw, features, log_normal, training_loss
from benchmarks.speed.growth import GROWTH, growth_tables, growths
from benchmarks.speed.hall import Hall
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.ours import Flowpost
from benchmarks.speed.peers import PEERS
from benchmarks.speed.results import SECONDS, Contest, Goal, MemoryGoal, shown
from benchmarks.speed.sizes import MINI, Plan, Size
from benchmarks.speed.steps import Step, compiled, scoring_step, training_step
from benchmarks.speed.table import goal_rows, markdown, time_rows
from benchmarks.speed.timing import Call, Rounds, contest, ratio, repeats
from benchmarks.speed.work import UnequalWork, check_scoring, check_training
from flowpost.recipes import RECIPES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EQUAL = {name: make for name, make in PEERS.items() if name != "normflows"}
Make = Callable[..., Flow]
peers = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.skipif(not here(name), reason="no peer"))
        for name, make in EQUAL.items()
    ],
)
TINY = Plan(
    training=(MINI,), compiled=(), external=(MINI,), dim=3, batch=4, samples=130,
    curves=(("training", "hidden", (MINI, replace(MINI, hidden=32))), ("external", "dim", (MINI,))),
    growth=(), growth_budget=0.0, budget=0.0, curve_budget=0.0, least=1, most=1,
)  # fmt: skip


def drawn(make: Make, **changes: int) -> Flow:
    flow = make(replace(MINI, **changes))
    draw(flow)
    return flow


# ---- equal work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Flowpost, Dense])
@pytest.mark.parametrize("samples", [1, 3])
def test_ours_and_dense_do_the_work(make: Make, samples: int) -> None:
    check_training(drawn(make, samples=samples))


@peers
@pytest.mark.parametrize("samples", [1, 3])
def test_peers_do_the_work(make: Make, samples: int) -> None:
    check_training(drawn(make, samples=samples))


@peers
def test_peers_inverses_are_right(make: Make) -> None:
    check_scoring(drawn(make))


def test_our_inverse_is_right() -> None:
    check_scoring(drawn(Flowpost))


def jacobian_gap(flow: Flow) -> float:
    """How far a flow's log-det is from that of its autodiff Jacobian, in float64, at one example."""
    flow.double()
    h = features(replace(MINI, batch=1), CPU).detach().double()
    noise = torch.randn(1, MINI.dim, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda x: flow.push(x, h)[0], noise)
    assert isinstance(matrix, Tensor)
    return (torch.linalg.slogdet(matrix[0, :, 0])[1] - flow.push(noise, h)[1]).abs().item()


def test_our_log_det_is_the_jacobians() -> None:
    assert jacobian_gap(drawn(Flowpost)) < 1e-10


@peers
def test_peers_log_dets_are_their_jacobians(make: Make) -> None:
    assert jacobian_gap(drawn(make)) < 1e-10


def test_dense_is_no_flow() -> None:
    assert jacobian_gap(drawn(Dense)) > 1e-5


@pytest.mark.skipif(not here("normflows"), reason="no peer")
def test_normflows_has_no_such_network() -> None:
    """Its feed-forward MADE refuses a context, and one residual block has a third hidden layer."""
    with pytest.raises(UnequalWork, match="^normflows: weight matrices: expected"):
        check_training(drawn(PEERS["normflows"]))


class Narrow(Dense):
    def __init__(self, size: Size) -> None:
        super().__init__(replace(size, hidden=size.hidden // 2))
        self.size = size


class Deeper(Dense):
    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.extra = nn.Linear(size.hidden, size.hidden)


class Tanh(Dense):
    def activations(self) -> list[object]:
        return [F.relu, torch.tanh] * self.size.steps


class Idle(Dense):
    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.idle = nn.Parameter(torch.ones(3))


class Detached(Dense):
    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return super().push(noise, h.detach())


class Half(Dense):
    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().push(noise[::2], h[::2])
        return z.repeat_interleave(2, 0), log_det.repeat_interleave(2, 0)


class Twice(Dense):
    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        super().push(noise, h)
        return super().push(noise, h)


class Summed(Dense):
    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().push(noise, h)
        return z, log_det.unsqueeze(-1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Narrow, "narrow: weight matrices: expected"),
        (Deeper, "deeper: weight matrices: expected"),
        (Tanh, "tanh: activations: expected 4 ReLUs"),
        (Idle, "idle: idle got no gradient"),
        (Detached, "detached: h got no gradient"),
        (Half, "half: operations of a forward pass: expected"),
        (Twice, "twice: operations of a forward pass: expected"),
        (Summed, "summed: z and log q: expected"),
    ],
)
def test_unequal_work_is_refused(make: Make, message: str) -> None:
    with pytest.raises(UnequalWork, match=message):
        check_training(drawn(make))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, log_q: log_q.mean(), "dense: the loss does not use z"),
        (lambda z, log_q: z.square().mean(), "dense: the loss does not use log q"),
    ],
)
def test_a_loss_has_to_use_both_outputs(loss: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(UnequalWork, match=message):
        check_training(drawn(Dense), loss)


class WrongInverse(Flowpost):
    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        return super().log_prob(z, h) + 0.01


class StoppedInverse(Flowpost):
    def log_prob(self, z: Tensor, h: Tensor) -> Tensor:
        return super().log_prob(z.detach(), h)


@pytest.mark.parametrize(
    ("make", "message"),
    [(WrongInverse, "log q of its own samples: .* off by 0.0"), (StoppedInverse, "stoppedinverse: z got no gradient")],
)
def test_a_wrong_inverse_is_refused(make: Make, message: str) -> None:
    with pytest.raises(UnequalWork, match=message):
        check_scoring(drawn(make))


def test_who_does_other_work_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.hall.PEERS", {"torch": Deeper, "json": Idle})  # names that can be imported
    found = training(Hall(CPU, TINY), MINI)
    assert set(found.seconds) == {"flowpost", "dense", "matrix products alone"}
    assert found.left_out["torch"].startswith("deeper: weight matrices")
    assert found.left_out["json"].startswith("idle: idle got no gradient")


def test_steps_take_every_gradient() -> None:
    for step in (training_step(drawn(Dense)), scoring_step(drawn(Flowpost))):
        step()
        assert all(leaf.grad is not None for leaf in step.leaves)
        step.clear()
        assert all(leaf.grad is None for leaf in step.leaves)


@pytest.mark.compile
@pytest.mark.parametrize("make", [Flowpost, Dense])
def test_a_compiled_step_has_the_eager_gradients(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", fullgraph=True))
    step = training_step(drawn(make))
    fast = compiled(step)
    gradients = []
    for call in (step, fast):
        torch.manual_seed(3)
        call()
        gradients.append([leaf.grad for leaf in step.leaves])
    torch.testing.assert_close(*gradients)


# ---- the posteriors without a network ----------------------------------------------------------------------------


@pytest.mark.parametrize("copying", [False, True])
def test_torchs_gaussian_is_ours(copying: bool) -> None:  # noqa: FBT001
    sampler = others.multivariate_normal(5, CPU, copying=copying)
    numbers = others.numbers_for(others.full_covariance(5), 7, CPU)
    others.check_gaussian("torch", sampler, numbers, 5)
    others.check_sampler("torch", sampler, numbers, 5)


def test_another_gaussian_is_refused() -> None:
    sampler = others.multivariate_normal(5, CPU, copying=True)
    numbers = others.numbers_for(others.full_covariance(5), 7, CPU)
    with pytest.raises(UnequalWork, match="torch: expected the same numbers"):
        others.check_gaussian("torch", lambda c, noise: sampler(1.1 * c, noise), numbers, 5)
    with pytest.raises(UnequalWork, match="torch: some numbers have no gradient"):
        others.check_sampler("torch", lambda c, noise: sampler(c * (c < 0), noise), numbers[:1].detach().clamp_min(0)
                             .requires_grad_(), 5)  # fmt: skip


@pytest.mark.skipif(not here("pyro"), reason="no peer")
def test_pyros_planar_chain_is_a_density() -> None:
    numbers = others.numbers_for(others.planar(3), 1, CPU).detach().double()
    noise = torch.randn(1, 3, dtype=torch.float64)
    sampler = others.pyro_planar(3)
    matrix = torch.autograd.functional.jacobian(lambda x: sampler(numbers, x)[0], noise)
    assert isinstance(matrix, Tensor)
    wanted = log_normal(noise) - torch.linalg.slogdet(matrix[0, :, 0])[1]
    torch.testing.assert_close(sampler(numbers, noise)[1], wanted)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.skipif(not here(name), reason="no peer")) for name in splines.PEERS]
)
def test_a_peer_s_spline_is_a_density(name: str) -> None:
    numbers = others.numbers_for(splines.spline(3), 200, CPU).detach().double()
    noise = torch.randn(200, 3, dtype=torch.float64, requires_grad=True)
    z, log_q = splines.PEERS[name](3)(numbers, noise)
    (slope,) = torch.autograd.grad(z.sum(), noise)
    assert (z != noise).double().mean() > 0.9
    torch.testing.assert_close(log_q, log_normal(noise) - slope.log().sum(-1))


# ---- times and memory --------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_rounds() -> None:
    assert ratio([1.0, 10.0, 3.0], [2.0, 20.0, 6.0]) == (0.5, 0.5, 0.5)
    assert ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]) == (2.0, 1.5, 3.0)


def test_everyone_has_a_turn_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, turns = {"fast": 0.001, "slow": 5.0}, []

    def timed(call: Callable[[], str], times: int, device: torch.device) -> float:
        turns.append((call(), times))
        return seconds[call()]

    monkeypatch.setattr(timing, "timed", timed)
    found = contest({"fast": lambda: "fast", "slow": lambda: "slow"}, CPU, Rounds(1e9, 1, 3))
    assert found == {"fast": [0.001] * 3, "slow": [5.0] * 3}
    assert sorted(turns) == [("fast", 1)] * 2 + [("fast", 10)] * 3 + [("slow", 1)] * 3  # a slow first call counts
    assert len({tuple(turns[i : i + 2]) for i in range(len(turns))}) > 3


def test_no_kernel_s_compilation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of all on a GPU, which is no round's."""
    seconds = iter([9.0, 0.001, 0.001, 0.001, 0.001])
    monkeypatch.setattr(timing, "timed", lambda call, times, device: next(seconds))
    assert contest({"any": lambda: None}, torch.device("cuda"), Rounds(1e9, 2, 2)) == {"any": [0.001, 0.001]}


def test_rounds_end_with_the_budget() -> None:
    rounds = Rounds(budget=10, least=3, most=5)
    assert not rounds.enough(1, 1000)
    assert not rounds.enough(2, 26)  # the third ends within four times the budget
    assert rounds.enough(2, 27)
    assert not rounds.enough(3, 7.5)
    assert rounds.enough(3, 7.6)
    assert rounds.enough(5, 0.1)
    assert (repeats(0.001), repeats(1.0), repeats(0.0)) == (10, 1, timing.MOST_CALLS)


def test_peak_memory_of_known_calls() -> None:
    def chain() -> Tensor:
        x = torch.zeros(1000, 1000)
        for _ in range(5):
            x = x + 1  # two at a time, 4 MB each
        return x

    assert peak_bytes(chain, lambda: None, CPU) == pytest.approx(8e6, rel=1e-3)
    w = torch.randn(1000, 1000, requires_grad=True)

    def step() -> None:
        (w.exp() * 2).sum().backward()

    def clear() -> None:
        w.grad = None

    # In the backward pass: exp, which was kept for it, the gradient that reaches it, and the one of w.
    assert peak_bytes(step, clear, CPU) == pytest.approx(12e6, rel=1e-3)


def test_the_products_alone_are_a_dense_step_s() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for size in (MINI, replace(MINI, samples=3)):
        with FlopCounterMode(display=False) as alone:
            products(size, CPU)()
        flow = drawn(Dense, samples=size.samples)
        h = features(size, CPU)
        noise = torch.randn(*((size.samples,) if size.samples > 1 else ()), size.batch, size.dim, requires_grad=True)
        with FlopCounterMode(display=False) as whole:
            z, log_det = flow.push(noise, h)
            training_loss(z, log_normal(noise) - log_det).backward()
        assert alone.get_total_flops() == whole.get_total_flops()


# ---- what is written ---------------------------------------------------------------------------------------------


def example(goal: Goal | None = None) -> Contest:
    seconds = {"flowpost": [1.0, 1.0], "dense": [2.0, 4.0], "zuko": [5.0, 5.0], "pyro": [3.0, 3.0]}
    return Contest("training step", "(1, 2)", "eager", seconds, () if goal is None else (goal,))


@pytest.mark.parametrize(
    ("goal", "beside", "measured", "met"),
    [
        (Goal(0.4, "dense"), "dense", "0.38 (0.31 to 0.44)", "yes"),
        (Goal(0.3, "dense"), "dense", "0.38 (0.31 to 0.44)", "no"),
        (Goal(3.0, faster=True), "pyro", "3.00 (3.00 to 3.00)", "yes"),  # the fastest peer, never dense
        (Goal(3.1, faster=True), "pyro", "3.00 (3.00 to 3.00)", "no"),
    ],
)
def test_goals(goal: Goal, beside: str, measured: str, met: str) -> None:
    [row] = goal_rows([example(goal)])
    assert row[4:] == [beside, measured, met]


def test_goals_of_memory_and_goals_without_a_rival() -> None:
    memory = {"flowpost": 30, "dense": 20}
    [row] = goal_rows([replace(example(), memory=memory, memory_goal=MemoryGoal(1.0, "flowpost", "dense"))])
    assert row[3:] == ["<= 1", "dense", "1.50", "no"]
    alone = Contest("x", "", "eager", {"flowpost": [1.0], "dense": [2.0]}, (Goal(20, faster=True),))
    assert goal_rows([alone]) == []


def test_tables_put_ours_first_and_the_others_by_time() -> None:
    rows = time_rows([example()])
    assert [row[1] for row in rows] == ["flowpost", "dense", "pyro", "zuko"]
    assert rows[1][2:5] == ["3.00 s (2.50 s to 3.50 s)", "1", "3.00 (2.50 to 3.50)"]
    assert rows[0][3:5] == ["0.38 (0.31 to 0.44)", "1"]


def test_durations() -> None:
    found = [shown(value, SECONDS) for value in (12.34, 0.09999, 0.0012345, 4.56e-5, 7e-9)]
    assert found == ["12.3 s", "100 ms", "1.23 ms", "45.6 µs", "7.00 ns"]


def test_markdown_names_who_is_left_out_once_for_each_check() -> None:
    first = replace(example(Goal(0.4, "dense")), left_out={"normflows": "shapes: expected 1, got 2", "zuko": "because"})
    second = replace(example(), left_out={"normflows": "shapes: expected 3, got 4"})
    text = markdown([first, second, replace(second, what="NLL")], "head")
    assert "- normflows is left out of: training step; NLL. shapes: expected 1, got 2\n" in text
    assert "- zuko is left out of: training step. because" in text
    assert "| training step | (1, 2) | eager | <= 0.4 | dense | 0.38 (0.31 to 0.44) | yes |" in text
    assert "peak MB" not in text  # nobody has one here


def test_external_contests_leave_dense_out() -> None:
    found = external(Hall(CPU, TINY, peers=False), MINI, backward=True)
    assert list(found.seconds) == ["flowpost"]
    assert found.seconds["flowpost"][0] > 0


@pytest.mark.full
def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "QUICK", TINY)
    threads = torch.get_num_threads()
    assert cli.main(["speed", "--quick", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "flowpost" in out
    assert "goals" in out
    content = json.loads((tmp_path / "speed.json").read_text())
    assert {"cpu", "cores", "torch", "python", "commit", "libraries"} <= content["environment"].keys()
    assert content["command"].startswith("python -m benchmarks")
    assert len(content["contests"]) == 7
    for one in content["contests"]:
        ours = one["summary"]["flowpost"]
        assert all(len(values) == one["rounds"] == 1 for values in one["seconds"].values())
        assert ours["seconds"]["median"] == one["seconds"]["flowpost"][0] > 0
        assert ours["over"]["flowpost"]["median"] == 1
        for name, values in one["seconds"].items():
            assert math.isclose(ours["over"][name]["median"], one["seconds"]["flowpost"][0] / values[0])
    assert [one["at"]["hidden"] for one in content["curves"]] == [24, 32, 24]
    assert "## Goals" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_growth_of_every_recipe_s_cost() -> None:
    hall = Hall(CPU, replace(TINY, growth=(2, 3), growth_budget=0.0))
    titles = [title for title, _ in growths(hall)]
    assert titles == [f"{GROWTH}: {name}, dim {dim}" for name in RECIPES for dim in (2, 3)]
    held = [held() for title, held in growths(hall) if "planar" in title or "maf" in title]
    [table] = growth_tables(held)
    assert [row[0] for row in table.rows] == ["planar", "maf"]
    assert all(len(cell.split(" / ")) == 2 for row in table.rows for cell in row[1:])
    first = held[0]
    assert table.rows[0][1].startswith(f"{1e3 * first.time('sample').median:.3g}")
    assert float(table.rows[0][4].split(" / ")[0]) == pytest.approx(
        first.seconds["log_prob"][0] / first.seconds["sample"][0], rel=6e-3
    )
    assert not growth_tables([])


def test_one_contest_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["speed", "--quick", "--reps", "23", "--only", "full covariance", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    [one] = json.loads((tmp_path / "speed.json").read_text())["contests"]
    assert one["what"] == "full covariance"
    assert one["rounds"] == 23  # more than the plan would have
    assert not (tmp_path / "speed.png").exists()


def test_a_contest_that_fails_ends_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Contest:
        raise RuntimeError("no compiler")

    one = example(Goal(0.4, "dense"))
    held = [("first", fails), ("second", lambda: one)], [("training", "dim", fails)]
    monkeypatch.setattr(speed, "programme", lambda hall: held[0])
    monkeypatch.setattr(speed, "curves", lambda hall: held[1])
    assert cli.main(["speed", "--quick", "--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [each["what"] for each in written["contests"]] == [one.what]
    out = capsys.readouterr().out
    assert "first failed: RuntimeError: no compiler" in out
    assert "training against dim failed" in out


def test_a_stopped_run_s_contests_are_on_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> Contest:
        raise KeyboardInterrupt

    page = tmp_path / "page.md"
    page.write_text("<!-- tables -->\n<!-- end of tables -->\n")
    held = [("first", lambda: example(Goal(0.4, "dense"))), ("second", stopped)]
    monkeypatch.setattr(speed, "programme", lambda hall: held)
    stop = cli.main(["speed", "--quick", "--out", str(tmp_path / "run"), "--page", str(page)])
    assert stop == 130
    assert "training step" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "fast"], "mode: expected one of default, reduce-overhead, max-autotune, got 'fast'"),
        (["--device", "tpu"], "device: expected one of cpu, cuda, got 'tpu'"),
        (["--threads", "0"], "threads: expected an integer of at least 1, got 0"),
        (["--reps", "0"], "reps"),
        (["--only", "nothing"], "only: expected a part of a contest's title, got 'nothing'"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["speed", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_tables_go_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page, run = tmp_path / "page.md", Run.begin("speed", tmp_path / "run")
    held = replace(example(Goal(0.4, "dense")), memory_goal=MemoryGoal(1.3, "flowpost", "dense"))
    run.write("speed.json", {"contests": [held.as_json()], "curves": [{"axis": "dim"}]})
    (run.folder / "speed.png").write_bytes(b"plot")
    page.write_text("above\n<!-- tables -->\nof an earlier run\n<!-- end of tables -->\nbelow\n")
    run.publish("speed.json", speed.shown, "speed.png")  # on no page
    assert "of an earlier run" in page.read_text()
    run.page = page
    for _ in range(2):  # once more changes nothing
        run.publish("speed.json", speed.shown, "speed.png")
        text = page.read_text()
        assert text.startswith("above\n<!-- tables -->\n\nMeasured on 2")
        assert markdown([held], origin(run.head())).partition("## Goals")[2] in text
        assert text.endswith("](page.png)\n\n<!-- end of tables -->\nbelow\n")
        assert "of an earlier run" not in text
    assert (tmp_path / "page.png").read_bytes() == b"plot"


def test_a_contest_is_what_its_file_says() -> None:
    plain = replace(example(Goal(3.0, faster=True)), left_out={"pyro": "why"}, at={"dim": 2})
    for held in (plain, replace(plain, memory_goal=MemoryGoal(1.3, "flowpost", "dense"))):
        assert Contest.from_json(json.loads(json.dumps(held.as_json()))) == held


def test_the_committed_page_has_its_marks() -> None:
    assert "TABLES" in fill(ROOT / "docs" / "speed.md", "TABLES")


def test_the_command_is_printed_without_folders() -> None:
    words = ["speed", "--out", "somewhere/of mine", "--quick", "--page=docs/x.md", "--only", "planar, 16"]
    assert typed(words) == "python -m benchmarks speed --quick --only 'planar, 16'"


@pytest.mark.parametrize("text", ["", "<!-- end of tables --> <!-- tables -->", "only <!-- tables -->"])
def test_a_page_without_marks_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert cli.main(["speed", "--quick", "--out", str(tmp_path), "--page", str(page)]) == 2
    assert "page: expected the marks" in capsys.readouterr().err
    assert page.read_text() == text


@pytest.mark.full
@pytest.mark.skipif(not here("zuko"), reason="no peer")
def test_a_peers_import_leaves_torch_as_it_was() -> None:
    code = """
from torch.distributions import Distribution
from benchmarks.speed.peers import PEERS
from benchmarks.speed.sizes import MINI
PEERS["zuko"](MINI)
print(Distribution._validate_args)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "True"


def test_who_cannot_be_captured_is_left_out_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = iter((False, True))  # flowpost's, and then dense's

    def capture(step: Step) -> Call:
        if next(captures):
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return step

    monkeypatch.setattr(contests, "captured", capture)
    found = training_captured(Hall(CPU, TINY, peers=False), MINI)
    assert found.left_out == {"dense": "cannot be captured: called a synchronizing CUDA operation"}
    assert set(found.seconds) == {"flowpost", "flowpost, eager", "matrix products alone"}
