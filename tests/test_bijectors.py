"""The contract (properties B1 to B24) over every entry of the registry, and each family against its paper's formula."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import exact
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from registry import BY_NAME, ENTRIES, Case, Entry, backward, carry, cases, draw, jacobian, push, size
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Conditioned,
    Coupling,
    Householder,
    Inverse,
    Learned,
    Permute,
    Planar,
    Reverse,
    Scale,
    Shared,
    UnitLowerTriangular,
)
from flowpost.functional import gate, gate_inverse, gate_parameters, log_var_scale, planar, planar_inverse
from flowpost.masked import gated_inverse
from flowpost.masked.network import MADE, MaskedLinear
from flowpost.testing.cases import place

every = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
Map = Callable[..., tuple[Tensor, Tensor]]


def directions(step: Bijector) -> dict[str, Map]:
    """Both, for points of the domain."""
    return {"forward": step, "inverse": backward(step)}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def norm(matrix: Tensor) -> Tensor:
    """The spectral norm, at least 1."""
    return torch.linalg.matrix_norm(matrix, 2).clamp_min(1)


# --------------------------------------------------------------------------------------------- B1, B2: log-dets


@every
@given(case=cases())
def test_log_det_is_that_of_the_jacobian(entry: Entry, case: Case) -> None:
    """B1, B2: to 8 eps (N + cond) where cond < 1e8, with one sign everywhere, in both directions."""
    step, z, context = draw(entry, case)
    for function in (step, step.inverse):
        z = exact.judge(function, z, context, size(step))


@pytest.mark.parametrize("b", [0.0, 1e-3, -0.02, 0.3])
def test_log_det_at_the_floor_of_one_dimension(b: float) -> None:
    """There cond is 1 however flat the map is: floors of map and log-det 1e-13 apart, by k's rounding, fail."""
    z, context = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[-50.0, 1.0, b]], dtype=torch.float64)
    for function in directions(Planar(1)).values():
        z = exact.judge(function, z, context, size(Planar(1)))


@every
@given(case=cases())
def test_float32_log_det_is_that_of_float64(entry: Entry, case: Case) -> None:
    """B1: to 64 eps N (1 + |log_det|) of float64 with the same weights."""
    step, z, context = draw(entry, case, dtype=torch.float32)
    wide, z64 = copy.deepcopy(step).double(), z.double().requires_grad_()
    image, expected = wide(z64, None if context is None else context.double())
    log_det = step(z, context)[1].double()
    tolerance = 64 * torch.finfo(torch.float32).eps * size(step) * (1 + expected.abs())
    assert ((log_det - expected).abs() <= tolerance)[torch.linalg.cond(jacobian(image, z64)) < 1e8].all()


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_orientation_is_the_family_s_own(dim: int) -> None:
    """B2: every family keeps orientation, for every context; only a permutation or a reflection may turn it."""
    for entry in ENTRIES:
        parts = [type(part) for part in entry.make(dim, 0).modules()]
        if {Reverse, Permute, Householder} & set(parts) or entry.name == "lu_linear_order":
            continue
        for seed in range(8):
            step, z, context = draw(entry, Case(dim, seed, push=1.0, spread=3.0, context=3.0))
            z = leaf(z)
            matrix = jacobian(step(z, context)[0], z)
            assert (torch.linalg.det(matrix)[torch.linalg.cond(matrix) < 1e8] > 0).all(), entry.name


# ------------------------------------------------------------------------------------------- B3, B4: the inverse


@every
@both_dtypes
@given(case=cases())
def test_inverse_undoes_forward(entry: Entry, dtype: torch.dtype, case: Case) -> None:
    """B3, B4. To RELIABILITY's tolerances, in which max|x| is multiplied by the map's own slopes there: a rounding of
    x alone moves f(x) by |J| eps |x| and its log-det by |grad log_det| eps |x|. With that the worst seen is 0.4 of the
    first tolerance and 0.01 of the second; without it a strongly pushed MAF or planar step misses the first by 160."""
    step, z, context = draw(entry, case, dtype=dtype)
    y = carry(step, z)
    with torch.no_grad():
        x, log_det_inverse = step.inverse(y, context)
    x.requires_grad_()
    image, log_det = step(x, context)
    matrix = jacobian(image, x)
    gradient = torch.zeros_like(x)
    if log_det.requires_grad:
        gradient = torch.autograd.grad(log_det.sum(), x, allow_unused=True, materialize_grads=True)[0]
    unit, reach = torch.finfo(dtype).eps * size(step), x.detach().abs().amax(-1)
    residual = (image - y).abs().amax(-1)
    assert (residual <= 64 * unit * (1 + y.abs().amax(-1) + norm(matrix) * reach)).all()
    good = torch.linalg.cond(matrix.double()) < 1 / (100 * unit)
    tolerance = 512 * unit * (1 + log_det.abs() + gradient.norm(dim=-1) * reach)
    assert ((log_det + log_det_inverse).abs() <= tolerance)[good].all()


@every
@given(case=cases(push=0.3))
def test_forward_undoes_inverse(entry: Entry, case: Case) -> None:
    """A rounding of the image moves its preimage by |J^-1| as much; cond would not do, it is 1 in one dimension."""
    step, z, context = draw(entry, case)
    z = leaf(z)
    image, log_det = step(z, context)
    matrix = jacobian(image, z)
    back, log_det_back = step.inverse(image, context)
    bound = 8 * torch.finfo(z.dtype).eps * size(step) * (1 + image.abs().amax(-1)) * norm(torch.linalg.inv(matrix))
    assert ((back - z).abs().amax(-1) <= bound).all()
    assert ((log_det + log_det_back).abs() <= 100 * bound).all()


@every
@pytest.mark.parametrize("dim", [1, 3])
def test_a_known_preimage_gives_the_same_inverse_and_gradients(entry: Entry, dim: int) -> None:
    step, z, context = draw(entry, Case(dim, seed=4, push=0.3))
    image = step(z, context)[0].detach()
    wanted: list[Tensor] = []
    for known in (None, z):
        y, c = leaf(image), None if context is None else leaf(context)
        inputs = [y] if c is None else [y, c]
        back, log_det = step.inverse(y, c, preimage=known)
        weights = torch.linspace(0.5, 1.5, back.numel(), dtype=z.dtype).view_as(back)
        objective = (weights * back).sum() + (log_det * log_det).sum()
        first = torch.autograd.grad(objective, inputs, create_graph=True, materialize_grads=True)
        curvature = sum((g * g).sum() for g in first)
        found = [back, log_det, *first]
        if isinstance(curvature, Tensor) and curvature.requires_grad:
            found += torch.autograd.grad(curvature, inputs, materialize_grads=True)
        if known is None:
            wanted = found
            continue
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_known_spares_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    step, z, context = draw(BY_NAME["planar_flow"], Case(3))
    image = step(z, context)[0]

    def refuse(*_: object) -> None:
        raise AssertionError("a search was run")

    monkeypatch.setattr("flowpost.bijectors.planar.tanh_root", refuse)
    back, _ = step.inverse(image, context, preimage=z)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-12)


def test_inverse_of_an_inverse_is_the_step() -> None:
    for entry in ENTRIES:
        step = entry.make(3, 0)
        once = Inverse(step)
        if isinstance(step, Inverse):
            assert once is step.step
        else:
            assert Inverse(once) is step
            assert isinstance(once, Inverse)


# ------------------------------------------------------------------------------------------- B5, B6: shapes, dtypes

SHAPES = [(), (1,), (0,), (6,), (1, 1), (2, 3), (2, 0, 3), (4, 1, 2)]


@every
@pytest.mark.parametrize("dim", [1, 3])
@both_dtypes
def test_any_leading_shape_equals_the_flat_batch(entry: Entry, dim: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        step, z, context = draw(entry, Case(dim, seed=1), dtype=dtype, batch=shape)
        flat_context = None if context is None else context.reshape(-1, step.context_size)
        for function in directions(step).values():
            image, log_det = function(z, context)
            assert image.shape == z.shape
            assert log_det.shape == shape
            assert image.dtype == log_det.dtype == dtype
            flat_image, flat_log_det = function(z.reshape(-1, dim), flat_context)
            assert_near(image.reshape(-1, dim), flat_image)
            assert_near(log_det.reshape(-1), flat_log_det)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """B5's tolerances."""
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


BROADCASTS = [
    ((5, 4), (4,)),
    ((5, 4), (1,)),
    ((2, 5, 4), (5, 1)),
    ((3, 1), (4,)),
    ((4,), (2, 4)),
    ((), (4,)),
    ((4,), ()),
    ((5, 1), (1, 4)),
    ((0, 4), (4,)),
    ((5, 0), (0,)),
]


@every
def test_leading_axes_broadcast(entry: Entry) -> None:
    """Each example's context serves all of its samples, whichever leading axes either lacks."""
    step, _, context = draw(entry, Case(3, seed=2), batch=(4,))
    for z_batch, context_batch in BROADCASTS:
        generator = torch.Generator().manual_seed(3)
        z = place(torch.randn(*z_batch, 3, dtype=torch.float64, generator=generator), step.domain)
        batch = z_batch
        if context is not None:
            context = torch.randn(*context_batch, step.context_size, dtype=torch.float64, generator=generator)
            batch = torch.broadcast_shapes(z_batch, context_batch)
        for function in directions(step).values():
            image, log_det = function(z, context)
            assert image.shape == (*batch, 3)
            assert log_det.shape == batch
            full = None if context is None else context.expand(*batch, -1)
            expected = function(z.expand(*batch, -1).contiguous(), full if full is None else full.contiguous())
            assert_near(image, expected[0])
            assert_near(log_det, expected[1])


@every
def test_strides_do_not_matter(entry: Entry) -> None:
    step, z, context = draw(entry, Case(3, seed=5), batch=(4, 2))
    transposed = z.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    expanded = z[:1, :1].expand(4, 2, 3)
    for function in directions(step).values():
        for odd in (transposed, expanded, z.flip(0).flip(0), torch.cat([z, z], -1)[..., :3]):
            for actual, expected in zip(
                function(odd, context), function(odd.clone().contiguous(), context), strict=True
            ):
                assert_near(actual, expected)


@every
@both_dtypes
def test_the_default_dtype_does_not_matter(entry: Entry, dtype: torch.dtype) -> None:
    """B6, B20."""
    step, z, context = draw(entry, Case(3, seed=6), dtype=dtype)
    before = [out for function in directions(step).values() for out in function(z, context)]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
        after = [out for function in directions(step).values() for out in function(z, context)]
    finally:
        torch.set_default_dtype(default)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


@every
def test_a_context_of_another_float_dtype_is_cast(entry: Entry) -> None:
    step, z, context = draw(entry, Case(3, seed=6), dtype=torch.float32)
    if context is None:
        return
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for function in directions(step).values():
            other = context.to(dtype)
            for actual, expected in zip(function(z, other), function(z, other.float()), strict=True):
                assert actual.dtype == torch.float32
                assert torch.equal(actual, expected)


@every
def test_autocast_keeps_dtypes(entry: Entry) -> None:
    """B6, B19: only a network may lose digits; a step without one gives the same bits."""
    step, z, context = draw(entry, Case(3, seed=6), dtype=torch.float32)
    network = any(isinstance(part, MADE | Coupling) for part in step.modules())
    for function in directions(step).values():
        expected = function(z, context)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(z, context)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            assert network or torch.equal(a, b)


def test_autocast_s_log_det_is_that_of_the_gate_it_used() -> None:
    """B19: the network may run in bf16, what is made of its outputs may not."""
    step, z, context = draw(BY_NAME["autoregressive_2_context"], Case(3, seed=6), dtype=torch.float32)
    assert isinstance(step, Autoregressive)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, log_det = step(z, context)
        raw, mean = step.net(z, context).float().unbind(-2)
    assert raw.dtype == torch.float32
    expected = gate(z, *gate_parameters(raw, mean))
    torch.testing.assert_close((image, log_det), expected, rtol=0, atol=1e-5)
    assert not torch.equal(log_det, step(z, context)[1])  # bf16 was in use


# ------------------------------------------------------------------------------------------- B7, B8, B9, B22: purity


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e6], ids=str)
@pytest.mark.parametrize("where", ["z", "context"])
def test_a_poisoned_row_stays_alone(entry: Entry, poison: float, where: str) -> None:
    """B7: the other rows are bit-equal, and a row with nan or inf never has a finite value and log-det together."""
    step, z, context = draw(entry, Case(3, seed=7), dtype=torch.float32, batch=(5,))
    bad_z, bad_context = z.clone(), None if context is None else context.clone()
    target = bad_z if where == "z" else bad_context
    if target is None:
        return
    target[2] = poison
    rest = [0, 1, 3, 4]
    for function in directions(step).values():
        expected, found = function(z, context), function(bad_z, bad_context)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[rest], b[rest])
        if not math.isfinite(poison) and (where == "z" or math.isnan(poison)):
            assert not (found[0][2].isfinite().all() and found[1][2].isfinite())


@every
def test_rows_are_independent(entry: Entry) -> None:
    step, z, context = draw(entry, Case(3, seed=8), batch=(6,))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for function in directions(step).values():
        image, log_det = function(z, context)
        shuffled = function(z[order], None if context is None else context[order])
        assert_near(shuffled[0], image[order])
        assert_near(shuffled[1], log_det[order])
        for i in range(6):
            alone = function(z[i : i + 1], None if context is None else context[i : i + 1])
            assert_near(alone[0], image[i : i + 1])
            assert_near(alone[1], log_det[i : i + 1])


@every
def test_calls_leave_no_trace(entry: Entry) -> None:
    """B8: inputs unchanged, fresh answers after an in-place refill and after a weight step, backward twice."""
    step, z, context = draw(entry, Case(3, seed=9))
    other_step, other, other_context = draw(entry, Case(3, seed=10))
    for name in ("forward", "inverse"):
        fresh, function = copy.deepcopy(step), directions(step)[name]
        buffer, kept = z.clone(), None if context is None else context.clone()
        first = function(buffer, kept)
        assert torch.equal(buffer, z)
        assert kept is None or (context is not None and torch.equal(kept, context))
        for a, b in zip(function(buffer, kept), first, strict=True):
            assert torch.equal(a, b)
        buffer.copy_(other)
        for a, b in zip(function(buffer, kept), directions(fresh)[name](other.clone(), kept), strict=True):
            assert torch.equal(a, b)
        if kept is not None and other_context is not None:
            kept.copy_(other_context)
        with torch.no_grad():
            for mine, theirs in zip(step.parameters(), other_step.parameters(), strict=True):
                mine.copy_(theirs)
                mine.mul_(1.5)
        fresh.load_state_dict(step.state_dict())
        for a, b in zip(function(buffer, kept), directions(fresh)[name](buffer.clone(), kept), strict=True):
            assert torch.equal(a, b)
        gradients = []
        for _ in range(2):
            x = leaf(z)
            image, log_det = function(x, context)
            (image.sin().sum() + log_det.sum()).backward()
            gradients.append(x.grad)
        assert torch.equal(gradients[0], gradients[1])


@every
@pytest.mark.parametrize("dim", [1, 3])
def test_everything_depends_on_the_context(entry: Entry, dim: int) -> None:
    """B9: every number of it, in value and in gradient, for each example; over many points, where it acts locally."""
    step, z, context = draw(entry, Case(dim, seed=11, push=0.3))
    if context is None:
        return
    if entry.local:
        z = torch.linspace(-2.95, 2.95, 121, dtype=z.dtype).view(-1, 1, 1) + 0.01 * z
    for function in directions(step).values():
        c = leaf(context)
        image, log_det = function(z, c)
        weights = torch.linspace(0.5, 1.5, dim, dtype=z.dtype)
        (gradient,) = torch.autograd.grad((weights * image).sum() + 0.7 * log_det.sum(), c)
        assert (gradient != 0).all()
        for feature in range(step.context_size):
            moved = context.clone()
            moved[:, feature] += 0.1
            changed = function(z, moved)
            differs = (changed[0] != image).any(-1) | (changed[1] != log_det)
            assert (differs.any(0) if entry.local else differs).all()


@every
def test_the_global_random_state_is_not_touched(entry: Entry) -> None:
    """B22."""
    step, z, context = draw(entry, Case(3, seed=12))
    state = torch.get_rng_state()
    first = [function(z, context) for function in directions(step).values()]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = [function(z, context) for function in directions(step).values()]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


# --------------------------------------------------------------------------------------------- B10, B24: structure

STEPS = {
    "linear": lambda dim: Autoregressive(dim, 0, ()),
    "1": lambda dim: Autoregressive(dim, 3, (20,)),
    "2": lambda dim: Autoregressive(dim, 0, (20, 30)),
    "3 relu": lambda dim: Autoregressive(dim, 3, (40, 40, 40), activation=F.relu),
    "blocks": lambda dim: Autoregressive(dim, 3, (300, 700)),
    "order": lambda dim: Autoregressive(dim, 3, (20,), order=torch.randperm(dim).tolist()),
}


def xavier(module: nn.Module) -> None:
    """An initialization that knows nothing of masks."""
    for parameter in module.parameters(recurse=False):
        nn.init.xavier_normal_(parameter) if parameter.ndim > 1 and parameter.numel() else nn.init.normal_(parameter)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dim", [1, 2, 5, 20])
@pytest.mark.parametrize("change", ["xavier", "decay", "push"])
def test_the_jacobian_is_triangular_in_the_declared_order(name: str, dim: int, change: str) -> None:
    """B10: exact zeros above the diagonal, a positive diagonal, and no dependence missing below it."""
    step = STEPS[name](dim).double()
    if change != "push":
        step.net.apply(xavier)
    if change == "decay":  # what an optimizer's step does to every entry, masked or not
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.sub_(0.1 * parameter.sign() + 0.05)
    if change == "push":  # less in the wide network, whose gates would saturate: slopes that round to 0
        push(step, Case(push=0.05 if name == "blocks" else 0.3))
    order = torch.arange(dim) if step.order is None else step.order
    context = torch.randn(6, step.context_size, dtype=torch.float64) if step.context_size else None
    for function in directions(step).values():
        z = torch.randn(6, dim, dtype=torch.float64, requires_grad=True)
        matrix = jacobian(function(z, context)[0], z)[:, order][:, :, order]
        assert (matrix.triu(1) == 0).all()
        assert (matrix.diagonal(dim1=-2, dim2=-1) > 0).all()
        if "relu" not in name:  # whose units may all be off
            below = torch.ones(dim, dim).tril(-1).bool()
            assert (matrix[:, below] != 0).any(0).all()


def test_weights_that_nothing_may_read_get_no_gradient() -> None:
    """The other side of B10: an optimizer's noise cannot come in through the masked entries."""
    step = Autoregressive(6, 2, (200, 300)).double()
    step.net.apply(xavier)
    image, log_det = step(torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64))
    (image.sum() + log_det.sum()).backward()
    for layer in step.net.layers:
        assert isinstance(layer, MaskedLinear)
        gradient = layer.weight.grad
        assert gradient is not None
        mask = layer.staircase.mask()
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).all()


@pytest.mark.parametrize("hidden", [(), (7,), (300,)], ids=str)
def test_the_first_variable_s_gate_depends_on_the_context(hidden: Sequence[int]) -> None:
    step = Autoregressive(4, 3, hidden).double()
    step.net.apply(xavier)
    context = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    image, _ = step(torch.randn(1, 4, dtype=torch.float64), context)
    (gradient,) = torch.autograd.grad(image[0, 0], context)
    assert (gradient != 0).all()


def test_network_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """B24: one pass forward, no more arithmetic back, and one projection of the context for any number of samples.

    Where the sizes of the sums cannot be read, as on a device, the way back has one more pass.
    """
    step = Autoregressive(5, 3, (10, 10), activation=F.relu)
    z, context = torch.randn(7, 4, 5), torch.randn(4, 3)
    network = 2 * 28 * sum(layer.weight.numel() for layer in step.net.stack)
    project = 2 * 4 * 3 * 10

    def in_place(_: object, a: tuple[int, int], b: tuple[int, int], **__: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    def flops(function: Map) -> int:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            function(z, context)
        return counter.get_total_flops()

    assert flops(step) == network + project
    assert flops(lambda z, context: step.inverse(z, context, preimage=z)) == network + project
    assert network + project < flops(step.inverse) <= 2 * (network + project)
    monkeypatch.setattr(gated_inverse, "on_host", lambda _: True)
    assert project < flops(step.inverse) <= network + project


# ---------------------------------------------------------------------------------------------- B11, B12: gradients

EXTREMES = [0.0, 1e-30, 1.0, -1.0, 1e3, -1e3, 1e6, -1e6]


@every
@both_dtypes
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4])
def test_extreme_inputs_stay_finite(entry: Entry, dtype: torch.dtype, scale: float) -> None:
    """B11: values and gradients, forward, for every context; what a matrix or a chain squares may leave the range."""
    step, _, context = draw(entry, Case(3, seed=13, push=0.3, context=scale), dtype=dtype, batch=(len(EXTREMES),))
    z = place(torch.tensor(EXTREMES, dtype=dtype), step.domain).unsqueeze(-1).repeat(1, 3).requires_grad_()
    context = None if context is None else leaf(context)
    inputs = [z, *step.parameters(), *([] if context is None else [context])]
    image, log_det = step(z, context)
    assert image.isfinite().all()
    assert log_det.isfinite().all()
    gradients = torch.autograd.grad(image.sum() + log_det.sum(), inputs, allow_unused=True, materialize_grads=True)
    for gradient in gradients:
        assert gradient.isfinite().all()


@every
@both_dtypes
def test_extreme_images_have_finite_preimages_and_gradients(entry: Entry, dtype: torch.dtype) -> None:
    """B11 for the inverse, at context scale 1."""
    step, _, context = draw(entry, Case(3, seed=13, push=0.3), dtype=dtype, batch=(len(EXTREMES),))
    y = place(torch.tensor(EXTREMES, dtype=dtype), step.codomain).unsqueeze(-1).repeat(1, 3).requires_grad_()
    context = None if context is None else leaf(context)
    inputs = [y, *step.parameters(), *([] if context is None else [context])]
    back, log_det = step.inverse(y, context)
    assert back.isfinite().all()
    assert log_det.isfinite().all()
    gradients = torch.autograd.grad(back.sum() + log_det.sum(), inputs, allow_unused=True, materialize_grads=True)
    for gradient in gradients:
        assert gradient.isfinite().all()


NARROW = [entry for entry in ENTRIES if entry.name != "autoregressive_wide"]


@pytest.mark.parametrize("entry", NARROW, ids=lambda entry: entry.name)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("dim", [1, 2])
def test_first_and_second_derivatives(entry: Entry, direction: str, dim: int) -> None:
    """B12: in z, in the context and in every parameter."""
    step, z, context = draw(entry, Case(dim, seed=14, push=0.3), batch=(2,))
    names = [name for name, _ in step.named_parameters()]

    def function(z: Tensor, context: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        state = dict(zip(names, parameters, strict=True))
        if direction == "forward":
            return torch.func.functional_call(step, state, (z, context))
        return torch.func.functional_call(_Backward(step), {f"step.{k}": v for k, v in state.items()}, (z, context))

    tensors = (leaf(z), None if context is None else leaf(context), *map(leaf, step.parameters()))
    inputs = cast("tuple[Tensor, ...]", tensors)  # gradcheck passes None on
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


class _Backward(nn.Module):
    """A step whose call is its inverse, without what `Inverse` adds."""

    def __init__(self, step: Bijector) -> None:
        super().__init__()
        self.step = step

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return backward(self.step)(z, context)


@pytest.mark.parametrize("entry", NARROW, ids=lambda entry: entry.name)
def test_second_derivatives_where_the_preimage_is_known(entry: Entry) -> None:
    """B12: those of the search, which `gradgradcheck` has checked."""
    step, known, context = draw(entry, Case(3, seed=14, push=0.3), batch=(2,))
    z = leaf(step(known, context)[0])
    inputs = [z, *([] if context is None else [leaf(context)]), *step.parameters()]

    def second(preimage: Tensor | None) -> tuple[Tensor, ...]:
        image, log_det = step.inverse(z, None if context is None else inputs[1], preimage=known)
        loss = image.square().sum() + log_det.sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        total = sum(grad.square().sum() for grad in grads)
        assert isinstance(total, Tensor)
        return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(second(known), second(None), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------- B13, B14: state


@every
def test_state_round_trips_into_a_fresh_step_of_another_seed(entry: Entry) -> None:
    """B13: through a file, read with `weights_only`."""
    step, z, context = draw(entry, Case(4, seed=15))
    buffer = io.BytesIO()
    torch.save(step.state_dict(), buffer)
    buffer.seek(0)
    fresh = entry.make(4, 16).double()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_map(step, fresh, z, context)
    assert_same_map(step.eval(), fresh.eval(), z, context)


@every
def test_copies_and_pickles_after_use_are_the_same_map(entry: Entry) -> None:
    """B13: after a forward and a backward, in both directions."""
    step, z, context = draw(entry, Case(4, seed=17))
    for function in directions(step).values():
        image, log_det = function(leaf(z), context)
        (image.sum() + log_det.sum()).backward()
    assert_same_map(step, copy.deepcopy(step), z, context)
    assert_same_map(step, pickle.loads(pickle.dumps(step)), z, context)
    torch.testing.assert_close(copy.deepcopy(step).initial_context(), step.initial_context(), rtol=0, atol=0)


def assert_same_map(step: Bijector, other: Bijector, z: Tensor, context: Tensor | None) -> None:
    for name, function in directions(step).items():
        for a, b in zip(function(z, context), directions(other)[name](z, context), strict=True):
            assert torch.equal(a, b)


@every
@both_dtypes
@pytest.mark.parametrize("dim", [1, 4])
def test_a_fresh_step_is_the_identity_where_it_says_so(entry: Entry, dtype: torch.dtype, dim: int) -> None:
    """B14."""
    if not entry.identity:
        return
    step = entry.make(dim, 18).to(dtype)
    z = 3 * torch.randn(9, dim, dtype=dtype)
    context = step.initial_context().to(dtype) if step.context_size else None
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for function in directions(step).values():
        image, log_det = function(z, context)
        torch.testing.assert_close(image, z, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=tolerance)


def test_a_fresh_planar_step_is_exactly_the_identity_and_can_learn() -> None:
    """u = 0 across a random direction; two steps have different ones; u has a gradient."""
    step, other = Planar(3), Planar(3)
    z = torch.randn(5, 3)
    context = step.initial_context().requires_grad_()
    image, log_det = step(z, context)
    assert torch.equal(image, z)
    assert (log_det == 0).all()
    assert not torch.equal(step.initial_context()[3:6], other.initial_context()[3:6])
    (gradient,) = torch.autograd.grad((z * image).sum() + log_det.sum(), context)
    assert (gradient[:3] != 0).all()


def test_a_fresh_autoregressive_step_scales_by_its_gate() -> None:
    for bias in (2.0, 0.5):
        step = Autoregressive(4, 3, (8,), forget_bias=bias).double()
        z = torch.randn(5, 4, dtype=torch.float64)
        image, log_det = step(z, step.initial_context().double())
        scale = 1 / (1 + math.exp(-bias))
        torch.testing.assert_close(image, scale * z, rtol=0, atol=1e-14)
        torch.testing.assert_close(log_det, torch.full((5,), 4 * math.log(scale), dtype=torch.float64))


def test_initial_context_cannot_be_changed_through_what_it_returns() -> None:
    for entry in ENTRIES:
        step = entry.make(3, 0)
        expected = step.initial_context().clone()
        step.initial_context().add_(1)
        assert torch.equal(step.initial_context(), expected), entry.name


# ------------------------------------------------------------------------------------------- B17, B18: transformations


@every
def test_torch_func(entry: Entry) -> None:
    """B17: vmap, vmap(jacrev), vmap(jacfwd) and stacked parameters equal the loop."""
    step, z, context = draw(entry, Case(3, seed=19), batch=(4,))
    for name, function in directions(step).items():
        x = leaf(z)
        image, log_det = function(x, context)
        contexts = (context,) if context is not None else ()
        axes = (0,) * (1 + len(contexts))
        vmapped = torch.func.vmap(function, in_dims=axes)(z, *contexts)
        torch.testing.assert_close(vmapped, (image, log_det), rtol=1e-8, atol=1e-8)
        expected = jacobian(image, x)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            matrix = torch.func.vmap(transform(lambda *a, f=function: f(*a)[0]), in_dims=axes)(z, *contexts)
            torch.testing.assert_close(matrix, expected, rtol=1e-8, atol=1e-8)
        models = [step, push(copy.deepcopy(step), Case(seed=20))]
        module, prefix = (step, "") if name == "forward" else (_Backward(step), "step.")
        stacked = torch.func.stack_module_state(models)  # pyright: ignore[reportArgumentType]
        state = tuple({prefix + key: value for key, value in part.items()} for part in stacked)
        if not any(state):
            continue
        ensemble = torch.func.vmap(partial(torch.func.functional_call, module), in_dims=(0, None))(state, (z, context))
        for i, model in enumerate(models):
            expected = directions(model)[name](z, context)
            torch.testing.assert_close((ensemble[0][i], ensemble[1][i]), expected, rtol=1e-8, atol=1e-8)


# A search is seventy halvings unrolled: seconds to trace, so once.
COMPILED = [
    ("affine", "forward", (3, 5, 7)),
    ("unit_lower_triangular", "inverse", (3, 5)),
    ("planar", "forward", (3, 5)),
    ("planar", "inverse", (3,)),
    ("radial", "forward", (3, 5)),
    ("radial", "inverse", (3,)),
    ("convex_combination", "inverse", (3, 5)),
    ("householder", "forward", (3, 5)),
    ("lu_linear_order", "inverse", (3, 5)),
    ("learned_planar", "forward", (3, 5)),
    ("autoregressive_2_context", "forward", (3, 5)),
    ("autoregressive_order", "inverse", (3, 5)),
    ("full_covariance", "forward", (3, 5)),
    ("iaf", "forward", (3, 5)),
    ("iaf", "inverse", (3,)),
]


@pytest.mark.parametrize(("name", "direction", "batches"), COMPILED)
def test_compiles_into_one_graph(name: str, direction: str, batches: Sequence[int]) -> None:
    """B18: value and all gradients equal eager's; the second batch size takes a dynamic graph."""
    step, _, _ = draw(BY_NAME[name], Case(2, seed=21))
    torch._dynamo.reset()
    compiled = torch.compile(directions(step)[direction], fullgraph=True, backend="aot_eager")
    for batch in batches:
        _, z, context = draw(BY_NAME[name], Case(2, seed=22), batch=(batch,))
        results = []
        for function in (directions(step)[direction], compiled):
            x, c = leaf(z), None if context is None else leaf(context)
            inputs = [x, *step.parameters(), *([] if c is None else [c])]
            image, log_det = function(x, c)
            objective = image.sin().sum() + log_det.sum()
            results.append([image, log_det, *torch.autograd.grad(objective, inputs, materialize_grads=True)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------- independent hands: the papers' formulas


def planar_by_the_book(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rezende & Mohamed (2015), one example: eq. 10, and A.1 with the shifted, floored m of DESIGN.md."""
    wu = sum(float(w[i]) * float(u[i]) for i in range(len(w)))
    m = math.log1p((1 - math.exp(-(1 - 1e-3))) * math.expm1(wu))
    length = sum(float(w[i]) ** 2 for i in range(len(w)))
    u_hat = [float(u[i]) + (m - wu) * float(w[i]) / length for i in range(len(w))]
    inner = sum(float(w[i]) * float(z[i]) for i in range(len(w))) + float(b)
    image = [float(z[i]) + u_hat[i] * math.tanh(inner) for i in range(len(w))]
    slope = 1 / math.cosh(inner) ** 2
    psi = [slope * float(w[i]) for i in range(len(w))]
    log_det = math.log(1 + sum(u_hat[i] * psi[i] for i in range(len(w))))
    return torch.tensor(image, dtype=torch.float64), torch.tensor(log_det, dtype=torch.float64)


def test_planar_is_the_paper_s() -> None:
    z, u, w = (2 * torch.randn(20, 3, dtype=torch.float64) for _ in range(3))
    b = torch.randn(20, 1, dtype=torch.float64)
    image, log_det = Planar(3)(z, torch.cat([u, w, b], -1))
    for i in range(20):
        expected = planar_by_the_book(z[i], u[i], w[i], b[i])
        torch.testing.assert_close((image[i], log_det[i]), expected, rtol=1e-12, atol=1e-12)


def test_planar_reads_one_map_for_each_example() -> None:
    z, context = torch.randn(50, 4, 3, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    image, log_det = Planar(3)(z, context)
    for s, i in [(0, 0), (49, 3), (7, 2)]:
        u, w, b = context[i].split([3, 3, 1])
        torch.testing.assert_close((image[s, i], log_det[s, i]), planar_by_the_book(z[s, i], u, w, b))


@pytest.mark.parametrize("wu", [-1e7, -1e4, -50.0, -2.0, -1e-8, 0.0, 1e-8, 2.0, 50.0, 1e4])
@both_dtypes
def test_planar_log_det_at_the_constraint(wu: float, dtype: torch.dtype) -> None:
    """At w.z + b = 0, where the slope is 1 + w.u_hat: never below 1e-3, however far u is on the wrong side."""
    w = torch.tensor([1.0, 0.0], dtype=dtype)
    _, log_det = planar(torch.zeros(2, dtype=dtype), wu * w, w, torch.zeros(1, dtype=dtype))
    k = -math.expm1(-0.999)
    expected = 1 + wu + math.log(k) if wu > 30 else 1 + math.log1p(k * math.expm1(wu))
    assert log_det.item() == pytest.approx(math.log(expected), rel=1e-6, abs=64 * 18 * torch.finfo(dtype).eps)


def test_planar_log_det_where_tanh_has_rounded_to_one() -> None:
    """float32, w.z = 10: 1 - tanh^2 would be 0 there, but 1e6 times the slope 4 e^-20 is not."""
    one, zero = torch.ones(1), torch.zeros(1)
    _, log_det = planar(10 * one, 1e6 * one, one, zero)
    expected = math.log1p((1e6 + math.log(-math.expm1(-0.999))) / math.cosh(10) ** 2)
    assert log_det.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wu", [-1e4, -50.0, -2.0])
def test_planar_is_monotone_however_far_u_is_on_the_wrong_side(wu: float) -> None:
    w = torch.tensor([0.6, -0.8], dtype=torch.float64)
    z = w * torch.linspace(-3, 3, 61, dtype=torch.float64).unsqueeze(-1)
    image, _ = planar(z, wu * w, w, torch.zeros(1, dtype=torch.float64))
    assert ((image * w).sum(-1).diff() > 0).all()


@pytest.mark.parametrize("wu", [-1e7, -1e4, -50.0])
@both_dtypes
def test_planar_moves_by_no_more_than_its_log_det_says(wu: float, dtype: torch.dtype) -> None:
    """Where tanh is 1 the image of 0 is u_hat itself: ``w.u_hat`` is eps - 1 there, to rounding of it and not of u."""
    w = torch.tensor([0.7, -0.8, 0.3], dtype=dtype)
    image, _ = planar(torch.zeros(3, dtype=dtype), wu / w.square().sum() * w, w, torch.full((1,), 50.0, dtype=dtype))
    assert (image.double() * w.double()).sum().item() == pytest.approx(1e-3 - 1, abs=4 * torch.finfo(dtype).eps)


def test_planar_without_a_direction_is_a_shift() -> None:
    """w = 0: every w.z is 0, u_hat = u, nothing is divided by zero."""
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    inputs = [leaf(t) for t in (one, one, zero, torch.ones(1, dtype=torch.float64))]
    image, log_det = planar(*inputs)
    torch.testing.assert_close(image, one + math.tanh(1.0))
    assert log_det == 0
    for gradient in torch.autograd.grad(image.sum() + log_det, inputs):
        assert gradient.isfinite().all()
    back, _ = planar_inverse(image.detach(), one, zero, inputs[3].detach())
    torch.testing.assert_close(back, one)


def naive_made(net: MADE, z: Tensor, context: Tensor | None, order: Sequence[int]) -> Tensor:
    """Germain et al. (2015) for one example, unit by unit, with masks of its own over the full weights.

    Unit u of a layer of n has seen the first floor(u dim / n) variables of the order; the outputs for a variable those
    before it. They come in the variables' own order, as rows.
    """
    place = {variable: index for index, variable in enumerate(order)}
    seen = [place[variable] + 1 for variable in range(net.dim)]
    values = [float(v) for v in z]
    offsets = [] if net.project is None or context is None else (net.project.weight @ context).detach().tolist()
    for index, layer in enumerate(net.layers):
        assert isinstance(layer, MaskedLinear)
        weight, bias = layer.weight.tolist(), layer.bias.tolist()
        count, last = len(bias), index == len(net.layers) - 1
        allowed = [place[u % net.dim] if last else math.floor(u * net.dim / count) for u in range(count)]
        sums = []
        for u in range(count):
            total = bias[u] + (offsets[u] if index == 0 and offsets else 0.0)
            for v, value in enumerate(values):
                if seen[v] <= allowed[u]:
                    total += weight[u][v] * value
            sums.append(total)
        values = sums if last else [net.activation(torch.tensor(s, dtype=torch.float64)).item() for s in sums]
        seen = allowed
    return torch.tensor(values, dtype=torch.float64).view(net.outputs, net.dim).T


@pytest.mark.parametrize(("dim", "hidden", "context_size"), [(1, (3,), 2), (3, (), 2), (3, (), 0), (4, (6,), 0),
    (4, (5, 9), 2), (3, (2,), 1), (5, (7, 3, 8), 2), (2, (260,), 1)])  # fmt: skip
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_autoregressive_gate_is_the_paper_s(
    dim: int,
    hidden: Sequence[int],
    context_size: int,
    shuffled: bool,  # noqa: FBT001
) -> None:
    """Kingma et al. (2016), algorithm 1: m, s = net(z, h); s = sigmoid(s); z = s z + (1 - s) m; log_det = sum log s."""
    order = torch.randperm(dim).tolist() if shuffled else None
    step = Autoregressive(dim, context_size, hidden, order=order).double()
    push(step, Case(seed=1, push=0.3))
    z = torch.randn(3, dim, dtype=torch.float64)
    context = torch.randn(3, context_size, dtype=torch.float64) if context_size else None
    image, log_det = step(z, context)
    image, log_det = image.detach(), log_det.detach()
    for row in range(3):
        turn = order or list(range(dim))
        numbers = naive_made(step.net, z[row], None if context is None else context[row], turn)
        total = 0.0
        for variable in range(dim):
            raw, mean = numbers[variable].tolist()
            s = 1 / (1 + math.exp(-(2 + 4 * math.tanh(raw / 4))))
            expected = s * float(z[row, variable]) + (1 - s) * 1e3 * math.tanh(mean / 1e3)
            assert float(image[row, variable]) == pytest.approx(expected, rel=1e-11, abs=1e-11)
            total += math.log(s)
        assert float(log_det[row]) == pytest.approx(total, rel=1e-11, abs=1e-11)


def test_masked_linear_equals_the_full_masked_product() -> None:
    for reads, width in [(50, 1), (50, 300), (50, 1100), (600, 700)]:
        units = sorted(torch.randint(0, 41, (width,)).tolist())
        rising = sorted(torch.randint(0, 41, (reads,)).tolist())
        for inputs, groups in [(rising, 1), (rising[::-1], 2), (torch.randint(0, 41, (reads,)).tolist(), 1)]:
            layer = MaskedLinear(inputs, units, groups).double()
            x = torch.randn(2, 3, reads, dtype=torch.float64)
            mask = torch.tensor([[float(d <= e) for d in inputs] for e in units * groups], dtype=torch.float64)
            torch.testing.assert_close(layer(x), x @ (layer.weight * mask).T + layer.bias)


def test_gate_inverse_undoes_gate_for_given_numbers() -> None:
    z, raw, mean = (3 * torch.randn(7, 4, dtype=torch.float64) for _ in range(3))
    logit, mean = gate_parameters(raw, mean)
    image, log_det = gate(z, logit, mean)
    s = torch.sigmoid(logit)
    torch.testing.assert_close(image, s * z + (1 - s) * mean)
    torch.testing.assert_close(log_det, s.log().sum(-1))
    back, log_det_back = gate_inverse(image, logit, mean)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_det_back, -log_det)


def test_gate_parameters_are_bounded_softly() -> None:
    raw = torch.tensor([0.0, 1e-3, 1e6, -1e6], dtype=torch.float64, requires_grad=True)
    logit, mean = gate_parameters(raw, raw)
    torch.testing.assert_close(logit, torch.tensor([2.0, 2.001, 6.0, -2.0], dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(mean, torch.tensor([0.0, 1e-3, 1e3, -1e3], dtype=torch.float64), rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(logit.sum(), raw)
    assert slope[0] == 1


def test_affine_is_loc_plus_scale_times_z() -> None:
    z, loc, raw = (2 * torch.randn(6, 3, dtype=torch.float64) for _ in range(3))
    scale = torch.log1p(torch.exp(raw + math.log(math.expm1(0.999)))) + 1e-3
    image, log_det = Affine(3)(z, torch.cat([loc, raw], -1))
    torch.testing.assert_close(image, loc + scale * z)
    torch.testing.assert_close(log_det, scale.log().sum(-1))


def test_scales_are_positive_and_bounded() -> None:
    raw = torch.tensor([-1e6, -30.0, 0.0, 5.0, 30.0, 1e6], dtype=torch.float64)
    soft = Affine(1)(torch.ones(6, 1, dtype=torch.float64), torch.stack([torch.zeros_like(raw), raw], -1))[0][:, 0]
    torch.testing.assert_close(soft[[0, 2]], torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert soft[-1] == pytest.approx(1e6, rel=1e-5)
    log_var = 2 * log_var_scale(raw).log()
    torch.testing.assert_close(
        log_var[[0, 2, 3, 5]], torch.tensor([-20.0, 0, 5, 20], dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert log_var_scale(torch.zeros(())) == 1


def test_unit_lower_triangular_fills_row_by_row() -> None:
    entries = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    image, log_det = UnitLowerTriangular(3)(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), entries)
    assert image.tolist() == [1.0, 2.0 + 10.0, 3.0 + 50.0 + 100.0]  # a transpose would give 1 + 20 + 300, ...
    assert log_det == 0


def test_unit_lower_triangular_is_a_matrix_product() -> None:
    dim = 7
    z, entries = torch.randn(5, dim, dtype=torch.float64), torch.randn(5, dim * (dim - 1) // 2, dtype=torch.float64)
    matrix = torch.eye(dim, dtype=torch.float64).repeat(5, 1, 1)
    index = 0
    for row in range(dim):
        for column in range(row):
            matrix[:, row, column] = entries[:, index]
            index += 1
    image, _ = UnitLowerTriangular(dim)(z, entries)
    torch.testing.assert_close(image, (matrix @ z.unsqueeze(-1)).squeeze(-1))
    back, _ = UnitLowerTriangular(dim).inverse(image, entries)
    torch.testing.assert_close(back, z)


def test_permutations_move_variables_where_they_say() -> None:
    z = torch.tensor([10.0, 20.0, 30.0])
    assert Permute([2, 0, 1])(z)[0].tolist() == [30.0, 10.0, 20.0]
    assert Permute([2, 0, 1]).inverse(z)[0].tolist() == [20.0, 30.0, 10.0]
    assert Reverse(3)(z)[0].tolist() == Reverse(3).inverse(z)[0].tolist() == [30.0, 20.0, 10.0]


def test_scale_multiplies() -> None:
    image, log_det = Scale(3, 0.5)(torch.tensor([1.0, -2.0, 4.0]))
    assert image.tolist() == [0.5, -1.0, 2.0]
    assert log_det.item() == pytest.approx(3 * math.log(0.5))


# ------------------------------------------------------------------------------------------ B21: composition by hand


def test_chain_applies_its_steps_in_list_order_each_on_its_own_context() -> None:
    affine, planar_, lower = Affine(3), Planar(3), UnitLowerTriangular(3)
    flow = Chain(affine, Reverse(3), planar_, lower).double()
    z, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, flow.context_size, dtype=torch.float64)
    assert flow.context_size == 6 + 7 + 3
    one, first = affine(z, context[:, :6])
    two, second = planar_(one.flip(-1), context[:, 6:13])
    three, third = lower(two, context[:, 13:])
    image, log_det = flow(z, context)
    torch.testing.assert_close(image, three)
    torch.testing.assert_close(log_det, first + second + third)
    initial = torch.cat([step.initial_context() for step in (affine, planar_, lower)])
    torch.testing.assert_close(flow.initial_context(), initial)


def test_shared_hands_every_step_the_same_context() -> None:
    steps = [Autoregressive(3, 2, (5,)), Reverse(3), Autoregressive(3, 2, (5,))]
    flow = push(Shared(*steps).double(), Case(seed=3, push=0.3))
    z, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    one, first = steps[0](z, context)
    two, second = steps[2](one.flip(-1), context)
    torch.testing.assert_close(flow(z, context), (two, first + second))


def test_learned_conditioned_and_inverse_hand_over_the_context() -> None:
    step, z = Planar(3), torch.randn(4, 3)
    learned, conditioned = Learned(step), Conditioned(step, 2)
    with torch.no_grad():
        learned.context.copy_(torch.randn(7))
        conditioned.head.weight.copy_(torch.randn(7, 2))
    torch.testing.assert_close(learned(z), step(z, learned.context))
    features = torch.randn(4, 2)
    context = features @ conditioned.head.weight.T + conditioned.head.bias
    torch.testing.assert_close(conditioned(z, features), step(z, context))
    torch.testing.assert_close(Inverse(step)(z, context), step.inverse(z, context))
    torch.testing.assert_close(cast(Bijector, Inverse(step)).inverse(z, context), step(z, context))


def test_a_chain_sums_log_dets_in_float64() -> None:
    """Fifty float32 terms near 1e4 and -1e4: summed in float32 they leave 1e-3 and more."""
    raw = [1e4 * torch.randn(1).item() for _ in range(50)]
    flow = Chain(*(_Constant(value) for value in raw))
    rounded = [torch.tensor(value).item() for value in raw]
    _, log_det = flow(torch.zeros(1))
    assert log_det.dtype == torch.float32
    assert log_det.item() == torch.tensor(math.fsum(rounded)).item()


class _Constant(Bijector):
    """The identity with a made-up log-det."""

    def __init__(self, value: float) -> None:
        super().__init__(1)
        self.value = value

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z, z.new_tensor(self.value)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z, z.new_tensor(-self.value)


def test_nested_chains_are_the_flat_chain() -> None:
    parts = [Affine(3), Planar(3), Reverse(3), UnitLowerTriangular(3)]
    flat, nested = Chain(*parts).double(), Chain(Chain(*parts[:2]), Chain(Chain(parts[2]), parts[3])).double()
    z, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, flat.context_size, dtype=torch.float64)
    for name, function in directions(flat).items():
        torch.testing.assert_close(function(z, context), directions(nested)[name](z, context))


@given(case=cases(dim=4, push=0.3))
def test_planar_steps_of_a_chain_see_each_other_s_output(case: Case) -> None:
    """The log-det of a chain is the sum along the path, here recomputed with the book's formula at every point."""
    flow = Chain(*(Planar(4) for _ in range(3))).double()
    generator = torch.Generator().manual_seed(case.seed)
    z = torch.randn(4, dtype=torch.float64, generator=generator)
    context = torch.randn(27, dtype=torch.float64, generator=generator)
    point, total = z, torch.zeros((), dtype=torch.float64)
    for low, high in pairwise(range(0, 28, 9)):
        u, w, b = context[low:high].split([4, 4, 1])
        point, log_det = planar_by_the_book(point, u, w, b)
        total = total + log_det
    torch.testing.assert_close(flow(z, context), (point, total), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("samples", [(), (1,), (3, 2)])
def test_planar_chain_is_its_steps_one_after_the_other(samples: tuple[int, ...]) -> None:
    """Values and gradients, with u far on both sides of the constraint, for one and many samples an example."""
    flow = Chain(Affine(3), *(Planar(3) for _ in range(5)), Reverse(3), Planar(3), Planar(3)).double()
    z = leaf(torch.randn(*samples, 4, 3, dtype=torch.float64))
    context = leaf(3 * torch.randn(4, flow.context_size, dtype=torch.float64))
    point, total, place = z, torch.zeros((), dtype=torch.float64), 0
    for step in flow:
        part = context[:, place : place + step.context_size] if step.context_size else None
        point, log_det = step(point, part)
        total, place = total + log_det, place + step.context_size
    for found, wanted in zip(flow(z, context), (point, total), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        weights = torch.linspace(0.5, 1.5, found.numel(), dtype=torch.float64).view_as(found)
        pairs = [torch.autograd.grad((weights * out).sum(), (z, context), retain_graph=True) for out in (found, wanted)]
        torch.testing.assert_close(*pairs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["planar_flow", "full_covariance"])
def test_derivatives_that_are_written_out_have_derivatives(name: str) -> None:
    """Forward mode, reverse mode and their second derivatives, to the context too."""
    flow, z, context = draw(BY_NAME[name], Case(3, seed=3), batch=(2,))

    def both(z: Tensor, context: Tensor) -> Tensor:
        image, log_det = flow(z, context)
        return torch.cat([image, log_det.unsqueeze(-1)], -1)

    inputs = (leaf(z), leaf(cast(Tensor, context)))
    assert torch.autograd.gradcheck(both, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, inputs)


def test_a_planar_step_with_a_map_of_its_own_is_not_joined() -> None:
    class Still(Planar):
        def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            return z, z.new_zeros(())

    z = torch.randn(4, 3)
    assert torch.equal(Chain(Still(3), Still(3))(z, torch.randn(4, 14))[0], z)
