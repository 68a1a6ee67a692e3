"""One compilation for all batch sizes, and one exported program: no shape is a number of the graph."""

from collections.abc import Callable, Sequence

import pytest
import torch
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flowpost import Autoregressive, FlowPosterior
from flowpost.masked import staircase
from flowpost.recipes import RECIPES

SIZES = [2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 33, 64]
Pair = tuple[Tensor, Tensor]


def sample(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Pair:
    return posterior(h, noise=z)[:2]


def samples(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Pair:
    return posterior(h, sample_shape=(3,), noise=torch.stack([z, -z, z + 1]))[:2]


def log_prob(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Pair:
    return z, posterior.log_prob(z, h)


def log_probs(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Pair:
    return z, posterior.log_prob(torch.stack([z, -z, z + 1]), h)


def path(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Pair:
    drawn = posterior(h, noise=z)
    return drawn.z, posterior.path_log_prob(drawn, h)


QUICK = [("full_covariance", sample), ("iaf", sample), ("maf", sample), ("maf", log_prob), ("realnvp", log_prob)]
"""Each recipe and use is among the slow tests."""


def tiny(name: str) -> FlowPosterior:
    """One step, since a compiler's time grows with the operations."""
    return small(name, **({} if name == "full_covariance" else {"steps": 1, "hidden": (6,)}))


def inputs(size: int) -> Pair:
    h, z = (torch.randn(size, width, dtype=torch.float64) for width in (FEATURES, DIM))
    return h, z


def assert_compiles_twice(function: Callable[..., Pair], points: Callable[[int], Sequence[Tensor]]) -> None:
    """For the first size, and once more for all others."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for count, size in enumerate(SIZES, 1):
        batch = points(size)
        torch.testing.assert_close(compiled(*batch), function(*batch), rtol=1e-10, atol=1e-10)
        assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {count} sizes"


@pytest.mark.parametrize(
    ("name", "use"),
    [pytest.param(*each, marks=pytest.mark.full if each[0] == "iaf" else pytest.mark.compile) for each in QUICK],
)
def test_twelve_sizes_compile_twice(name: str, use: Callable[..., Pair]) -> None:
    posterior = tiny(name)
    assert_compiles_twice(lambda h, z: use(posterior, h, z), inputs)


def test_layers_of_many_blocks_compile_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "_GRAIN", 2**10)
    step = Autoregressive(6, 0, (96, 96)).double()
    assert len(step.net.stack[1].staircase.blocks) > 2
    assert_compiles_twice(step, lambda size: (torch.randn(size, 6, dtype=torch.float64),))


@pytest.mark.full
def test_features_that_samples_share_compile_with_every_size_a_symbol() -> None:
    """With as many examples as features: for the compiler their number is then a constant, and elsewhere a symbol."""
    posterior = small("diagonal")

    def shared(h: Tensor, z: Tensor) -> Pair:
        return posterior(h.expand(len(z), *h.shape), noise=z)[:2]

    torch.compiler.reset()
    compiled = torch.compile(shared, backend="eager", fullgraph=True, dynamic=True)
    h, noise = inputs(FEATURES)[0], torch.randn(6, FEATURES, DIM, dtype=torch.float64)
    torch.testing.assert_close(compiled(h, noise), shared(h, noise), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        pytest.param("iaf", sample, marks=pytest.mark.full),
        pytest.param("iaf", log_prob, marks=pytest.mark.compile),
        *(pytest.param(name, path, marks=pytest.mark.compile) for name in ("affine_iaf", "maf", "naf")),
    ],
)
def test_masked_posteriors_compile_with_every_number_a_symbol(name: str, use: Callable[..., Pair]) -> None:
    """Of constants too, which the passes of a node have in common."""
    posterior, parts = tiny(name), inputs(5)
    torch.compiler.reset()
    compiled = torch.compile(use, backend="eager", fullgraph=True, dynamic=True)
    found, expected = compiled(posterior, *parts), use(posterior, *parts)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = [each for each in posterior.parameters() if each.requires_grad]
    slopes = [torch.autograd.grad(z.sum() + log_q.sum(), weights) for z, log_q in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


EVERY = [
    *((name, use) for name in RECIPES for use in (sample, log_prob)),
    *((name, use) for name in ("iaf", "maf", "planar", "realnvp") for use in (samples, log_probs)),
    *((name, path) for name in RECIPES),
]


@pytest.mark.compile
@pytest.mark.parametrize(("name", "use"), EVERY)
def test_every_recipe_compiles_twice(name: str, use: Callable[..., Pair]) -> None:
    posterior = small(name)
    assert_compiles_twice(lambda h, z: use(posterior, h, z), inputs)


class Used(nn.Module):
    """What is exported is a forward."""

    def __init__(self, posterior: FlowPosterior, use: Callable[..., Pair]) -> None:
        super().__init__()
        self.posterior, self.use = posterior, use

    def forward(self, h: Tensor, z: Tensor) -> Pair:
        return self.use(self.posterior, h, z)


def assert_exports(module: nn.Module, points: Callable[[int], Sequence[Tensor]]) -> None:
    """With a batch of any size, and the same numbers at sizes that the export never saw."""
    example = tuple(points(4))
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(module, example, dynamic_shapes=tuple({0: batch} for _ in example))
    exported = program.module()
    for size in (2, 4, 7, 33):
        torch.testing.assert_close(exported(*points(size)), module(*points(size)), rtol=1e-10, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize(("name", "use"), QUICK)
def test_an_export_has_a_batch_of_any_size(name: str, use: Callable[..., Pair]) -> None:
    assert_exports(Used(tiny(name), use), fixed_inputs)


def fixed_inputs(size: int) -> Pair:
    torch.manual_seed(size)
    return inputs(size)


@pytest.mark.compile
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("use", [sample, log_prob])
def test_every_recipe_exports_with_a_batch_of_any_size(name: str, use: Callable[..., Pair]) -> None:
    assert_exports(Used(small(name), use), fixed_inputs)
