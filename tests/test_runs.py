"""Masked steps in sequence run as one node of the autograd graph: where a run ends, and that the numbers stay."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from registry import Case, push
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    DeepSigmoid,
    Inverse,
    Masked,
    Reverse,
    Shared,
    Shift,
    Spline,
)
from flowpost.functional import exp_scale
from flowpost.masked import engine

F64 = torch.float64
DIM, CONTEXT = 4, 3


def gated(**options: object) -> Autoregressive:
    return Autoregressive(DIM, CONTEXT, (6, 5), **options)  # pyright: ignore[reportArgumentType]


def mixed() -> list[Bijector]:
    """Gates, affine maps of two scales, a step without a closed form, one without a log-det, two of one module."""
    tied = gated(order=[2, 0, 3, 1], gain=1.2)
    others = [Affine(DIM, exp_scale), Affine(DIM), Spline(DIM, bins=3), Shift(DIM), DeepSigmoid(DIM, units=2)]
    masked = [Masked(step, CONTEXT, (6,), order=range(DIM)[::-1]) for step in others]
    return [tied, *masked, tied, Masked(Inverse(Affine(DIM, exp_scale)), CONTEXT, ())]


def fed(steps: list[Bijector]) -> tuple[Shared, Tensor, Tensor]:
    """The steps in a chain, pushed, with points and contexts of fewer axes, all of which want a gradient."""
    flow = push(Shared(*steps).double(), Case(seed=3, push=0.1))
    assert isinstance(flow, Shared)
    generator = torch.Generator().manual_seed(5)
    z, context = (torch.randn(*shape, dtype=F64, generator=generator) for shape in ((2, 5, DIM), (5, CONTEXT)))
    return flow, z.requires_grad_(), context.requires_grad_()


def nodes(tensor: Tensor) -> Counter[str]:
    """How often each kind of node stands in a tensor's graph."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def results(flow: Bijector, direction: str, z: Tensor, context: Tensor) -> list[Tensor]:
    if direction == "forward":
        image, log_det = flow(z, context)
    else:
        preimage = z.detach() if direction == "known" else None
        z = flow(z.detach(), context)[0].detach().requires_grad_() if preimage is not None else z
        image, log_det = flow.inverse(z, context, preimage=preimage)
    loss = image.sin().sum() + log_det.square().sum()
    return [image, log_det, *torch.autograd.grad(loss, [z, context, *flow.parameters()], materialize_grads=True)]


@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
def test_a_run_of_any_steps_is_its_plain_operations(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, z, context = fed(mixed())
    found = results(flow, direction, z, context)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "choose", lambda run, z: None)
        expected = results(flow, direction, z, context)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("direction", "node"), [("forward", "_PassBackward"), ("inverse", "_SolveBackward")])
def test_a_run_is_one_node(direction: str, node: str) -> None:
    flow, z, context = fed(mixed())
    image, log_det = getattr(flow, direction)(z, context)
    assert nodes(image)[node] == nodes(log_det)[node] == 1


def test_inverted_steps_run_as_one_too() -> None:
    flow, z, context = fed([Inverse(step) for step in mixed()])
    assert nodes(flow(z, context)[0])["_SolveBackward"] == 1
    assert nodes(flow.inverse(z, context)[0])["_PassBackward"] == 1


def ended_by_a_hook(steps: list[Bijector]) -> None:
    steps[1].register_forward_hook(lambda *_: None)


def ended_by_a_changed_layer(steps: list[Bijector]) -> None:
    layer = steps[1].get_submodule("net.layers.0")
    nn.utils.parametrizations.weight_norm(layer)


def ended_by_an_activation(steps: list[Bijector]) -> None:
    steps[1] = gated(activation=F.silu)


def ended_by_another_kind_of_step(steps: list[Bijector]) -> None:
    steps[1] = Reverse(DIM)


ENDS = [
    (ended_by_a_hook, 3),
    (ended_by_a_changed_layer, 2),
    (ended_by_an_activation, 2),
    (ended_by_another_kind_of_step, 2),
]


@pytest.mark.parametrize(("change", "left"), ENDS)
def test_where_a_run_ends(change: Callable[[list[Bijector]], None], left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hooked step is a node of its own, a changed or an unknown one is plain, and the numbers stay."""
    steps: list[Bijector] = [gated() for _ in range(4)]
    change(steps)
    flow, z, context = fed(steps)
    assert nodes(flow(z, context)[0])["_PassBackward"] == left
    found = results(flow, "forward", z, context)
    monkeypatch.setattr(engine, "choose", lambda run, z: None)
    torch.testing.assert_close(found, results(flow, "forward", z, context), rtol=1e-10, atol=1e-10)


def test_a_chain_of_contexts_of_their_own_has_a_node_for_each_step() -> None:
    flow = Chain(*(gated() for _ in range(3))).double()
    image, _ = flow(torch.randn(2, DIM, dtype=F64), torch.randn(2, 3 * CONTEXT, dtype=F64, requires_grad=True))
    assert nodes(image)["_PassBackward"] == 3


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_checkpoints_and_offloaded_tensors_change_no_gradient(direction: str) -> None:
    """The graph of an element-wise step is kept with the tensors that autograd saves, whoever packs these."""
    flow, z, context = fed(mixed())
    expected = results(flow, direction, z, context)

    class Checkpointed(nn.Module):
        def inverse(self, *inputs: Tensor, **_: object) -> tuple[Tensor, Tensor]:
            return checkpoint(flow.inverse, *inputs, use_reentrant=False)  # pyright: ignore[reportReturnType]

        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return checkpoint(flow, *inputs, use_reentrant=False)  # pyright: ignore[reportReturnType]

        def parameters(self, recurse: bool = True):  # noqa: ANN202, FBT001, FBT002
            return flow.parameters(recurse)

    found = results(Checkpointed(), direction, z, context)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(results(flow, direction, z, context), expected, rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_kept_is_walked_twice() -> None:
    flow, z, context = fed(mixed())
    loss = flow(z, context)[1].sum()
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, z)[0], first)
