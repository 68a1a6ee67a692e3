"""What is not saved is rebuilt, whatever became of a module's memory, and what is an index survives arithmetic.

Under ``torch.use_deterministic_algorithms`` uninitialized memory is nan, or the largest int: nothing is right by luck.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import pytest
import torch
from registry import ENTRIES, Case, Entry, by_level, carry, draw, push
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flowpost
from flowpost import Autoregressive, Bijector, Chain, Coupling, FlowPosterior, Inverse, LULinear, Permute, Planar
from flowpost.recipes import RECIPES

M = TypeVar("M", bound=nn.Module)
recipes = pytest.mark.parametrize("name", RECIPES)
entries = by_level(ENTRIES, pytest.mark.full)
CASE = Case(dim=4, seed=5, push=0.3)


@pytest.fixture
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


poison = pytest.mark.usefixtures("_poison")


def of_posterior(posterior: FlowPosterior) -> list[Tensor]:
    """Numbers of both directions, and where a fresh one would start."""
    generator = torch.Generator().manual_seed(1)
    sizes = (FEATURES, posterior.dim)
    h, z = (torch.randn(3, size, dtype=torch.float64, generator=generator) for size in sizes)
    sample = posterior(h, noise=z)
    return [sample.z, sample.log_prob, posterior.log_prob(z, h), posterior.path_log_prob(sample, h)]


def of_step(step: Bijector, z: Tensor, context: Tensor | None) -> list[Tensor]:
    return [*step(z, context), *step.inverse(carry(step, z), context)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(tensor.isfinite().all() for tensor in expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def emptied(module: nn.Module, source: nn.Module) -> None:
    module.to_empty(device="cpu").load_state_dict(source.state_dict())


def emptied_then_assigned(module: nn.Module, source: nn.Module) -> None:
    module.to_empty(device="cpu").load_state_dict(source.state_dict(), assign=True)


def assigned(module: nn.Module, source: nn.Module) -> None:
    module.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)


def emptied_twice(module: nn.Module, source: nn.Module) -> None:
    emptied(module.to_empty(device="cpu"), source)


def emptied_one_by_one(module: nn.Module, source: nn.Module) -> None:
    """As a framework does that has memory for one module at a time."""
    for part in module.modules():
        part.to_empty(device="cpu", recurse=False)
    module.load_state_dict(source.state_dict())


LOADS = [emptied, emptied_then_assigned, assigned, emptied_twice, emptied_one_by_one]


def _loads() -> list:
    """Two ways of every recipe in the full run, and all of those that hold all that is not saved."""
    early = {"full_covariance", "cc_lin_iaf", "householder", "iaf", "maf", "realnvp", "spline_coupling"}
    marks = {True: pytest.mark.full, False: pytest.mark.long}
    pairs = [(name, load) for load in LOADS for name in RECIPES]
    return [
        pytest.param(
            name, load, marks=marks[name in early or load in (emptied, assigned)], id=f"{load.__name__}-{name}"
        )
        for name, load in pairs
    ]


@poison
@pytest.mark.parametrize(("name", "load"), _loads())
def test_a_recipe_built_on_meta(name: str, load: Callable[[nn.Module, nn.Module], None]) -> None:
    source = small(name, push=0.3)
    posterior = on_meta(lambda: small(name, seed=1))
    load(posterior, source)
    assert isinstance(posterior, FlowPosterior)
    assert_same(of_posterior(posterior), of_posterior(source))
    assert_starts(posterior.flow, small(name).flow, small(name, seed=1).flow)


def assert_starts(step: Bijector, one: Bijector, other: Bijector) -> None:
    """Drawn afresh where a start is random, which two seeds tell, and as always elsewhere."""
    found, start = step.initial_context(), one.initial_context().double()
    random = start != other.initial_context().double()
    assert found.device == start.device
    assert found.isfinite().all()
    assert (found[random] != 0).all()
    assert (found[random].abs() < 20).all()
    torch.testing.assert_close(found[~random].double(), start[~random], rtol=0, atol=1e-6)
    torch.testing.assert_close(step.head_scale().double(), one.head_scale().double(), rtol=0, atol=1e-6)


def points(entry: Entry) -> tuple[Bijector, Tensor, Tensor | None]:
    return draw(entry, CASE, batch=(2,))


@poison
@entries
@pytest.mark.parametrize("load", [emptied, assigned])
def test_an_entry_built_on_meta(entry: Entry, load: Callable[[nn.Module, nn.Module], None]) -> None:
    source, z, context = points(entry)
    step = on_meta(lambda: entry.make(CASE.dim, CASE.seed + 1).double())
    if load is assigned and not list(step.parameters()):
        pytest.skip("its state has no parameter that would say where the step is now")
    load(step, source)
    assert isinstance(step, Bijector)
    assert_same(of_step(step, z, context), of_step(source, z, context))
    assert_starts(step, *(entry.make(CASE.dim, seed) for seed in (1, 2)))


@poison
@entries
def test_an_entry_that_was_emptied(entry: Entry) -> None:
    """In use, and then its memory taken, as an offloader does."""
    source, z, context = points(entry)
    expected = of_step(source, z, context)
    step = entry.make(CASE.dim, CASE.seed + 1).double()
    emptied(step, source)
    assert_same(of_step(step, z, context), expected)
    moved = copy.deepcopy(source).to("meta")
    emptied(moved, source)
    assert_same(of_step(copy.deepcopy(moved), z, context), expected)


@poison
@recipes
def test_a_start_outlives_being_emptied(name: str) -> None:
    """It is drawn when a module is built, also on a device without memory: the same seed, the same start."""

    def start(seed: int) -> Tensor:
        posterior = on_meta(lambda: small(name, seed=seed))
        assert isinstance(posterior, FlowPosterior)
        return posterior.to_empty(device="cpu").flow.initial_context()

    assert torch.equal(start(1), small(name, seed=1).flow.initial_context())
    random = small(name).flow.initial_context() != small(name, seed=1).flow.initial_context()
    assert (start(1) != start(2))[random].all()


@poison
@recipes
def test_a_file_loads_into_an_emptied_posterior(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    source = small(name)
    flowpost.save(source, tmp_path / "posterior")
    posterior = on_meta(lambda: small(name, seed=1))
    assert isinstance(posterior, FlowPosterior)
    flowpost.load(tmp_path / "posterior", into=posterior.to_empty(device="cpu"))
    assert_same(of_posterior(posterior), of_posterior(source))
    assert_same(of_posterior(flowpost.load(tmp_path / "posterior")), of_posterior(source))
    with torch.device("meta"):
        loaded = flowpost.load(tmp_path / "posterior", device="cpu")
    assert_same(of_posterior(loaded), of_posterior(source))


@poison
def test_a_posterior_inside_somebody_s_model() -> None:
    """Whoever empties and loads the whole knows nothing of its parts."""

    def model() -> nn.Module:
        return nn.ModuleDict({"encoder": nn.Linear(2, FEATURES), "q": small("iaf"), "p": small("maf")})

    source, other = model(), on_meta(model)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.to_empty(device="cpu").load_state_dict(source.state_dict())
    for key in ("q", "p"):
        found, expected = (part[key] for part in (other, source))  # pyright: ignore[reportIndexIssue]
        assert_same(of_posterior(found), of_posterior(expected))


@poison
def test_a_rebuilt_posterior_trains_and_saves() -> None:
    source = small("affine_iaf")
    posterior = on_meta(lambda: small("affine_iaf", seed=1))
    assigned(posterior, source)
    assert isinstance(posterior, FlowPosterior)
    h, z = torch.randn(3, FEATURES, dtype=torch.float64), torch.randn(3, DIM, dtype=torch.float64)
    for each in (posterior, source):
        each(h, noise=z).log_prob.sum().backward()
    pairs = zip(posterior.named_parameters(), source.parameters(), strict=True)
    assert all(torch.equal(found.grad, parameter.grad) for (_, found), parameter in pairs)  # pyright: ignore
    assert posterior.state_dict().keys() == source.state_dict().keys()


AVERAGES = {"swa": None, "ema": get_ema_multi_avg_fn(0.9), "slow ema": get_ema_multi_avg_fn(0.999)}


def averaging(module: nn.Module, kind: str) -> AveragedModel:
    return AveragedModel(beside(module), multi_avg_fn=AVERAGES[kind], use_buffers=True)


def beside(module: nn.Module) -> nn.Module:
    """With another module, for torch averages none without parameters."""
    return nn.ModuleDict({"module": module, "other": nn.Linear(1, 1).double()})


def averaged(module: M, kind: str) -> M:
    """After some updates with one and the same module."""
    found = averaging(module, kind)
    for _ in range(4):
        found.update_parameters(beside(module))
    return cast(M, found.module["module"])  # pyright: ignore[reportIndexIssue]


averages = pytest.mark.parametrize("kind", AVERAGES)


@pytest.mark.full
@recipes
@averages
def test_an_average_of_equal_posteriors_is_that_posterior(name: str, kind: str) -> None:
    source = small(name, dim=4)
    found = averaged(source, kind)
    torch.testing.assert_close(of_posterior(found), of_posterior(source), rtol=1e-10, atol=1e-10)
    other = small(name, dim=4, seed=1)
    other.load_state_dict(found.state_dict())
    torch.testing.assert_close(of_posterior(other), of_posterior(source), rtol=1e-10, atol=1e-10)


@entries
def test_an_average_of_equal_entries_is_that_entry(entry: Entry) -> None:
    source, z, context = points(entry)
    expected = of_step(source, z, context)
    for kind in AVERAGES:
        found = averaged(source, kind)
        torch.testing.assert_close(of_step(found, z, context), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.causal_order(), source.causal_order())
        other = push(entry.make(CASE.dim, CASE.seed).double(), Case(seed=9))
        other.load_state_dict(found.state_dict())
        torch.testing.assert_close(of_step(other, z, context), expected, rtol=1e-10, atol=1e-10)


def ordered() -> Bijector:
    """An order that truncation spoils in every kind of step that has one."""
    order = [3, 2, 0, 1]
    return Chain(
        Permute(order),
        LULinear(4, order),
        Autoregressive(4, 0, (8,), order=order),
        Coupling(4, Planar(2), 0, (8,), order=order),
        Inverse(flowpost.Masked(flowpost.Affine(4), 0, (8,), order=order)),
    )


@averages
def test_an_average_of_a_training_is_the_mean_of_its_weights(kind: str) -> None:
    source, mean = push(ordered().double(), Case(push=0.1)), ordered().double()
    means = averaging(source, kind)
    found = means.module["module"]  # pyright: ignore[reportIndexIssue]
    for index in range(6):
        push(source, Case(seed=index, push=0.03))
        means.update_parameters(beside(source))
    for parameter, value in zip(mean.parameters(), found.parameters(), strict=True):
        parameter.data.copy_(value)
    z = torch.randn(5, 4, dtype=torch.float64)
    context = torch.randn(5, mean.context_size, dtype=torch.float64)
    expected = of_step(mean, z, context)
    torch.testing.assert_close(of_step(found, z, context), expected, rtol=1e-10, atol=1e-10)
    loaded = push(ordered().double(), Case(seed=9))
    loaded.load_state_dict(found.state_dict())
    torch.testing.assert_close(of_step(loaded, z, context), expected, rtol=1e-10, atol=1e-10)


@entries
def test_a_cast_there_and_back_keeps_every_index(entry: Entry) -> None:
    """The weights lose digits; masks and orders do not."""
    source, z, context = points(entry)
    found = copy.deepcopy(source).bfloat16().double()
    expected = copy.deepcopy(source)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.bfloat16())
    torch.testing.assert_close(of_step(found, z, context), of_step(expected, z, context), rtol=1e-10, atol=1e-10)
