"""Activation normalization: what `initialize` sets, and what it must not do."""

import math

import pytest
import torch

from flowpost import ActNorm, Chain, FlowPosterior, Learned, NonFiniteError, Planar, UnitLowerTriangular

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def test_it_is_glow_s() -> None:
    """``y = s x + b``, element by element, with ``s = exp(20 tanh(l / 20))`` and ``b = -s center``."""
    step = ActNorm(3).double()
    torch.nn.init.normal_(step.center)
    torch.nn.init.normal_(step.log_scale)
    z = torch.randn(4, 3, dtype=torch.float64)
    image, log_det = step(z)
    scales = [math.exp(20 * math.tanh(float(v) / 20)) for v in step.log_scale.detach()]
    for i in range(4):
        for j, scale in enumerate(scales):
            shift = -scale * float(step.center.detach()[j])
            assert image[i, j].item() == pytest.approx(scale * z[i, j].item() + shift, rel=1e-12, abs=1e-12)
        assert log_det[i].item() == pytest.approx(sum(math.log(scale) for scale in scales), rel=1e-12)


@both_dtypes
def test_a_batch_comes_out_with_zero_mean_and_unit_variance(dtype: torch.dtype) -> None:
    step = ActNorm(4).to(dtype)
    size = torch.tensor([1e-5, 1.0, 30.0, 1e6], dtype=dtype)
    z = size * (torch.tensor([3.0, -100.0, 0.0, 0.1], dtype=dtype) + torch.randn(50, 20, 4, dtype=dtype))
    assert torch.equal(step(z)[0], z)
    assert step.initialize(z) is step
    image, log_det = step(z)
    flat = image.detach().double().flatten(0, 1)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(flat.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=tolerance)
    torch.testing.assert_close(flat.var(0, correction=0), torch.ones(4, dtype=torch.float64), rtol=tolerance, atol=0)
    expected = -z.double().flatten(0, 1).std(0, correction=0).log().sum()
    torch.testing.assert_close(log_det[0, 0].double(), expected, rtol=tolerance, atol=0)


@both_dtypes
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-30])
def test_a_constant_variable_is_centred_and_keeps_its_scale(dtype: torch.dtype, value: float) -> None:
    """0.1 is no float: the deviations from its mean are roundings, which are not blown up."""
    z = torch.stack([torch.full((1000,), value, dtype=dtype), torch.randn(1000, dtype=dtype)], -1)
    step = ActNorm(2).to(dtype).initialize(z)
    assert step.log_scale[0] == 0
    assert step(z)[0][:, 0].abs().max() <= 16 * torch.finfo(dtype).eps * abs(value)


def test_a_variance_out_of_reach_leaves_finite_numbers() -> None:
    z = torch.randn(100, 2, dtype=torch.float64) * torch.tensor([1e-30, 1e30], dtype=torch.float64)
    step = ActNorm(2).double().initialize(z)
    image, log_det = step(z)
    assert image.isfinite().all()
    torch.testing.assert_close(step.inverse(image)[0], z, rtol=1e-6, atol=0)
    assert log_det.abs().max() < 1e-6


def test_a_forward_pass_sets_nothing() -> None:
    step, z = ActNorm(2), 5 + torch.randn(7, 2)
    before = {key: value.clone() for key, value in step.state_dict().items()}
    step.train()(z)
    assert all(torch.equal(value, before[key]) for key, value in step.state_dict().items())
    assert set(before) == {"center", "log_scale"}


def test_in_a_chain_each_step_sees_what_those_before_it_make() -> None:
    chain = Chain(Learned(Planar(2)), ActNorm(2), Learned(UnitLowerTriangular(2)), ActNorm(2)).double()
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter)
    z = batch = 4 + torch.randn(500, 2, dtype=torch.float64)
    for step in chain:
        if isinstance(step, ActNorm):
            step.initialize(z)
        z, _ = step(z)
    image, _ = chain(batch)
    torch.testing.assert_close(image.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(image.std(0, correction=0), torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_normal_is_pushed_through() -> None:
    flow = Chain(Learned(UnitLowerTriangular(3)), ActNorm(3)).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter)
    posterior = FlowPosterior(0, flow)
    loc, tril = posterior.gaussian()
    sample = posterior(sample_shape=(20,))
    normal = torch.distributions.MultivariateNormal(loc, scale_tril=tril)
    torch.testing.assert_close(sample.log_prob, normal.log_prob(sample.z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("z", "kind", "message"),
    [
        (torch.zeros(0, 3), ValueError, "z: expected at least one row, got shape (0, 3)"),
        (torch.tensor([[0.0], [math.nan]]).expand(2, 3), NonFiniteError, "z: 1 of 2 rows are not finite (first: row 1"),
        (torch.zeros(5, 2), ValueError, "z: expected shape (*, 3), got (5, 2)"),
        (torch.zeros(5, 3).double(), TypeError, "z: expected torch.float32 like the parameters, got torch.float64"),
    ],
)  # fmt: skip
def test_what_initialize_refuses(z: torch.Tensor, kind: type[Exception], message: str) -> None:
    step = ActNorm(3)
    with pytest.raises(kind) as caught:
        step.initialize(z)
    assert str(caught.value).startswith(message)
    assert (step.center == 0).all()
