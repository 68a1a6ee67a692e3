"""The GPU's engine, run on the CPU and on the meta device: the host's numbers, few launches, and no host read."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from on_device import inputs, made, under_autocast
from registry import Case, Entry, draw, push
from test_engines import NETWORKS, SIZES, every_result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowpost import Affine, Autoregressive, Bijector, Inverse, Masked, Shared, Shift, Spline
from flowpost.masked import device, engine, host
from flowpost.masked.device import full, fused, loops
from flowpost.masked.network import MADE
from flowpost.masked.run import COLUMNS
from flowpost.numerics.scales import exp_scale
from flowpost.recipes import RECIPES

DIRECTIONS = ["forward", "inverse", "known"]
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tensors are."""
    monkeypatch.setattr(engine, "engine_on", lambda z: device)


def assert_same(
    step: Bijector, direction: str, z: Tensor, context: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the host's engine, and as the plain operations."""
    known = z
    if direction == "known":
        z = step(z, context)[0].detach()
    found = every_result(step, direction, z, context, known)
    for name, other in (("engine_on", lambda z: host), ("choose", lambda run, z: None)):
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, other)
            assert_close(found, every_result(step, direction, z, context, known))


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_host_and_plain(entry: Entry, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, z, context = draw(entry, Case(5, seed=1, push=1.0))
    assert_same(step, direction, z, context, monkeypatch)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}-{sizes[1]}")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_host_and_plain_at_many_shapes(sizes: tuple, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders, activations, contexts that samples share, and none; the sweeps without a host read."""
    dim, hidden, context_size, activation, order, batch, context_batch = sizes
    step = Autoregressive(dim, context_size, hidden, activation=activation, order=order, gain=1.1).double()
    push(step, Case(seed=2, push=0.05))
    z = torch.randn(*batch, dim, dtype=torch.float64)
    context = None if context_batch is None else torch.randn(*context_batch, context_size, dtype=torch.float64)
    if direction == "known" and context is not None:
        z = z.expand(*torch.broadcast_shapes(batch, context.shape[:-1]), dim)
    assert_same(step, direction, z, context, monkeypatch)


def tied() -> Bijector:
    step = Autoregressive(4, 2, (9, 8))
    return Shared(step, step)


RUNS: dict[str, Callable[[], Bijector]] = {
    "gates": lambda: Shared(*(Autoregressive(4, 2, (9, 8), order=order) for order in (None, [3, 1, 0, 2], None))),
    "widths": lambda: Shared(*(Autoregressive(4, 2, hidden, activation=F.relu) for hidden in ((9, 5, 8), (), (6,)))),
    "mixed": lambda: Shared(
        Masked(Affine(4, exp_scale), 2, (9,)), Masked(Spline(4, bins=3), 2, (8,)), Autoregressive(4, 2, (7,))
    ),
    "rates": lambda: Shared(
        Masked(Affine(4, exp_scale), 2, (9, 8), rate=0.3),
        Masked(Spline(4, bins=3), 2, (), rate=2.0),
        Autoregressive(4, 2, (7,)),
    ),
    "shifts": lambda: Shared(Masked(Shift(4), 2, (9,)), Masked(Shift(4), 2, (5,), order=[3, 2, 1, 0])),
    "inverses": lambda: Shared(*(Inverse(Masked(Inverse(Affine(4)), 2, (9, 8))) for _ in range(2))),
    "no context": lambda: Shared(*(Autoregressive(4, 0, (9, 8), activation=torch.tanh) for _ in range(2))),
    "tied": tied,
}
"""Several links that run as one."""


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [((5,), (5,)), ((3, 5), (5,)), ((5,), (3, 1)), ((), ()), ((0,), (0,))], ids=str)
def test_runs_equal_host_and_plain(name: str, direction: str, batch: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = RUNS[name]().double()
    push(flow, Case(seed=3, push=0.1))
    assert len(cast(Shared, flow)._runs(None)) == 1
    z = torch.randn(*torch.broadcast_shapes(*batch) if direction == "known" else batch[0], 4, dtype=torch.float64)
    context = torch.randn(*batch[1], 2, dtype=torch.float64) if flow.context_size else None
    assert_same(flow, direction, z, context, monkeypatch)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_runs_of_large_weights_equal_host_and_plain(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose way back masks one link's weights after the other's."""
    monkeypatch.setattr(full, "_SMALL", 0)
    test_runs_equal_host_and_plain(name, direction, ((3, 5), (5,)), monkeypatch)


@pytest.mark.parametrize("make", [RUNS["gates"], RUNS["shifts"], RUNS["no context"]])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_only_what_is_needed_is_computed(make: Callable[[], Bijector], direction: str) -> None:
    """Frozen parameters, a z or a context without gradient."""
    flow = make().double()
    push(flow, Case(seed=4))
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True) if flow.context_size else None
    leaves = {"z": z, **({} if context is None else {"context": context}), **dict(flow.named_parameters())}

    def loss() -> Tensor:
        image, log_det = flow(z, context) if direction == "forward" else flow.inverse(z, context)
        return image.sum() + log_det.square().sum()

    whole = torch.autograd.grad(loss(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(leaves, whole, strict=True):
        for key, leaf in leaves.items():
            leaf.requires_grad_(key == name)
            leaf.grad = None
        if loss().requires_grad:
            loss().backward()
            assert_close(leaves[name].grad, gradient)
    for leaf in leaves.values():
        leaf.requires_grad_()


def test_a_caller_s_gradient_is_left_as_it_was() -> None:
    """A shift hands its gradient on: what is added to it must not be written over it."""
    flow = RUNS["shifts"]().double()
    push(flow, Case(seed=5))
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for function in (flow.forward, flow.inverse):
        grad = torch.ones(3, 4, dtype=torch.float64)
        image, _ = function(z, torch.randn(3, 2, dtype=torch.float64))
        torch.autograd.grad(image, z, grad)
        assert (grad == 1).all()


def test_the_kernels_maps_are_closed_forms() -> None:
    assert set(fused.MAPS) < set(fused.SOLVED) <= set(COLUMNS)


@pytest.mark.parametrize(("dim", "width"), [(3, 8), (5, 3), (7, 7), (4, 320)])
def test_units_of_a_degree_stand_where_the_network_puts_them(dim: int, width: int) -> None:
    degrees = MADE(dim, 2, (width,)).units[0]
    for degree in range(dim):
        first, last = loops.ends(degree, width, dim)
        assert degrees[first:last] == [degree] * degrees.count(degree)


class Products(TorchDispatchMode):
    """Notes in which dtypes matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        if str(func).removeprefix("aten.").startswith(("mm.", "addmm.", "addmm_.")):
            self.dtypes |= {each.dtype for each in args if isinstance(each, Tensor)}
        return func(*args, **(kwargs or {}))


class DropsNan(TorchDispatchMode):
    """As a GPU computes a relu that is joined to a product: it gives 0 for nan."""

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        return found.nan_to_num(nan=0.0) if str(func).startswith("aten._addmm_activation.") else found


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_context_without_a_value_leaves_its_row_without_one(direction: str) -> None:
    flow = Autoregressive(4, 2, (9, 8, 7), activation=F.relu)
    z, context = torch.randn(3, 4), torch.randn(3, 2)
    context[1, 0] = torch.nan
    with DropsNan():
        image, log_det = getattr(flow, direction)(z, context)
    assert image.isnan().all(-1).tolist() == log_det.isnan().tolist() == [False, True, False]


PASSES = [name for name in RUNS if name != "inverses"]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("batch", [(5,), (3, 5)], ids=str)
def test_autocast_runs_a_pass_s_products_in_half_precision(name: str, batch: tuple[int, ...]) -> None:
    """Forward and back; the rest, and what comes out, in float32; near to what no autocast gives."""
    flow = RUNS[name]()
    push(flow, Case(seed=9, push=0.1))
    z, context = torch.randn(*batch, 4), torch.randn(5, 2) if flow.context_size else None
    exact = every_result(flow, "forward", z, context, None)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        found = every_result(flow, "forward", z, context, None)
    assert products.dtypes == {torch.bfloat16}
    assert {each.dtype for each in found} == {torch.float32}
    for each, expected in zip(found, exact, strict=True):
        assert (each - expected).abs().max() <= 0.1 * (1 + expected.abs().max())
    assert not torch.equal(found[0], exact[0])


@pytest.mark.parametrize("name", PASSES)
def test_under_autocast_an_inverse_is_exact(name: str) -> None:
    """A search is in full precision; a known preimage is that of the pass, whose numbers it has."""
    flow = RUNS[name]()
    push(flow, Case(seed=10, push=0.1))
    noise, context = torch.randn(5, 4), torch.randn(5, 2) if flow.context_size else None
    expected = every_result(flow, "inverse", noise, context, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = every_result(flow, "inverse", noise, context, None)
        image, log_det = flow(noise, context)
        preimage, back, *grads = every_result(flow, "known", image, context, noise)
    assert all(map(torch.equal, found, expected))
    torch.testing.assert_close((preimage, back), (noise, -log_det), rtol=1e-5, atol=1e-5)
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_recipe_under_autocast_is_near_float32(name: str, dtype: torch.dtype) -> None:
    """At the numbers that a GPU is given too."""
    under_autocast(made(name, "cpu"), dtype, "cpu")


def test_every_device_is_given_the_same_numbers() -> None:
    """By the generator of the CPU; on the meta device, where no number can be read."""
    after = []
    for where in ("cpu", "meta"):
        torch.manual_seed(0)
        inputs(where)
        after.append(torch.rand(5))
    assert torch.equal(*after)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["gates", "no context"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("half", [False, True], ids=["full", "autocast"])
def test_a_compiler_traces_both_ways(name: str, direction: str, half: bool) -> None:  # noqa: FBT001
    dtype = torch.float32 if half else torch.float64
    flow = RUNS[name]().to(dtype)
    push(flow, Case(seed=8, push=0.3))
    z = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    context = torch.randn(3, 2, dtype=dtype) if flow.context_size else None
    function = getattr(flow, direction)
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            image, log_det = call(z, context)
        loss = image.sum() + log_det.square().sum()
        results.append([image, log_det, *torch.autograd.grad(loss, [z, *flow.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-4 if half else 1e-10, atol=1e-4 if half else 1e-10)
