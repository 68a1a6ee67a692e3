"""The training loop as it runs on a GPU, captured, on a stand-in for CUDA's graphs: the eager loop's numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from spoilt import spoil
from tape import NoReads, OnMeta, Tape
from test_checkpoint import Training, same
from torch import Tensor

from benchmarks import checkpoint, report, train
from benchmarks.config import Config, configure
from benchmarks.data import Data, load
from benchmarks.models import build
from benchmarks.step import Advance, outcomes, set_learning_rate, step
from benchmarks.train import BAD_STEPS, History, TrainingError, train_one
from flowpost import training
from flowpost.masked import device, engine

EPOCHS = 5
IMAGES = 250  # three batches of 64 and one of 58


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """All that were made."""
    made: list[Tape] = []

    def make(where: torch.device, generators: Sequence[torch.Generator]) -> Tape:
        made.append(Tape(where, generators))
        return made[-1]

    monkeypatch.setitem(training._BACKENDS, "cpu", make)
    return made


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> None:
    monkeypatch.setattr(Config, "captured", property(lambda config: not config.eager))
    monkeypatch.setattr(engine, "engine_on", lambda z: device)


@pytest.fixture(scope="module")
def data() -> Data:
    """Few digits, their pixels drawn afresh in every epoch."""
    digits = load("digits")
    pixels = digits.train[:IMAGES] / digits.train.max()
    return replace(digits, train=pixels, valid=digits.valid[:64], test=digits.test[:32], dynamic=True)


@pytest.fixture(scope="module")
def config() -> Config:
    return configure(
        epochs=EPOCHS, width=16, dim=2, samples=20, batch=64, kl_warmup=3, patience=EPOCHS, dropout=0.2, seeds=(3,)
    )


def run(data: Data, config: Config, name: str = "iaf") -> tuple[dict[str, Tensor], History]:
    vae, history = train_one(data, name, 3, config, lambda _: None)
    return vae.state_dict(), replace(history, step_ms=0.0)


OBJECTIVES = {
    "elbo": {},
    "free bits": {"free_bits": 1.0},
    "dreg": {"objective": "iwae", "train_samples": 3, "gradient": "dreg"},
    "stl": {"gradient": "stl"},
}


@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=[] if name == "elbo" else pytest.mark.long) for name in OBJECTIVES]
)
def test_the_captured_loop_trains_to_the_plain_loop_s_numbers(
    data: Data, config: Config, objective: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where Adam is the same, and to rounding where it is the one that is not fused."""
    config = replace(config, **OBJECTIVES[objective])
    weights, history = run(data, config)
    steps = math.ceil(IMAGES / config.batch) * EPOCHS
    (tape,) = tapes
    # One graph of each shape, whatever the learning rate and the KL's weight are; each step was taken once.
    assert (tape.captures, tape.runs, tape.replays) == (2, 6, steps - 6)
    eager, other = run(data, replace(config, eager=True))
    monkeypatch.delitem(training._BACKENDS, "cpu")
    plain, same_history = run(data, config)
    assert len(tapes) == 1
    assert history == same_history
    for key, value in weights.items():
        assert torch.equal(value, plain[key])
        torch.testing.assert_close(value, eager[key], rtol=1e-3, atol=1e-3)
    assert history.train == pytest.approx(other.train, rel=1e-4)
    assert history.valid == pytest.approx(other.valid, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_captured_run_ends_in_the_same_numbers(
    data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    whole = Training(data, config, tmp_path / "whole").end()
    assert same(Training(data, config, tmp_path / "cut").stop(stop).end(), whole)


def test_nothing_is_read_before_the_epoch_s_end(data: Data, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    make = train.whole_step

    def watched(*arguments: object) -> Advance:
        advance = make(*arguments)  # pyright: ignore[reportArgumentType]

        def alone(index: Tensor, kl_weight: Tensor) -> Tensor:
            with NoReads():
                return advance(index, kl_weight)

        return alone

    monkeypatch.setattr(train, "whole_step", watched)
    assert len(run(data, config)[1].train) == EPOCHS
    with pytest.raises(RuntimeError, match="synchronizing"):  # the control: Adam is asked on the host
        run(data, replace(config, eager=True))


def test_outcomes_are_read_once() -> None:
    """All steps are taken before the first outcome is known; eagerly, each after the one before it."""
    batches = list(torch.arange(6.0).split(2))
    for once in (True, False):
        taken = iter(range(9))
        found = outcomes(lambda x, w, taken=taken: next(taken) * 0 + w * x.sum(), batches, torch.tensor(2.0), once=once)
        assert next(found)[0] == 2
        assert next(taken) == (3 if once else 1)
        assert [outcome for outcome, seconds in found if seconds >= 0] == [10, 18]


def test_a_spoilt_image_costs_its_steps_and_no_more(
    data: Data, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps are left out as in the eager loop, which alone can name tensors."""
    spoilt = spoil(data, [7], monkeypatch)
    weights, history = run(spoilt, config)
    eager, other = run(spoilt, replace(config, eager=True))
    assert history.skipped_steps == other.skipped_steps == EPOCHS
    assert [skip | {"tensors": []} for skip in other.skips] == history.skips
    assert all(skip["tensors"] for skip in other.skips)
    for key, value in weights.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, eager[key], rtol=1e-3, atol=1e-3)


def test_ten_bad_steps_in_a_row_end_the_run(data: Data, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted over the ends of epochs, here of four steps."""
    spoilt = spoil(data, list(range(IMAGES)), monkeypatch)
    message = rf"{BAD_STEPS} steps in a row \(epoch 3; not finite: --eager tells which tensors\)"
    with pytest.raises(TrainingError, match=message):
        run(spoilt, config, "diagonal")


def test_a_table_does_not_guess_at_tensors(data: Data, config: Config, tmp_path: Path) -> None:
    result = {"posterior": "iaf", "seed": 0, "error": None, "skipped_steps": 1}
    result |= {"skips": [{"epoch": 2, "step": 9, "tensors": []}]}
    for eager, said in ((False, "--eager tells which tensors"), (True, "the loss or the norm alone")):
        assert report._note(result, replace(config, eager=eager)).endswith(f"(the first in epoch 2: {said})")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_stays_on_the_device(data: Data, config: Config, objective: str) -> None:
    """On the meta device: no host read, and no tensor of another device."""
    config = replace(config, **OBJECTIVES[objective])
    vae = build(data, "iaf", dim=2, width=16, dropout=0.1, options={"hidden": (8,)}).to("meta")
    optimizer = torch.optim.Adam(vae.parameters(), lr=1.0, fused=True, capturable=True)
    optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
    for parameter in vae.parameters():  # Adam would ask whether a kernel knows the device
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device="meta"), **moments}
    x, kl_weight = data.train[:6].to("meta"), torch.ones((), device="meta")
    vae(x).log_q.sum().backward()  # the first call may bring constants there
    with OnMeta():
        assert step(vae, optimizer, x, kl_weight, config).is_meta


def test_the_learning_rate_is_a_tensor_only_where_a_graph_reads_it(data: Data, config: Config) -> None:
    vae = build(data, "diagonal", dim=2, width=16, dropout=0.0, options={})
    for eager in (False, True):
        optimizer = config.optimization.build(vae, config.lr, "" if eager else config.device)
        before = optimizer.param_groups[0]["lr"]
        set_learning_rate(optimizer, 0.25)
        after = optimizer.param_groups[0]["lr"]
        assert float(after) == 0.25
        assert (after is before) == isinstance(after, Tensor) == (not eager)


def test_a_gpu_captures_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Config(device="cuda:1").captured
    assert not Config(device="cuda", eager=True).captured
    assert not Config().captured
