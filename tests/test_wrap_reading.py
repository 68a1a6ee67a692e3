"""What `wrap` makes of the encoders that people have: what is read, refused and warned of, and what stays as it was."""

import copy
import pickle
import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_wrap import Pair, Returns, X, raises
from torch import Tensor, nn
from torch.distributions import Beta, Distribution, Independent, MultivariateNormal, Normal
from torch.nn.utils.rnn import pack_padded_sequence

import flowpost
from flowpost import wrap
from flowpost.evaluation import active_units, log_marginal
from flowpost.objectives import elbo_terms
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli


@dataclass
class Moments:
    """A dataclass, as pythae and many others return."""

    embedding: Tensor
    log_covariance: Tensor


def moments(out: Moments) -> tuple[Tensor, Tensor]:
    return out.embedding, out.log_covariance


LOC, STD = torch.linspace(-2, 2, 12).view(4, 3), torch.linspace(0.1, 3, 12).view(4, 3)
LOG_VAR = 2 * STD.log()
READ: dict[str, tuple[object, Callable[[Any], object] | None]] = {
    "a pair": ((LOC, LOG_VAR), None),
    "a list": ([LOC, LOG_VAR], None),
    "a pair of one scale": ((LOC, LOG_VAR[:1]), None),
    "a pair of one scale without an axis": ((LOC, LOG_VAR[0]), None),
    "mu and std": ((LOC, STD), lambda out: Normal(*out)),
    "side by side": (torch.cat([LOC, LOG_VAR], -1), lambda out: out.chunk(2, -1)),
    "a dict": ({"mu": LOC, "logvar": LOG_VAR}, lambda out: (out["mu"], out["logvar"])),
    "a dataclass": (Moments(LOC, LOG_VAR), moments),
    "three": ((LOC, LOC, LOG_VAR), lambda out: out[1:]),
    "channels": (torch.cat([LOC, LOG_VAR], 1)[..., None, None], lambda out: out.flatten(1).chunk(2, -1)),
    "a Normal": (Normal(LOC, STD), None),
    "an independent Normal": (Independent(Normal(LOC, STD), 1), None),
    "a diagonal Gaussian": (MultivariateNormal(LOC, torch.diag_embed(STD.square())), None),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("flow", ["diagonal", "iaf", "full_covariance"])
def test_it_starts_at_the_encoder_s_own_gaussian(name: str, flow: str) -> None:
    value, read = READ[name]
    one = name in ("a pair of one scale", "a pair of one scale without an axis")
    scale = STD[:1].expand(4, 3) if one else STD
    posterior = wrap(Returns(value), 3, example=X, read=read, flow=flow)
    z, log_prob, noise = posterior(X, sample_shape=(5,))
    torch.testing.assert_close(z, LOC + scale * noise, rtol=0, atol=2e-6)
    torch.testing.assert_close(log_prob, Normal(LOC, scale).log_prob(z).sum(-1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_of_half_precision_keeps_its_digits(dtype: torch.dtype) -> None:
    scale = torch.linspace(0.02, 0.1, 12, dtype=dtype).view(4, 3)
    for out in (Normal(LOC.to(dtype), scale), Independent(Normal(LOC.to(dtype), scale), 1)):
        q = wrap(Returns(out), 3, example=X, flow="diagonal").at(X)
        torch.testing.assert_close(q.stddev, scale.float(), rtol=1e-5, atol=0)


def test_a_named_read_pickles_and_copies() -> None:
    posterior = wrap(Returns(Moments(LOC, LOG_VAR)), 3, example=X, read=moments, flow="planar")
    noise = torch.randn(4, 3)
    for other in (pickle.loads(pickle.dumps(posterior)), copy.deepcopy(posterior)):
        assert torch.equal(other(X, noise=noise).z, posterior(X, noise=noise).z)


def test_read_may_make_features() -> None:
    """Of a feature map: one z an example, or one a pixel; and of tokens with `features` alone."""
    maps = torch.randn(4, 7, 2, 5)
    flat = wrap(Returns(maps), 3, example=X, read=lambda out: out.flatten(1), flow="diagonal")
    assert flat(X).z.shape == (4, 3)
    each = wrap(Returns(maps), 3, example=X, read=lambda out: out.movedim(1, -1), flow="diagonal")
    assert each(X).z.shape == (4, 2, 5, 3)
    first = wrap(Returns(torch.randn(4, 9, 7)), 3, features=7, read=lambda out: out[:, 0], flow="diagonal")
    assert first(X).z.shape == (4, 3)
    assert wrap(Returns(torch.randn(4, 9, 7)), 3, example=X, flow="diagonal")(X).z.shape == (4, 9, 3)


def test_a_read_with_parameters_of_its_own_is_refused() -> None:
    """Nobody would train them, nor move them to a device; the encoder's own are trained."""
    inner, other, frozen = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(7, 5).requires_grad_(requires_grad=False)
    message = (
        "read: expected a function without parameters of its own, got one that is a Linear whose parameters would not "
        "be trained; put it into the encoder, as nn.Sequential(encoder, module)"
    )
    for read in (other, other.forward, partial(other)):
        raises(TypeError, message, lambda read=read: wrap(inner, 3, features=5, read=read))
    with pytest.warns(UserWarning, match=re.escape(message.replace("is a", "names a"))):
        wrap(inner, 3, features=5, read=lambda out: other(out))
    for read in (nn.Flatten(), frozen, lambda out: frozen(out), lambda out: out @ inner.weight):
        wrap(inner, 3, features=5, read=read)


STATES = "pass read=lambda out: {} for one z a sequence, or read=lambda out: out[0] for one z a step"
REFUSED = {
    "a feature map": (
        torch.zeros(16, 6, 7, 7), ValueError,
        "encoder: expected (batch, features), with one axis between them at most, got shape (16, 6, 7, 7): pass read="
        "lambda out: out.flatten(1) for one z an example, or read=lambda out: out.movedim(1, -1) for one z a pixel",
    ),
    "a pair of maps": (
        (torch.zeros(2, 3, 5, 3), torch.zeros(2, 3, 5, 3)), ValueError,
        "encoder: expected (batch, features), with one axis between them at most, got shape (2, 3, 5, 3): pass "
        "read=lambda out: [part.flatten(1) for part in out] for one z an example, "
        "or read=lambda out: [part.movedim(1, -1) for part in out] for one z a pixel",
    ),
    "a GRU's output and state": (
        (torch.zeros(4, 9, 7), torch.zeros(1, 4, 7)), ValueError,
        "encoder: expected loc and log_var, got a tuple of a tensor of shape (4, 9, 7), a tensor of shape (1, 4, 7), "
        f"as a recurrent network returns its outputs and its last state; {STATES.format('out[1][-1]')}; if it is the "
        "pair, read=lambda out: out",
    ),
    "a GRU's of width dim, which broadcast": (
        (torch.zeros(1, 9, 3), torch.zeros(1, 1, 3)), ValueError,
        "encoder: expected loc and log_var, got a tuple of a tensor of shape (1, 9, 3), a tensor of shape (1, 1, 3), "
        f"as a recurrent network returns its outputs and its last state; {STATES.format('out[1][-1]')}; if it is the "
        "pair, read=lambda out: out",
    ),
    "an LSTM's output and states": (
        (torch.zeros(4, 9, 7), (torch.zeros(1, 4, 7), torch.zeros(1, 4, 7))), TypeError,
        "encoder: expected a tensor, the pair (loc, log_var) or a Normal, got a tuple of a tensor of shape (4, 9, 7), "
        f"a tuple of a tensor of shape (1, 4, 7), a tensor of shape (1, 4, 7); {STATES.format('out[1][0][-1]')}",
    ),
    "a pair that does not broadcast": (
        (torch.zeros(4, 3), torch.zeros(2, 3)), ValueError,
        "encoder: expected loc and log_var that broadcast, got a tuple of a tensor of shape (4, 3), a tensor of shape "
        "(2, 3); pass a read= that gives the pair, or features",
    ),
    "a pair of two widths": (
        (torch.zeros(4, 3), torch.zeros(4, 1)), ValueError,
        "encoder: expected loc and log_var of shape (*, 3), got a tuple of a tensor of shape (4, 3), a tensor of shape "
        "(4, 1); pass a read= that gives the pair, or features",
    ),
    "features and indices": (
        LOC.sort(-1), TypeError,
        "encoder: expected loc and log_var of floating dtypes, got a log_var of torch.int64, as indices or a mask "
        "have; pass read= a function that takes the features out, as lambda out: out[0]",
    ),
    "a mask and features": (
        (LOC > 0, LOC), TypeError,
        "encoder: expected loc and log_var of floating dtypes, got a loc of torch.bool, as indices or a mask have; "
        "pass read= a function that takes the features out, as lambda out: out[0]",
    ),
    "a dataclass": (
        Moments(LOC, LOG_VAR), TypeError,
        "encoder: expected a tensor, the pair (loc, log_var) or a Normal, got Moments of embedding, log_covariance; "
        "pass read= a function from it to one of these",
    ),
    "another distribution": (
        Beta(LOC.exp(), STD), TypeError,
        "encoder: expected a tensor, the pair (loc, log_var) or a diagonal Gaussian, got Beta; pass wrap read= a "
        "function from it to one of these",
    ),
    "a correlated Gaussian": (
        MultivariateNormal(LOC, torch.eye(3) + 0.5), ValueError,
        "encoder: expected a Gaussian of independent variables, got a MultivariateNormal with correlations; the flow "
        "acts on the noise before a diagonal Gaussian: pass read=lambda out: (out.mean, out.variance.log()), and "
        "flow='full_covariance' learns correlations again",
    ),
}  # fmt: skip


def test_a_pair_with_one_log_var_for_all_steps_can_be_meant() -> None:
    pair = torch.zeros(4, 9, 3), torch.zeros(1, 1, 3)
    assert wrap(Returns(pair), 3, example=X, read=lambda out: out, flow="diagonal")(X).z.shape == (4, 9, 3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    value, error, message = REFUSED[name]
    raises(error, message, lambda: wrap(Returns(value), 3, example=X))


def test_correlations_that_come_later_are_found_under_checking() -> None:
    encoder = Returns(MultivariateNormal(LOC, torch.eye(3)))
    posterior = wrap(encoder, 3, example=X, flow="diagonal")
    encoder.value = MultivariateNormal(LOC, torch.eye(3) + 0.5)
    posterior(X)
    with flowpost.checking(), pytest.raises(ValueError, match="with correlations"):
        posterior(X)


def test_what_is_hardly_meant_warns_and_both_cures_silence_it() -> None:
    positive, wide = Returns((X[:, :4], 0.1 + X[:, :4].abs())), Returns(torch.zeros(4, 8))
    with pytest.warns(
        UserWarning, match="looks like a standard deviation.*read=lambda out: torch.distributions.Normal"
    ):
        wrap(positive, 4, example=X, flow="diagonal")
    with pytest.warns(UserWarning, match="8 wide, twice dim.*read=lambda out: out.chunk.2, -1.; features=8"):
        wrap(wide, 4, example=X, flow="diagonal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(positive, 4, example=X, flow="diagonal", read=lambda out: out)
        wrap(positive, 4, example=X, flow="diagonal", read=lambda out: Normal(*out))
        wrap(Returns((X[:3, :4], 0.1 + X[:3, :4].abs())), 4, example=X, flow="diagonal")  # 12 numbers say little
        wrap(Returns(Normal(X[:, :4], 1 + X[:, :4].abs() * 9)), 4, example=X, flow="diagonal")
        wrap(wide, 4, example=X, flow="diagonal", features=8)
        wrap(wide, 4, example=X, flow="diagonal", read=lambda out: out)


@pytest.mark.parametrize(
    ("names", "value", "cure"),
    [
        ("mean std", STD, "torch.distributions.Normal(*out)"),
        ("mu sigma", STD, "torch.distributions.Normal(*out)"),
        ("mu log_std", STD.log(), "(out[0], 2 * out[1])"),
        ("loc log_scale", STD.log(), "(out[0], 2 * out[1])"),
        ("mu variance", STD.square(), "(out[0], out[1].log())"),
        ("mu sigma_sq", STD.square(), "(out[0], out[1].log())"),
        ("mu log_prec", -LOG_VAR, "(out[0], -out[1])"),
        ("loc precision", 1 / STD.square(), "(out[0], -out[1].log())"),
        ("logvar mu", LOC, "(out[1], out[0])"),
        ("mu logvar", LOG_VAR, ""),
        ("loc log_sigma2", LOG_VAR, ""),
        ("first h2", LOG_VAR, ""),
    ],
)
def test_the_names_of_a_pair_are_read(names: str, value: Tensor, cure: str) -> None:
    """Of one that is not named loc and log_var a warning says what to write, and that gives the encoder's Gaussian."""
    first = LOG_VAR if names == "logvar mu" else LOC
    out = namedtuple("Out", names)(first, value)  # noqa: PYI024
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = wrap(Returns(out), 3, example=X, flow="diagonal")
    said = [str(each.message) for each in caught]
    if not cure:
        assert not said
    else:
        listed = ", ".join(names.split())
        assert said == [
            f"encoder: expected the pair (loc, log_var), got one named {listed}; pass read=lambda out: {cure}, or, if "
            f"it is right, read=lambda out: out"
        ]
        assert caught[0].filename == __file__
        posterior = wrap(Returns(out), 3, example=X, flow="diagonal", read=eval(f"lambda out: {cure}"))  # noqa: S307
    if "h2" not in names:
        torch.testing.assert_close(posterior.at(X).mean, LOC)
        torch.testing.assert_close(posterior.at(X).stddev, STD, rtol=1e-4, atol=1e-4)


def test_a_method_is_no_module() -> None:
    model = Pair()
    raises(
        TypeError,
        "encoder: expected a torch.nn.Module, got method; pass the Pair itself, or a module of your own whose forward "
        "calls forward",
        lambda: wrap(model.forward, 3, example=X),  # pyright: ignore[reportArgumentType]
    )


def test_a_packed_batch_is_one_input() -> None:
    """Although it is a tuple: what each sequence has alone, it has in the batch."""
    gru, x = nn.GRU(3, 7, batch_first=True), torch.randn(4, 5, 3)
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 1, 4]), batch_first=True, enforce_sorted=False)
    posterior = wrap(gru, 3, example=packed, read=lambda out: out[1][-1], flow="planar")
    assert posterior.posterior.features == 7
    torch.testing.assert_close(posterior.features(packed)[1:2], posterior.features(x[1:2, :2]))


class Noisy(nn.Module):
    """An encoder with keywords of the posterior's names."""

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        return x + noise


def test_an_encoder_s_own_noise_is_not_swallowed() -> None:
    posterior = wrap(Noisy(), 3, example=X, features=6, flow="diagonal")
    assert torch.equal(posterior.features(X, noise=2.0), X + 2)
    assert posterior(X).z.shape == (4, 3)
    with pytest.raises(TypeError, match="noise: the encoder has an argument of this name.*at"):
        posterior(X, noise=torch.zeros(4, 3))
    noise = torch.randn(4, 3)
    z = posterior.at(X, noise=2.0).draw(noise=noise).z
    assert torch.equal(z, posterior.posterior(X + 2, noise=noise).z)


@pytest.mark.parametrize("change", [lambda encoder: encoder, partial(torch.compile, backend="eager")])
def test_nor_is_that_of_an_encoder_put_in_its_place(change: Callable[[nn.Module], nn.Module]) -> None:
    posterior = wrap(nn.Identity(), 3, features=6, flow="diagonal")
    assert posterior(X, noise=torch.zeros(4, 3)).z.shape == (4, 3)
    posterior.encoder = change(Noisy())
    with pytest.raises(TypeError, match="noise: the encoder has an argument of this name"):
        posterior(X, noise=torch.zeros(4, 3))
    posterior.encoder = nn.Identity()
    assert posterior(X, noise=torch.zeros(4, 3)).z.shape == (4, 3)


def test_a_scripted_encoder_is_a_module_too() -> None:
    inner = nn.Linear(6, 7)
    posterior, noise = wrap(torch.jit.trace(inner, X), 3, example=X, flow="diagonal"), torch.randn(4, 3)  # pyright: ignore
    assert torch.equal(posterior(X, noise=noise).z, posterior.posterior(inner(X), noise=noise).z)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["a pair", "side by side", "three"])
def test_a_wrapped_encoder_compiles_whole(name: str) -> None:
    value, read = READ[name]
    vae = VAE(wrap(Returns(value), 3, example=X, read=read, flow="planar"), nn.Linear(3, 6), Bernoulli())
    step = torch.compile(lambda x: vae(x)[:3], fullgraph=True, backend="aot_eager")
    assert [each.shape for each in step((X > 0).float())] == [(4,)] * 3


@pytest.mark.parametrize("flow", ["diagonal", "full_covariance", "planar"])
def test_it_is_a_posterior_like_any_other(flow: str) -> None:
    posterior = wrap(Pair(), 3, example=X, flow=flow).double()
    x = X.double()
    q = posterior.at(x)
    sample = q.draw((2,))
    assert isinstance(q, Distribution)
    assert posterior.dim == 3
    assert posterior.is_gaussian == (flow != "planar")
    torch.testing.assert_close(posterior.log_prob(sample.z, x), sample.log_prob)
    torch.testing.assert_close(posterior.path_log_prob(sample, x), sample.log_prob)
    if posterior.is_gaussian:
        for found, expected in zip(
            posterior.gaussian(x), posterior.posterior.gaussian(posterior.features(x)), strict=True
        ):
            assert torch.equal(found, expected)
    else:
        with pytest.raises(TypeError, match="posterior: expected a Gaussian one"):
            posterior.gaussian(x)


# ------------------------------------------------------------------------------------------------ what stays as it was


class Model(nn.Module):
    """A VAE of somebody's own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, nn.Linear(3, 6)


class Nested(nn.Module):
    """An encoder whose child is called encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm = Pair(), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(self.norm(x))


@pytest.mark.parametrize("make", [Pair, Nested])
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_a_state_from_before_it_was_wrapped_loads(make: Callable[[], nn.Module], options: dict[str, bool]) -> None:
    old, new = Model(make()), Model(make())
    before = {key: value.clone() for key, value in old.state_dict().items()}
    wrapped = new.encoder = wrap(new.encoder, 3, example=X, flow="iaf", hidden=(8,))
    own = {key: value.clone() for key, value in wrapped.posterior.state_dict().items()}
    result = new.load_state_dict(old.state_dict(), **options)
    assert not result.missing_keys
    assert not result.unexpected_keys
    found = wrapped.encoder.state_dict()
    assert all(torch.equal(value, before[f"encoder.{key}"]) for key, value in found.items())
    assert all(torch.equal(value, own[key]) for key, value in wrapped.posterior.state_dict().items())
    assert torch.equal(new.decoder.weight, before["decoder.weight"])
    again = wrap(make(), 3, example=X, flow="iaf", hidden=(8,))
    again.load_state_dict(wrapped.state_dict())  # a new state
    assert all(torch.equal(value, wrapped.state_dict()[key]) for key, value in again.state_dict().items())
    again.load_state_dict(old.encoder.state_dict())  # the encoder's alone
    assert all(torch.equal(value, before[f"encoder.{key}"]) for key, value in again.encoder.state_dict().items())


def test_a_load_of_nothing_is_not_silent() -> None:
    new = Model(wrap(Pair(), 3, example=X, flow="diagonal"))
    state = {key.replace("encoder.", "enc."): value for key, value in Model(Pair()).state_dict().items()}
    with pytest.raises(RuntimeError, match="Missing key"), pytest.warns(UserWarning, match="nothing of the encoder"):
        new.load_state_dict(state)
    with pytest.warns(
        UserWarning, match="nothing of the encoder was loaded; expected keys such as encoder.encoder.body"
    ):
        new.load_state_dict(state, strict=False)


def test_a_frozen_encoder_stays_in_eval_mode() -> None:
    frozen = Nested().requires_grad_(requires_grad=False).eval()
    posterior = wrap(frozen, 3, example=X, flow="planar")
    before = copy.deepcopy(frozen.state_dict())
    for mode in (True, False, True):
        posterior.train(mode)
        posterior(X)
        assert not any(module.training for module in frozen.modules())
        assert posterior.posterior.training == mode
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    trained = wrap(Nested().eval(), 3, example=X, flow="planar").train()
    assert trained.encoder.training  # nobody froze it
    awake = wrap(Nested().requires_grad_(requires_grad=False), 3, example=X, flow="planar")
    assert awake.eval().train().encoder.training  # frozen, but not in eval mode
    awake.encoder.eval()
    assert not awake.train().encoder.training
    assert not awake.eval().train().encoder.training


@pytest.mark.parametrize("flow", RECIPES)
def test_every_recipe_names_its_options(flow: str) -> None:
    with pytest.raises(TypeError, match=f"^flow_options: {flow} takes .*; got nonsense$"):
        wrap(nn.Linear(6, 7), 3, features=7, flow=flow, nonsense=1)


def test_a_head_that_explodes_says_so() -> None:
    """The full covariance of 784 latents has 307,720 numbers; of a pair, 481 million weights."""
    message = (
        "features: expected a head of at most 100,000,000 weights, got 481,275,648, from 1,568 features to the 306,936 "
        "numbers of a flow of dim=784; use a flow whose numbers do not grow as dim^2 (householder, planar, iaf), a "
        "smaller dim, or a head of your own: FlowPosterior(features, flow, head)"
    )
    encoder = Returns((torch.zeros(2, 784), torch.zeros(2, 784)))
    raises(ValueError, message, lambda: wrap(encoder, 784, example=X, flow="full_covariance"))
    with pytest.raises(ValueError, match="got 308,504,000, from 1,000 features to the 308,504 numbers"):
        flowpost.full_covariance(1000, 784)


# ----------------------------------------------------------------------------------------------------------- in a VAE


def parts(flow: str) -> tuple[Any, nn.Module, Bernoulli]:
    torch.manual_seed(2)
    return wrap(Pair(), 3, example=X, flow=flow), nn.Linear(3, 6), Bernoulli()


@pytest.mark.parametrize("flow", ["diagonal", "full_covariance", "planar", "iaf"])
def test_a_vae_takes_what_wrap_made(flow: str) -> None:
    """With the keys, and the numbers, of the form that has encoder and posterior apart."""
    wrapped, decoder, likelihood = parts(flow)
    vae, x = VAE(wrapped, decoder, likelihood), (X > 0).float()
    assert {key.partition(".")[0] for key in vae.state_dict()} <= {"encoder", "posterior", "decoder"}
    apart = VAE(Joined(wrapped.encoder), wrapped.posterior, decoder=decoder, likelihood=likelihood)
    outs = []
    for model in (vae, apart):
        torch.manual_seed(3)
        outs.append(model(x, (2,)))
    for found, expected in zip(outs[0], outs[1], strict=True):
        assert (found is None) == (expected is None)
        if isinstance(found, Tensor):
            assert torch.equal(found, expected)
    assert (outs[0].kl is not None) == wrapped.is_gaussian
    terms = elbo_terms(outs[0].log_likelihood, outs[0].log_prior, outs[0].log_q, outs[0].kl)
    torch.manual_seed(3)
    found = vae.elbo_terms(x, (2,))
    torch.testing.assert_close(found.kl, terms.kl)
    assert log_marginal(vae, x, 50).shape == (4,)
    assert active_units(vae, x).active.shape == (3,)
    for copied in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        torch.manual_seed(3)
        assert torch.equal(copied(x, (2,)).log_q, outs[0].log_q)


class Joined(nn.Module):
    """A pair side by side."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.inner(x), -1)


def test_a_vae_keeps_a_frozen_encoder_at_rest() -> None:
    frozen = Nested().requires_grad_(requires_grad=False).eval()
    vae = VAE(wrap(frozen, 3, example=X, flow="planar"), nn.Linear(3, 6), Bernoulli()).train()
    assert not frozen.training
    assert vae.posterior.training
    assert VAE(Nested(), flowpost.diagonal(6, 3), nn.Linear(3, 6), Bernoulli()).eval().train().encoder.training


def test_what_a_vae_lacks_is_named() -> None:
    wrapped, decoder, likelihood = parts("diagonal")
    with pytest.raises(TypeError, match="missing a required argument: 'likelihood'"):
        VAE(wrapped, decoder)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="too many positional arguments"):
        VAE(wrapped, wrapped.posterior, decoder, likelihood)  # pyright: ignore[reportCallIssue]


def test_a_vae_with_a_wrapped_encoder_saves_and_loads(tmp_path: Path) -> None:
    vae, other = VAE(*parts("iaf")), VAE(*parts("iaf"))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1)
    flowpost.save(vae, tmp_path / "vae.safetensors")
    flowpost.load(tmp_path / "vae.safetensors", other)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in vae.state_dict().items())
