"""The affine step, its scales, the constant scale and the shift of one number."""

import math

import pytest
import torch

from flowpost import Affine, Scale
from flowpost.functional import log_var_scale


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


def test_scale_multiplies() -> None:
    image, log_det = Scale(3, 0.5)(torch.tensor([1.0, -2.0, 4.0]))
    assert image.tolist() == [0.5, -1.0, 2.0]
    assert log_det.item() == pytest.approx(3 * math.log(0.5))
