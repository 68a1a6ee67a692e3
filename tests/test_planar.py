"""The planar flow against its paper's formula, at its constraint and at its floors."""

import math
from collections.abc import Callable
from itertools import pairwise

import exact
import pytest
import torch
from hypothesis import given
from registry import BY_NAME, Case, backward, cases, draw, size
from torch import Tensor

from flowpost import Affine, Bijector, Chain, Planar, Reverse
from flowpost.functional import planar, planar_inverse

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


Map = Callable[..., tuple[Tensor, Tensor]]


def directions(step: Bijector) -> dict[str, Map]:
    """Both, for points of the domain."""
    return {"forward": step, "inverse": backward(step)}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("b", [0.0, 1e-3, -0.02, 0.3])
def test_log_det_at_the_floor_of_one_dimension(b: float) -> None:
    """There cond is 1 however flat the map is: floors of map and log-det 1e-13 apart, by k's rounding, fail."""
    z, context = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[-50.0, 1.0, b]], dtype=torch.float64)
    for function in directions(Planar(1)).values():
        z = exact.judge(function, z, context, size(Planar(1)))


def test_known_spares_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    step, z, context = draw(BY_NAME["planar_flow"], Case(3))
    image = step(z, context)[0]

    def refuse(*_: object) -> None:
        raise AssertionError("a search was run")

    monkeypatch.setattr("flowpost.bijectors.planar.tanh_root", refuse)
    back, _ = step.inverse(image, context, preimage=z)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-12)


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


def one_by_one(flow: Chain, direction: str, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The steps, each called alone."""
    total, parts = torch.zeros((), dtype=torch.float64), context.split([step.context_size for step in flow], -1)
    pairs = [(step, part if step.context_size else None) for step, part in zip(flow, parts, strict=True)]
    for step, part in pairs if direction == "forward" else reversed(pairs):
        z, log_det = getattr(step, direction)(z, part)
        total = total + log_det
    return z, total


@pytest.mark.parametrize("direction", ["forward", "inverse", "preimage"])
@pytest.mark.parametrize("samples", [(), (1,), (3, 2)])
def test_planar_chain_is_its_steps_one_after_the_other(samples: tuple[int, ...], direction: str) -> None:
    """Values and gradients, with u far on both sides of the constraint, for one and many samples an example."""
    flow = Chain(Affine(3), *(Planar(3) for _ in range(5)), Reverse(3), Planar(3), Planar(3)).double()
    z = leaf(torch.randn(*samples, 4, 3, dtype=torch.float64))
    context = leaf(3 * torch.randn(4, flow.context_size, dtype=torch.float64))
    known = None
    if direction == "preimage":
        known, direction = z.detach(), "inverse"
        z = leaf(flow(z, context)[0])
    expected = one_by_one(flow, direction, z, context)
    found = flow(z, context) if direction == "forward" else flow.inverse(z, context, preimage=known)
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)
        weights = torch.linspace(0.5, 1.5, mine.numel(), dtype=torch.float64).view_as(mine)
        pairs = [torch.autograd.grad((weights * out).sum(), (z, context), retain_graph=True) for out in (mine, wanted)]
        torch.testing.assert_close(*pairs, rtol=1e-7, atol=1e-7)


def test_a_run_of_planar_steps_is_undone_with_exact_second_derivatives() -> None:
    flow = Chain(*(Planar(2) for _ in range(3))).double()
    z, context = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, flow.context_size, dtype=torch.float64)

    def undone(z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return flow.inverse(z, context)

    given = z.requires_grad_(), context.requires_grad_()
    assert torch.autograd.gradcheck(undone, given)
    assert torch.autograd.gradgradcheck(undone, given)


def test_a_planar_step_with_a_map_of_its_own_is_not_joined() -> None:
    class Still(Planar):
        def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            return z, z.new_zeros(())

    class Back(Planar):
        def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
            return z, z.new_zeros(())

    z, context = torch.randn(4, 3), torch.randn(4, 14)
    assert torch.equal(Chain(Still(3), Still(3))(z, context)[0], z)
    assert torch.equal(Chain(Back(3), Back(3)).inverse(z, context)[0], z)
