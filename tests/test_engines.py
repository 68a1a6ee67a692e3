"""The engine of the masked networks against the plain operations, and where which of the two runs."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from registry import ENTRIES, Case, Entry, draw, push
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flowpost import Affine, Autoregressive, Bijector, Masked, Shared
from flowpost.masked import device, engine, host, recorded, staircase
from flowpost.masked.device import elements
from flowpost.masked.network import MADE
from flowpost.masked.staircase import Staircase

NETWORKS = [entry for entry in ENTRIES if any(isinstance(part, MADE) for part in entry.build(3).modules())]
SIZES = [
    # dim, hidden, context_size, activation, order, z's leading axes, the context's
    (64, (512, 640), 8, F.relu, range(63, -1, -1), (3,), (2, 1)),
    (64, (512, 640), 8, F.elu, None, (2, 3), (3,)),
    (70, (2000,), 2, torch.tanh, None, (3,), (1,)),
    (6, (300, 400), 0, torch.relu, [2, 0, 1, 5, 3, 4], (7,), None),
    (17, (40, 6), 2, F.elu, None, (3,), (3,)),  # sweeps go by groups of 8 variables, and some here have no unit
    (9, (5,), 0, torch.tanh, range(8, -1, -1), (3,), None),
    (7, (3, 5), 2, F.elu, [2, 1, 0, 4, 3, 6, 5], (), (4,)),
    (4, (), 2, F.relu, [3, 2, 1, 0], (3,), ()),
]


def every_result(
    step: Bijector, direction: str, z: Tensor, context: Tensor | None, preimage: Tensor | None
) -> list[Tensor]:
    """Value, log-det, and the gradients at z, the context and all parameters."""
    z = z.detach().clone().requires_grad_()
    context = None if context is None else context.detach().clone().requires_grad_()
    if direction == "forward":
        image, log_det = step(z, context)
    else:
        image, log_det = step.inverse(z, context, preimage=preimage if direction == "known" else None)
    loss = (
        image * torch.linspace(0, 1, image.numel(), dtype=z.dtype, device=z.device).view_as(image)
    ).sum() + log_det.square().sum()
    inputs = [z, *([] if context is None else [context]), *step.parameters()]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [image.detach(), log_det.detach(), *grads]


def assert_same(
    step: Bijector, direction: str, z: Tensor, context: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = z
    if direction == "known":
        z = step(z, context)[0].detach()
    found = every_result(step, direction, z, context, known)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "choose", lambda run, z: None)
        expected = every_result(step, direction, z, context, known)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_by_hand_equals_plain(entry: Entry, direction: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step, z, context = draw(entry, Case(5, seed=1, push=scale))
    assert_same(step, direction, z, context, monkeypatch)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}-{sizes[1]}")
@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
def test_by_hand_equals_plain_where_weights_are_cut_into_blocks(
    sizes: tuple, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dim, hidden, context_size, activation, order, batch, context_batch = sizes
    step = Autoregressive(dim, context_size, hidden, activation=activation, order=order).double()
    push(step, Case(seed=2, push=0.05))
    z = torch.randn(*batch, dim, dtype=torch.float64)
    context = None if context_batch is None else torch.randn(*context_batch, context_size, dtype=torch.float64)
    if direction == "known" and context is not None:
        z = z.expand(*torch.broadcast_shapes(batch, context.shape[:-1]), dim)
    assert_same(step, direction, z, context, monkeypatch)


class _NoHostRead(TorchDispatchMode):
    """What a CUDA graph forbids: a number brought to the host, or a shape that depends on values."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        assert str(func) not in {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}
        return func(*args, **(kwargs or {}))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}-{sizes[1]}")
@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
def test_on_tensors_as_on_numpy_and_without_a_host_read(sizes: tuple, direction: str) -> None:
    """Off the CPU the sweeps run on tensors: so they do here where something watches the operations."""
    dim, hidden, context_size, activation, order, batch, context_batch = sizes
    step = Autoregressive(dim, context_size, hidden, activation=activation, order=order).double()
    push(step, Case(seed=7, push=0.05))
    shape = batch if context_batch is None else torch.broadcast_shapes(batch, context_batch)
    known = torch.randn(*shape, dim, dtype=torch.float64)
    context = None if context_batch is None else torch.randn(*context_batch, context_size, dtype=torch.float64)
    z = known if direction == "forward" else step(known, context)[0].detach()
    expected = every_result(step, direction, z, context, known)
    with _NoHostRead():
        found = every_result(step, direction, z, context, known)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_blocks_are_cut_and_their_zeros_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that no unit reads may be nan: the forward and both gradients are those of a masked product."""
    monkeypatch.setattr(staircase, "_GRAIN", 2**14)
    rising = [unit * 40 // 800 for unit in range(800)]
    for inputs in (rising, rising[::-1]):
        stairs = Staircase(inputs, rising, groups=2)
        assert len(stairs.blocks) > 4
        weight, x, grad = (torch.randn(*shape, dtype=torch.float64) for shape in ((1600, 800), (5, 800), (5, 1600)))
        mask = stairs.mask.on(weight)
        full = weight * mask
        for rows, _, _, rest in stairs.blocks:
            weight.narrow(0, *rows).narrow(1, *rest).fill_(math.nan)
        assert weight.isnan().double().mean() > 0.35
        y = torch.zeros(5, 1600, dtype=torch.float64)
        stairs.add_product(y, x, weight)
        torch.testing.assert_close(y, x @ full.T)
        torch.testing.assert_close(stairs.input_gradient(grad, weight), grad @ full)
        torch.testing.assert_close(stairs.weight_gradient(grad, x), (grad.T @ x) * mask)


class _Multiplications(TorchDispatchMode):
    """How many multiplications the products take, also those into a part of a tensor."""

    number = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> object:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.number += left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [5, 200])
def test_few_rows_take_two_blocks_as_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the multiplications that are counted; the results are those of a masked product either way."""
    monkeypatch.setattr(staircase, "_GRAIN", 2**14)
    stairs = Staircase(range(320), range(320))
    weight, x, grad = torch.randn(320, 320).double(), torch.randn(rows, 320).double(), torch.randn(rows, 320).double()
    mask, bias = stairs.mask.on(weight), torch.randn(320).double()
    with _Multiplications() as counted:
        y = stairs.affine(bias, x, weight)
        of_x, of_weight = stairs.input_gradient(grad, weight), stairs.weight_gradient(grad, x)
    share = sum(block.rows[1] * (block.stair[1] + block.full[1]) for block in stairs.blocks) / weight.numel()
    assert len(stairs.blocks) == 2
    assert share < 0.9
    assert counted.number == round(3 * rows * weight.numel() * (1 if rows == 5 else share))
    torch.testing.assert_close(y, bias + x @ (weight * mask).T)
    torch.testing.assert_close(of_x, grad @ (weight * mask))
    torch.testing.assert_close(of_weight, (grad.T @ x) * mask)
    torch.testing.assert_close(stairs.add_input_gradient(x, grad, weight), x + grad @ (weight * mask))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(("made", "pulls"), [(host, recorded), (device, elements)], ids=["host", "device"])
def test_the_way_back_frees_what_it_is_through_with(
    made: ModuleType, pulls: ModuleType, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run in one node: each link finds less of the tape alive than the one before, and no hidden values of its.

    But for those of the first layer, whose place a gradient may take that is needed to the end.
    """
    monkeypatch.setattr(engine, "engine_on", lambda _: made)
    tape: list[StorageWeakRef] = []
    hidden: list[StorageWeakRef] = []
    alive: list[tuple[int, int]] = []
    pass_name, pull_name = ("values", "pull") if direction == "forward" else ("solve", "pull_inverse")
    values, pull = getattr(made, pass_name), getattr(pulls, pull_name)

    def keeping(*inputs: object, **options: object) -> tuple[Tensor, Tensor, list[Tensor]]:
        image, log_det, kept = values(*inputs, **options)
        tape.extend(StorageWeakRef(each.untyped_storage()) for each in kept)
        hidden.extend(StorageWeakRef(each.untyped_storage()) for each in kept if each.shape[-1] == 7)
        return image, log_det, kept

    def counting(*inputs: object) -> object:
        alive.append((sum(not each.expired() for each in tape), sum(not each.expired() for each in hidden)))
        return pull(*inputs)

    monkeypatch.setattr(made, pass_name, keeping)
    monkeypatch.setattr(pulls, pull_name, counting)
    chain = Shared(*(Autoregressive(4, 3, (9, 7)) for _ in range(4)))
    image, log_det = getattr(chain, direction)(torch.randn(5, 4), torch.randn(5, 3))
    (image.sum() + log_det.sum()).backward()
    counts, of_hidden = zip(*alive, strict=True)
    assert all(later < earlier for earlier, later in pairwise(counts)), counts
    assert of_hidden == (4, 3, 2, 1)


@pytest.mark.parametrize("batch", [(3,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_what_it_gives_may_be_changed_in_place(direction: str, batch: tuple[int, ...]) -> None:
    step = Autoregressive(4, 2, (9, 8)).double()
    push(step, Case(seed=7))
    z, context = (torch.randn(*batch, size, dtype=torch.float64) for size in (4, 2))
    found = []
    for change in (lambda each: each.mul_(2), lambda each: each * 2):
        results = map(change, getattr(step, direction)(z, context))
        loss = torch.stack([each.square().sum() for each in results]).sum()
        found.append(torch.autograd.grad(loss, list(step.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("hidden", [(9, 8), (600, 600)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("options", [{}, {"create_graph": True}], ids=str)
def test_a_backward_within_autocast_is_that_of_the_pass(
    options: dict[str, bool], direction: str, hidden: tuple[int, ...]
) -> None:
    """torch says to call it outside, and who does not is to lose no digits."""
    step = Autoregressive(4, 2, hidden)
    push(step, Case(seed=8))
    image, log_det = getattr(step, direction)(torch.randn(3, 4), torch.randn(3, 2))
    loss, parameters = image.sum() + log_det.sum(), list(step.parameters())
    gradients = partial(torch.autograd.grad, loss, parameters, retain_graph=True, **options)
    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients()
    torch.testing.assert_close(found, expected)


def test_a_step_that_an_older_release_pickled_runs() -> None:
    """A pickle holds the attributes that there were then."""
    step = Autoregressive(4, 2, (9, 8))
    z, context = torch.randn(3, 4), torch.randn(3, 2)
    expected = every_result(step, "forward", z, context, None)
    for layer in step.net.stack:
        older = Staircase.__new__(Staircase)
        had = ("inputs", "units", "blocks", "mask", "_edges")
        vars(older).update({name: vars(layer.staircase)[name] for name in had})
        layer.staircase = older
    torch.testing.assert_close(every_result(step, "forward", z, context, None), expected)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_an_activation_of_one_s_own_runs_plain(direction: str) -> None:
    step = Autoregressive(4, 0, (9, 8), activation=lambda x: x * torch.sigmoid(x)).double()
    other = Autoregressive(4, 0, (9, 8), activation=F.silu).double()
    push(step, Case(seed=3))
    other.load_state_dict(step.state_dict())
    z = torch.randn(3, 4, dtype=torch.float64)
    assert engine.choose([step._link()], z) is None
    torch.testing.assert_close(getattr(step, direction)(z) if direction == "inverse" else step(z),
                               other.inverse(z) if direction == "inverse" else other(z))  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_forward_mode_runs_plain_and_agrees(direction: str) -> None:
    """A tangent pushed forward is the Jacobian, taken by hand row by row, times it."""
    step = Autoregressive(4, 2, (9, 8), order=[2, 0, 3, 1]).double()
    push(step, Case(seed=4, push=0.5))
    z, tangent, context = (torch.randn(3, size, dtype=torch.float64) for size in (4, 4, 2))
    function = partial(step if direction == "forward" else step.inverse, context=context)
    with forward_ad.dual_level():
        image, log_det = function(forward_ad.make_dual(z, tangent))
        found = [forward_ad.unpack_dual(each).tangent for each in (image, log_det)]
    jacobians = torch.autograd.functional.jacobian(lambda z: tuple(function(z)), z)
    expected = [(matrix * tangent).sum((-2, -1)) for matrix in jacobians]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [lambda: Autoregressive(4, 2, (9, 8)), lambda: Masked(Affine(4), 2, (9, 8))])
def test_only_what_is_needed_is_computed(make: Callable[[], Bijector]) -> None:
    """Frozen parameters, a z or a context without gradient."""
    step = make().double()
    push(step, Case(seed=5))
    expected = dict(step.named_parameters())
    z, context = (torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (4, 2))
    whole = torch.autograd.grad(step(z, context)[0].sum(), [z, context, *expected.values()])
    for name, gradient in zip(["z", "context", *expected], whole, strict=True):
        inputs = {"z": z.detach(), "context": context.detach()}
        for key, parameter in expected.items():
            parameter.requires_grad_(key == name)
        if name in inputs:
            inputs[name].requires_grad_()
        step(inputs["z"], inputs["context"])[0].sum().backward()
        leaf = inputs.get(name, expected.get(name))
        assert leaf is not None
        torch.testing.assert_close(leaf.grad, gradient)
        leaf.grad = None


ORDERS: list[Sequence[int]] = [[3, 2, 1, 0], [1, 3, 0, 2]]


@pytest.mark.parametrize("hidden", [(), (9,), (300, 260)], ids=str)
def test_a_loaded_order_is_adopted(hidden: Sequence[int]) -> None:
    """The weights are laid out for their order, so it comes with them, whatever the step was built for."""
    saved, other = (Autoregressive(4, 2, hidden, order=order).double() for order in ORDERS)
    push(saved, Case(seed=6, push=0.3))
    other.load_state_dict(saved.state_dict())
    z, context = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    for function in ("forward", "inverse"):
        found: Callable = getattr(other, function)
        assert all(map(torch.equal, found(z, context), getattr(saved, function)(z, context)))


def test_a_sweep_leaves_the_parameters_storage_as_it_was() -> None:
    """Numpy's view by ``.numpy()`` would fix its size for good, and whoever shards parameters resizes it."""
    step = Autoregressive(4, 2, (9, 8))
    image, _ = step.inverse(torch.randn(3, 4), torch.randn(3, 2))
    image.sum().backward()
    assert all(parameter.untyped_storage().resizable() for parameter in step.parameters())
