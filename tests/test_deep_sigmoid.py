"""The deep sigmoid against Huang et al. (2018) written naively, its slopes' bounds, its tails and its root-find."""

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from flowpost import DeepSigmoid, Learned
from flowpost.bijectors import deep_sigmoid as module
from flowpost.functional import deep_sigmoid, deep_sigmoid_inverse, deep_sigmoid_parameters
from flowpost.numerics.mixtures import mixture_root
from flowpost.numerics.roots import correct, increasing_root

LEAST = math.exp(-4) / (1 + math.exp(6))
"""Of the slope: the smallest a times sigmoid(-6), at the largest shift."""


def draw(scale: float, units: int = 5, points: int = 40, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points and bounded parameters, one variable each."""
    raw = scale * torch.randn(3, points, units, 1, dtype=torch.float64)
    return (spread * torch.randn(points, 1, dtype=torch.float64), *deep_sigmoid_parameters(*raw))


def by_the_book(z: float, raw: Tensor) -> tuple[Any, Any]:
    """Equation 8 for one number, with our bounds: image and log-slope; `raw` (3, units)."""
    units = raw.shape[-1]
    with mp.workdps(60):
        total = mp.fsum(mp.exp(mpf(float(w))) for w in raw[2])
        p, slope = mpf(0), mpf(0)
        for j in range(units):
            a = mp.exp(4 * mp.tanh(mpf(float(raw[0, j])) / 4))
            rate = mpf(2) ** (-1 + mpf(2 * j) / (units - 1))
            b = 6 * mp.tanh(rate * mpf(float(raw[1, j])) / 6)
            s = 1 / (1 + mp.exp(-(a * mpf(z) + b)))
            p += mp.exp(mpf(float(raw[2, j]))) / total * s
            slope += mp.exp(mpf(float(raw[2, j]))) / total * a * s * (1 - s)
        return mp.log(p / (1 - p)), mp.log(slope / (p * (1 - p)))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("units", [2, 5])
def test_deep_sigmoid_is_the_paper_s(layers: int, units: int) -> None:
    step = DeepSigmoid(2, units, layers)
    z = 2 * torch.randn(10, 2, dtype=torch.float64)
    context = 1.5 * torch.randn(10, step.context_size, dtype=torch.float64)
    image, log_det = step(z, context)
    raw = context.view(10, layers, 3, units, 2)
    for row in range(10):
        total = mpf(0)
        for variable in range(2):
            point = float(z[row, variable])
            for layer in range(layers):
                value, log_slope = by_the_book(point, raw[row, layer, ..., variable])
                point, total = float(value), total + log_slope
            assert float(image[row, variable]) == pytest.approx(point, rel=1e-12, abs=1e-12)
        assert float(log_det[row]) == pytest.approx(float(total), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("z", [-700.0, -40.0, 1e-30, 40.0, 700.0])
def test_tails_keep_their_digits(z: float) -> None:
    """Where p or 1 - p is 1 to every digit of float64; beyond e^700 no float could hold it."""
    raw = torch.tensor([[0.3, -0.5, 1.0], [1.0, -2.0, 0.5], [0.0, 1.0, -1.0]], dtype=torch.float64)
    numbers = deep_sigmoid_parameters(*raw.unsqueeze(-1))
    with mp.workdps(700):
        expected, log_slope = by_the_book_at(700, z, raw)
    image, log_det = deep_sigmoid(torch.tensor([z], dtype=torch.float64), *numbers)
    assert image.item() == pytest.approx(float(expected), rel=1e-14)
    assert log_det.item() == pytest.approx(float(log_slope), abs=3e-13)


def by_the_book_at(digits: int, z: float, raw: Tensor) -> tuple[Any, Any]:
    """As `by_the_book`, which is told of more digits than it asks for."""
    with mock.patch.object(mp, "workdps", lambda _, real=mp.workdps: real(digits)):
        return by_the_book(z, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_it_is_the_flattest_unit(dtype: torch.dtype) -> None:
    """For z beyond all shifts ``z' = min a z + (b - log w)`` to the right, ``min a z + (b + log w)`` to the left."""
    raw = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5], [0.3, -0.2, 1.0]], dtype=dtype).unsqueeze(-1)
    a, b, log_w = deep_sigmoid_parameters(*raw)
    for z in (1e3, 1e6):
        for sign in (1, -1):
            image, log_det = deep_sigmoid(torch.tensor([sign * z], dtype=dtype), a, b, log_w)
            expected = sign * z * a[0] + b[0] - sign * log_w[0]
            torch.testing.assert_close(image, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
            torch.testing.assert_close(log_det, torch.zeros((), dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_the_slope_keeps_its_bounds(scale: float) -> None:
    z, a, b, log_w = draw(scale, points=20000, spread=10.0)
    _, log_det = deep_sigmoid(z, a, b, log_w)
    assert (log_det <= a.amax((-2, -1)).log() + 1e-12).all()
    assert (log_det >= a.amin((-2, -1)).log() - torch.log1p(b.abs().amax((-2, -1)).exp()) - 1e-12).all()
    assert log_det.min() >= math.log(LEAST)
    if scale > 1:  # and the bounds are not idle
        assert log_det.min() < math.log(LEAST) + 3
        assert log_det.max() > 3.9


def test_the_zero_context_is_the_identity() -> None:
    for layers in (1, 3):
        step = DeepSigmoid(2, 4, layers)
        z = torch.tensor([0.0, 1e-3, -2.0, 30.0, -1e6], dtype=torch.float64).unsqueeze(-1).expand(-1, 2)
        image, log_det = step(z, step.initial_context().double())
        torch.testing.assert_close(image, z, rtol=1e-15, atol=1e-15 * layers)
        torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-15 * layers)


def test_one_unit_is_an_affine_map() -> None:
    z, a, b, log_w = draw(2.0, units=1)
    image, log_det = deep_sigmoid(z, a, b, log_w)
    torch.testing.assert_close(image, (a * z.unsqueeze(-2) + b).squeeze(-2))
    torch.testing.assert_close(log_det, a.log().sum((-2, -1)))


def test_adam_tells_equal_units_apart() -> None:
    """It moves numbers of like gradients alike; from the identity to two modes the units must part all the same."""
    flow = Learned(DeepSigmoid(1, 6))
    optimizer = torch.optim.Adam(flow.parameters(), 0.03)
    noise = torch.special.ndtri((torch.arange(200) + 0.5) / 200).unsqueeze(-1)
    losses = []
    for step in range(300):
        z, log_det = flow(noise)
        modes = torch.stack([-2 * (z - 1.5) ** 2, -2 * (z + 1.6) ** 2])
        log_density = torch.logsumexp(modes, 0).sum(-1) - math.log(2 * math.sqrt(math.pi / 2))
        losses.append((-log_det - log_density).mean() - 0.5 * math.log(2 * math.pi * math.e))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        if step == 0:
            shift = deep_sigmoid_parameters(*flow.context.detach().view(3, 6, 1))[1].flatten()
            torch.testing.assert_close(shift / shift[0], 2 ** torch.linspace(0, 2, 6), rtol=1e-3, atol=0)
    assert losses[0] > 1
    assert losses[-1] < 0.1


# ------------------------------------------------------------------------------------------------------- the inverse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.3, 3.0, 1e4])
@pytest.mark.parametrize("spread", [1.0, 30.0, 1e6])
def test_the_root_is_found_to_rounding(dtype: torch.dtype, scale: float, spread: float) -> None:
    z, *numbers = (value.to(dtype) for value in draw(scale, units=8, points=5000, spread=spread))
    x, log_det = deep_sigmoid_inverse(z, *numbers)
    image, forward = deep_sigmoid(x, *numbers)
    eps = torch.finfo(dtype).eps
    assert ((image - z).abs() <= 8 * eps * (1 + z.abs() + forward.exp().unsqueeze(-1) * x.abs())).all()
    assert torch.equal(log_det, -forward)


def test_the_bracket_holds_the_root() -> None:
    """The least and the largest ``(z' - b) / a``, at any parameters and targets."""
    z, a, b, log_w = draw(4.0, points=5000, spread=10.0)
    ends = (z.unsqueeze(-2) - b) / a
    for end, sign in ((ends.amin(-2), -1), (ends.amax(-2), 1)):
        image, _ = deep_sigmoid(end, a, b, log_w)
        assert (sign * (image - z) >= -1e-12 * (1 + z.abs())).all()


def test_a_root_on_numpy_s_arrays_is_the_same_beside_harder_ones_and_alone() -> None:
    """To the last bit: one that is there is not moved while others are sought."""
    generator = np.random.default_rng(0)
    scale, shift = np.exp(3 * generator.normal(size=(6, 60))), 5 * generator.normal(size=(6, 60))
    image, weight = 4 * generator.normal(size=60), 2 * generator.normal(size=(6, 60))
    image[7], image[20] = np.nan, 1e6
    together = mixture_root(image, scale, shift, weight)
    for i in set(range(60)) - {7}:
        assert mixture_root(*(each[..., i : i + 1] for each in (image, scale, shift, weight)))[0] == together[i]


def test_increasing_root_bisects_where_newton_cannot() -> None:
    """A staircase whose flat treads throw Newton's steps far out, and a root at either end of the bracket."""
    target = torch.linspace(-3, 3, 61, dtype=torch.float64)

    def stairs(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 0.15 * torch.sin(6.6 * x) - target, 1 + 0.99 * torch.cos(6.6 * x)

    root = increasing_root(stairs, torch.full_like(target, -40.0), torch.full_like(target, 60.0))
    assert stairs(root)[0].abs().max() < 1e-13
    for low, high in ((0.0, 9.0), (-9.0, 0.0)):
        ends = torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)

        def residual(x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.expm1(x), x.exp()

        assert correct(residual, increasing_root(residual, *ends)).abs().item() < 1e-15


def test_known_spares_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a search was run")

    step = DeepSigmoid(2, 3, 2)
    z = torch.randn(5, 2, dtype=torch.float64)
    context = torch.randn(5, step.context_size, dtype=torch.float64)
    image, _ = step(z, context)
    monkeypatch.setattr(module, "increasing_root", refuse)
    torch.testing.assert_close(step.inverse(image, context, preimage=z)[0], z, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 0), "units: expected an int >= 1, got 0"), ((2, 3, 0), "layers: expected an int >= 1, got 0")],
)
def test_bad_sizes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepSigmoid(*arguments)
