"""The radial flow against its paper's formula, at its floors and at its centre."""

import math

import pytest
import torch
from torch import Tensor

from flowpost import Radial
from flowpost.functional import radial, radial_chain, radial_chain_inverse, radial_inverse

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def constrained(alpha: float, beta: float) -> tuple[float, float]:
    """A.2's ``a > 0`` and ``b > -a``, shifted and floored as the docstring says."""
    width = math.log1p(math.exp(alpha) * math.expm1(1 - 1e-3)) + 1e-3
    return width, width * math.log1p((1 - math.exp(-(1 - 1e-3))) * math.expm1(beta))


def radial_by_the_book(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Rezende & Mohamed (2015), eq. 14, one example; the log-det with h' as printed."""
    a, b = constrained(float(alpha), float(beta))
    dim = len(z)
    offset = [float(z[i]) - float(center[i]) for i in range(dim)]
    r = math.sqrt(sum(x * x for x in offset))
    h, slope = 1 / (a + r), -1 / (a + r) ** 2
    image = [float(z[i]) + b * h * offset[i] for i in range(dim)]
    log_det = (dim - 1) * math.log(1 + b * h) + math.log(1 + b * h + b * slope * r)
    return torch.tensor(image, dtype=torch.float64), torch.tensor(log_det, dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_radial_is_the_paper_s(dim: int) -> None:
    z, center = 2 * torch.randn(2, 20, dim, dtype=torch.float64)
    alpha, beta = 2 * torch.randn(2, 20, 1, dtype=torch.float64)
    image, log_det = Radial(dim)(z, torch.cat([center, alpha, beta], -1))
    for i in range(20):
        expected = radial_by_the_book(z[i], center[i], alpha[i], beta[i])
        torch.testing.assert_close((image[i], log_det[i]), expected, rtol=1e-12, atol=1e-12)


def test_radial_reads_one_map_for_each_example() -> None:
    z, context = torch.randn(50, 4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    image, log_det = Radial(3)(z, context)
    for s, i in [(0, 0), (49, 3), (7, 2)]:
        expected = radial_by_the_book(z[s, i], *context[i].split([3, 1, 1]))
        torch.testing.assert_close((image[s, i], log_det[s, i]), expected)


def test_a_chain_of_radial_maps_is_its_maps_one_after_the_other() -> None:
    batch = torch.Size((4, 5))
    center, alpha, beta = (2 * torch.randn(*batch, size, dtype=torch.float64) for size in (3, 1, 1))
    start = z = torch.randn(4, 3, dtype=torch.float64)
    total = torch.zeros(4, dtype=torch.float64)
    for k in range(5):
        z, log_det = radial(z, center[:, k], alpha[:, k], beta[:, k])
        total += log_det
    torch.testing.assert_close(radial_chain(start, center, alpha, beta), (z, total), rtol=1e-12, atol=1e-12)
    found = radial_chain_inverse(z, center, alpha, beta)
    torch.testing.assert_close(found, (start, -total), rtol=1e-10, atol=1e-10)


def test_a_fresh_radial_step_is_exactly_the_identity_and_can_learn() -> None:
    step, other = Radial(3), Radial(3)
    z = torch.randn(5, 3)
    context = step.initial_context().requires_grad_()
    image, log_det = step(z, context)
    back, log_det_back = step.inverse(z, context)
    assert torch.equal(image, z)
    assert torch.equal(back, z)
    assert (log_det == 0).all()
    assert (log_det_back == 0).all()
    assert not torch.equal(step.initial_context()[:3], other.initial_context()[:3])
    (gradient,) = torch.autograd.grad((z * image).sum() + log_det.sum(), context)
    assert gradient[-1] != 0


@pytest.mark.parametrize("beta", [-1e7, -1e4, -50.0, -2.0, -1e-8, 0.0, 1e-8, 2.0, 50.0, 1e4])
@both_dtypes
def test_at_its_centre_radial_scales_by_its_gain(beta: float, dtype: torch.dtype) -> None:
    """There the log-det is ``dim log(1 + b / a)``: never below dim log 1e-3, however far beta is on the wrong side."""
    center, alpha = torch.full((5,), 0.3, dtype=dtype), torch.full((1,), 0.7, dtype=dtype)
    inputs = [t.requires_grad_() for t in (center.clone(), center, alpha, torch.full((1,), beta, dtype=dtype))]
    k = -math.expm1(-0.999)
    gain = 1 + beta + math.log(k) if beta > 30 else 1e-3 + math.log1p(k / (1 - k) * math.exp(beta))
    for function, sign in ((radial, 1), (radial_inverse, -1)):
        image, log_det = function(*inputs)
        torch.testing.assert_close(image, center)
        assert log_det.item() == pytest.approx(sign * 5 * math.log(gain), rel=1e-5 if dtype == torch.float32 else 1e-12)
        gradients = torch.autograd.grad(image.sum() + log_det, inputs)
        assert all(gradient.isfinite().all() for gradient in gradients)
        slope = gain**sign
        torch.testing.assert_close(gradients[0], torch.full((5,), slope, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [-1e4, -50.0, -2.0, 2.0, 1e3])
@both_dtypes
def test_radii_keep_their_order_and_come_back(beta: float, dtype: torch.dtype) -> None:
    """From 1e-12 to 1e6, at the floor of alpha too: relative to the radius, 64 roundings and no more."""
    radius = torch.logspace(-12, 6, 181, dtype=dtype).unsqueeze(-1)
    center = torch.zeros(1, dtype=dtype)
    for alpha in (-100.0, 0.0, 100.0):
        numbers = center, torch.full((1,), alpha, dtype=dtype), torch.full((1,), beta, dtype=dtype)
        image, log_det = radial(radius, *numbers)
        assert (image.diff(dim=0) > 0).all()
        back, log_det_back = radial_inverse(image, *numbers)
        unit = torch.finfo(dtype).eps
        # A rounding of the image is one of the preimage times its condition, r' / (r dr'/dr).
        condition = (image / radius).squeeze(-1) * torch.exp(-log_det)
        assert ((back / radius - 1).abs().squeeze(-1) <= 64 * unit * (1 + condition)).all()
        assert (log_det + log_det_back).abs().max() <= 64 * unit * (8 + condition.max())


def test_far_away_radial_shifts_by_beta() -> None:
    """``b h (z - z0) -> b (z - z0) / r``: what a step can move is b and no more."""
    z = 1e9 * torch.tensor([0.6, -0.8], dtype=torch.float64)
    number = torch.tensor([1.5], dtype=torch.float64)
    image, log_det = radial(z, torch.zeros(2, dtype=torch.float64), number, number)
    _, b = constrained(1.5, 1.5)
    torch.testing.assert_close(image - z, b * z / 1e9, rtol=1e-6, atol=0)
    assert log_det.item() == pytest.approx(b / 1e9, rel=1e-6)
