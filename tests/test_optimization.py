"""What a preset may ask of the one loop: optimizers, rates, averaging, precision, a limit of minutes, a log."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_checkpoint import Training, same

from benchmarks import checkpoint, figures
from benchmarks.config import Config, ConfigError, configure
from benchmarks.data import Data, load
from benchmarks.models import build
from benchmarks.optimizers import Optimization, burda
from benchmarks.step import step
from benchmarks.train import Loop, begin, fit, train_one
from benchmarks.watchers import TensorBoard, Together, rows
from flowpost.vae import VAE

AVERAGED = Optimization(averaging=0.8, decay="constant")


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    train = digits.train[:128] / digits.train.max()
    return replace(digits, train=train, valid=digits.valid[:32], test=digits.test[:32], dynamic=True)


@pytest.fixture(scope="module")
def config() -> Config:
    return configure(
        epochs=3, width=8, dim=2, samples=20, batch=64, kl_warmup=0, patience=3, seeds=(3,), trusted_images=0
    )


def made(data: Data, config: Config) -> VAE:
    torch.manual_seed(0)
    return build(data, "diagonal", dim=2, width=config.width, dropout=0.0, options={})


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamax"])
def test_every_optimizer_s_run_is_resumed_to_the_same_bits(
    data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    config = replace(config, optimization=replace(AVERAGED, optimizer=optimizer))
    whole = Training(data, config, tmp_path / "whole").end()
    assert same(Training(data, config, tmp_path / "cut").stop(2).end(), whole)
    for name in ("model", "optimizer"):  # the control: without the averages, without the optimizer's state
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(checkpoint.PARTS, name, forgetful(checkpoint.PARTS[name]))
            assert not same(Training(data, config, tmp_path / name).stop(2).end(), whole)


def forgetful(part: checkpoint.Part) -> checkpoint.Part:
    """It keeps zeros in the place of averages, of weights as of gradients."""

    def pack(loop: Loop, config: Config) -> dict[str, torch.Tensor]:
        found = part.pack(loop, config)
        kept = {key for key in found if ".constant_" in key}  # a gain of 0 is refused
        spoilt = [key for key in found.keys() - kept if "av" in key and found[key].is_floating_point()]
        return found | {key: torch.zeros_like(found[key]) for key in spoilt}

    return part._replace(pack=pack)


def test_the_average_is_what_is_validated_and_kept(data: Data, config: Config) -> None:
    """Polyak's recursion, written once more: ``a <- 0.8 a + 0.2 w`` after every step, from the first weights on."""
    config = replace(config, optimization=AVERAGED, epochs=1)
    vae = made(data, config)
    weights = [parameter.detach().clone() for parameter in vae.parameters()]
    by_hand, seen = [weight.double() for weight in weights], []
    plain = copy.deepcopy(vae)
    make = config.optimization.build

    def watched(model: VAE, *arguments: object) -> torch.optim.Optimizer:
        optimizer = make(model, *arguments)  # pyright: ignore[reportArgumentType]
        optimizer.register_step_post_hook(lambda *_: seen.append([p.detach().double() for p in plain.parameters()]))
        return optimizer

    plain = vae
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimization, "build", lambda _, *arguments: watched(*arguments))
        fit(vae, data, config, 0, lambda _: None)
    assert len(seen) == 2
    for each in seen:
        by_hand = [0.8 * a + 0.2 * w for a, w in zip(by_hand, each, strict=True)]
    for kept, a in zip(vae.parameters(), by_hand, strict=True):
        torch.testing.assert_close(kept.detach().double(), a, rtol=1e-6, atol=1e-7)


def test_burda_s_rates() -> None:
    """1 epoch at 1e-3, 3 at 10^(-1/7) of it, ... and 3^7 = 2187 at a tenth: 3,280 in all."""
    found = [burda(epoch, 3280) for epoch in (0, 1, 3, 4, 12, 13, 1092, 1093, 3279)]
    assert found == pytest.approx([10 ** (-stage / 7) for stage in (0, 1, 1, 2, 2, 3, 6, 7, 7)])


def test_minutes_end_a_run_and_are_counted_over_stops(
    data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = replace(config, minutes=1e-9)
    assert len(train_one(data, "diagonal", 0, late, lambda _: None)[1].valid) == 1
    assert len(train_one(data, "diagonal", 0, replace(config, minutes=60.0), lambda _: None)[1].valid) == 3
    loop = begin(made(data, config), config, 0)
    loop.seconds = 61.5
    again = begin(made(data, config), config, 0)
    checkpoint.Snapshot(loop, config, {}).restore(again)
    assert again.seconds == 61.5
    assert again.is_over(replace(config, minutes=1.0))
    assert not again.is_over(replace(config, minutes=1.1))


def test_low_precision_is_for_the_pass_alone(data: Data, config: Config) -> None:
    low = replace(config, optimization=Optimization(precision="bfloat16"))
    found = []
    for each in (config, low):
        vae = made(data, config)
        optimizer = each.optimization.build(vae, 1e-3)
        seen: list[torch.dtype] = []
        [*vae.encoder.children()][1].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        )
        torch.manual_seed(1)
        found.append(step(vae, optimizer, data.train[:32].round(), torch.tensor(1.0), each).item())
        assert seen == [torch.bfloat16 if each is low else torch.float32]
        assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_fewer_images_and_the_validation_part_are_evaluated(data: Data, config: Config) -> None:
    vae = made(data, config).eval()
    few = figures.evaluate(vae, data, replace(config, images=9, information=0))
    cut = figures.evaluate(vae, replace(data, test=data.test[:9]), config)
    assert few == {key: cut[key] for key in few}
    assert cut.keys() - few.keys() == {"mutual_information"}
    both = figures.evaluate(vae, replace(data, valid=data.test), replace(config, valid_samples=30, images=9))
    assert (both["valid_neg_elbo"], both["valid_nll"]) == pytest.approx((both["neg_elbo"], both["nll"]), rel=0.05)


def test_tensorboard_has_the_rows_of_the_log(data: Data, config: Config, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, last = TensorBoard(tmp_path, "diagonal-0", config), []

    class Last(TensorBoard):
        def __init__(self) -> None:
            super().__init__(tmp_path / "other", "x", config)

        def start(self, loop: Loop) -> None:
            last.append(loop)

        def end_epoch(self, loop: Loop) -> None:
            last.append(rows(loop, config))

    fit(made(data, config), data, config, 0, Together([board, Last()]))
    board.writer.close()
    found = events.EventAccumulator(str(tmp_path / "diagonal-0")).Reload()
    for name in ("train", "valid", "lr", "kl_weight"):
        values = [(event.step, event.value) for event in found.Scalars(name)]
        assert values == [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in last[-1]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of adam, adamax, rmsprop, got 'lion'"),
        ({"decay": "cosine"}, "decay: expected one of linear, constant, burda, got 'cosine'"),
        ({"clip": 0.0}, "clip: expected a positive number, got 0.0"),
        ({"eps": float("inf")}, "eps: expected a positive number, got inf"),
        ({"averaging": 1.0}, r"averaging: expected a share in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_values_are_refused(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Optimization(**change)
