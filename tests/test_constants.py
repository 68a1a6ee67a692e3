"""Constants are right wherever they are read and whoever watches; an order is saved, and a load is checked."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from versions import untraceable

from flowpost import Affine, Autoregressive, Bijector, Coupling, LULinear, Permute, Planar, Spline
from flowpost.masked.network import MaskedLinear
from flowpost.numerics.constants import Constant, Order


def value() -> Tensor:
    return torch.arange(3.0)


def test_a_constant_has_the_dtype_and_device_that_are_asked_for() -> None:
    numbers, index = Constant(value()), Constant(torch.arange(3))
    for dtype in (torch.float32, torch.float64):
        assert numbers.on(torch.empty(0, dtype=dtype)).dtype == dtype
        assert index.on(torch.empty(0, dtype=dtype)).dtype == torch.int64
    assert numbers.on(torch.empty(0, device="meta")).is_meta
    double = torch.empty(0, dtype=torch.float64)
    assert numbers.on(double) is numbers.on(double)
    assert torch.equal(numbers.on(double), value().double())


def under_inference(read: Callable[[], Tensor]) -> None:
    with torch.inference_mode():
        read()


def under_vmap(read: Callable[[], Tensor]) -> None:
    torch.func.vmap(lambda x: x * read())(torch.ones(2, 3, dtype=torch.float64))


def under_grad(read: Callable[[], Tensor]) -> None:
    torch.func.grad(lambda x: (x * read()).sum())(torch.ones(3, dtype=torch.float64))


def under_fakes(read: Callable[[], Tensor]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        read()


def under_export(read: Callable[[], Tensor]) -> None:
    class Read(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * read()

    torch.export.export(Read(), (torch.ones(3, dtype=torch.float64),), strict=False)


@pytest.mark.parametrize("watch", [under_inference, under_vmap, under_grad, under_fakes, under_export])
def test_a_copy_made_while_somebody_watches_is_a_plain_tensor_later(watch: Callable[[Callable], None]) -> None:
    constant, like = Constant(value()), torch.empty(0, dtype=torch.float64)
    watch(lambda: constant.on(like))
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (weight * constant.on(like)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 1, 2]


def test_a_step_that_is_made_in_inference_mode_has_gradients_outside_of_it() -> None:
    """The step itself, and a deep copy: autograd saves the frame of knots."""
    with torch.inference_mode():
        made = Spline(2, bins=4)
    for step in (made, copy.deepcopy(made)):
        context = torch.randn(3, step.context_size, requires_grad=True)
        step(torch.randn(3, 2), context)[1].sum().backward()
        assert context.grad is not None
        assert context.grad.any()


def test_a_compiled_call_is_not_compiled_again_for_a_copy() -> None:
    constant = Constant(value())
    compiled = torch.compile(lambda x: x * constant.on(x), fullgraph=True, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    for _ in range(3):
        assert compiled(torch.ones(3, dtype=torch.float64)).tolist() == [0, 1, 2]
    assert counters["stats"]["unique_graphs"] == 1


def test_a_pickle_holds_the_value_alone() -> None:
    constant = Constant(value())
    constant.on(torch.empty(0, device="meta"))
    other = pickle.loads(pickle.dumps(constant))  # noqa: S301
    assert torch.equal(other.on(torch.empty(0)), value())
    assert not other._copies


@untraceable
def test_a_copied_module_has_the_copies_at_hand() -> None:
    """A compiled call would else copy them from the host each time, and make no CUDA graph for that."""
    step = copy.deepcopy(Autoregressive(4, 2, (8,), order=[1, 0, 3, 2]).double())
    given: list[torch.dtype] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        given.extend(each.dtype for each in inputs if each.is_floating_point())
        return module

    torch._dynamo.reset()
    z, context = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    torch.compile(step, fullgraph=True, backend=backend)(z, context)
    assert set(given) == {torch.float64}


def test_a_copy_that_reads_a_constant_leaves_the_first_one_alone() -> None:
    constant = Constant(value())
    other = copy.deepcopy(constant)
    other.on(torch.empty(0, device="meta"))
    assert torch.equal(other.on(torch.empty(0)), value())
    assert not constant._copies


def test_a_module_that_moves_has_its_copies_at_hand() -> None:
    step = Planar(2)
    step.double()
    assert step._start is not None
    assert list(step._start._copies) == [(torch.device("cpu"), torch.float64)]


def test_an_order_goes_there_and_back() -> None:
    order, z = Order([2, 0, 1]), torch.tensor([[10.0, 20.0, 30.0]])
    assert order.take(z).tolist() == [[30, 10, 20]]
    assert torch.equal(order.put(order.take(z)), z)
    assert torch.equal(order.take(z.T, 0), order.take(z).T)


ORDERED: dict[str, Callable[[list[int]], Bijector]] = {
    "permute": Permute,
    "lu_linear": lambda order: LULinear(3, order),
    "coupling": lambda order: Coupling(3, Affine(2), 0, (4,), order=order),
    "autoregressive": lambda order: Autoregressive(3, 0, (4,), order=order),
}
ordered = pytest.mark.parametrize("make", ORDERED.values(), ids=ORDERED)
Make = Callable[[list[int]], Bijector]


@ordered
def test_an_order_is_saved_as_before_and_a_load_takes_it_over(make: Make) -> None:
    source, other = make([2, 0, 1]), make([1, 2, 0])
    state = source.state_dict()
    assert state["order"].tolist() == [2, 0, 1]
    assert state["order"].dtype == torch.int64
    if "back" in state:
        assert state["back"].tolist() == [1, 2, 0]
    z, context = torch.randn(4, 3), torch.randn(4, source.context_size) if source.context_size else None
    other.load_state_dict(state)
    assert torch.equal(other(z, context)[0], source(z, context)[0])
    assert torch.equal(other.inverse(z, context)[0], source.inverse(z, context)[0])
    state["order"].zero_()  # a copy
    assert torch.equal(other(z, context)[0], source(z, context)[0])


@ordered
def test_a_load_leaves_what_a_graph_reads_where_it_is(make: Make) -> None:
    """A CUDA graph knows addresses: freed by a load of the same order, they would soon be other tensors'."""
    step = make([2, 0, 1])

    def kept() -> list[Constant]:
        order = vars(step)["_order"]
        stairs = [part.staircase for part in step.modules() if isinstance(part, MaskedLinear)]
        return [order._there, order._back, *(each for stair in stairs for each in (stair.mask, *stair._edges))]

    before = kept()
    step.load_state_dict(step.state_dict())
    assert all(one is other for one, other in zip(kept(), before, strict=True))
    step.load_state_dict(make([1, 2, 0]).state_dict())
    assert vars(step)["_order"].order == (1, 2, 0)


@ordered
@pytest.mark.parametrize("order", [[2.0, 0.0, 1.0], [2, 0, 1]])
def test_whoever_calls_with_a_state_gets_its_order(make: Make, order: list[float]) -> None:
    source, other = make([2, 0, 1]), make([1, 2, 0])
    z, context = torch.randn(4, 3), torch.randn(4, source.context_size) if source.context_size else None
    expected = other(z, context)[0]
    found = torch.func.functional_call(other, source.state_dict() | {"order": torch.tensor(order)}, (z, context))
    assert torch.equal(found[0], source(z, context)[0])
    assert torch.equal(other(z, context)[0], expected)


@ordered
@pytest.mark.parametrize("order", [[2, 2, 1], [1.5, 0, 1.5], [0, 1], [0.0, float("nan"), 1.0]])
def test_what_is_no_permutation_is_refused(make: Make, order: list[float]) -> None:
    step = make([2, 0, 1])
    with pytest.raises(RuntimeError, match=r"order: expected a permutation of 0..2, got .*averaged"):
        step.load_state_dict(step.state_dict() | {"order": torch.tensor(order)})
    assert step.state_dict()["order"].tolist() == [2, 0, 1]


@ordered
def test_a_state_without_an_order_is_told_as_torch_tells_it(make: Make) -> None:
    step = make([2, 0, 1])
    state = {name: tensor for name, tensor in step.state_dict().items() if name != "order"}
    with pytest.raises(RuntimeError, match='Missing key.*"order"'):
        step.load_state_dict(state)
    assert step.load_state_dict(state, strict=False).missing_keys == ["order"]
