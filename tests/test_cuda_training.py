"""Captured steps on a real GPU: the eager steps' numbers, fresh noise, no wait, and errors that say what to do."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from small import RECIPES, small
from spoilt import spoil
from test_checkpoint import Training
from torch import Tensor, nn

from benchmarks import checkpoint
from benchmarks.config import Config, configure
from benchmarks.data import Data, load
from benchmarks.train import BAD_STEPS, History, TrainingError, train_one
from flowpost._graphs import _no_waits
from flowpost.density import standard_normal_log_prob
from flowpost.training import Captured, step_if_finite
from flowpost.vae import VAE, Bernoulli

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EPOCHS = 30
IMAGES = 250  # three batches of 64 and one of 58


@pytest.fixture(autouse=True)
def _exact_matmul() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(name: str) -> VAE:
    vae = VAE(nn.Linear(5, 4), small(name).float(), nn.Linear(3, 5), Bernoulli())
    return vae.cuda()


def adam(vae: VAE) -> torch.optim.Adam:
    return torch.optim.Adam(vae.parameters(), lr=torch.tensor(1e-2, device="cuda"), fused=True, capturable=True)


def step_with_noise(vae: VAE, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
    """One whose noise is given, so that both ways can be compared number by number."""

    def step(x: Tensor, noise: Tensor, kl_weight: Tensor) -> Tensor:
        optimizer.zero_grad()
        z, log_q, _ = vae.posterior(vae.encoder(x), noise=noise)
        loss = (kl_weight * (log_q - standard_normal_log_prob(z)) - vae.log_joint(x, z)[0]).mean()
        loss.backward()
        return torch.where(step_if_finite(optimizer, loss, max_norm=10.0), loss, torch.nan)

    return step


def state(vae: VAE, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for each in optimizer.state.values() for value in each.values()]
    return [*vae.state_dict().values(), *moments]


@pytest.mark.parametrize("name", RECIPES)
def test_captured_steps_have_the_eager_steps_numbers(name: str) -> None:
    """Two shapes in turns, while weight of the KL and learning rate go on; nothing is lost, nothing doubled."""
    plain = make(name)
    ends = []
    for wrap in (False, True):
        vae = copy.deepcopy(plain)
        optimizer = adam(vae)
        step = step_with_noise(vae, optimizer)
        step = Captured(step, "cuda") if wrap else step
        draws, losses = torch.Generator("cuda").manual_seed(5), []
        for i, size in enumerate((7, 7, 4) * 6):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + i))
            x = torch.rand(size, 5, generator=draws, device="cuda").round()
            noise = torch.randn(size, 3, generator=draws, device="cuda")
            losses.append(step(x, noise, torch.tensor(i / 18, device="cuda")).detach())
        assert all(int(each["step"]) == 18 for each in optimizer.state.values())
        ends.append([torch.stack(losses), *state(vae, optimizer)])
    assert ends[0][0].isfinite().all()
    for eager, captured in zip(*ends, strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["iaf", "maf", "realnvp"])
def test_weights_that_are_loaded_are_seen(name: str) -> None:
    """With the masks and the order of the variables, which the graph reads beside them."""
    vae = make(name)
    step = Captured(lambda x, noise: vae.posterior(vae.encoder(x), noise=noise), "cuda")
    x, noise = torch.rand(7, 5, device="cuda"), torch.randn(7, 3, device="cuda")
    for _ in range(5):
        step(x, noise)
    vae.load_state_dict(vae.state_dict() | {key: value / 2 for key, value in vae.named_parameters()})
    others = [torch.full((size,), -1, device="cuda") for size in (2, 8, 32, 128) for _ in range(100)]
    with torch.no_grad():
        expected = vae.posterior(vae.encoder(x), noise=noise)
    for found, each in zip(step(x, noise), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)
    assert len(others) == 400  # which lie where anything was that the load freed


@pytest.mark.parametrize("own", [False, True])
def test_every_replay_has_fresh_noise(*, own: bool) -> None:
    """Of the device's generator, and of one that is given, which eager draws go on from."""
    generator = torch.Generator("cuda").manual_seed(1) if own else None
    given = [] if generator is None else [generator]
    draw = Captured(lambda x: x + torch.rand(4, generator=generator, device="cuda"), "cuda", generators=given)
    found = [draw(torch.zeros(4, device="cuda")) for _ in range(8)]
    found += [torch.rand(4, generator=generator, device="cuda"), draw(torch.zeros(4, device="cuda"))]
    assert len(torch.stack(found).flatten().unique()) == 40


def test_a_generator_s_state_can_be_set_between_replays() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    draw = Captured(lambda x: x + torch.rand(4, generator=generator, device="cuda"), "cuda", generators=[generator])
    zeros = torch.zeros(4, device="cuda")
    for _ in range(5):
        draw(zeros)
    before = generator.get_state()
    first, second = draw(zeros), draw(zeros)
    generator.set_state(before)
    assert torch.equal(draw(zeros), first)
    assert torch.equal(draw(zeros), second)


def test_replays_wait_for_nothing() -> None:
    vae = make("diagonal")
    step = Captured(step_with_noise(vae, adam(vae)), "cuda")
    x, noise, weight = torch.ones(7, 5, device="cuda"), torch.randn(7, 3, device="cuda"), torch.ones((), device="cuda")
    for _ in range(4):
        step(x, noise, weight)
    with _no_waits():
        losses = [step(x, noise, weight) for _ in range(5)]
    assert torch.stack(losses).isfinite().all()


def test_inputs_may_stand_in_pinned_memory() -> None:
    double = Captured(lambda x: 2 * x, "cuda")
    for i in range(6):
        found = double(torch.full((1000,), float(i)).pin_memory())
        assert found.is_cuda
        assert torch.equal(found.cpu(), torch.full((1000,), 2.0 * i))


def test_a_step_that_is_not_finite_leaves_weights_and_moments() -> None:
    vae = make("iaf")
    optimizer = adam(vae)
    step = Captured(step_with_noise(vae, optimizer), "cuda")
    x, noise, weight = torch.ones(7, 5, device="cuda"), torch.randn(7, 3, device="cuda"), torch.ones((), device="cuda")
    for _ in range(5):
        assert step(x, noise, weight).isfinite()
    before = [tensor.clone() for tensor in state(vae, optimizer)]
    assert step(x, noise * math.nan, weight).isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, state(vae, optimizer), strict=True))
    assert step(x, noise, weight).isfinite()
    assert not torch.equal(before[0], state(vae, optimizer)[0])


READERS = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "mask": lambda x: x[x > 0].sum(),
    "cpu": lambda x: x * x.cpu().cuda(),
}


@pytest.mark.parametrize("what", READERS)
def test_a_host_read_is_found_before_the_capture(what: str) -> None:
    """And the process goes on: noise is drawn and other functions are captured."""
    x, outside = torch.ones(2, device="cuda"), torch.cuda.current_stream()
    wrong = Captured(READERS[what], "cuda")
    for _ in range(2):
        wrong(x)
    with pytest.raises(RuntimeError, match=r"(?s)can be captured.*fused=True"):
        wrong(x)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() == outside
    right = Captured(lambda x: x + torch.rand_like(x), "cuda")
    assert len(torch.stack([right(x) for _ in range(6)]).unique()) == 12


FAILING = """
import torch
from flowpost.training import Captured
generator, outside = torch.Generator("cuda"), torch.cuda.current_stream()
draw = Captured(lambda x: x + torch.rand(2, generator=generator, device="cuda"), "cuda")
try:
    for _ in range(4):
        draw(torch.zeros(2, device="cuda"))
except RuntimeError as error:
    print(error)
assert torch.cuda.current_stream() == outside
assert len(torch.randn(9, device="cuda").unique()) == 9
right = Captured(lambda x: x + torch.rand_like(x), "cuda")
assert len(torch.stack([right(torch.zeros(2, device="cuda")) for _ in range(6)]).unique()) == 12
"""


def test_a_capture_that_fails_says_what_to_look_for() -> None:
    """In a process of its own, which goes on afterwards: the graph does not know a generator."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "can be captured" in done.stdout
    assert "`generators`" in done.stdout


# ------------------------------------------------------------------------------------------------ the benchmarks' loop


@pytest.fixture(scope="module")
def data() -> Data:
    """Few digits, their pixels drawn afresh in every epoch."""
    digits = load("digits")
    valid, test = ((part / digits.levels).round() for part in (digits.valid[:64], digits.test[:32]))
    train = digits.train[:IMAGES] / digits.levels
    return replace(digits, train=train, valid=valid, test=test, dynamic=True, likelihood="bernoulli", levels=1)


@pytest.fixture(scope="module")
def config() -> Config:
    options = {"width": 64, "dim": 2, "samples": 20, "batch": 64, "kl_warmup": 3, "dropout": 0.1, "seeds": (3,)}
    return configure(epochs=EPOCHS, patience=EPOCHS, device="cuda", **options)


def run(data: Data, config: Config, name: str = "iaf") -> tuple[VAE, History]:
    return train_one(data, name, 3, config, lambda _: None)


@pytest.mark.parametrize("name", ["diagonal", "full_covariance", "planar", "iaf"])
def test_the_captured_loop_learns_as_the_eager_loop_does(data: Data, config: Config, name: str) -> None:
    """Their noise need not be equal, so neither need the curves; of ten noises on a CPU the ends have an sd of 1 %."""
    vae, history = run(data, config, name)
    _, other = run(data, replace(config, eager=True), name)
    assert len(history.train) == len(other.train) == EPOCHS
    assert history.skipped_steps == other.skipped_steps == 0
    assert cast(float, history.train[-1]) < cast(float, history.train[0])
    assert history.valid[-1] == pytest.approx(other.valid[-1], rel=0.05)
    ends = [sum(cast("list[float]", each.train[-10:])) / 10 for each in (history, other)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)
    assert all(value.isfinite().all() for value in vae.state_dict().values())


def test_a_spoilt_image_costs_its_steps_and_no_more(
    data: Data, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = spoil(data, [7], monkeypatch)
    vae, history = run(spoilt, config)
    _, other = run(spoilt, replace(config, eager=True))
    assert history.skipped_steps == EPOCHS
    assert [skip | {"tensors": []} for skip in other.skips] == history.skips
    assert all(skip["tensors"] for skip in other.skips)
    assert all(value.isfinite().all() for value in vae.state_dict().values())


def test_ten_bad_steps_in_a_row_end_the_run(data: Data, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = spoil(data, list(range(IMAGES)), monkeypatch)
    with pytest.raises(TrainingError, match=rf"{BAD_STEPS} steps in a row \(epoch 3; not finite: --eager"):
        run(spoilt, config, "diagonal")


def test_a_stopped_run_goes_on(data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Adam's state and the generators' as they were; the kernels' sums may differ in their last digits."""
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    whole = Training(data, config, tmp_path / "whole").end()
    resumed = Training(data, config, tmp_path / "cut").stop(5).end()
    assert len(resumed["history"]["valid"]) == EPOCHS
    assert resumed["history"]["valid"] == pytest.approx(whole["history"]["valid"], rel=0.05)
