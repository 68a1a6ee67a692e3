"""The numbers of every recipe as they were before the redesign, from the files that were saved then."""

from pathlib import Path

import pytest
import torch
from golden.make import DIM, OPTIONS, Halves, numbers, wrapped, wrapped_numbers
from safetensors.torch import load_file
from torch import nn

import flowpost
from flowpost.recipes.record import BEFORE, record_of
from flowpost.wrapped import WrappedPosterior

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name.split(".")[0] for path in GOLDEN.glob("*.numbers.safetensors"))


def test_there_is_one_of_every_recipe_of_then() -> None:
    assert len(NAMES) == 17


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_then_gives_the_numbers_of_then(name: str) -> None:
    """To the rounding of one machine's products against another's; values, log q, and all gradients."""
    found = numbers(flowpost.load(GOLDEN / f"{name}.posterior.safetensors"))
    wanted = load_file(GOLDEN / f"{name}.numbers.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-11, atol=1e-11, msg=lambda said, key=key: f"{key}: {said}"
        )


def test_a_file_or_state_of_then_is_for_gates_without_a_gain(tmp_path: Path) -> None:
    """A file's record and a state tell that they are older than the gain."""
    path = GOLDEN / "iaf.posterior.safetensors"
    old = flowpost.load(path)
    assert vars(old)["recipe"]["arguments"]["gain"] == 1
    options = {key: value for key, value in vars(old)["recipe"]["arguments"].items() if key != "gain"}
    with pytest.raises(ValueError, match=r"\(file != into\): gain 1.0 != 1.1353352832366128"):
        flowpost.load(path, into=flowpost.iaf(**options).double())
    for into in (flowpost.iaf(**options).double(), flowpost.iaf(**options, gain=1.0).double()):
        into.load_state_dict(load_file(path))
        for key, value in numbers(into).items():
            assert torch.equal(value, numbers(old)[key]), key
        flowpost.save(into, tmp_path / "again")
        again = flowpost.load(tmp_path / "again")
        assert vars(again)["recipe"]["arguments"]["gain"] == 1
        assert torch.equal(numbers(again)["log_q"], numbers(old)["log_q"])
    assert flowpost.load(path, into=into) is into


def test_a_state_without_the_network_changes_no_gain() -> None:
    posterior = flowpost.iaf(3, 2, steps=1, hidden=(4,))
    state = posterior.state_dict()
    posterior.load_state_dict({key: value for key, value in state.items() if "flow" not in key}, strict=False)
    assert all(torch.equal(value, state[key]) for key, value in posterior.state_dict().items())
    assert posterior.state_dict().keys() == state.keys()


def test_parameters_alone_change_no_gain() -> None:
    """An average of weights, or a copy of them, is no older state."""
    one, other = flowpost.iaf(3, 4, steps=2, hidden=(8,)), flowpost.iaf(3, 4, steps=2, hidden=(8,))
    other.load_state_dict(dict(one.named_parameters()), strict=False)
    h, noise = torch.randn(5, 3), torch.randn(5, 4)
    assert torch.equal(other(h, noise=noise).z, one(h, noise=noise).z)
    assert other.state_dict().keys() == one.state_dict().keys()


@pytest.mark.parametrize("one", [flowpost.iaf(3, 4, hidden=(8,)), flowpost.iaf(3, 4, hidden=(8,), gain=1.5)])
def test_a_state_in_two_parts_keeps_its_gain_wherever_it_is_cut(one: flowpost.FlowPosterior) -> None:
    """A part that ended before a gate's gain was taken for an older state: log q was off by 0.4 nats."""
    h, noise = torch.randn(5, 3), torch.randn(5, 4)
    state, expected = one.state_dict(), one(h, noise=noise).log_prob
    for cut in range(len(state) + 1):
        other = flowpost.iaf(3, 4, hidden=(8,))
        for part in (slice(cut), slice(cut, None)):
            other.load_state_dict(dict([*state.items()][part]), strict=False)
        assert torch.equal(other(h, noise=noise).log_prob, expected), cut
        assert other.state_dict().keys() == state.keys()


def test_a_state_of_another_gain_makes_the_gates_those_of_that_gain() -> None:
    one, other = flowpost.iaf(3, 4, steps=2, hidden=(8,), gain=1.5), flowpost.iaf(3, 4, steps=2, hidden=(8,))
    other.load_state_dict(one.state_dict())
    h, noise = torch.randn(5, 3), torch.randn(5, 4)
    assert torch.equal(other(h, noise=noise).z, one(h, noise=noise).z)
    assert record_of(other) == record_of(one)


def test_a_wrapped_iaf_of_then_gives_the_numbers_of_then() -> None:
    """Its file has no record, and is not taken for one of the gates of now."""
    with pytest.raises(ValueError, match=r"step.constant_gain': nothing != \(\) torch.float64"):
        flowpost.load(GOLDEN / "wrapped.safetensors", into=wrapped())
    wanted = load_file(GOLDEN / "wrapped_numbers.safetensors")
    into = wrapped(gain=1.0)
    for load in (lambda path: flowpost.load(path, into=into), lambda path: into.load_state_dict(load_file(path))):
        for parameter in into.parameters():
            nn.init.zeros_(parameter)
        load(GOLDEN / "wrapped.safetensors")
        found = wrapped_numbers(into)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["spline_autoregressive", "spline_coupling"])
def test_a_state_of_elu_networks_is_refused_by_those_of_relu(name: str) -> None:
    """Whose names and shapes are the same: it would be another map. Parameters alone are taken as they are."""
    recipe, sizes = getattr(flowpost, name), {"features": 3, "dim": 2, "steps": 2, "hidden": (4,)}
    older = recipe(**sizes, activation="elu", bound=3.0)
    wrapped_older, wrapped_newer = (
        flowpost.wrap(nn.Linear(3, 5), 2, example=torch.zeros(1, 3), flow=name, steps=2, hidden=(4,), activation=each)
        for each in ("elu", "relu")
    )
    for into, state in ((recipe(**sizes), older.state_dict()), (wrapped_newer, wrapped_older.state_dict())):
        with pytest.raises(RuntimeError, match=r"Missing key.*net.constant_relu"):
            into.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net.constant_relu"):
        older.load_state_dict(recipe(**sizes).state_dict())
    into, other = recipe(**sizes), recipe(**sizes)
    into.load_state_dict(dict(other.named_parameters()), strict=False)
    h, noise = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(into(h, noise=noise).z, other(h, noise=noise).z)


@pytest.mark.parametrize("name", ["affine_iaf", "maf", "realnvp", "naf", "spline_coupling", "spline_autoregressive"])
def test_a_state_that_lost_its_marks_is_told_by_its_orders(name: str) -> None:
    """With its marks a state of no rate is the map that it was; without, only parameters alone are taken as given."""
    older = flowpost.load(GOLDEN / f"{name}.posterior.safetensors")
    into = getattr(flowpost, name)(3, 3, **OPTIONS[name], rate=0.5).double()
    state = load_file(GOLDEN / f"{name}.posterior.safetensors")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"output_rate: the state is of another map, without .*rate=1.0"):
            into.load_state_dict(state, strict=strict)
    into.load_state_dict(dict(older.named_parameters()), strict=False)


AROUND = ["householder", "cc_lin_iaf", "full_covariance", "spline_coupling"]


def _then_and_now(name: str) -> tuple[flowpost.FlowPosterior, flowpost.FlowPosterior]:
    sizes = {"spline_coupling": {"steps": 2, "hidden": (4,)}, "full_covariance": {"rate": 0.5}}.get(name, {})
    recipe, older = getattr(flowpost, name), BEFORE[name]
    return recipe(3, 2, **{**sizes, **older}), recipe(3, 2, **sizes)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", AROUND)
def test_a_whole_state_of_another_map_is_refused_and_told_what_takes_it(name: str, strict: bool) -> None:  # noqa: FBT001
    """Also where names may differ: a whole state's marks tell it from parameters alone."""
    older, newer = _then_and_now(name)
    key = {"full_covariance": "rate=1.0", "spline_coupling": 'activation="elu"'}.get(name, "centred=False")
    held, other = nn.ModuleDict({"q": newer}), nn.ModuleDict({"q": older})
    for into, state in ((newer, older.state_dict()), (held, other.state_dict())):
        with pytest.raises(RuntimeError, match=rf"constant_\w+: the state is of another map, without .*{key}"):
            into.load_state_dict(state, strict=strict)
    for state in (newer.state_dict(), dict(newer.state_dict())):
        with pytest.raises(RuntimeError, match=r"constant_\w+: the state is of another map, with this constant"):
            older.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("name", AROUND)
def test_a_part_of_a_state_and_parameters_alone_are_no_other_map(name: str) -> None:
    older, newer = _then_and_now(name)
    newer.load_state_dict(dict(older.named_parameters()), strict=False)
    assert all(torch.equal(dict(newer.named_parameters())[key], value) for key, value in older.named_parameters())
    model, other = (nn.ModuleDict({"encoder": nn.Linear(3, 3), "q": each}) for each in (newer, older))
    state = other.state_dict()
    for key in [key for key in state if key.startswith("q.")]:
        del state[key]  # in place: the marks of torch stay
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(model["encoder"].weight, other["encoder"].weight)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrapped_iaf_of_then_is_refused_also_where_names_may_differ(strict: bool) -> None:  # noqa: FBT001
    with pytest.raises(RuntimeError, match=r"constant_gain: the state is of another map, without .*gain=1.0"):
        wrapped().load_state_dict(wrapped(gain=1.0).state_dict(), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrapped_householder_that_turned_noise_alone_is_refused(strict: bool) -> None:  # noqa: FBT001
    """It was the encoder's own Gaussian whatever its reflections were, which is not what they make of scaled noise."""

    def pair(flow: str) -> WrappedPosterior:
        return flowpost.wrap(Halves(), DIM, example=torch.zeros(1, 2 * DIM), flow=flow)

    into, other = pair("householder"), pair("householder")
    into.load_state_dict(other.state_dict())
    x, noise = torch.randn(5, 2 * DIM), torch.randn(5, DIM)
    assert torch.equal(into(x, noise=noise).z, other(x, noise=noise).z)
    state = other.state_dict()
    del state["posterior.head.constant_turned"]
    with pytest.raises(RuntimeError, match=r"constant_turned: the state is of another map, without .*diagonal"):
        into.load_state_dict(state, strict=strict)
    pair("diagonal").load_state_dict(state, strict=False)


def test_a_recipe_knows_three_activations() -> None:
    with pytest.raises(ValueError, match="activation: expected one of relu, elu, tanh, got 'selu'"):
        flowpost.spline_coupling(3, 2, activation="selu")


@pytest.mark.parametrize(("hidden", "rate"), [((64, 320), 0.1), ((320, 64), 0.5), ((16,), 1.0), ((), 1.0)])
@pytest.mark.parametrize("name", ["spline_autoregressive", "spline_coupling"])
def test_a_spline_s_networks_are_as_fast_at_every_width(name: str, hidden: tuple[int, ...], rate: float) -> None:
    posterior = getattr(flowpost, name)(3, 2, steps=2, hidden=hidden)
    nets = [step.net for step in posterior.flow.modules() if isinstance(step, (flowpost.Masked, flowpost.Coupling))]
    assert [(net.rate, net.activation) for net in nets] == [(rate, nn.functional.relu)] * 2
    given = getattr(flowpost, name)(3, 2, steps=2, hidden=hidden, rate=0.3, activation="tanh")
    nets = [step.net for step in given.flow.modules() if isinstance(step, (flowpost.Masked, flowpost.Coupling))]
    assert [(net.rate, net.activation) for net in nets] == [(0.3, torch.tanh)] * 2
