"""Files: what no tensor tells of a step, as a spline's bound, is compared before anything is loaded."""

import functools
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_files import bits, forge
from test_repr import PAIRS
from torch import Tensor, nn
from torch.distributions import transforms as T

import flowpost
from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Coupling,
    FlowPosterior,
    Gate,
    Inverse,
    Learned,
    Masked,
    Planar,
    Reverse,
    Scale,
    Shared,
    Sigmoid,
    Softplus,
    Spline,
    Tanh,
)
from flowpost.numerics.scales import exp_scale
from flowpost.vae import VAE, Bernoulli, ContinuousBernoulli, Gaussian

Make = Callable[[], nn.Module]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def pair_wrapped(bound: float = 5.0) -> nn.Module:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            loc, log_var = self.layer(x).chunk(2, -1)
            return loc, log_var

    return flowpost.wrap(Pair(), 2, example=torch.zeros(5, 3), flow="spline_coupling", hidden=(8,), bound=bound)


def refused(path: Path, saved: nn.Module, into: nn.Module, match: str) -> None:
    """A file is not loaded into a module that would be another map of it, and the module keeps every bit."""
    flowpost.save(saved, path)
    before, printed = bits(into), repr(into)
    with pytest.raises(ValueError, match=match):
        flowpost.load(path, into=into)
    assert (bits(into), repr(into)) == (before, printed)
    assert bits(flowpost.load(path, into=saved)) == bits(saved)


def test_an_option_of_a_wrapped_pair_is_not_lost(path: Path) -> None:
    said = r"^into: expected the steps of '.*', got others \(file != into\): posterior.flow.steps.0.steps.0.step: "
    said += r"bound 2.0 != 5.0; make it with bound=2.0\n  posterior.flow.steps.0.steps.1.step: bound"
    refused(path, pair_wrapped(bound=2.0), pair_wrapped(), said)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def own(x: Tensor) -> Tensor:
    return x.sin()


OTHERS: dict[str, tuple[Make, Make, str]] = {
    "bound": (lambda: Spline(2, bound=2.0), lambda: Spline(2), ": bound 2.0 != 3.0; make it with bound=2.0$"),
    "bins of one size": (lambda: Spline(2, bins=8), lambda: Spline(2, bins=9), "context_size|bins"),
    "scale": (lambda: Affine(2, exp_scale), lambda: Affine(2), "scale exp_scale != softplus_scale"),
    "factor": (lambda: Scale(2, 2.0), lambda: Scale(2, 3), "factor 2.0 != 3.0"),
    "a tiny difference": (lambda: Scale(2, 2.0), lambda: Scale(2, 2.00001), "factor 2.0 != 2.00001"),
    "forget bias": (
        lambda: Autoregressive(2, forget_bias=1),
        lambda: Autoregressive(2),
        "step: forget_bias 1.0 != 2",
    ),
    "activation": (lambda: Masked(Affine(2), activation=torch.tanh), lambda: Masked(Affine(2)), "net: activation tanh"),
    "a module": (lambda: Coupling(2, Affine(1), activation=nn.Tanh()), lambda: Coupling(2, Affine(1)), "Tanh != elu"),
    "an own module": (
        lambda: Coupling(2, Affine(1), activation=Sine()),
        lambda: Coupling(2, Affine(1)),
        "net: activation a function of your own != elu; make it with the same$",
    ),
    "an own function": (lambda: Masked(Affine(2), activation=own), lambda: Masked(Affine(2)), "own != elu"),
    "for an own function": (lambda: Masked(Affine(2)), lambda: Masked(Affine(2), activation=own), "elu != a function"),
    "a lambda": (lambda: Masked(Affine(2), activation=lambda x: x.sin()), lambda: Masked(Affine(2)), "own != elu"),
    "another step": (lambda: Chain(Affine(2), Tanh(2)), lambda: Chain(Affine(2), Sigmoid(2)), "Tanh != Sigmoid"),
    "a step less": (lambda: Chain(Affine(2), Tanh(2)), lambda: Chain(Affine(2)), "steps.1: Tanh != nothing"),
    "a step more": (lambda: Chain(Affine(2)), lambda: Chain(Affine(2), Tanh(2)), "steps.1: nothing != Tanh; leave it"),
    "the other way": (lambda: Chain(Inverse(Spline(2))), lambda: Chain(Spline(2)), "steps.0: Inverse != Spline"),
    "gates of one context": (
        lambda: Shared(Autoregressive(2, 3, (4,)), Autoregressive(2, 3, (4,))),
        lambda: Chain(Autoregressive(2, 3, (4,)), Autoregressive(2, 3, (4,))),
        r"into\): Shared != Chain; make it a Shared",
    ),
    "a likelihood's scale": (
        lambda: VAE(nn.Linear(3, 4), flowpost.diagonal(4, 2), nn.Linear(2, 3), Gaussian(0.1)),
        lambda: VAE(nn.Linear(3, 4), flowpost.diagonal(4, 2), nn.Linear(2, 3), Gaussian(1.0)),
        "likelihood: scale 0.1 != 1.0",
    ),
    "a likelihood": (
        lambda: VAE(nn.Linear(3, 4), flowpost.diagonal(4, 2), nn.Linear(2, 3), Bernoulli()),
        lambda: VAE(nn.Linear(3, 4), flowpost.diagonal(4, 2), nn.Linear(2, 3), ContinuousBernoulli()),
        "likelihood: Bernoulli != ContinuousBernoulli",
    ),
}


@pytest.mark.parametrize(("saved", "into", "match"), OTHERS.values(), ids=OTHERS)
def test_what_no_tensor_tells_is_compared(path: Path, saved: Make, into: Make, match: str) -> None:
    refused(path, saved(), into(), match)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_what_prints_otherwise_is_refused_or_becomes_the_file(
    path: Path, pair: tuple[Callable[[], Bijector], Callable[[], Bijector]]
) -> None:
    """An order, a gain and a rate are in the tensors: a load takes them over."""
    posteriors = [FlowPosterior(3, Chain(make())) for make in pair]
    for saved, into in (posteriors, posteriors[::-1]):
        flowpost.save(saved, path)
        try:
            flowpost.load(path, into=into)
        except ValueError:
            continue
        assert repr(into) == repr(saved)


def test_a_hand_built_posterior_is_compared(path: Path) -> None:
    def build(bound: float) -> FlowPosterior:
        return FlowPosterior(3, Chain(Masked(Spline(2, bound=bound), hidden=(4,)), Reverse(2), Affine(2)))

    refused(path, build(2.0), build(4.0), r"\(file != into\): flow.steps.0.step: bound 2.0 != 4.0; make it with")


def _mapped(transform: T.Transform) -> Chain:
    return Chain(Affine(3), Bijector.from_transform(transform, 3))


@pytest.mark.parametrize(
    "other",
    [
        T.SigmoidTransform(),
        T.ComposeTransform([T.AffineTransform(0.0, 2.0), T.TanhTransform()]),
        T.ComposeTransform([T.AffineTransform(0.0, torch.full((3,), 3.1, device="cpu")), T.TanhTransform()]),
        T.ComposeTransform([T.AffineTransform(0.0, 3.0).inv, T.TanhTransform()]),
    ],
)
def test_a_transform_s_constants_are_compared(path: Path, other: T.Transform) -> None:
    """They are in no state dict: the file loaded into another transform, and was another map."""
    given = T.ComposeTransform([T.AffineTransform(0.0, 3.0), T.TanhTransform()])
    flowpost.save(_mapped(given), path)
    flowpost.load(path, into=_mapped(T.ComposeTransform([T.AffineTransform(0.0, 3.0), T.TanhTransform(cache_size=1)])))
    with pytest.raises(ValueError, match=r"^into: expected the steps of .*: steps.1: transform 'ComposeTrans"):
        flowpost.load(path, into=_mapped(other))


def test_a_transform_s_numbers_that_another_machine_rounds_otherwise_are_the_same(path: Path) -> None:
    numbers = torch.randn(3, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    flowpost.save(_mapped(T.AffineTransform(numbers, 2.0)), path)
    flowpost.load(path, into=_mapped(T.AffineTransform(numbers * (1 + 1e-6), 2.0 * (1 + 1e-15))))
    with pytest.raises(ValueError, match="transform"):
        flowpost.load(path, into=_mapped(T.AffineTransform(numbers.flip(0), 2.0)))
    within = torch.distributions.ContinuousBernoulli(logits=numbers)  # whose probs are made when asked for
    flowpost.save(Bijector.from_transform(T.CumulativeDistributionTransform(within), 3), path)


def test_a_recipe_that_was_altered_is_compared(path: Path) -> None:
    saved, into = (flowpost.spline_coupling(3, 2, hidden=(8,)) for _ in range(2))
    spline = saved.get_submodule("flow.steps.0.steps.0.step")
    assert isinstance(spline, Spline)
    spline.bound = 2.0
    refused(path, saved, into, "flow.steps.0.steps.0.step: bound 2.0 != 5.0")
    refused(path, into, saved, "flow.steps.0.steps.0.step: bound 5.0 != 2.0")


# What is no difference


class Renamed(Spline):
    """A user's, of another name than when it was saved, and with things of its own on it."""

    def __init__(self, dim: int, name: str, *, verbose: bool, bound: float = 3.0) -> None:
        super().__init__(dim, bound=bound)
        self.name, self.verbose, self.calls = name, verbose, len(name)
        self.where = object()

    def extra_repr(self) -> str:
        return f"{self.where}"


class Named(Renamed):
    """The same by another name."""


class Twice(Bijector):
    """A user's, of nothing but the contract."""

    def __init__(self, dim: int, device: str = "cpu") -> None:
        super().__init__(dim)
        self.device = device

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return 2 * z, z.new_full((), self.dim * math.log(2))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z / 2, z.new_full((), -self.dim * math.log(2))


def _in_use() -> nn.Module:
    step = Chain(Spline(2), Affine(2)).double().eval()
    step.compile(backend="eager")
    step.register_forward_hook(lambda *_: None)
    vars(step.steps[0])["note"] = "of a user"
    return step


ALIKE: dict[str, tuple[Make, Make]] = {
    "a renamed subclass": (
        lambda: Chain(Renamed(2, "a", verbose=True)),
        lambda: Chain(Named(2, "later", verbose=False)),
    ),
    "no subclass any more": (lambda: Chain(Renamed(2, "a", verbose=True)), lambda: Chain(Spline(2))),
    "an own step": (lambda: Twice(2), lambda: Twice(2, "cuda:0")),
    "ints and floats": (lambda: Spline(2, bound=2), lambda: Spline(2, bound=2.0)),
    "numpy's": (lambda: Spline(2, bound=np.float64(2)), lambda: Spline(2, bound=2.0)),
    "rounding": (lambda: Scale(2, 0.1 + 0.2), lambda: Scale(2, 0.3)),
    "two names of a function": (
        lambda: Masked(Affine(2), activation=torch.tanh),
        lambda: Masked(Affine(2), activation=F.tanh),
    ),
    "a function's module": (
        lambda: Coupling(2, Affine(1), activation=nn.LeakyReLU()),
        lambda: Coupling(2, Affine(1), activation=F.leaky_relu),
    ),
    "two own functions": (
        lambda: Masked(Affine(2), activation=own),
        lambda: Masked(Affine(2), activation=functools.partial(torch.sin)),
    ),
    "a gain, which is a tensor": (lambda: Gate(2, gain=1.5), lambda: Gate(2, gain=1.2)),
    "a rate, which is a tensor": (lambda: Masked(Affine(2), rate=0.5), lambda: Masked(Affine(2), rate=0.3)),
    "an order, which is a tensor": (
        lambda: Autoregressive(3, order=[2, 1, 0]),
        lambda: Autoregressive(3, order=[0, 2, 1]),
    ),
    "in use": (_in_use, lambda: Chain(Spline(2), Affine(2)).double()),
    "one step twice": (lambda: Chain(*[Learned(Planar(2))] * 2), lambda: Chain(*[Learned(Planar(2))] * 2)),
    "parametrized": (lambda: _parametrized(), lambda: _parametrized()),
    "a plain container": (
        lambda: FlowPosterior(3, Chain(Affine(2), Tanh(2))),
        lambda: nn.ModuleDict({"head": nn.Linear(3, 4)}),
    ),
    "the parts of a whole": (
        lambda: FlowPosterior(3, Chain(Learned(Planar(2)), Softplus(2))),
        lambda: nn.ModuleDict({"flow": nn.ModuleDict({"steps": nn.ModuleList([Learned(Planar(2))])})}),
    ),
}


def _parametrized() -> nn.Module:
    step = Learned(Planar(2))
    nn.utils.parametrize.register_parametrization(step, "context", nn.Identity())
    return step


@pytest.mark.parametrize(("saved", "into"), ALIKE.values(), ids=ALIKE)
def test_what_makes_no_other_map_is_loaded(path: Path, saved: Make, into: Make) -> None:
    module, other = saved(), into()
    flowpost.save(module, path)
    assert bits(flowpost.load(path, into=other)) == bits(module)


@pytest.mark.parametrize(
    "edit",
    [
        lambda table, config: config.pop("settings"),  # of an older release
        lambda table, config: config["settings"]["flow.steps.0"].pop("bound"),  # of one that did not name it
        lambda table, config: config["settings"]["flow.steps.0"].update(sharpness=3, kinks=[1, {}]),  # of a later one
        lambda table, config: config["settings"]["flow.steps.0"].update(bound={"low": 1}),
        lambda table, config: config["settings"]["flow.steps.0"].update(kind=["Spline"]),
    ],
)
def test_files_of_other_releases_are_loaded(path: Path, edit: Callable[[dict, dict], object]) -> None:
    posterior, into = (FlowPosterior(3, Chain(Spline(2, bound=bound))) for bound in (2.0, 2.0))
    flowpost.save(posterior, path)
    forge(path, edit)
    assert bits(flowpost.load(path, into=into)) == bits(posterior)


@pytest.mark.parametrize("settings", [[], "flow", 3, None, {"flow": []}, {"flow": "Chain"}])
def test_settings_that_are_none_are_refused(path: Path, settings: object) -> None:
    posterior = flowpost.diagonal(3, 2)
    flowpost.save(posterior, path)
    forge(path, lambda table, config: config.update(settings=settings))
    with pytest.raises(flowpost.CorruptFileError, match="is cut, altered or not of flowpost.save"):
        flowpost.load(path, into=posterior)


def test_a_value_of_a_file_is_shown_in_short_and_harmless(path: Path) -> None:
    posterior = FlowPosterior(3, Chain(Spline(2)))
    flowpost.save(posterior, path)
    forge(path, lambda table, config: config["settings"]["flow.steps.0"].update(bound="\x1b[2J" * 10_000))
    with pytest.raises(ValueError, match="flow.steps.0: bound ") as info:
        flowpost.load(path, into=posterior)
    assert "\x1b" not in str(info.value)
    assert len(str(info.value)) < 500 + len(str(path))


def test_the_file_is_plain_text(path: Path) -> None:
    flowpost.save(FlowPosterior(3, Chain(Spline(2, bound=2), Scale(2, math.pi))), path)
    data = path.read_bytes()
    table = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert json.loads(table["__metadata__"]["flowpost"])["settings"] == {
        "": {"features": 3},
        "flow": {"kind": "Chain"},
        "flow.steps.0": {"kind": "Spline", "dim": 2, "bins": 8, "bound": 2.0},
        "flow.steps.1": {"kind": "Scale", "dim": 2, "factor": math.pi},
    }
    assert not re.search(rb"0x[0-9a-f]{6}", data[: 8 + struct.unpack("<Q", data[:8])[0]])


def test_more_steps_than_a_header_holds_are_saved_without(path: Path) -> None:
    flow = Chain(*[Scale(2, 1 + 1 / n) for n in range(1, 20_000)])
    flowpost.save(flow, path)
    assert path.stat().st_size < 10_000
    assert flowpost.load(path, into=flow) is flow
