"""The autoregressive step by hand under a compiler: the same numbers, one graph, and operators that keep their word."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from registry import Case, push
from torch import Tensor, nn
from versions import untraceable

from flowpost import Affine, Autoregressive, Bijector, DeepSigmoid, Inverse, Masked, Shared, Shift, Spline
from flowpost.masked import recorded, staircase
from flowpost.masked.host import sweep, transposed
from flowpost.masked.network import MADE
from flowpost.masked.run import Column
from flowpost.masked.staircase import Staircase

STEPS: dict[str, dict[str, Any]] = {
    "plain": {"hidden": (20, 17)},
    "no hidden layer, order": {"hidden": (), "order": [2, 0, 1, 5, 3, 4]},
    "blocks, reversed": {"hidden": (300, 260), "order": range(5, -1, -1), "activation": F.relu},
    "three blocks": {"hidden": (400, 400), "activation": F.relu},
    "no context": {"hidden": (20,), "context_size": 0, "activation": torch.tanh},
}
SWEEPS = {torch.ops.flowpost.solve.default, torch.ops.flowpost.pull.default}


def make(name: str = "plain") -> tuple[Autoregressive, Tensor, Tensor | None]:
    step = Autoregressive(6, **{"context_size": 3, **STEPS[name]}).double()
    push(step, Case(seed=1, push=0.2))
    z = torch.randn(2, 5, 6, dtype=torch.float64)
    return step, z, torch.randn(5, 3, dtype=torch.float64) if step.context_size else None


def inverse_known(step: Autoregressive, known: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return step.inverse(step(known, context)[0].detach() + 0 * known, context, preimage=known.detach())


DIRECTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward": Bijector.__call__,
    "inverse": Bijector.inverse,
    "known": inverse_known,
}


def results(step: nn.Module, function: Callable, z: Tensor | None, context: Tensor | None) -> list[Tensor]:
    """Value, log-det, and the gradients at whatever wants one."""
    z, context = (None if each is None else each.detach().clone().requires_grad_() for each in (z, context))
    image, log_det = function(z, context)
    wanted = [each for each in (z, context, *step.parameters()) if each is not None and each.requires_grad]
    loss = image.sin().sum() + log_det.square().sum()
    return [image, log_det, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


def assert_compiled_agrees(step: nn.Module, function: Callable, *inputs: Tensor | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        results(step, compiled, *inputs), results(step, function, *inputs), rtol=1e-10, atol=1e-10
    )


@pytest.mark.compile
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiled_equals_eager(name: str, direction: str) -> None:
    step, z, context = make(name)
    assert_compiled_agrees(step, partial(DIRECTIONS[direction], step), z, context)


@pytest.mark.full
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_of_frozen_parameters_too(direction: str) -> None:
    step, z, context = make()
    for parameter in list(step.parameters())[::2]:
        parameter.requires_grad = False
    assert_compiled_agrees(step, partial(DIRECTIONS[direction], step), z, context)


RUNS: dict[str, Callable[[], Shared]] = {
    "gates": lambda: Shared(*(Autoregressive(3, 3, (5,), order=order) for order in (None, [2, 1, 0]))),
    "splines": lambda: Shared(*(Masked(Spline(3, bins=3), 3, (5,)) for _ in range(2))),
    "inverses": lambda: Shared(*(Inverse(Masked(Inverse(Affine(3)), 3, (5,), rate=0.5)) for _ in range(2))),
}


@untraceable
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.compile) for name in RUNS])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("tie", ["step", "weight", "context"])
def test_what_a_run_takes_twice_compiles(name: str, direction: str, tie: str) -> None:
    """A step that comes twice, a weight of two steps, a z that is the context: of a node, a compiler takes none."""
    run = RUNS[name]().double()
    push(run, Case(seed=1, push=0.2))
    first, second = (cast(Bijector, step) for step in run.steps)
    if tie == "step":
        run = Shared(first, second, first)
    nets = [part for part in run.modules() if isinstance(part, MADE)]
    if tie == "weight":
        nets[1].stack[0].weight = nets[0].stack[0].weight
    z, context = torch.randn(2, 5, 3, dtype=torch.float64)
    directed = DIRECTIONS[direction]
    if tie == "context":
        assert_compiled_agrees(run, lambda z, _: directed(run, z, z), z, None)
    else:
        assert_compiled_agrees(run, partial(directed, run), z, context)


ELEMENTS: dict[str, Callable[[], Bijector]] = {
    "affine": lambda: Affine(3),
    "shift": lambda: Shift(3),
    "spline": lambda: Spline(3, bins=3),
    "inverse": lambda: Inverse(Spline(3, bins=3)),
    "deep sigmoid": lambda: DeepSigmoid(3, units=2),
}


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("inverse", [False, True])
def test_a_pass_that_was_compiled_alone_has_its_gradients(name: str, *, inverse: bool) -> None:
    """It recorded nothing, and the way back is not compiled, as where a compiler's graph ends within the pass."""
    step = ELEMENTS[name]()
    z, grad = torch.randn(2, 5, 3, dtype=torch.float64)
    numbers, of_log_det = torch.randn(5, step.context_size, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    found = []
    for recording in (True, False):
        if inverse:
            kept = recorded.run_inverse(step, z, step(z, numbers)[0], numbers, recording=recording)[2]
            found.append([*sum(recorded.pull_inverse(step, kept, of_log_det), ())])
        else:
            kept = recorded.run(step, z, numbers, recording=recording)[2]
            found.append([*recorded.pull(step, kept, grad, of_log_det)])
    torch.testing.assert_close(*found)
    assert any((each != 0).any() for each in found[0])


@pytest.mark.compile
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_autocast_compiles_to_what_it_runs(direction: str) -> None:
    """The network in half precision, so the agreement is of two runs of the same plain operations."""
    step, z, context = make()
    step.float()

    def cast(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return DIRECTIONS[direction](step, z, context)

    assert context is not None
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(cast, fullgraph=True, backend="aot_eager")(z.float(), context.float())
        torch.testing.assert_close(found, cast(z.float(), context.float()))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(torch.func.vmap, marks=pytest.mark.compile, id="vmap"),
        pytest.param(torch.func.jacrev, marks=pytest.mark.compile, id="jacrev"),
    ],
)
def test_transforms_compile(direction: str, transform: Callable) -> None:
    step, z, context = make()
    assert context is not None
    function = transform(lambda z: DIRECTIONS[direction](step, z, context[0])[0])
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z[0]), function(z[0]), rtol=1e-10, atol=1e-10)


def targets(graphs: list[torch.fx.GraphModule]) -> list[object]:
    return [node.target for graph in graphs for node in graph.graph.nodes]


@pytest.mark.full
def test_a_compiler_sees_each_sweep_as_one_operator() -> None:
    """Its graphs hold both, and grow no longer with dim."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.extend(part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        return graph.forward

    lengths = []
    for dim in (3, 9):
        graphs.clear()
        step = Autoregressive(dim, 2, (12,))
        torch.compiler.reset()
        compiled = torch.compile(step.inverse, fullgraph=True, backend=keep)
        results(step, compiled, torch.randn(4, dim), torch.randn(4, 2))
        lengths.append(len(targets(graphs)))
        assert SWEEPS <= set(targets(graphs))
    assert lengths[0] == lengths[1]


@untraceable
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_an_export_runs_where_flowpost_is_not(direction: str) -> None:
    step, z, context = make()

    class Directed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = step

        def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return DIRECTIONS[direction](self.step, z, context)

    assert context is not None
    program = torch.export.export(Directed(), (z, context))
    assert not SWEEPS & set(targets([program.graph_module]))
    torch.testing.assert_close(program.module()(z, context), Directed()(z, context), rtol=1e-10, atol=1e-10)


@untraceable
def test_a_second_backward_says_that_it_is_not_compiled() -> None:
    """The eager step has one; a compiled one names what it lacks instead of returning a wrong number."""
    step, z, context = make()
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z = z.requires_grad_()
    (grad,) = torch.autograd.grad(compiled(z, context)[0].sin().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), z)


def sweep_inputs(widths: list[int]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Of 4 variables: weights, start and biases, and how many units of a layer have each degree."""
    weights = [
        torch.randn(out, size, dtype=torch.float64) for size, out in zip([4, *widths], [*widths, 8], strict=True)
    ]
    biases = [torch.randn(len(weight), dtype=torch.float64) for weight in weights]
    return weights, biases, [width // 4 for width in widths for _ in range(4)]


@pytest.mark.parametrize("widths", [[], [8], [8, 12]], ids=str)
def test_operators_keep_their_word(widths: list[int]) -> None:
    """What they declare: nothing written, nothing aliased, the shapes and strides that they say."""
    weights, biases, sizes = sweep_inputs(widths)
    images, start = torch.randn(4, 5, dtype=torch.float64), torch.randn(len(biases[0]), 5, dtype=torch.float64)
    inputs = (images, start, weights, biases[1:], sizes, "relu", "gate", [2.0, 1.0])
    torch.library.opcheck(torch.ops.flowpost.solve.default, inputs)
    found = torch.ops.flowpost.solve(*inputs)
    torch.testing.assert_close(found, sweep.solve(images, start.clone(), *inputs[2:6], Column("gate", (2.0, 1.0))))
    slopes = [torch.rand(width, 5, dtype=torch.float64) for width in widths]
    fixed, moved = torch.randn(2, 4, 2, 5, dtype=torch.float64)
    pulled = (images, fixed, moved, weights, slopes, sizes)
    torch.library.opcheck(torch.ops.flowpost.pull.default, pulled)
    torch.testing.assert_close(torch.ops.flowpost.pull(*pulled), transposed.pull(*pulled))


def test_products_of_many_blocks_are_operators_under_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their schemas and fakes hold, and each gives what autodiff gives for ``x (W mask)^T``."""
    monkeypatch.setattr(staircase, "_GRAIN", 2**14)
    layout = Staircase(range(300), [i // 2 for i in range(600)])
    weight = torch.randn(600, 300, dtype=torch.float64)
    masks, runs, mask = layout.edges(weight), staircase._runs(layout.blocks), layout.mask.on(weight)
    assert len(masks) > 2
    x = torch.randn(3, 300, dtype=torch.float64)
    y = torch.randn(3, 600, dtype=torch.float64)
    pulled: Any = torch.func.vjp(lambda x, weight: x @ (weight * mask).T, x, weight)
    product, vjp = pulled
    ops = torch.ops.flowpost
    for operator, inputs in (
        (ops.add_product.default, (y.clone(), x, weight, masks, runs)),
        (ops.input_gradient.default, (y, weight, masks, runs)),
        (ops.weight_gradient.default, (y, x, masks, runs)),
    ):
        torch.library.opcheck(operator, inputs)
    total = y.clone()
    ops.add_product(total, x, weight, masks, runs)
    found = [total - y, ops.input_gradient(y, weight, masks, runs), ops.weight_gradient(y, x, masks, runs)]
    torch.testing.assert_close(found, [product, *vjp(y)], rtol=1e-12, atol=1e-12)
