"""Posteriors without values: on the meta device and of fake tensors, as planners of memory and launches have them."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from on_device import inputs, path_slopes
from small import DIM, FEATURES, OPTIONS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowpost
from flowpost import FlowPosterior
from flowpost.recipes import RECIPES

recipes = pytest.mark.parametrize("name", RECIPES)
searched = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name == "naf" else []) for name in RECIPES]
)
"""With naf's search, whose thousands of operations take seconds, among the full tests."""


class Operations(TorchDispatchMode):
    """Counts what a device would run, and refuses what mixes devices or reads a number back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.strays: list[str] = []

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        self.count += not func.is_view  # pyright: ignore[reportFunctionMemberAccess]
        self.strays += [str(func) for tensor in tensors if not tensor.is_meta]
        return found


def sample(posterior: FlowPosterior, h: Tensor) -> Tensor:
    return posterior(h, sample_shape=(2,)).log_prob


def log_prob(posterior: FlowPosterior, h: Tensor) -> Tensor:
    return posterior.log_prob(h.new_zeros(2, 5, DIM), h)


def path_log_prob(posterior: FlowPosterior, h: Tensor) -> Tensor:
    return posterior.path_log_prob(posterior(h, sample_shape=(2,)), h)


def make(name: str) -> FlowPosterior:
    """With one step, where each searches an inverse that no value ends."""
    return RECIPES[name](FEATURES, DIM, **{**OPTIONS.get(name, {}), **({"steps": 1} if name == "naf" else {})})


LAUNCHES = {
    "diagonal": (32, 47),
    "full_covariance": (41, 59),
    "planar": (188, 379),
    "radial": (251, 411),
    "householder": (53, 116),
    "cc_lin_iaf": (44, 67),
    "orthogonal_sylvester": (372, 711),
    "householder_sylvester": (370, 789),
    "triangular_sylvester": (304, 722),
    "iaf": (121, 371),
    "affine_iaf": (111, 313),
    "maf": (251, 153),
    "nice": (62, 124),
    "realnvp": (142, 164),
    "spline_autoregressive": (347, 1085),
    "spline_coupling": (358, 438),
    "naf": (142, 1376),
}
"""Operations other than views of a sample and of a log q, each with its gradient, at the sizes here.

A recipe that is not here has no bound.
"""


BY_KERNELS = {"iaf": (85, 121), "affine_iaf": (85, 121), "maf": (94, 112)}
"""The same in float32, which has kernels: of the recipes that they were written for."""


def launched(
    posterior: FlowPosterior, use: Callable[[FlowPosterior, Tensor], Tensor], dtype: torch.dtype = torch.float64
) -> int:
    """How many operations a use and its gradient take, which leave the device nowhere."""
    h = torch.zeros(5, FEATURES, dtype=dtype, device="meta", requires_grad=True)
    use(posterior, h)  # the first call may bring constants there
    with Operations() as operations:
        found = use(posterior, h)
        found.sum().backward()
    assert (found.device.type, found.dtype, found.shape) == ("meta", dtype, (2, 5))
    assert operations.strays == []
    assert h.grad is not None
    return operations.count


@searched
def test_every_recipe_runs_on_meta_alone_and_launches_no_more_than_it_did(name: str) -> None:
    posterior = make(name).double().to("meta")
    counts = [launched(posterior, use) for use in (sample, log_prob)]
    print(f"{name}: {counts}")
    bounds = LAUNCHES.get(name, (math.inf, math.inf))
    # Another torch may take a few more.
    assert all(count <= 1.1 * most for count, most in zip(counts, bounds, strict=True)), counts
    assert posterior.flow.initial_context().is_meta
    assert posterior.flow.head_scale().is_meta


def test_the_bounds_are_those_of_recipes() -> None:
    assert LAUNCHES.keys() <= RECIPES.keys()


@pytest.mark.parametrize("name", BY_KERNELS)
def test_kernels_launch_less(name: str) -> None:
    posterior = make(name).to("meta")
    counts = [launched(posterior, use, torch.float32) for use in (sample, log_prob)]
    print(f"{name}: {counts}")
    assert all(count <= 1.1 * most for count, most in zip(counts, BY_KERNELS[name], strict=True)), counts


@pytest.mark.parametrize("name", ["planar", "iaf", "maf", "realnvp", "naf"])
def test_the_path_gradient_runs_on_meta_alone(name: str) -> None:
    launched(make(name).double().to("meta"), path_log_prob)


@pytest.mark.parametrize("name", ["planar", "iaf", "maf", "realnvp"])
def test_second_derivatives_of_the_path_run_on_meta_alone(name: str) -> None:
    posterior, (h, noise, _) = make(name).to("meta"), inputs("meta")
    path_slopes(posterior, h, noise)  # the first call may bring constants there
    with Operations() as operations:
        path_slopes(posterior, h, noise)
    assert operations.count
    assert operations.strays == []


@recipes
def test_every_recipe_built_on_meta_runs_there(name: str) -> None:
    with torch.device("meta"):
        posterior = make(name)
        h = torch.zeros(5, FEATURES, requires_grad=True)
        assert posterior(h).log_prob.is_meta
        if posterior.is_gaussian:
            assert all(each.is_meta for each in posterior.gaussian(h))


FAKE = [*((name, sample) for name in RECIPES), ("householder", log_prob), ("iaf", log_prob), ("maf", path_log_prob)]


@pytest.mark.full
@pytest.mark.parametrize(("name", "use"), FAKE)
def test_a_recipe_is_built_and_runs_of_fake_tensors(name: str, use: Callable[[FlowPosterior, Tensor], Tensor]) -> None:
    with FakeTensorMode():
        posterior = make(name)
        found = use(posterior, torch.randn(5, FEATURES, requires_grad=True))
        found.sum().backward()
        assert isinstance(found, FakeTensor)
        assert found.shape == (2, 5)
        assert isinstance(posterior.flow.initial_context(), FakeTensor)


@pytest.mark.parametrize("name", ["planar", "iaf", "maf", "realnvp"])
def test_a_model_becomes_fake(name: str) -> None:
    """As an exporter makes it: a real posterior's tensors, converted one by one."""
    posterior, mode = make(name).double(), FakeTensorMode(allow_non_fake_inputs=True)
    state: dict[str, Tensor] = {
        key: mode.from_tensor(tensor) for key, tensor in [*posterior.named_parameters(), *posterior.named_buffers()]
    }
    with mode:
        h = torch.randn(5, FEATURES, dtype=torch.float64)
        found = torch.func.functional_call(posterior, state, (h,), {"sample_shape": (2,)})
        assert isinstance(found.z, FakeTensor)
        assert found.log_prob.shape == (2, 5)


def test_autocast_is_asked_of_devices_that_have_it() -> None:
    """The meta device has none, and the CPU's is none of its business."""
    posterior = flowpost.iaf(FEATURES, DIM, hidden=(6,)).to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert posterior(torch.zeros(5, FEATURES, device="meta")).z.dtype == torch.float32
