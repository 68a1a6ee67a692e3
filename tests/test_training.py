"""Captured steps, on a stand-in for CUDA's graphs: no step lost or doubled, nothing read, the plain step's numbers."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import pytest
import torch
from on_device import evidence_in_graphs
from small import RECIPES, small
from tape import OnMeta, Tape
from torch import Tensor, nn

from flowpost import training
from flowpost._graphs import CUDAGraphs
from flowpost.masked import device, engine
from flowpost.objectives import elbo
from flowpost.training import Captured, step_if_finite
from flowpost.vae import VAE, Bernoulli

Step = Callable[[Tensor, Tensor], Tensor]
recipes = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("diagonal", "iaf") else pytest.mark.full) for name in RECIPES]
)


@pytest.fixture(autouse=True)
def _tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on the CPU, and the GPU's engine with them."""
    monkeypatch.setitem(training._BACKENDS, "cpu", Tape)
    monkeypatch.setattr(engine, "engine_on", lambda z: device)


def tape(captured: Captured) -> Tape:
    return cast(Tape, captured._backend)


def adam(parameters: object, lr: float = 1e-2) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=torch.tensor(lr), fused=True, capturable=True)  # pyright: ignore[reportArgumentType]


def make(name: str) -> VAE:
    return VAE(nn.Linear(5, 4), small(name).float(), nn.Linear(3, 5), Bernoulli())


def whole_step(vae: VAE, optimizer: torch.optim.Optimizer, generator: torch.Generator | None = None) -> Step:
    """A user's: pixels, ELBO, gradients, clipping, Adam."""

    def step(x: Tensor, kl_weight: Tensor) -> Tensor:
        x = (torch.rand(x.shape, generator=generator, device=x.device) < x).to(x.dtype)
        optimizer.zero_grad()
        out = vae(x)
        loss = -elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl, kl_weight=kl_weight).mean()
        loss.backward()
        taken = step_if_finite(optimizer, loss, max_norm=1.0)
        return torch.where(taken, loss, torch.nan)

    return step


def batches(sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.rand(size, 5) for size in sizes]


def same(a: object, b: object) -> bool:
    return all(torch.equal(one, other) for one, other in zip(state(a), state(b), strict=True))


def state(of: object) -> list[Tensor]:
    """A model's tensors, or an optimizer's."""
    if isinstance(of, torch.optim.Optimizer):
        return [value for each in of.state.values() for value in each.values()]
    return list(cast(nn.Module, of).state_dict().values())


@recipes
def test_captured_steps_are_the_plain_steps_to_the_bit(name: str) -> None:
    """Of two shapes in turns, while KL weight, learning rate and the noise of two generators go on."""
    torch.manual_seed(1)
    plain, data = make(name), batches((7, 7, 4) * 6)
    found, results = [], []
    for wrap in (False, True):
        vae, generator = copy.deepcopy(plain), torch.Generator().manual_seed(3)
        optimizer = adam(vae.parameters())
        step = whole_step(vae, optimizer, generator)
        captured = Captured(step, "cpu", generators=[generator])
        torch.manual_seed(2)
        losses = []
        for i, x in enumerate(data):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + i))
            losses.append((captured if wrap else step)(x, torch.tensor(i / len(data))).detach())
        found.append((vae, optimizer, generator.get_state(), torch.get_rng_state()))
        results.append(torch.stack(losses))
        if wrap:
            assert (tape(captured).runs, tape(captured).captures, tape(captured).replays) == (6, 2, 12)
    (vae, optimizer, *noise), (other, its, *others) = found
    assert torch.equal(*results)
    assert results[0].isfinite().all()
    assert same(vae, other)
    assert same(optimizer, its)
    assert all(torch.equal(a, b) for a, b in zip(noise, others, strict=True))
    assert not same(plain, vae)


def test_on_a_device_without_graphs_the_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(training._BACKENDS, "cpu")
    calls = []
    captured = Captured(lambda x: (calls.append(x), x.sum())[1], "cpu")
    x = torch.ones(3, requires_grad=True)
    results = [captured(x) for _ in range(9)]
    assert len(calls) == 9
    assert captured._backend is None
    assert not any(tensor.requires_grad for tensor in [*calls, *results])
    with pytest.raises(TypeError, match=r"expected tensors, got 0\.5 at position 1"):
        captured(x, 0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("graphs", [True, False])
def test_inputs_are_copies_on_every_device(monkeypatch: pytest.MonkeyPatch, *, graphs: bool) -> None:
    """What a step does to its batch in place does not reach the data that the batch is a view of."""
    if not graphs:
        monkeypatch.delitem(training._BACKENDS, "cpu")
    data = torch.zeros(6, 3)
    captured = Captured(lambda x: x.add_(1).sum(), "cpu")
    assert [captured(data[:2]).item() for _ in range(9)] == [6.0] * 9
    assert not data.any()


def test_calls_in_inference_mode_and_outside_take_turns() -> None:
    captured, weight = Captured(lambda x: x * weight, "cpu"), torch.ones(3, requires_grad=True)
    for i in range(9):
        with torch.inference_mode(mode=i % 2 == 0):
            found = captured(torch.full((3,), float(i)))
        assert found.tolist() == [i] * 3
    assert tape(captured).captures == 1


def test_results_are_copies_in_every_structure() -> None:
    total = torch.zeros(())

    def add(x: Tensor) -> dict[str, object]:
        total.add_(x.sum())
        return {"total": total, "pair": (x, None), "list": [x.mean()]}

    captured = Captured(add, "cpu")
    found = [captured(torch.full((2,), float(i))) for i in range(7)]
    assert [cast(Tensor, each["total"]).item() for each in found] == [0, 2, 6, 12, 20, 30, 42]
    assert [cast(tuple, each["pair"])[0][0].item() for each in found] == list(range(7))
    assert [cast(list, each["list"])[0].item() for each in found] == list(range(7))
    assert Captured(lambda x: None, "cpu")(torch.ones(1)) is None


def test_shapes_beyond_those_that_have_a_graph_run_as_they_are() -> None:
    captured = Captured(lambda x: 2 * x, "cpu", warmup=2, shapes=1)
    for _ in range(5):
        for size in (2, 3):
            assert torch.equal(captured(torch.ones(size)), torch.full((size,), 2.0))
    assert captured(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert (tape(captured).captures, tape(captured).replays, tape(captured).runs) == (1, 3, 2 + 5 + 1)


READERS = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "mask": lambda x: x[x > 0].sum(),
    "optimizer": None,
}


@pytest.mark.parametrize("what", READERS)
def test_a_host_read_is_found_before_the_capture(what: str) -> None:
    """An optimizer that is not fused is asked on the host whether to step."""
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adam([weight])

    def unfused(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (weight * x).sum()
        loss.backward()
        return step_if_finite(optimizer, loss)

    captured = Captured(READERS[what] or unfused, "cpu")
    for _ in range(2):
        captured(torch.ones(2))  # the first calls may make constants
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)can be captured.*synchronizing.*fused=True") as caught:
            captured(torch.ones(2))
        assert "\n" not in str(caught.value)
    assert tape(captured).captures == 0


def test_a_host_read_of_an_encoder_of_integers_is_found_too() -> None:
    """And not taken for an encoder of other numbers."""

    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / int(x.max())

    vae = VAE(Reading(), small("diagonal", 2).float(), nn.Linear(3, 2), Bernoulli())
    captured = Captured(lambda x: vae(x).log_q, "cpu", warmup=2)
    captured(torch.ones(5, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"can be captured.*synchronizing"):
        captured(torch.ones(5, 2, dtype=torch.int64))


def test_other_errors_of_the_function_stay_as_they_are() -> None:
    def broken(x: Tensor) -> Tensor:
        return x @ torch.ones(7)

    with pytest.raises(RuntimeError, match="^size mismatch|^inconsistent"):
        Captured(broken, "cpu")(torch.ones(2))


def test_a_capture_that_fails_says_what_to_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might")

    monkeypatch.setattr(Tape, "capture", refuse)
    captured = Captured(torch.exp, "cpu", warmup=2)
    for _ in range(2):
        captured(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing; what is captured may"):
        captured(torch.ones(1))


class Stream:
    """A stand-in for CUDA's, which notes whom it waits for."""

    def __init__(self, *_: object) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


def test_work_that_fails_on_the_side_stream_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was launched before the error still reads and writes the weights with which a caller goes on."""
    outside = Stream()
    for name, stand_in in (("Stream", Stream), ("current_stream", lambda _: outside), ("stream", nullcontext)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs = CUDAGraphs(torch.device("cuda"), [])
    with pytest.raises(ZeroDivisionError):
        graphs.run(lambda: 1 / 0, strict=False)
    assert graphs.run(lambda: 1, strict=False) == 1
    assert outside.waited_for == [graphs.stream, graphs.stream]
    assert cast(Stream, graphs.stream).waited_for == [outside, outside]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="^warmup: expected at least 2"):
        Captured(torch.exp, "cpu", warmup=1)
    with pytest.raises(ValueError, match="^generators: expected ones of meta, got one of cpu"):
        Captured(torch.exp, "meta", generators=[torch.Generator()])


@pytest.mark.parametrize("spoilt", ["loss", "gradient", "infinite"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(spoilt: str, *, fused: bool) -> None:
    weights = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    optimizer = adam(weights) if fused else torch.optim.Adam(weights, lr=1e-2)

    def backward(factor: float) -> Tensor:
        optimizer.zero_grad()
        loss = cast(Tensor, sum(weight.square().sum() for weight in weights))
        (factor * weights[0].sum() + loss).backward() if spoilt != "loss" else loss.backward()
        return loss.detach() * (factor if spoilt == "loss" else 1)

    bad = math.inf if spoilt == "infinite" else math.nan
    assert step_if_finite(optimizer, backward(1.0), max_norm=0.1)
    before = copy.deepcopy((weights, optimizer.state_dict()["state"]))
    assert not step_if_finite(optimizer, backward(bad), max_norm=0.1)
    assert all(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
    for index, each in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][index][key]) for key, value in each.items())
    if not fused and spoilt != "loss":
        assert weights[0].grad is not None
        assert not weights[0].grad.isfinite().any()
        assert torch.equal(cast(Tensor, weights[1].grad), 2 * weights[1])  # as backward left it
    assert step_if_finite(optimizer, backward(1.0), max_norm=0.1)
    assert not any(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_of_one_number_may_have_axes(*, fused: bool) -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = adam([weight]) if fused else torch.optim.Adam([weight], lr=1e-2)
    for factor, taken in ((1.0, True), (math.nan, False), (1.0, True)):
        optimizer.zero_grad()
        loss = factor * weight.square().sum(0, keepdim=True)
        loss.backward()
        found = step_if_finite(optimizer, loss, max_norm=1.0)
        assert found.shape == ()
        assert bool(found) == taken
    assert optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_clipping_is_torch_s_to_the_bit(max_norm: float | None) -> None:
    weights = [torch.randn(5, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    others = copy.deepcopy(weights)
    for each, optimizer in ((weights, torch.optim.SGD(weights, lr=0.1)), (others, torch.optim.SGD(others, lr=0.1))):
        loss = cast(Tensor, sum(weight.square().sum() for weight in each))
        loss.backward()
        if each is weights:
            assert step_if_finite(optimizer, loss, max_norm=max_norm)
        else:
            nn.utils.clip_grad_norm_(others, math.inf if max_norm is None else max_norm)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    with pytest.raises(ValueError, match="^optimizer: expected parameters with gradients"):
        step_if_finite(torch.optim.SGD([torch.ones(1, requires_grad=True)]), torch.zeros(()))
    optimizer = torch.optim.SGD(weights)
    with pytest.raises(ValueError, match=r"^loss: expected a scalar, got shape \(5,\); write loss.mean\(\)"):
        step_if_finite(optimizer, torch.zeros(5))
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="^max_norm: expected a positive number or None, got "):
            step_if_finite(optimizer, torch.zeros(()), max_norm=wrong)


@recipes
def test_a_whole_step_stays_on_the_device(name: str) -> None:
    """On the meta device: no host read, and no tensor of another device."""
    vae = make(name).to("meta")
    optimizer = torch.optim.Adam(vae.parameters(), lr=1.0, fused=True, capturable=True)
    optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
    for parameter in vae.parameters():  # Adam would ask whether a kernel knows the device
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device="meta"), **moments}
    x, kl_weight = torch.empty(7, 5, device="meta"), torch.empty((), device="meta")
    step = whole_step(vae, optimizer)
    out = vae(x)  # the first call may bring constants there
    (out.log_likelihood + out.log_q).sum().backward()
    with OnMeta():
        assert step(x, kl_weight).is_meta


def test_an_annealed_estimate_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence_in_graphs(Tape, monkeypatch, "cpu")
