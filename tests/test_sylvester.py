"""Sylvester flows: the paper's formula by explicit matrices, its special cases, and the triangle of roots."""

import math
from collections.abc import Callable, Mapping

import exact
import pytest
import torch
from registry import jacobian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flowpost import Sylvester
from flowpost.functional import planar, sylvester, sylvester_inverse
from flowpost.numerics import squares
from flowpost.numerics.tanh_roots import tanh_roots

FORMS = {
    "orthogonal": lambda dim=5: Sylvester(dim, (dim + 1) // 2),
    "householder": lambda dim=5: Sylvester(dim, dim, 2),
    "more reflections than variables": lambda dim=5: Sylvester(dim, dim, dim + 3),
    "triangular": lambda dim=5: Sylvester(dim, dim, 0),
    "triangular, not all variables": lambda dim=5: Sylvester(dim, (dim + 1) // 2, 0),
    "rank 1": lambda dim=5: Sylvester(dim, 1),
}
every_form = pytest.mark.parametrize("form", FORMS)


def m(a: float) -> float:
    return math.log1p((1 - math.exp(-(1 - 1e-3))) * math.expm1(a))


def bounded(number: float) -> float:
    return 1e3 * math.tanh(number / 1e3)


def factors(step: Sylvester, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, R1, R2 and b of one example, number by number."""
    dim, rank, numbers = step.dim, step.rank, iter(context.tolist())
    q = torch.eye(dim, dtype=torch.float64)
    for k in range(step.reflections):
        v = torch.tensor([1.0 if i == k % dim else next(numbers) for i in range(dim)], dtype=torch.float64)
        q = q @ (torch.eye(dim, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    r1, r2 = torch.zeros(2, rank, rank, dtype=torch.float64)
    raw = []
    for i in range(rank):
        for j in range(rank):
            number = bounded(next(numbers))
            if i < j:
                r1[i, j] = number
            elif i > j:
                r2[j, i] = number
            else:
                raw.append(number)
    for i in range(rank):
        r2[i, i] = 1 + m(bounded(next(numbers)))
        r1[i, i] = m(raw[i] * float(r2[i, i])) / r2[i, i]
    return q[:, :rank], r1, r2, torch.tensor([*numbers], dtype=torch.float64)


def by_the_book(step: Sylvester, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Van den Berg et al. (2018), one example: the map, and the determinant of its whole Jacobian, ``dim x dim``."""
    q, r1, r2, b = factors(step, context)
    inner = r2 @ q.T @ z + b
    matrix = torch.eye(step.dim, dtype=z.dtype) + q @ r1 @ torch.diag(1 - torch.tanh(inner) ** 2) @ r2 @ q.T
    return z + q @ r1 @ torch.tanh(inner), torch.linalg.slogdet(matrix)[1]


def draw(step: Sylvester, *batch: int, scale: float = 1.0) -> Tensor:
    return step.initial_context().double() + scale * torch.randn(*batch, step.context_size, dtype=torch.float64)


@every_form
def test_it_is_the_paper_s(form: str) -> None:
    """One map for each example, the same for all of its samples."""
    step = FORMS[form]()
    z, context = torch.randn(3, 6, 5, dtype=torch.float64), draw(step, 6, scale=2)
    image, log_det = step(z, context)
    for s in range(3):
        for i in range(6):
            expected = by_the_book(step, z[s, i], context[i])
            torch.testing.assert_close((image[s, i], log_det[s, i]), expected, rtol=1e-11, atol=1e-11)
    assert log_det.abs().max() > 0.1


@every_form
def test_it_moves_along_the_columns_of_q_alone(form: str) -> None:
    step = FORMS[form]()
    z, context = torch.randn(4, 5, dtype=torch.float64), draw(step)
    q = factors(step, context)[0]
    torch.testing.assert_close(q.T @ q, torch.eye(step.rank, dtype=torch.float64), rtol=0, atol=1e-13)
    move = step(z, context)[0] - z
    torch.testing.assert_close(move @ q @ q.T, move, rtol=0, atol=1e-13)


def test_rank_one_is_a_planar_step() -> None:
    step = Sylvester(4, 1)
    z, context = torch.randn(6, 4, dtype=torch.float64), draw(step, 6, scale=3)
    image, log_det = step(z, context)
    for i in range(6):
        q, _, r2, b = factors(step, context[i])
        along, raw = q[:, 0], bounded(float(context[i, 3]))
        expected = planar(z[i], raw * along, r2[0, 0] * along, b)
        torch.testing.assert_close((image[i], log_det[i]), expected, rtol=1e-12, atol=1e-12)


def test_the_room_above_the_floor_is_not_that_of_the_product() -> None:
    """``1 + r1 r2`` of the rounded product is off by up to 1.7e-13, as autodiff is: five times the contract's bound."""
    step = Sylvester(1, 1, 0)
    raw = torch.linspace(-1, 1, 12, dtype=torch.float64)
    for a in (-50.0, -12.0, -9.0):
        context = torch.stack([torch.full_like(raw, a), raw, torch.zeros_like(raw)], -1)
        z = torch.zeros(12, 1, dtype=torch.float64)
        expected = exact.slogdet(step, z, context)[1]
        torch.testing.assert_close(step(z, context)[1], expected, rtol=0, atol=8 * torch.finfo(z.dtype).eps * 18)


@pytest.mark.parametrize("dim", [pytest.param(1, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("form", ["orthogonal", "householder", "triangular"])
def test_the_log_det_at_the_floor(dim: int, form: str) -> None:
    """Every gain at its lowest: where the map is flattest, and beside it; both directions, to the contract's bound."""
    step = FORMS[form](dim)
    context = step.initial_context().double()
    square = context[step.reflections * (dim - 1) :][: step.rank**2].view(step.rank, step.rank)
    square.diagonal().fill_(-50)
    square.add_(0.1 * torch.randn_like(square).triu(1))
    for b in (0.0, 1e-3, -0.02, 0.3):
        context[-step.rank :] = b
        z = torch.zeros(1, dim, dtype=torch.float64)
        for function in (step, step.inverse):
            z = exact.judge(function, z, context.unsqueeze(0), dim + 16)


def test_a_singular_r2() -> None:
    """Zeros on R2's diagonal: what is said of the inverse does not need R2's own."""
    q = torch.linalg.qr(torch.randn(7, 5, 3, dtype=torch.float64))[0]
    r1, r2 = torch.randn(2, 7, 3, 3, dtype=torch.float64).triu()
    r1.diagonal(dim1=-2, dim2=-1).copy_(torch.tensor([0.7, 3.0, -5.0]))
    r2.diagonal(dim1=-2, dim2=-1).copy_(torch.tensor([0.0, -0.3, 0.0]))
    z, b = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 3, dtype=torch.float64)
    image, log_det = sylvester(z, q, r1, r2, b)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian(image, z))[1], rtol=0, atol=1e-12)
    back, log_det_back = sylvester_inverse(image, q, r1, r2, b)
    torch.testing.assert_close((back, log_det_back), (z, -log_det), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_tanh_has_rounded_to_one(dtype: torch.dtype) -> None:
    """Slopes of ``4 e^-20`` times gains of 1e9: by ``1 - tanh^2`` the log-det would be 0 in float32."""
    r1, r2 = 1e9 * torch.eye(2, dtype=dtype), torch.eye(2, dtype=dtype)
    _, log_det = sylvester(torch.full((2,), 10.0, dtype=dtype), None, r1, r2, torch.zeros(2, dtype=dtype))
    expected = 2 * math.log1p(1e9 / math.cosh(10) ** 2)
    assert expected > 4
    assert log_det.item() == pytest.approx(expected, rel=16 * torch.finfo(dtype).eps)


@every_form
def test_a_fresh_step_is_exactly_the_identity_and_can_learn(form: str) -> None:
    """R1 = 0 in random directions; two steps have different ones; R1 has a gradient everywhere."""
    step, other = FORMS[form](), FORMS[form]()
    z = torch.randn(50, 5)
    context = step.initial_context().requires_grad_()
    image, log_det = step(z, context)
    assert torch.equal(image, z)
    assert (log_det == 0).all()
    assert not torch.equal(step.initial_context(), other.initial_context())
    (gradient,) = torch.autograd.grad((z * image.roll(1, -1)).sum() + log_det.sum(), context)
    square = gradient[step.reflections * 4 :][: step.rank**2].view(step.rank, step.rank)
    assert (square.triu()[torch.ones_like(square).triu().bool()] != 0).all()
    assert (square.tril(-1) == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_contexts_of_any_size_keep_it_increasing(scale: float) -> None:
    """``1 + r1_ii r2_ii`` is never below its floor: the triangle of the step that is one has a positive diagonal."""
    step = Sylvester(6, 6, 0)
    z = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    image, log_det = step(z, draw(step, 40, scale=scale))
    matrix = jacobian(image, z)
    assert (matrix.tril(-1) == 0).all()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    assert (diagonal > 0.99e-3).all()
    torch.testing.assert_close(log_det, diagonal.log().sum(-1), rtol=1e-9, atol=1e-9)


def test_nothing_is_done_for_each_sample_that_is_the_example_s() -> None:
    """Arithmetic grows with the samples by the products of their own points alone."""
    step = Sylvester(6, 4)
    context = draw(step, 3).float()

    def flops(function: Callable[..., object], samples: int) -> int:
        z = torch.randn(samples, 3, 6)
        with FlopCounterMode(display=False) as counter:
            function(z)
        return counter.get_total_flops()

    def forward(z: Tensor) -> object:
        return step(z, context)

    def inverse(z: Tensor) -> object:
        return step.inverse(z, context)

    point = 2 * 3 * (2 * 6 * 4 + 2 * 4 * 4)
    assert flops(forward, 50) - flops(forward, 10) == 40 * point
    newton = 2 * 3 * 2 * 4 * 4
    assert flops(inverse, 50) - flops(inverse, 10) == 40 * (point + newton)


class Large(TorchDispatchMode):
    """Counts the tensors of at least so many numbers that are written."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        made = [] if func.is_view else tree_leaves(found)  # pyright: ignore[reportFunctionMemberAccess]
        self.count += sum(each.numel() >= self.least for each in made if isinstance(each, Tensor))
        return found


@pytest.mark.parametrize(("reflections", "most"), [(0, 15), (16, 46)])
def test_a_training_step_writes_few_tensors_as_large_as_its_matrices(reflections: int, most: int) -> None:
    """On a CPU they are what a step of many variables costs; they were 25 once, and 64 with 16 reflections."""
    step = Sylvester(16, 16, reflections)
    z, context = torch.randn(4, 16), draw(step, 4).float().requires_grad_()
    with Large(4 * 16 * 15) as large:
        image, log_det = step(z, context)
        torch.autograd.grad((image, log_det), context, (torch.ones_like(image), torch.ones_like(log_det)))
    assert large.count <= most


# ------------------------------------------------------------------------------------------------ the node of a pass


def of_both(step: Sylvester, z: Tensor, context: Tensor) -> list[tuple[Tensor, ...]]:
    """Image, log-det and the gradients at z and context of a sum of both: by the plain operations, and by the node."""
    weights = torch.randn_like(z), torch.randn_like(z[..., 0])

    def all_of(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        found = function(z, context)
        return *found, *torch.autograd.grad(found, (z, context), weights)

    return [all_of(step._plain_forward), all_of(step)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("batch", [(7,), (), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("form", [*FORMS, "two runs of reflections"])
def test_the_way_back_by_hand_is_autograd_s(form: str, batch: tuple[int, ...], scale: float) -> None:
    step = Sylvester(40, 40) if form == "two runs of reflections" else FORMS[form]()
    z = torch.randn(*batch, step.dim, dtype=torch.float64, requires_grad=True)
    expected, found = of_both(step, z, draw(step, *batch, scale=scale).requires_grad_())
    size = max((each.abs().max().item() for each in expected if each.numel()), default=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13 * max(1.0, size))


def test_the_node_is_for_one_point_an_example() -> None:
    step = Sylvester(5, 3)
    context = draw(step, 4).requires_grad_()
    nodes = [step(torch.randn(*batch, 5, dtype=torch.float64), context)[0].grad_fn for batch in [(4,), (2, 4)]]
    assert [type(node).__name__ for node in nodes] == ["_PassBackward", "AddBackward0"]


def test_a_few_examples_at_a_time_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many variables are gone through in portions, of which the last is shorter."""
    step = Sylvester(5, 5, 2)
    z, context = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), draw(step, 7).requires_grad_()
    torch.manual_seed(1)
    whole = of_both(step, z, context)[1]
    monkeypatch.setattr(squares, "_AT_ONCE", 3 * 5**2)
    torch.manual_seed(1)
    torch.testing.assert_close(of_both(step, z, context)[1], whole, rtol=1e-14, atol=1e-14)


@every_form
def test_second_derivatives_are_those_of_the_plain_operations(form: str) -> None:
    """One after the other, and many at once; a context that was made of z is not counted twice."""
    step = FORMS[form]()
    z, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, step.context_size, dtype=torch.float64)

    def total(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], z: Tensor) -> Tensor:
        image, log_det = function(z, 0.3 * z.tanh() @ weight + step.initial_context().double())
        return (image.sin().sum(-1) + log_det).sum()

    expected = torch.func.hessian(lambda z: total(step._plain_forward, z))(z)
    torch.testing.assert_close(torch.func.hessian(lambda z: total(step, z))(z), expected)
    for vectorize in (False, True):
        found = torch.autograd.functional.hessian(lambda z: total(step, z), z, vectorize=vectorize)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_only_what_is_asked_for_is_differentiated() -> None:
    """A z alone, as of a path gradient, or a context alone, as of the first step's noise."""
    step = Sylvester(5, 3)
    z, context = torch.randn(4, 5, dtype=torch.float64), draw(step, 4)

    def total(z: Tensor, context: Tensor) -> Tensor:
        image, log_det = step(z, context)
        return image.sin().sum() + log_det.sum()

    both = torch.autograd.grad(total(z.requires_grad_(), context.requires_grad_()), (z, context))
    for k in (0, 1):
        inputs = [each.detach().requires_grad_(i == k) for i, each in enumerate((z, context))]
        (found,) = torch.autograd.grad(total(*inputs), inputs[k])
        torch.testing.assert_close(found, both[k], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- the triangle of roots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roots_at_all_gains(dtype: torch.dtype) -> None:
    gains = torch.tensor([-0.999, -0.5, 0.0, 1.0, 1e3, 1e6], dtype=dtype)
    matrix = torch.randn(300, 6, 6, dtype=dtype).triu(1) + torch.diag(gains)
    target = 10 ** (4 * torch.rand(300, 6, dtype=dtype) - 2) * torch.randn(300, 6, dtype=dtype).sign()
    y = tanh_roots(matrix, target)
    value = torch.tanh(y).unsqueeze(-1)
    residual = (y + (matrix @ value).squeeze(-1) - target).abs()
    size = y.abs() + (matrix.abs() @ value.abs()).squeeze(-1) + target.abs()
    assert (residual <= 8 * torch.finfo(dtype).eps * size).all()


AXES = [(0, 0), (0, None), (None, 0)]


class Roots(nn.Module):
    def forward(self, gain: Tensor, target: Tensor) -> Tensor:
        return tanh_roots(gain, target)


@pytest.mark.compile
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("gains", "targets"), [((), ()), ((2,), (3, 2)), ((3, 2), (2,)), ((0,), (0,))], ids=str)
def test_a_compiler_s_operator_is_the_search(
    axes: tuple[int | None, int | None], gains: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    """Whichever is mapped over; and an exported program, which may be loaded without flowpost, has none."""
    gain, target = torch.randn(4, *gains, 3, 3, dtype=torch.float64).triu(), torch.randn(4, *targets, 3).double()
    gain.diagonal(dim1=-2, dim2=-1).abs_()
    inputs = tuple(x if axis == 0 else x[0] for x, axis in zip((gain, target), axes, strict=True))
    mapped = torch.func.vmap(tanh_roots, in_dims=axes)
    torch._dynamo.reset()
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), mapped(*inputs), rtol=0, atol=0)
    rows = [tanh_roots(*(x[i] if a == 0 else x for x, a in zip(inputs, axes, strict=True))) for i in range(4)]
    torch.testing.assert_close(mapped(*inputs), torch.stack(rows), rtol=0, atol=0)
    program = torch.export.export(Roots(), (gain[0], target[0]))
    assert torch.ops.flowpost.tanh_roots.default not in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(gain[0], target[0]), tanh_roots(gain[0], target[0]), rtol=0, atol=0)


def test_the_operator_keeps_its_word() -> None:
    inputs = torch.eye(3).expand(2, 3, 3).contiguous(), torch.randn(5, 2, 3)
    torch.library.opcheck(torch.ops.flowpost.tanh_roots.default, inputs)
