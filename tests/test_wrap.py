"""A posterior on an encoder that somebody already has."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from flowpost import Affine, Chain, Householder, Permute, Planar, Reverse, Scale, Shared, wrap
from flowpost.functional import log_var_scale
from flowpost.recipes import RECIPES

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("diagonal", {}),
    ("full_covariance", {}),
    ("planar", {"steps": 1}),
    ("planar", {"steps": 4}),
    ("radial", {"steps": 2}),
    ("householder", {"steps": 4}),
    ("cc_lin_iaf", {"combinations": 3}),
    *((name, {"steps": 3, "hidden": (16,), "context_size": 5}) for name in ("affine_iaf", "maf", "nice", "realnvp")),
    ("spline_autoregressive", {"steps": 2, "hidden": (16,), "context_size": 5, "bins": 4}),
    ("spline_coupling", {"steps": 2, "hidden": (16,), "context_size": 5, "bins": 4}),
    ("naf", {"steps": 2, "hidden": (16,), "context_size": 5, "units": 3, "layers": 2}),
    ("orthogonal_sylvester", {"steps": 2, "rank": 1}),
    ("householder_sylvester", {"steps": 1, "reflections": 2}),
    ("triangular_sylvester", {"steps": 2}),
    *(("iaf", {"steps": steps, "hidden": (16,), "context_size": 5}) for steps in (1, 2, 3, 4)),
    ("iaf", {"steps": 3, "hidden": (16,), "context_size": 5, "gain": 1.0}),
]
OPTIONS += [(name, {}) for name in RECIPES if name not in dict(OPTIONS)]
flows = pytest.mark.parametrize(("flow", "options"), OPTIONS, ids=lambda value: str(value))


class Pair(nn.Module):
    """The usual VAE encoder."""

    def __init__(self, dim: int = 3, inputs: int = 6) -> None:
        super().__init__()
        self.body = nn.Linear(inputs, 8)
        self.loc, self.log_var = nn.Linear(8, dim), nn.Linear(8, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.loc(hidden), self.log_var(hidden)


class Returns(nn.Module):
    """An encoder that gives whatever it was made with."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: object, **__: object) -> object:
        return self.value


X = torch.linspace(-1, 1, 24).view(4, 6)


@flows
def test_features_become_the_flow_s(flow: str, options: dict[str, Any]) -> None:
    encoder = nn.Linear(6, 7)
    posterior = wrap(encoder, 3, features=7, flow=flow, **options)
    z, log_prob, noise = posterior(X, sample_shape=(5,))
    inner = posterior.posterior(encoder(X), (5,), noise)
    assert torch.equal(z, inner.z)
    assert torch.equal(log_prob, inner.log_prob)
    assert type(posterior.posterior.flow) is type(RECIPES[flow](7, 3, **options).flow)
    torch.testing.assert_close(posterior.log_prob(z, X), log_prob, rtol=1e-3, atol=1e-3)
    assert torch.equal(posterior(X, noise=noise[0]).z, z[0])


GAUSSIAN = [
    ("full_covariance", {}),
    ("householder", {"steps": 3}),
    ("householder", {"steps": 4}),
    ("cc_lin_iaf", {"combinations": 3}),
]


def test_reflections_among_permutations_turn_the_scaled_noise_too() -> None:
    """All of them are orthogonal, so that of the noise alone they would make the same noise."""
    torch.manual_seed(0)
    flow = Chain(Reverse(3), Householder(3), Permute([1, 2, 0]), Householder(3))
    posterior = wrap(Pair().double(), 3, example=X.double(), flow=flow)
    x, zero = X[:1].double(), torch.zeros(1, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda e: posterior(x, noise=e).z[0], zero).squeeze(-2)
    covariance = jacobian @ jacobian.mT
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() > 0.05


@pytest.mark.parametrize(("flow", "options"), GAUSSIAN, ids=str)
def test_a_linear_flow_on_a_pair_makes_correlations(flow: str, options: dict[str, Any]) -> None:
    """From the encoder's own Gaussian to a full covariance: reflections of the noise alone would change nothing."""
    torch.manual_seed(0)
    encoder = Pair().double()
    posterior = wrap(encoder, 3, example=X.double(), flow=flow, **options)
    x = X[:1].double()

    def moments() -> tuple[Tensor, Tensor]:
        zero = torch.zeros(1, 3, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda e: posterior(x, noise=e).z[0], zero).squeeze(-2)
        return posterior(x, noise=zero).z[0], jacobian @ jacobian.mT

    (loc, log_var), (mean, covariance) = encoder(x), moments()
    torch.testing.assert_close(mean, loc[0])
    torch.testing.assert_close(covariance, log_var_scale(log_var[0]).square().diag())
    with torch.no_grad():
        posterior.posterior.head.linear.weight.add_(0.5 * torch.randn(()))  # pyright: ignore
        posterior.posterior.head.linear.bias.add_(torch.randn(len(posterior.posterior.head.linear.bias)))  # pyright: ignore
    mean, covariance = moments()
    torch.testing.assert_close(mean, loc[0])
    assert covariance.triu(1).abs().max() > 0.05 * covariance.diag().min()


EXAMPLES: list[tuple[Callable[..., nn.Module], object, tuple, dict]] = [
    (lambda: nn.Linear(6, 7), torch.zeros(2, 6), (X,), {}),
    (lambda: nn.Bilinear(6, 6, 7), (torch.zeros(2, 6), torch.zeros(2, 6)), (X, X), {}),
    (lambda: nn.Bilinear(6, 6, 7), {"input1": torch.zeros(2, 6), "input2": torch.zeros(2, 6)}, (X,), {"input2": X}),
]


@pytest.mark.parametrize("index", range(3), ids=["tensor", "tuple", "dict"])
def test_the_width_is_learned_from_an_example(index: int) -> None:
    make, example, inputs, keywords = EXAMPLES[index]
    encoder = make()
    posterior = wrap(encoder, 3, example=example, flow="planar", steps=2)
    assert posterior.posterior.features == 7
    z, log_prob, noise = posterior(*inputs, **keywords)
    expected = posterior.posterior(encoder(*inputs, **keywords), noise=noise)
    assert torch.equal(z, expected.z)
    torch.testing.assert_close(posterior.log_prob(z, *inputs, **keywords), log_prob, rtol=1e-3, atol=1e-3)


@flows
@pytest.mark.parametrize("dim", [1, 3])
def test_a_pair_starts_at_the_encoder_s_own_gaussian(flow: str, options: dict[str, Any], dim: int) -> None:
    encoder = Pair(dim)
    posterior = wrap(encoder, dim, example=X[:1], flow=flow, **options)
    loc, log_var = encoder(X)
    z, log_prob, noise = posterior(X, sample_shape=(9,))
    torch.testing.assert_close(z, loc + torch.exp(log_var / 2) * noise, rtol=0, atol=1e-5)
    expected = Normal(loc, torch.exp(log_var / 2)).log_prob(z).sum(-1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(posterior.log_prob(z, X), expected, rtol=1e-4, atol=1e-4)


@flows
def test_a_pair_starts_there_to_the_last_digits(flow: str, options: dict[str, Any]) -> None:
    encoder = Pair().double()
    loc, log_var = encoder(X.double())
    z, log_prob, noise = wrap(encoder, 3, example=X[:1].double(), flow=flow, **options)(X.double())
    gaussian = Normal(loc, log_var_scale(log_var))
    torch.testing.assert_close(z, loc + log_var_scale(log_var) * noise, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(log_prob, gaussian.log_prob(z).sum(-1), rtol=1e-12, atol=1e-12)


def test_the_gates_of_a_wrapped_iaf_need_no_correction() -> None:
    """With the recipe's gain they start as the identity; with another a constant scale undoes what they do."""

    def steps(**options: Any) -> list[type]:  # noqa: ANN401
        flow = wrap(Pair(), 3, example=X[:1], flow="iaf", hidden=(16,), **options).posterior.flow
        assert isinstance(flow, Chain)
        return [type(step) for step in flow]

    assert steps() == [Shared, Affine]
    assert steps(gain=1.0) == [Shared, Scale, Affine]


def test_a_pair_with_a_flow_of_one_s_own() -> None:
    encoder = Pair()
    posterior = wrap(encoder, 3, example=X[:1], flow=Chain(Planar(3), Planar(3)))
    loc, log_var = encoder(X)
    z, _, noise = posterior(X)
    torch.testing.assert_close(z, loc + torch.exp(log_var / 2) * noise, rtol=0, atol=1e-5)


def test_features_with_a_flow_of_one_s_own() -> None:
    flow = Chain(Affine(3), Planar(3))
    posterior = wrap(nn.Linear(6, 7), 3, features=7, flow=flow)
    assert posterior.posterior.flow is flow
    with pytest.raises(ValueError, match="^flow: expected a bijector of dim=4, got dim=3$"):
        wrap(nn.Linear(6, 7), 4, features=7, flow=flow)


@flows
def test_training_reaches_the_encoder_and_leaves_the_start(flow: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    posterior = wrap(Pair(), 3, example=X[:1], flow=flow, **options)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        z, log_prob, _ = posterior(X, sample_shape=(32,))
        (log_prob + (z - 1).square().sum(-1) + z.prod(-1)).mean().backward()
        optimizer.step()
    for name, parameter in posterior.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        if parameter.numel():
            assert (parameter.grad != 0).any(), name


@flows
def test_the_path_gradient_by_features_of_one_pass(flow: str, options: dict[str, Any]) -> None:
    """The gradient of log q at z with everything else held, through an encoder with dropout."""
    torch.manual_seed(0)
    posterior = wrap(nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.5)), 3, features=7, flow=flow, **options).double()
    h = posterior.features(X.double())
    sample = posterior.posterior(h)
    path = posterior.posterior.path_log_prob(sample, h)
    (found,) = torch.autograd.grad(path.sum(), sample.z)
    z = sample.z.detach().requires_grad_()
    (expected,) = torch.autograd.grad(posterior.posterior.log_prob(z, h.detach()).sum(), z)
    torch.testing.assert_close((path, found), (sample.log_prob, expected), rtol=1e-8, atol=1e-8)


def test_the_example_leaves_the_encoder_as_it_was() -> None:
    encoder = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)))
    encoder[2].eval()
    modes = [module.training for module in encoder.modules()]
    before = copy.deepcopy(encoder.state_dict())
    state = torch.get_rng_state()
    wrap(encoder, 3, example=X[:1], flow="diagonal")  # one row, on which BatchNorm in train mode raises
    assert [module.training for module in encoder.modules()] == modes
    after = encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    torch.set_rng_state(state)


def test_modes_are_restored_when_the_example_fails() -> None:
    encoder = nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.5))
    with pytest.raises(RuntimeError):
        wrap(encoder, 3, example=torch.zeros(2, 5))
    assert all(module.training for module in encoder.modules())


def test_a_float64_encoder_gets_a_float64_posterior() -> None:
    for encoder, keywords in [(nn.Linear(6, 7), {"features": 7}), (Pair(), {"example": X[:1].double()})]:
        posterior = wrap(encoder.double(), 3, flow="iaf", hidden=(8,), **keywords)
        z, log_prob, _ = posterior(X.double())
        assert z.dtype == log_prob.dtype == torch.float64
        assert {p.dtype for p in posterior.parameters()} == {torch.float64}


def test_a_pair_under_autocast_gets_a_float32_sample() -> None:
    posterior, noise = wrap(Pair(), 3, flow="diagonal", example=X[:1]), torch.randn(len(X), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loc, log_var = (part.float() for part in posterior.encoder(X))
        z, log_prob, _ = posterior(X, noise=noise)
        assert posterior(X).z.dtype == posterior.at(X).sample().dtype == torch.float32
    normal = torch.distributions.Normal(loc, (0.5 * log_var).exp())
    torch.testing.assert_close(z, loc + normal.scale * noise)
    torch.testing.assert_close(log_prob, normal.log_prob(z).sum(-1))


def test_a_half_precision_encoder_gets_a_float32_posterior() -> None:
    for encoder, keywords in [(nn.Linear(6, 7), {"features": 7}), (Pair(), {"example": X[:1].bfloat16()})]:
        posterior = wrap(encoder.bfloat16(), 3, flow="full_covariance", **keywords)
        z, log_prob, _ = posterior(X.bfloat16())
        assert z.dtype == log_prob.dtype == torch.float32


def test_extreme_log_variances_stay_finite() -> None:
    encoder = Returns((torch.zeros(4, 3), torch.tensor([-1e30, -100.0, 100.0, 1e30]).unsqueeze(-1).expand(4, 3)))
    z, log_prob, _ = wrap(encoder, 3, example=X, flow="planar")(X)
    assert z.isfinite().all()
    assert log_prob.isfinite().all()


def raises(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_what_is_refused() -> None:
    neither = "features: expected the width of the encoder's last axis, or an example= input, got neither"
    raises(ValueError, neither, lambda: wrap(nn.Linear(6, 7), 3))
    width = "features: expected 7, the width of the encoder's output, got 8"
    raises(ValueError, width, lambda: wrap(nn.Linear(6, 7), 3, features=8, example=X))
    unknown = f"flow: expected one of {', '.join(RECIPES)}, got 'glow'"
    raises(ValueError, unknown, lambda: wrap(nn.Linear(6, 7), 3, features=7, flow="glow"))
    raises(ValueError, "dim: expected an int >= 1, got 0", lambda: wrap(nn.Linear(6, 7), 0, features=7))
    raises(ValueError, "features: expected an int >= 1, got 0", lambda: wrap(nn.Linear(6, 7), 3, features=0))
    options = "flow_options: expected none with a bijector, got steps; make it with them"
    raises(TypeError, options, lambda: wrap(nn.Linear(6, 7), 3, features=7, flow=Planar(3), steps=2))
    of_dim = "flow: expected a bijector of dim=3, got dim=2"
    raises(ValueError, of_dim, lambda: wrap(Pair(), 3, example=X, flow=Planar(2)))
    planar = "flow_options: planar takes steps, centred; got hidden"
    raises(TypeError, planar, lambda: wrap(nn.Linear(6, 7), 3, features=7, flow="planar", hidden=(8,)))
    none = "flow_options: diagonal takes none; got steps, hidden"
    raises(TypeError, none, lambda: wrap(nn.Linear(6, 7), 3, features=7, flow="diagonal", steps=2, hidden=(8,)))
    pair = "features: expected none with the pair (loc, log_var), got 6; leave it out"
    raises(ValueError, pair, lambda: wrap(Pair(), 3, features=6, example=X))
    own = "; the posterior, and its head, are made here"
    kinds = "flow: expected a recipe's name, as flow='iaf', or a Bijector, as flow=Planar(dim), got"
    iaf = RECIPES["iaf"]
    wrong: list[tuple[Any, str]] = [(Planar, "Planar"), (iaf, "iaf"), (iaf(6, 3), "FlowPosterior")]
    for flow, name in wrong:
        raises(TypeError, f"{kinds} {name}{own}", lambda flow=flow: wrap(Pair(), 3, example=X, flow=flow))
    function = "read: expected a function of what the encoder returns, got 'loc'; write read=lambda out: out[...]"
    raises(TypeError, function, lambda: wrap(Pair(), 3, example=X, read="loc"))  # pyright: ignore[reportArgumentType]
    no_module = (
        "encoder: expected a torch.nn.Module, got function; write a torch.nn.Module whose forward calls it, so that "
        "its parameters are found"
    )
    raises(TypeError, no_module, lambda: wrap(raises, 3, features=7))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("value", "got"), [
    (None, "NoneType"),
    ({"loc": X}, "dict of loc"),
    ({}, "dict"),
    ((X, X, X), "a tuple of a tensor of shape (4, 6), a tensor of shape (4, 6), a tensor of shape (4, 6)"),
    ((X,), "a tuple of a tensor of shape (4, 6)"),
    ((X, None), "a tuple of a tensor of shape (4, 6), NoneType"),
    (torch.zeros(()), "a tensor of shape ()"),
])  # fmt: skip
def test_an_encoder_that_returns_something_else(value: object, got: str) -> None:
    expected = f"expected a tensor, the pair (loc, log_var) or a Normal, got {got}"
    message = f"encoder: {expected}; pass read= a function from it to one of these"
    raises(TypeError, f"read: {expected}", lambda: wrap(Returns(None), 3, example=X, read=lambda _: value))
    raises(TypeError, message, lambda: wrap(Returns(value), 3, example=X))


def test_an_encoder_that_changes_its_mind() -> None:
    message = "encoder: expected a tensor, got a tuple of a tensor of shape (4, 6), a tensor of shape (4, 6)"
    posterior = wrap(Returns((X, X)), 3, features=6, flow="diagonal")
    raises(TypeError, f"{message}; pass wrap an example= of its input", lambda: posterior(X))
    encoder = Returns((X, X))
    posterior = wrap(encoder, 6, example=X, flow="diagonal")
    encoder.value = X
    message = "encoder: expected the pair (loc, log_var), as for the example, got a tensor of shape (4, 6)"
    raises(TypeError, message, lambda: posterior(X))


def test_a_pair_of_another_width_than_dim() -> None:
    message = (
        "encoder: expected loc and log_var of shape (*, 4), "
        "got a tuple of a tensor of shape (4, 3), a tensor of shape (4, 3)"
    )
    cure = "; pass dim=3, or a read= that gives the pair, or features"
    raises(ValueError, message + cure, lambda: wrap(Pair(), 4, example=X, flow="diagonal"))
    raises(ValueError, message + cure, lambda: wrap(Pair(), 4, example=X, flow="diagonal", read=lambda out: out))
    encoder = Pair()
    posterior = wrap(encoder, 3, example=X, flow="diagonal")
    encoder.loc, encoder.log_var = nn.Linear(8, 4), nn.Linear(8, 4)
    raises(ValueError, message.replace("3", "5").replace("4)", "3)").replace("5)", "4)"), lambda: posterior(X))
