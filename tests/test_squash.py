"""Maps onto intervals: sigmoid, softplus and tanh against 50 digits, and what a domain is for."""

import math
from collections.abc import Callable

import pytest
import torch
from mpmath import mp
from torch import Tensor

import flowpost
from flowpost import (
    Affine,
    Bijector,
    Chain,
    Conditioned,
    DomainError,
    FlowPosterior,
    Inverse,
    Learned,
    Planar,
    Shared,
    Sigmoid,
    Softplus,
    Tanh,
)

LINE = (-math.inf, math.inf)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
MAPS: dict[type[Bijector], tuple[Callable, Callable]] = {
    Sigmoid: (lambda x: 1 / (1 + mp.exp(-x)), lambda x: mp.exp(-x) / (1 + mp.exp(-x)) ** 2),
    Softplus: (lambda x: mp.log1p(mp.exp(x)), lambda x: 1 / (1 + mp.exp(-x))),
    Tanh: (mp.tanh, lambda x: mp.sech(x) ** 2),
}
every = pytest.mark.parametrize("family", MAPS)
POINTS = [0.0, 1e-30, 1e-8, 0.3, -0.3, 0.499, 0.501, -0.5, 1.0, -2.5, 7.0, -7.0, 15.0, -15.0, 19.0, 21.0, 39.0, -40.0]


def exact(function: Callable, points: list[float], dtype: torch.dtype) -> Tensor:
    with mp.workdps(50):
        return torch.tensor([float(function(mp.mpf(x))) for x in torch.tensor(points, dtype=dtype).tolist()])


@pytest.fixture(autouse=True)
def _float64() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every
@both_dtypes
def test_values_slopes_and_log_dets_to_a_few_roundings(family: type[Bijector], dtype: torch.dtype) -> None:
    """Relative to each, far out too, where a slope by ``s (1 - s)`` would be rounding alone."""
    value, slope = MAPS[family]
    z = torch.tensor(POINTS, dtype=dtype).unsqueeze(-1).requires_grad_()
    image, log_det = family(1)(z)
    (gradient,) = torch.autograd.grad(image.sum(), z)
    unit = torch.finfo(dtype).eps
    for found, function in ((image, value), (gradient, slope)):
        wanted = exact(function, POINTS, dtype)
        found = found.detach().squeeze(-1).double()
        # exp rounds its argument: 40 roundings there are 40 in the value.
        allowed = unit * (4 + z.detach().double().squeeze(-1).abs()) * wanted.abs() + torch.finfo(dtype).tiny
        assert ((found - wanted).abs() <= allowed).all()
    wanted = exact(lambda x: mp.log(slope(x)), POINTS, dtype)
    assert ((log_det.detach().double() - wanted).abs() <= 4 * unit * (1 + wanted.abs())).all()


@every
@both_dtypes
def test_what_the_inverse_gives_maps_back(family: type[Bijector], dtype: torch.dtype) -> None:
    """From a millionth of an end on, and from 1e-30 where that end is 0; B3 and B4 in z' alone."""
    step = family(1)
    low, high = step.codomain
    near = [1e-30, 1e-12, 1e-6, 0.01, 0.3] if low == 0 else [-1 + 1e-6, -0.9, -1e-12, 1e-30, 0.3]
    y = torch.tensor([*near, 0.5, 0.9, 1 - 1e-6, *([2.0, 17.0, 1e3, 1e6] if high == math.inf else [])], dtype=dtype)
    x, log_det = step.inverse(y.unsqueeze(-1))
    back, log_det_back = step(x)
    unit = torch.finfo(dtype).eps
    x, back = x.squeeze(-1), back.squeeze(-1)
    assert ((back - y).abs() <= 8 * unit * (1 + x.abs()) * y.abs()).all()
    slope = torch.exp(log_det_back)
    # A rounding of y moves log_det by y / slope of it, at most.
    assert ((log_det + log_det_back).abs() <= 8 * unit * (1 + x.abs() + y.abs() / slope)).all()


@every
@pytest.mark.parametrize("outside", [-2.0, -1.0, 0.0, 1.0, 2.0, math.inf, -math.inf, math.nan])
def test_outside_the_codomain_a_row_is_nan_and_the_others_exact(family: type[Bijector], outside: float) -> None:
    low, high = family(2).codomain
    if low < outside < high:
        return
    z = torch.tensor([[0.3, 0.4], [0.3, outside], [0.7, 0.1]])
    posterior = FlowPosterior(0, Chain(Affine(2), family(2)))
    log_prob = posterior.log_prob(z)
    assert log_prob[1].isnan()
    assert torch.equal(log_prob[[0, 2]], posterior.log_prob(z[[0, 2]]))
    with flowpost.checking(), pytest.raises(ValueError, match=r"^z: ") as caught:
        posterior.log_prob(z)
    if math.isfinite(outside):
        assert caught.type is DomainError
        expected = (
            f"expected numbers between {low} and {high}, got 1 of 3 rows outside (first: row 1, feature 1 = {outside})"
        )
        assert str(caught.value) == f"z: {expected}"


@every
def test_a_sample_s_log_q_is_the_density_by_hand(family: type[Bijector]) -> None:
    """``log N(x; 0, I) - sum log f'(x)``, and torch's own transformed distribution says the same."""
    transforms = {Sigmoid: "SigmoidTransform", Softplus: "SoftplusTransform", Tanh: "TanhTransform"}
    transform = getattr(torch.distributions.transforms, transforms[family])()
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1)
    other = torch.distributions.TransformedDistribution(base, [transform])
    z, log_prob, noise = FlowPosterior(0, family(3))(sample_shape=(20,))
    torch.testing.assert_close(z, transform(noise), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_prob, other.log_prob(z), rtol=1e-9, atol=1e-9)


@every
def test_the_distribution_s_support_is_the_codomain(family: type[Bijector]) -> None:
    distribution = FlowPosterior(0, family(2)).at(validate_args=True)
    distribution.log_prob(distribution.sample((5,)))
    with pytest.raises(ValueError, match="within the support"):
        distribution.log_prob(torch.tensor([0.5, -1.5]))
    assert distribution.support.check(torch.tensor([[0.5, 0.5], [0.5, 1.5]])).tolist() == [True, family is Softplus]


def test_domains_of_wholes_are_those_of_their_parts() -> None:
    up, unit = (0.0, math.inf), (0.0, 1.0)
    assert (Softplus(2).domain, Softplus(2).codomain) == (LINE, up)
    assert (Inverse(Softplus(2)).domain, Inverse(Softplus(2)).codomain) == (up, LINE)
    for whole, wanted in [
        (Affine(2), (LINE, LINE)),
        (Chain(Affine(2), Sigmoid(2)), (LINE, unit)),
        (Learned(Chain(Affine(2), Sigmoid(2))), (LINE, unit)),
        (Conditioned(Chain(Affine(2), Sigmoid(2)), 3), (LINE, unit)),
        (Inverse(Chain(Affine(2), Sigmoid(2))), (unit, LINE)),
        (Chain(Inverse(Softplus(2)), Affine(2), Softplus(2)), (up, up)),
        (Shared(Planar(2), Tanh(2)), (LINE, (-1.0, 1.0))),
    ]:
        assert (whole.domain, whole.codomain) == wanted


def test_steps_that_do_not_meet_are_refused() -> None:
    message = (
        r"expected steps that start where the one before ends, got Sigmoid onto \(0.0, 1.0\) and Affine from \(-inf"
    )
    for whole in (Chain, Shared):
        with pytest.raises(ValueError, match=f"^{whole.__name__}: {message}"):
            whole(Sigmoid(2), Affine(2))
    with pytest.raises(
        ValueError, match=r"^flow: expected one from all real numbers, where noise lies, got domain \(0"
    ):
        FlowPosterior(0, Inverse(Sigmoid(2)))


def test_a_flow_between_intervals_trains() -> None:
    """Between a logit and a sigmoid any flow of the line is one of the unit interval."""
    flow = Chain(Inverse(Sigmoid(2)), Learned(Planar(2)), Learned(Affine(2)), Sigmoid(2))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter)
    z = torch.rand(50, 2, requires_grad=True)
    image, log_det = flow(z)
    assert ((image > 0) & (image < 1)).all()
    rows = [torch.autograd.grad(image[:, i].sum(), z, retain_graph=True)[0] for i in range(2)]
    torch.testing.assert_close(log_det, torch.linalg.slogdet(torch.stack(rows, 1))[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.inverse(image)[0], z)


@every
@both_dtypes
@pytest.mark.parametrize("loc", [-40.0, -12.0, -6.0, 0.3, 6.0, 12.0, 40.0])
def test_the_path_gradient_of_a_sample_at_an_end_is_that_of_its_noise(
    family: type[Bijector], dtype: torch.dtype, loc: float
) -> None:
    """By hand, ``-e / s - dlog f'(u)/du`` for the mean: the rounded z' no longer tells u."""
    posterior = FlowPosterior(0, Chain(Affine(2), family(2))).to(dtype)
    (context,) = posterior.parameters()
    noise = torch.tensor([[0.5, -1.2], [1.0, 0.1]], dtype=dtype)
    with torch.no_grad():
        context[:2] = loc
    sample = posterior(sample_shape=(2,), noise=noise)
    (gradient,) = torch.autograd.grad(posterior.path_log_prob(sample).sum(), context)
    u = (loc + noise).double().requires_grad_()
    (bend,) = torch.autograd.grad(family(2)(u)[1].sum(), u)
    wanted = (-noise - bend).sum(0)
    torch.testing.assert_close(gradient[:2].double(), wanted, rtol=1e3 * torch.finfo(dtype).eps, atol=1e-6)
