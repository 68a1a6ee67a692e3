"""The rational-quadratic spline against Durkan et al. (2019) written naively, its knots, its ends and its rounding."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from tape import OnMeta
from torch import Tensor

from flowpost import Spline
from flowpost.functional import rational_quadratic, rational_quadratic_inverse, spline_parameters
from flowpost.numerics.knots import knot_frame

BINS, BOUND = 5, 3.0
SHARES = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).unsqueeze(-1)
RISES = torch.tensor([0.5, 0.375, 0.125], dtype=torch.float64).unsqueeze(-1)
SLOPES = torch.tensor([4.0, 0.25], dtype=torch.float64).unsqueeze(-1)
KNOTS = [(-4.0, -4.0, 1.0), (-2.0, 0.0, 4.0), (0.0, 3.0, 0.25), (4.0, 4.0, 1.0)]
"""Of three bins on [-4, 4] with those shares: x, y and the slope."""


def draw(points: int = 60, scale: float = 2.0, bins: int = BINS) -> tuple[Spline, Tensor, Tensor]:
    step = Spline(3, bins, BOUND)
    z = 1.5 * torch.randn(points, 3, dtype=torch.float64)
    return step, z, scale * torch.randn(points, step.context_size, dtype=torch.float64)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def knots_by_the_book(raw: list[float], bins: int, bound: float) -> tuple[list[float], list[float], list[float]]:
    """Section 3.1 with our floors and bound: x, y and slopes at all knots, from one variable's raw numbers."""
    floor, least = 1e-2, 1e-3
    sides = []
    for part in (raw[:bins], raw[bins : 2 * bins]):
        total = sum(math.exp(value) for value in part)
        sizes = [floor + (1 - bins * floor) * math.exp(value) / total for value in part]
        sides.append([-bound + 2 * bound * sum(sizes[:k]) for k in range(bins + 1)])
    shift = math.log(math.exp(1 - least) - 1)
    bounded = [100 * math.tanh(value / 100) for value in raw[2 * bins :]]
    return *sides, [1.0, *(math.log(1 + math.exp(value + shift)) + least for value in bounded), 1.0]


def by_the_book(z: float, raw: list[float], bins: int, bound: float) -> tuple[float, float]:
    """Equations 4 and 5 for one number: its image and the slope there."""
    if abs(z) >= bound:
        return z, 1.0
    x, y, d = knots_by_the_book(raw, bins, bound)
    k = max(k for k in range(bins) if x[k] <= z)
    s = (y[k + 1] - y[k]) / (x[k + 1] - x[k])
    xi = (z - x[k]) / (x[k + 1] - x[k])
    below = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
    image = y[k] + (y[k + 1] - y[k]) * (s * xi**2 + d[k] * xi * (1 - xi)) / below
    slope = s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / below**2
    return image, slope


def back_by_the_book(image: float, raw: list[float], bins: int, bound: float) -> float:
    """Equations 6 to 8: the root of a quadratic."""
    if abs(image) >= bound:
        return image
    x, y, d = knots_by_the_book(raw, bins, bound)
    k = max(k for k in range(bins) if y[k] <= image)
    s, rise = (y[k + 1] - y[k]) / (x[k + 1] - x[k]), y[k + 1] - y[k]
    excess = (image - y[k]) * (d[k + 1] + d[k] - 2 * s)
    a, b, c = rise * (s - d[k]) + excess, rise * d[k] - excess, -s * (image - y[k])
    return x[k] + (x[k + 1] - x[k]) * 2 * c / (-b - math.sqrt(b * b - 4 * a * c))


@pytest.mark.parametrize("bins", [2, 3, 8])
def test_spline_is_the_paper_s(bins: int) -> None:
    step, z, context = draw(bins=bins)
    image, log_det = step(z, context)
    back, log_det_back = step.inverse(z, context)
    for row in range(len(z)):
        total, total_back = 0.0, 0.0
        for variable in range(3):
            raw = context[row].view(-1, 3)[:, variable].tolist()
            expected, slope = by_the_book(float(z[row, variable]), raw, bins, BOUND)
            assert float(image[row, variable]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
            total += math.log(slope)
            root = back_by_the_book(float(z[row, variable]), raw, bins, BOUND)
            assert float(back[row, variable]) == pytest.approx(root, rel=1e-10, abs=1e-10)
            total_back -= math.log(by_the_book(float(back[row, variable]), raw, bins, BOUND)[1])
        assert float(log_det[row]) == pytest.approx(total, rel=1e-11, abs=1e-11)
        assert float(log_det_back[row]) == pytest.approx(total_back, rel=1e-9, abs=1e-9)


def test_the_knots_are_met_with_their_slopes_from_both_sides() -> None:
    for x, y, slope in KNOTS:
        z = torch.tensor([x - 1e-9, x, x + 1e-9], dtype=torch.float64).unsqueeze(-1)
        image, log_det = rational_quadratic(z, SHARES, RISES, SLOPES, 4.0)
        assert image[1].item() == y
        torch.testing.assert_close(log_det.exp(), torch.full_like(log_det, slope), rtol=1e-7, atol=0)
        back, log_det_back = rational_quadratic_inverse(image, SHARES, RISES, SLOPES, 4.0)
        assert back[1].item() == x
        torch.testing.assert_close(back, z, rtol=0, atol=1e-14)
        torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_it_is_exactly_the_identity(dtype: torch.dtype) -> None:
    """At the ends too, for shares whose rounded sum is not 1; just inside the log-det is near 0, and none is beyond."""
    step, _, context = draw(points=1, bins=7)
    last = float(torch.nextafter(torch.tensor(BOUND, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    for value in (BOUND, 3.5, 1e6):
        z = torch.tensor([[value], [-value]], dtype=dtype).expand(2, 3)
        for function in (step, step.inverse):
            image, log_det = function(z, context.to(dtype))
            assert torch.equal(image, z)
            assert torch.equal(log_det, torch.zeros_like(log_det))
    z = torch.tensor([[last], [-last]], dtype=dtype).expand(2, 3)
    for function in (step, step.inverse):
        image, log_det = function(z, context.to(dtype))
        assert (image.abs() <= BOUND).all()
        torch.testing.assert_close(image, z, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)
        assert log_det.abs().max() < (1e-3 if dtype == torch.float32 else 1e-11)


def test_a_context_that_is_nan_shows_outside_too() -> None:
    step, z, context = draw(points=2)
    context[1, 0] = math.nan
    for function in (step, step.inverse):
        _, log_det = function(torch.full_like(z, 10.0), context)
        assert log_det.isnan().tolist() == [False, True]


@pytest.mark.parametrize("scale", [0.3, 3.0, 100.0])
def test_it_increases_without_gaps(scale: float) -> None:
    step = Spline(1, BINS, BOUND).double()
    context = scale * torch.randn(20, 1, step.context_size, dtype=torch.float64)
    z = torch.linspace(-3.01, 3.01, 20001, dtype=torch.float64).unsqueeze(-1)
    image, log_det = step(z, context)
    rises = image.diff(dim=1).squeeze(-1)
    assert (rises > 0).all()
    # Each rise is the integral of the slope over the step: a jump of 1e-9 at a knot would show.
    steepest = torch.maximum(log_det[:, 1:], log_det[:, :-1]).exp() * 3.01e-4
    flattest = torch.minimum(log_det[:, 1:], log_det[:, :-1]).exp() * 3.01e-4
    inner = (rises >= flattest * (1 - 1e-2) - 1e-12) & (rises <= steepest * (1 + 1e-2) + 1e-12)
    assert inner.double().mean() > 0.99  # but where the slope has a minimum or maximum between two points


def test_the_zero_context_is_the_identity_and_can_learn() -> None:
    """In float32 to the bit; every number but a common shift of the widths, or of the heights, has a gradient there."""
    for bins in (2, 5, 8):
        step = Spline(2, bins)
        z = torch.linspace(-3.5, 3.5, 141).unsqueeze(-1).expand(-1, 2)
        context = step.initial_context().requires_grad_()
        image, log_det = step(z, context)
        assert torch.equal(image, z)
        assert log_det.abs().max() < 1e-6
        (gradient,) = torch.autograd.grad((z.sin() * image).sum() + (z.cos().sum(-1) * log_det).sum(), context)
        assert (gradient != 0).all()


def test_float32_knots_would_not_do() -> None:
    """In the narrowest bins a knot's rounding is a large part of the bin: the log-det is float64's, rounded once."""
    step = Spline(1, 8)
    context = 3 * torch.randn(50, 1, step.context_size)
    z = torch.linspace(-3, 3, 2001).unsqueeze(-1)
    image, log_det = step(z, context)
    expected = step(z.double(), context.double())
    assert (log_det - expected[1]).abs().max() < 1e-6
    assert (image - expected[0]).abs().max() < 3e-7


def test_steep_ends_of_a_flat_bin_do_not_spoil_its_slope() -> None:
    """There eq. 4, as autodiff differentiates it, loses (slope / s)^2 roundings: 1e-12 at these numbers."""
    flat, slopes = torch.tensor([0.45, 0.01, 0.54], dtype=torch.float64).unsqueeze(-1), column([20.0, 30.0])
    widths = torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64).unsqueeze(-1)
    z = torch.linspace(-2.9, 2.9, 3001, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    image, log_det = rational_quadratic(z, widths, flat, slopes, BOUND)
    (slope,) = torch.autograd.grad(image.sum(), z)
    assert log_det.min() < -10
    torch.testing.assert_close(slope.squeeze(-1).log(), log_det, rtol=0, atol=4e-14)


@pytest.mark.parametrize("end", [0.01, 1.0, 50.0])
def test_the_inverse_near_a_knot_has_all_digits(end: float) -> None:
    """Above a knot at 0 of slope d, ``x = z' / d``; 1 is a linear bin, where the quadratic has no square."""
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    z = column([1e-12, 1e-20, 1e-30])
    back, log_det = rational_quadratic_inverse(z, half, half, column([end]), BOUND)
    torch.testing.assert_close(back, z / end, rtol=1e-7, atol=0)
    torch.testing.assert_close(log_det[1:], torch.full((2,), -math.log(end), dtype=torch.float64))


def test_derivatives_at_knots_are_those_of_a_side() -> None:
    """Where z is a knot, and where the inverse's ``g`` is 0: central differences over 1e-6, of a C1 map, agree."""
    for function in (rational_quadratic, rational_quadratic_inverse):
        places = [knot[0 if function is rational_quadratic else 1] for knot in KNOTS]
        middles = [0.5 * (a + b) for a, b in pairwise(places)]
        z = column([*places, *middles]).requires_grad_()
        image, _ = function(z, SHARES, RISES, SLOPES, 4.0)
        (found,) = torch.autograd.grad(image.sum(), z)
        with torch.no_grad():
            high, low = (function(z + move, SHARES, RISES, SLOPES, 4.0)[0] for move in (1e-6, -1e-6))
        torch.testing.assert_close(found, (high - low) / 2e-6, rtol=1e-4, atol=1e-6)
    even = column([0.0, 1.5, -1.5]).requires_grad_()  # the identity: g is 0 in the middle of every bin
    half, one = torch.full((2, 1), 0.5, dtype=torch.float64), column([1.0])
    (found,) = torch.autograd.grad(rational_quadratic_inverse(even, half, half, one, BOUND)[0].sum(), even)
    torch.testing.assert_close(found, torch.ones_like(found))


Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 300.0])
@pytest.mark.parametrize(("batch", "bins"), [((60,), 8), ((), 3), ((4, 5), 2), ((0,), 5), ((30,), 50)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_way_back_by_hand_is_autograd_s(direction: str, batch: tuple[int, ...], bins: int, scale: float) -> None:
    """Image and log-det as the plain operations give them, and the gradients of both; inside, outside, at an end."""
    step = Spline(3, bins, BOUND)
    z = 2 * torch.randn(*batch, 3, dtype=torch.float64)
    z.view(-1)[:4] = torch.tensor([-BOUND, BOUND, 0.0, BOUND - 1e-12])[: z.numel()]
    context = scale * torch.randn(*batch, step.context_size, dtype=torch.float64)
    weights = torch.randn_like(z), torch.randn(batch, dtype=torch.float64)
    if direction == "inverse":  # of images, since between them the map can be too flat for digits of a preimage
        z = step(z, context)[0]

    def all_of(function: Map) -> tuple[Tensor, ...]:
        inputs = z.clone().requires_grad_(), context.clone().requires_grad_()
        found = function(*inputs)
        return *(each.detach() for each in found), *torch.autograd.grad(found, inputs, weights)

    pairs = {"forward": (step, step._plain_forward), "inverse": (step.inverse, step._plain_inverse)}
    found, expected = (all_of(function) for function in pairs[direction])
    # A rounding of z' moves a preimage by it over the slope.
    steep = float(expected[1].abs().max()) if direction == "inverse" and expected[1].numel() else 0.0
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * size * math.exp(min(steep, 12.0)))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_an_infinite_gradient_outside_reaches_no_number_of_the_context(direction: str) -> None:
    step, _, context = draw(2)
    context.requires_grad_()
    z = torch.tensor([[800.0, 0.5, 1.0], [0.1, 0.2, 0.3]], dtype=torch.float64, requires_grad=True)
    image, _ = {"forward": step, "inverse": step.inverse}[direction](z, context)
    of_z, of_context = torch.autograd.grad(image.exp().sum(), (z, context))
    assert of_z.isinf().nonzero().tolist() == [[0, 0]]
    assert of_context.isfinite().all()
    assert (of_context[0].view(-1, 3)[:, 0] == 0).all()


@pytest.mark.parametrize("end", [0, -1])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_number_of_a_slope_is_bounded(value: float, end: int) -> None:
    step, z, context = draw(20)
    slopes = context.view(20, -1, 3)[:, 2 * BINS :]
    slopes[:, end] = value
    for node, plain in ((step, step._plain_forward), (step.inverse, step._plain_inverse)):
        torch.testing.assert_close(node(z, context), plain(z, context), rtol=1e-9, atol=1e-9)


def test_what_inference_mode_made_is_trained_on() -> None:
    with torch.inference_mode():
        step, z, context = draw(4)
    for which in (0, 1):
        given = [each.clone() for each in (z, context)]
        expected = torch.autograd.grad(step(*(each.requires_grad_() for each in given))[1].sum(), given)[which]
        inputs = [z, context]
        inputs[which] = given[which].detach().requires_grad_()
        (found,) = torch.autograd.grad(step(*inputs)[1].sum(), inputs[which])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_node_for_one_point_an_example_alone() -> None:
    """And for our own map: a subclass may have another."""

    class Other(Spline):
        pass

    _, z, context = draw(4)
    context.requires_grad_()
    shapes = [z, z.expand(2, 4, 3)]
    steps = [make(3, BINS, BOUND) for make in (Spline, Other)]
    for maps in ([step for step in steps], [step.inverse for step in steps]):
        nodes = [function(x, context)[0].grad_fn for function in maps for x in shapes]
        assert [type(node).__name__ for node in nodes] == ["_PassBackward", *["WhereBackward0"] * 3]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_second_derivatives_are_those_of_the_plain_operations(direction: str) -> None:
    """One after the other, and many at once; numbers that were made of z are not counted twice."""
    step, z, context = draw(3, 0.5)
    weight = 0.3 * torch.randn(3, step.context_size, dtype=torch.float64)
    pairs = {"forward": (step, step._plain_forward), "inverse": (step.inverse, step._plain_inverse)}
    node, plain = pairs[direction]

    def total(function: Map, z: Tensor) -> Tensor:
        image, log_det = function(z, context + z.tanh() @ weight)
        return (image.sin().sum(-1) + log_det).sum()

    expected = torch.func.hessian(lambda z: total(plain, z))(z)
    torch.testing.assert_close(torch.func.hessian(lambda z: total(node, z))(z), expected)
    for vectorize in (False, True):
        found = torch.autograd.functional.hessian(lambda z: total(node, z), z, vectorize=vectorize)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_image_is_the_slope_that_the_log_det_has() -> None:
    """To the bit nearly: autodiff of the same map loses digits where a bin is far flatter than its ends."""
    step = Spline(1, 3, BOUND)
    z = torch.linspace(-2.9, 2.9, 3001, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    context = torch.tensor([0.0, 4.0, 0.0, 4.0, -4.0, 4.0, 20.0, 30.0], dtype=torch.float64).expand(3001, -1)
    image, log_det = step(z, context)
    (slope,) = torch.autograd.grad(image.sum(), z)
    assert log_det.min() < -6
    torch.testing.assert_close(slope.squeeze(-1).log(), log_det, rtol=0, atol=4e-15)


def test_parameters_add_up_and_keep_their_floors() -> None:
    raw = 1e4 * torch.randn(3, 6, 2, dtype=torch.float64)
    widths, heights, slopes = spline_parameters(raw, -raw, raw[:, 1:])
    for shares in (widths, heights):
        torch.testing.assert_close(shares.sum(-2), torch.ones(3, 2, dtype=torch.float64))
        assert shares.min().item() == pytest.approx(1e-2)
    assert slopes.min().item() == pytest.approx(1e-3)
    at_zero = spline_parameters(torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(3, 1))
    torch.testing.assert_close(torch.cat(at_zero).flatten(), torch.tensor([0.25] * 8 + [1.0] * 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2, 1), ValueError, "bins: expected an int >= 2, got 1"),
        ((2, 51), ValueError, "bins: expected an int from 2 to 50, got 51"),
        ((2, 4.0), TypeError, "bins: expected an int, got float"),
        ((2, 4, 0.0), ValueError, "bound: expected a positive finite number, got 0.0"),
        ((2, 4, math.inf), ValueError, "bound: expected a positive finite number, got inf"),
        ((0,), ValueError, "dim: expected an int >= 1, got 0"),
    ],
)
def test_bad_sizes(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Spline(*arguments)


@pytest.mark.parametrize("function", [rational_quadratic, rational_quadratic_inverse])
def test_a_spline_by_hand_copies_nothing_from_the_host(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Each copy would make a GPU's host wait, and no CUDA graph can hold one."""
    z, shares, slopes = (torch.ones(size, 2, device="meta") for size in (3, 4, 3))
    with OnMeta():
        image, log_det = function(z, shares / 4, shares / 4, slopes, 2.0)
    assert image.is_meta
    assert log_det.is_meta


def test_the_frame_of_knots_is_the_same_on_the_host() -> None:
    frame, units, sides = knot_frame(3, 2.5, 0.25, 4.0)
    assert frame.squeeze(-1).tolist() == [[-2.5, -2.5, -2.5, 2.5]] * 2 + [[1.0, 0.25, 0.25, 1.0]]
    assert units.flatten().tolist() == [5.0, 5.0, 4.0]
    assert sides.squeeze(-1).tolist() == [[0, 1], [0, 1], [1, 0]]
