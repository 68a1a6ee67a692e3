"""The affine step, its scales, the constant scale and the shift of one number."""

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from flowpost import ActNorm, Affine, Bijector, Chain, Conditioned, FlowPosterior, Learned, Scale, Shift
from flowpost.functional import exp_scale, log_var_scale


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


@pytest.mark.parametrize("scale", [exp_scale, log_var_scale])
def test_the_log_det_of_an_exponential_is_its_logarithm_s_sum(scale: Callable[[Tensor], Tensor]) -> None:
    context = torch.cat([torch.zeros(6, 3), 9 * torch.randn(6, 3)], -1).double().requires_grad_()
    step, z = Affine(3, scale), torch.randn(6, 3, dtype=torch.float64)
    expected = scale(context[:, 3:]).log().sum(-1)
    (wanted,) = torch.autograd.grad(expected.sum(), context, retain_graph=True)
    for found in (step(z, context)[1], -step.inverse(z, context)[1]):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), context)[0], wanted)


class ByTriangle(Affine):
    """As a step of somebody's own, which knows its Gaussian as a matrix alone."""

    _line = Bijector._line

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale = (cast(Tensor, each) for each in Affine._line(self, context))
        return shift + scale * loc, scale.unsqueeze(-1) * (torch.eye(self.dim).to(loc) if tril is None else tril)


def drawn(flow: Bijector) -> Bijector:
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter)
    return flow


FACTORIZED = {
    "alone": lambda: Affine(3),
    "shift": lambda: Shift(3),
    "scale": lambda: Chain(Scale(3, 0.5), Scale(3, 3.0)),
    "chain": lambda: Chain(Shift(3), Affine(3), Scale(3, 0.5), ActNorm(3), Shift(3), Affine(3)),
    "learned": lambda: Chain(Learned(Affine(3)), Conditioned(Affine(3), 2)),
    "own": lambda: Chain(ByTriangle(3), Affine(3), ByTriangle(3)),
}


@pytest.mark.parametrize("name", FACTORIZED)
def test_the_moments_of_a_factorized_gaussian_are_its_samples(name: str) -> None:
    q = FlowPosterior(5, drawn(FACTORIZED[name]()).double()).double().at(torch.randn(4, 5, dtype=torch.float64))
    (loc, tril), scale = q.gaussian(), q.stddev
    torch.testing.assert_close(torch.diag_embed(scale), tril)
    torch.testing.assert_close(q.mean, loc)
    noise = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(loc + scale * noise, q.draw(noise=noise).z)
