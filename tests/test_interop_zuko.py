"""zuko's transforms as steps: the contract, but for what zuko itself cannot do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

import flowpost
from flowpost import Bijector, FlowPosterior
from flowpost.testing import check_bijector

_validates = Distribution._validate_args
zuko = pytest.importorskip("zuko", reason="zuko comes with the extra flowpost[peers]")
Distribution._validate_args = _validates  # importing zuko turns torch's checks of values off, for all

MAKE: dict[str, Callable[[int], Bijector]] = {
    "maf": lambda dim: Bijector.from_transform(
        zuko.flows.MaskedAutoregressiveTransform(dim, 0, hidden_features=(8,)), dim
    ),
    "spline of a context": lambda dim: Bijector.from_transform(
        zuko.flows.MaskedAutoregressiveTransform(
            dim,
            3,
            univariate=zuko.transforms.MonotonicRQSTransform,
            shapes=[(4,), (4,), (3,)],
            hidden_features=(8,),
        ),
        dim,
        3,
    ),
}
# zuko takes no empty batch, builds nothing on the meta device, has bools as buffers, and draws where it inverts.
SKIP = ["identity", "extremes", "compiles", "batch_sizes", "shapes", "rebuilt", "averaged", "unchanged", "meta"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "maf" else pytest.mark.full) for name in MAKE])
def test_a_lazy_transform_holds_the_contract(name: str) -> None:
    worst = check_bijector(
        lambda dim, context_size, dtype, seed, push: flowpost.testing.push(MAKE[name](dim).to(dtype), push, seed),
        dims=(2,),
        examples=3,
        skip=SKIP,
    )
    assert worst["log_det"] < 1e-3


@pytest.mark.parametrize("transform", [zuko.transforms.SoftclipTransform(2.0), zuko.transforms.CosTransform()])
def test_a_transform_of_zuko_s_is_a_step(transform: Transform) -> None:
    step = Bijector.from_transform(transform, 3)
    z = torch.full((5, 3), 0.3, dtype=torch.float64)
    image, log_det = step(z)
    torch.testing.assert_close(image, transform(z))
    torch.testing.assert_close(log_det, transform.log_abs_det_jacobian(z, image).sum(-1))
    assert all(step.codomain[0] <= float(value) <= step.codomain[1] for value in image.flatten())


def test_a_zuko_flow_as_a_posterior_trains() -> None:
    """Its density is zuko's own, and its parameters have gradients."""
    lazy = zuko.flows.MaskedAutoregressiveTransform(3, 4, hidden_features=(8,)).double()
    posterior = FlowPosterior(4, Bijector.from_transform(lazy, 3, 4), nn.Identity())
    h = torch.randn(5, 4, dtype=torch.float64)
    z, log_q, _ = posterior(h, (2,))
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3).double(), 1.0), 1)
    flow: Distribution = zuko.distributions.NormalizingFlow(lazy(h).inv, base)
    torch.testing.assert_close(flow.log_prob(z), log_q, rtol=1e-8, atol=1e-8)
    log_q.sum().backward()
    grads: list[Tensor | None] = [each.grad for each in lazy.parameters()]
    assert grads
    assert all(grad is not None for grad in grads)


def test_a_made_transform_is_refused_for_its_parameters() -> None:
    lazy = zuko.flows.MaskedAutoregressiveTransform(3, 0, hidden_features=(8,))
    with pytest.raises(ValueError, match="^transform: expected one without modules in it"):
        Bijector.from_transform(lazy(), 3)
