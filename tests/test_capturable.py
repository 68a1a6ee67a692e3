"""Steps of optimizers that are not fused, captured: what is spoilt is put back on the device, and nothing is read."""

import copy
import math
from importlib import import_module
from typing import cast

import pytest
import torch
from tape import Tape
from torch import Tensor

from benchmarks.optimizers import OPTIMIZERS, Optimization
from flowpost import training
from flowpost.training import Captured, step_if_finite

NAMES = [name for name, kind in OPTIMIZERS.items() if not kind.fused]
SPOILT = (0, 4, 7, 8)  # of the steps: the first one, one before the capture and two of the replays
STEPS = 10


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training._BACKENDS, "cpu", Tape)
    for name in NAMES:  # torch's own check of the device
        monkeypatch.setattr(
            import_module(f"torch.optim.{name}"), "_get_capturable_supported_devices", lambda **_: ["cpu"]
        )


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, generator=generator).double() * (math.nan if i in SPOILT else 1) for i in range(STEPS)]


def trained(name: str, xs: list[Tensor], graph: str) -> tuple[list[Tensor], list[bool], list[dict]]:
    """The weight after each step, whether it was taken, and the optimizer's state after each."""
    model = torch.nn.Linear(4, 1, dtype=torch.float64)  # in float32 the two ways round apart
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = Optimization(optimizer=name).build(model, 0.125, graph)  # which float32 has exactly

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().sum()
        loss.backward()
        return step_if_finite(optimizer, loss, max_norm=5.0)

    run = Captured(step, "cpu") if graph else step
    weights, taken, states = [], [], []
    for x in xs:
        taken.append(bool(run(x)))
        weights.append(torch.cat([part.detach().flatten() for part in model.parameters()]))
        states.append(copy.deepcopy(optimizer.state_dict()["state"]))
    if graph:
        assert cast(Tape, cast(Captured, run)._backend).captures == 1
    return weights, taken, states


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_is_the_plain_one_and_leaves_the_spoilt_ones_out(name: str) -> None:
    weights, taken, states = trained(name, inputs(), "cpu")
    plain, others, _ = trained(name, inputs(), "")
    assert taken == others == [i not in SPOILT for i in range(STEPS)]
    torch.testing.assert_close(weights, plain, rtol=1e-6, atol=1e-7)
    for i in SPOILT[1:]:
        assert torch.equal(weights[i], weights[i - 1])
        for index, state in states[i].items():
            assert all(torch.equal(value, states[i - 1][index][key]) for key, value in state.items())
    assert all((value == 0).all() for state in states[0].values() for value in state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_what_a_checkpoint_keeps(name: str) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = Optimization(optimizer=name, eps=1e-3).build(model, 0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.weight]) == set(OPTIMIZERS[name].state)
    assert optimizer.param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"capturable": True}) for name in ("NAdam", "Rprop", "ASGD", "RAdam")),
        ("SGD", {"momentum": 0.9, "fused": True}),
        ("SGD", {"momentum": 0.9, "fused": True, "dampening": 0.5}),
    ],
)
def test_a_spoilt_first_step_is_as_if_it_had_not_been(
    name: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of optimizers whose state starts as no zeros; and of fused SGD, whose skipped momentum is unset memory.

    Dampening leaves out the first step, and is not told by the state which one that was.
    """
    module = import_module(f"torch.optim.{name.lower()}")
    if name != "SGD":
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    trained = []
    for spoilt in (True, False):
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = getattr(torch.optim, name)([weight], lr=0.01, **options)
        for i in range(4):
            optimizer.zero_grad()
            loss = (weight - 3).square().sum() * (math.nan if i == 0 and spoilt else 1)
            loss.backward()
            if i or spoilt:
                scratch = torch.full((1000,), math.nan)
                del scratch  # what is made of unset memory next is likely to be made of this
                assert bool(step_if_finite(optimizer, loss)) == (i > 0)
        trained.append(weight.detach())
    torch.testing.assert_close(*trained)
