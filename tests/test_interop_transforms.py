"""A step as a `torch.distributions.Transform` and back: torch's own laws one way, the contract the other."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution, constraints
from torch.distributions import transforms as T
from versions import walked

import flowpost
from flowpost import (
    Affine,
    Bijector,
    Chain,
    Coupling,
    FlowPosterior,
    Inverse,
    Learned,
    Permute,
    Planar,
    Sigmoid,
    Softplus,
    Spline,
    Tanh,
)
from flowpost.bijectors.base import LINE
from flowpost.testing import check_bijector, push

BATCH = 4
STEPS: dict[str, Callable[[], Bijector]] = {
    "affine": lambda: Affine(DIM),
    "planar": lambda: Planar(DIM),
    "autoregressive": lambda: flowpost.Autoregressive(DIM, 3, hidden=(8,)),
    "maf": lambda: Inverse(flowpost.Autoregressive(DIM, 3, hidden=(8,))),
    "learned": lambda: Learned(Planar(DIM)),
    "positive": lambda: Chain(Affine(DIM), Softplus(DIM)),
    "bounded": lambda: Chain(Affine(DIM), Tanh(DIM)),
    "from a proportion": lambda: Inverse(Sigmoid(DIM)),
}
every = pytest.mark.parametrize("name", STEPS)


def made(name: str) -> tuple[Bijector, Tensor | None]:
    step = push(STEPS[name]().double(), 0.3, seed=0)
    context = torch.randn(BATCH, step.context_size, dtype=torch.float64) if step.context_size else None
    return step, context


def points(interval: tuple[float, float], *batch: int) -> Tensor:
    z = torch.randn(*batch, DIM, dtype=torch.float64)
    low, high = interval
    return z if math.isinf(low) else low + torch.sigmoid(z) * min(high - low, 3.0)


# ------------------------------------------------------------------------------------------------- torch's own laws


@every
def test_image_log_det_and_inverse_are_the_step_s(name: str) -> None:
    step, context = made(name)
    transform, x = step.as_transform(context), points(step.domain, BATCH)
    y, log_det = step(x, context)
    assert torch.equal(transform(x), y)
    assert torch.equal(transform.log_abs_det_jacobian(x, y), log_det)
    torch.testing.assert_close(transform.inv(y), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -log_det, rtol=1e-9, atol=1e-9)
    assert transform.inv.inv is transform
    assert (transform.bijective, transform.event_dim) == (True, 1)
    for constraint, value in ((transform.domain, x), (transform.codomain, y)):
        assert constraint.event_dim == 1
        assert constraint.check(value).shape == (BATCH,)
        assert constraint.check(value).all()


@every
def test_the_log_det_is_autodiff_s(name: str) -> None:
    step, context = made(name)
    transform, x = step.as_transform(None if context is None else context[0]), points(step.domain)
    for each, value in ((transform, x), (transform.inv, transform(x).detach())):
        jacobian = torch.autograd.functional.jacobian(each, value)
        wanted = torch.linalg.slogdet(jacobian).logabsdet  # pyright: ignore[reportArgumentType]
        found = each.log_abs_det_jacobian(value, each(value))  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_domain_and_codomain_are_the_step_s() -> None:
    assert Planar(DIM).as_transform(torch.zeros(2 * DIM + 1)).codomain is constraints.real_vector
    for step, inside, outside in ((Sigmoid(DIM), 0.5, 1.5), (Softplus(DIM), 1.5, -0.5), (Tanh(DIM), -0.5, -1.5)):
        for constraint in (step.as_transform().codomain, Inverse(step).as_transform().domain):
            assert constraint.check(torch.full((DIM,), inside))
            assert not constraint.check(torch.full((DIM,), outside))


@every
@pytest.mark.parametrize("cache_size", [0, 1])
def test_a_transformed_distribution_is_the_posterior(name: str, cache_size: int) -> None:
    step, context = made(name)
    if step.domain != LINE:
        pytest.skip("noise is on the line")
    transform = step.as_transform(context).with_cache(cache_size)
    mine = FlowPosterior(FEATURES, step, nn.Identity()) if context is not None else FlowPosterior(0, step)
    q = flowpost.FlowDistribution(mine.flow, context, () if context is None else (BATCH,))
    for base in (Normal(torch.zeros(DIM).double(), 1.0), Independent(Normal(torch.zeros(DIM).double(), 1.0), 1)):
        # Explicitly: a compiler, once used, turns the default off for the whole process.
        p = TransformedDistribution(base, [transform], validate_args=True)
        assert (p.batch_shape, p.event_shape) == (q.batch_shape, q.event_shape)
        z = p.rsample((5,))
        assert z.shape == (5, *q.batch_shape, DIM)
        torch.testing.assert_close(p.log_prob(z), q.log_prob(z), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(p.expand((2, BATCH)).log_prob(z[:2, None] if context is None else z[:2]),
                                   q.log_prob(z[:2, None] if context is None else z[:2]).expand(2, BATCH))  # fmt: skip
        with pytest.raises(ValueError, match="support"):
            p.log_prob(torch.full((DIM,), math.nan).double())


def test_compositions_are_chains() -> None:
    (first, c), (second, d) = made("affine"), made("planar")
    assert c is not None
    assert d is not None
    composed = T.ComposeTransform([first.as_transform(c), T.SigmoidTransform().inv.inv, T.SigmoidTransform().inv,
                                   second.as_transform(d)])  # fmt: skip
    x = points(first.domain, BATCH)
    y, log_det = Chain(first, second)(x, torch.cat([c, d], -1))
    torch.testing.assert_close(composed(x), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(composed.log_abs_det_jacobian(x, composed(x)), log_det, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(composed.inv(y), x, rtol=1e-8, atol=1e-8)
    assert composed.event_dim == 1


def test_shapes_broadcast_with_the_context_s() -> None:
    transform = Planar(DIM).as_transform(torch.zeros(BATCH, 2 * DIM + 1))
    assert transform.forward_shape(torch.Size((5, 1, DIM))) == (5, BATCH, DIM)
    assert transform.inv.forward_shape(torch.Size((DIM,))) == (BATCH, DIM)
    for shape in ((DIM + 1,), ()):
        with pytest.raises(ValueError, match=r"^shape: expected \(\*, 3\)"):
            transform.forward_shape(torch.Size(shape))


@pytest.mark.parametrize("context", [None, torch.zeros(BATCH, 2), torch.zeros(BATCH, 7, dtype=torch.int64)])
def test_a_wrong_context_is_refused_at_once(context: Tensor | None) -> None:
    with pytest.raises((TypeError, ValueError), match="^context: "):
        Planar(DIM).as_transform(context)


def counted(step: Bijector) -> list[str]:
    calls: list[str] = []
    for name in ("_forward", "_inverse"):
        real = getattr(step, name)
        setattr(step, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    return calls


def test_a_cache_holds_the_last_pair_while_nothing_changes() -> None:
    step, context = made("autoregressive")
    assert context is not None
    calls, x = counted(step), points(step.domain, BATCH)
    transform = step.as_transform(context).with_cache()
    assert transform.with_cache(1) is transform
    assert transform.with_cache(0)._cache_size == 0
    y = transform(x)
    assert transform(x) is y
    assert transform.inv(y) is x
    log_det = transform.log_abs_det_jacobian(x, y)
    assert calls == ["_forward"]
    torch.testing.assert_close(transform.log_abs_det_jacobian(x.clone(), y), log_det)
    assert calls == ["_forward"] * 2
    back = transform.inv(y.clone())
    assert calls[2:] == ["_inverse"]
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, back), -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", ["x", "y", "context", "parameter", "grad mode"])
def test_a_cache_is_never_stale(what: str) -> None:
    step, context = made("autoregressive")
    assert context is not None
    transform, x = step.as_transform(context).with_cache(), points(step.domain, BATCH)
    y = transform(x)
    changed = {"x": x, "y": y, "context": context, "parameter": next(step.parameters())}
    with torch.no_grad():
        if what in changed:
            changed[what].add_(0.1)
    with torch.set_grad_enabled(what != "grad mode"):
        fresh = step.as_transform(context.clone())
        found = (transform.log_abs_det_jacobian(x, y), transform(x))
        for one, other in zip(found, (fresh.log_abs_det_jacobian(x, y), fresh(x)), strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad is other.requires_grad


@pytest.mark.parametrize("what", ["x", "context", "parameter", "data"])
def test_a_cache_notices_what_a_tensor_does_not_count(what: str) -> None:
    """A gradient that is wanted from now on, and other numbers in a parameter's place."""
    step, context = made("autoregressive")
    assert context is not None
    step.requires_grad_(what == "data")
    transform, x = step.as_transform(context).with_cache(), points(step.domain, BATCH)
    transform(x)
    parameter = next(step.parameters())
    if what == "data":
        parameter.data = 2 * parameter.data
    else:
        {"x": x, "context": context, "parameter": parameter}[what].requires_grad_()
    y = transform(x)
    found, expected = (y, transform.log_abs_det_jacobian(x, y)), step(x, context)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad


class Tempered(Bijector):
    """A step with a buffer, which in eval mode does nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("by", torch.tensor(2.0))

    def _by(self) -> Tensor:
        return self.get_buffer("by") if self.training else torch.ones(())

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z * self._by(), self.dim * self._by().log()

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z / self._by(), -self.dim * self._by().log()


CHANGES: dict[str, Callable[[Tempered], object]] = {
    "buffer": lambda step: step.get_buffer("by").fill_(3.0),
    "mode": lambda step: step.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_notices_a_buffer_and_a_mode(change: str) -> None:
    step = Tempered(3)
    transform, x = Chain(step).as_transform().with_cache(), torch.randn(5, 3)
    transform(x)
    CHANGES[change](step)
    y = transform(x)
    for one, other in zip((y, transform.log_abs_det_jacobian(x, y)), step(x), strict=True):
        assert torch.equal(one, other)


SETTINGS: dict[str, tuple[Callable[[], Bijector], Callable[[Any], object]]] = {
    "bound": (lambda: Spline(3, bins=4), lambda step: setattr(step, "bound", 1.0)),
    "order": (lambda: Permute([1, 2, 0]), lambda step: setattr(step, "order", [2, 1, 0])),
    "activation": (
        lambda: Coupling(3, Affine(1), 12, (8,)),
        lambda step: setattr(step.net, "activation", torch.tanh),
    ),
    "hook": (
        lambda: Coupling(3, Affine(1), 12, (8,)),
        lambda step: step.net.layers[0].register_forward_hook(lambda _, args, result: 2 * result),
    ),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_cache_notices_a_setting(what: str) -> None:
    """What no tensor tells: numbers on a step, an order, a function, a hook."""
    make, change = SETTINGS[what]
    step, x = make(), torch.randn(5, 3)
    for parameter in step.parameters():
        nn.init.normal_(parameter)
    context = torch.randn(5, step.context_size) if step.context_size else None
    transform = step.as_transform(context).with_cache()
    before = transform(x)
    change(step)
    y = transform(x)
    assert not torch.equal(y, before)
    for one, other in zip((y, transform.log_abs_det_jacobian(x, y)), step(x, context), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_cache_notices_the_steps_of_a_fused_optimizer(keep: bool, epochs: int) -> None:  # noqa: FBT001
    """Which no parameter counts: points that are mapped again after each epoch would stay where they were."""
    step, context = made("autoregressive")
    assert context is not None
    transform, x = step.as_transform(context).with_cache(), points(step.domain, BATCH)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.1, fused=True)
    for _ in range(epochs):
        with torch.no_grad():
            transform(x)
        optimizer.zero_grad(set_to_none=not keep)
        step(x, context)[0].square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(transform(x), step(x, context)[0])


def test_a_transform_pickles_and_copies() -> None:
    step, context = made("autoregressive")
    transform, x = step.as_transform(context).with_cache(), points(step.domain, BATCH)
    y = transform(x)
    for other in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):
        assert torch.equal(other(x), y)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_gradients_reach_the_step_and_the_context(cache_size: int) -> None:
    step, context = made("autoregressive")
    assert context is not None
    transform, x = step.as_transform(context.requires_grad_()).with_cache(cache_size), points(step.domain, BATCH)
    found = transform.log_abs_det_jacobian(x, transform(x)).sum()
    inputs = [context, *step.parameters()]
    wanted = torch.autograd.grad(step(x, context)[1].sum(), inputs, allow_unused=True)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, allow_unused=True), wanted)
    assert wanted[0] is not None
    assert wanted[0].abs().max() > 0


# ------------------------------------------------------------------------------------------------- transforms as steps


def shifts(dim: int) -> T.Transform:
    numbers = torch.linspace(-2, 1, dim, dtype=torch.float64, device="cpu")
    return T.AffineTransform(numbers, 0.5 + numbers.square(), cache_size=1)


class Lazy(nn.Module):
    """A module that makes a transform: of vectors, each variable's shift the sum of those before it and of c."""

    def __init__(self, dim: int, context_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim + context_size))
        self.dim = dim

    def forward(self, context: Tensor | None = None) -> T.Transform:
        weight = torch.tanh(self.weight)
        lower, shift = weight[:, : self.dim].tril(-1), weight[:, self.dim :]
        return Linear(lower, lower.new_zeros(()) if context is None else context @ shift.mT)


class Linear(T.Transform):
    """``y = x + L x + b`` with L strictly lower-triangular; its scale ``exp(b)``."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, lower: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.lower, self.shift = lower, shift

    def _call(self, x: Tensor) -> Tensor:
        return (x + x @ self.lower.mT) * self.shift.exp() + self.shift

    def _inverse(self, y: Tensor) -> Tensor:
        unit = self.lower + torch.eye(len(self.lower), dtype=y.dtype, device=y.device)
        scaled = ((y - self.shift) * torch.exp(-self.shift)).unsqueeze(-1)
        return torch.linalg.solve_triangular(unit, scaled, upper=False, unitriangular=True).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.shift.expand_as(y).sum(-1)


def affine(context: Tensor) -> T.Transform:
    loc, scale = context.chunk(2, -1)
    return T.AffineTransform(loc, torch.exp(scale.tanh()))


GIVEN: dict[str, Callable[[int], Bijector]] = {
    "constants": lambda dim: Bijector.from_transform(shifts(dim), dim),
    "an inverse, composed": lambda dim: Bijector.from_transform(
        T.ComposeTransform([shifts(dim), T.ExpTransform()]).inv, dim
    ),
    "onto an interval": lambda dim: Bijector.from_transform(T.TanhTransform(), dim),
    "onto an interval, clamped": lambda dim: Bijector.from_transform(T.SigmoidTransform(), dim),
    "a function": lambda dim: Bijector.from_transform(affine, dim, 2 * dim),
    "a module": lambda dim: Bijector.from_transform(Lazy(dim, 0), dim),
    "a module of a context": lambda dim: Bijector.from_transform(Lazy(dim, 2), dim, 2),
}  # fmt: skip
# None is the identity anywhere; a tanh of torch's is 1 already where the contract tries it, and exp overflows.
SKIP = ["identity", "extremes", "compiles", "batch_sizes"]


QUICK = ["an inverse, composed", "a module of a context"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in GIVEN]
)
def test_a_transform_as_a_step_holds_the_contract(name: str) -> None:
    worst = check_bijector(
        lambda dim, context_size, dtype, seed, push: flowpost.testing.push(GIVEN[name](dim).to(dtype), push, seed),
        dims=(2,),
        examples=3,
        skip=SKIP,
    )
    assert worst["log_det"] < 1e-3


@walked
@pytest.mark.compile
@pytest.mark.parametrize("name", GIVEN)
def test_a_transform_as_a_step_compiles(name: str) -> None:
    check_bijector(
        lambda dim, context_size, dtype, seed, push: GIVEN[name](dim).to(dtype),
        dims=(2,),
        dtypes=(torch.float32,),
        skip=[each for each in flowpost.testing.PROPERTIES if each != "compiles"],
    )


def test_the_contract_sees_a_wrong_log_det(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "log_abs_det_jacobian", lambda self, x, y: -self.shift.expand_as(y).sum(-1))
    with pytest.raises(flowpost.testing.ContractError, match="^log_det"):
        test_a_transform_as_a_step_holds_the_contract("a module of a context")


def test_a_transform_is_as_it_was_after_both_ways() -> None:
    x = torch.randn(BATCH, DIM, dtype=torch.float64)
    back = Bijector.from_transform(T.ComposeTransform([shifts(DIM), T.TanhTransform(cache_size=1)]), DIM).as_transform()
    wanted = T.ComposeTransform([shifts(DIM), T.TanhTransform()])
    torch.testing.assert_close(back(x), wanted(x))
    torch.testing.assert_close(back.log_abs_det_jacobian(x, back(x)), wanted.log_abs_det_jacobian(x, wanted(x)).sum(-1))


def test_parameters_of_a_module_are_the_step_s() -> None:
    module = Lazy(DIM, FEATURES)
    posterior = FlowPosterior(FEATURES, Bijector.from_transform(module, DIM, FEATURES), nn.Identity()).double()
    assert any(each is module.weight for each in posterior.parameters())
    assert module.weight.dtype == torch.float64
    h = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    z, log_q, _ = posterior(h, (5,))
    torch.testing.assert_close(posterior.log_prob(z, h), log_q, rtol=1e-9, atol=1e-9)
    (log_q.sum() + z.sum()).backward()
    assert module.weight.grad is not None


def test_constants_follow_and_no_cache_is_filled() -> None:
    given = shifts(DIM)
    step, z = Bijector.from_transform(T.ComposeTransform([given]), DIM), torch.randn(BATCH, DIM)
    assert step.to(torch.float32)(z)[0].dtype == torch.float32
    step(z.double())
    step.inverse(z.double())
    assert vars(given)["_cached_x_y"] == (None, None)
    assert step.to("meta")(z.to("meta"))[0].device.type == "meta"
    assert not step.state_dict()


def test_the_constants_of_a_distribution_within_follow_too() -> None:
    base = Normal(torch.arange(3.0), 2.0, validate_args=False)
    step, z = Bijector.from_transform(T.CumulativeDistributionTransform(base), 3), torch.randn(BATCH, 3)
    assert step.to("meta")(z.to("meta"))[0].device.type == "meta"
    assert base.loc.device.type == "cpu"


def test_what_a_cache_was_filled_with_before_is_no_constant() -> None:
    given, z = T.ComposeTransform([shifts(DIM)], cache_size=1), torch.randn(BATCH, DIM, dtype=torch.float64)
    image = given(z.clone().requires_grad_())
    found, _ = Bijector.from_transform(given, DIM)(z)
    torch.testing.assert_close(found, image, rtol=0, atol=0)


class Kept(nn.Module):
    """A module that gives the same transform at each call, a part of which has a cache, as Pyro's modules have."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
        self.transform = T.ComposeTransform([T.AffineTransform(self.shift, 2.0, cache_size=1), T.ExpTransform()])

    def forward(self) -> T.Transform:
        return self.transform


class Itself(T.ComposeTransform, nn.Module):
    """The same as a module that is the transform."""

    def __init__(self) -> None:
        shift = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
        super().__init__([T.AffineTransform(shift, 2.0, cache_size=1), T.ExpTransform()])
        self.shift = shift

    def __hash__(self) -> int:
        return id(self)


@pytest.mark.parametrize("kind", [Kept, Itself])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_part_s_cache_is_not_asked(kind: type[nn.Module], direction: str) -> None:
    module, z = kind(), torch.rand(BATCH, DIM, dtype=torch.float64) + 0.5
    step = Bijector.from_transform(module, DIM)
    run = step if direction == "forward" else step.inverse
    with torch.no_grad():
        run(z)
    assert run(z)[0].requires_grad
    with torch.no_grad():
        cast(Tensor, module.shift).add_(1.0)
    torch.testing.assert_close(run(z), run(z.clone()), rtol=0, atol=0)
    z.mul_(2.0)
    torch.testing.assert_close(run(z), run(z.clone()), rtol=0, atol=0)


def test_a_known_preimage_is_what_the_inverse_returns() -> None:
    step, known = GIVEN["an inverse, composed"](DIM), torch.rand(BATCH, DIM, dtype=torch.float64) + 0.5
    y = step(known)[0]
    assert not torch.equal(step.inverse(y)[0], known)
    assert torch.equal(step.inverse(y, preimage=known)[0], known)


def test_a_known_preimage_of_more_points_than_z() -> None:
    """As within a chain, the last of whose steps reads no context, where one z serves several."""
    chain = Chain(Affine(DIM), Bijector.from_transform(T.TanhTransform(), DIM)).double()
    z = torch.rand(DIM, dtype=torch.float64) - 0.5
    context = torch.randn(BATCH, chain.context_size, dtype=torch.float64)
    preimage, log_det = chain.inverse(z, context)
    torch.testing.assert_close(chain.inverse(z, context, preimage=preimage), (preimage, log_det))


def test_a_start_and_the_head_s_scale() -> None:
    start = torch.cat([torch.ones(DIM), torch.zeros(DIM)])
    step = Bijector.from_transform(affine, DIM, 2 * DIM, start=start)
    assert torch.equal(step.initial_context(), start)
    assert step.head_scale().max() < 0.1
    assert torch.equal(Bijector.from_transform(Lazy(DIM, 2), DIM, 2).head_scale(), torch.ones(2))


def test_one_scale_of_a_context_is_refused_with_event_dim_alone() -> None:
    """Torch's log-det then has the one scale once. Its log-det of each variable is right."""
    step = Bijector.from_transform(lambda c: T.AffineTransform(0.0, c.exp()), DIM, 1)
    found = step(torch.zeros(DIM), torch.ones(1))[1]
    torch.testing.assert_close(found, torch.tensor(float(DIM)))
    with pytest.raises(ValueError, match="^transform: expected a scale for each variable"):
        Bijector.from_transform(lambda c: T.AffineTransform(0.0, c.exp(), event_dim=1), DIM, 1)
    assert Bijector.from_transform(T.AffineTransform(0.0, 2.0, event_dim=1), DIM)(torch.zeros(DIM))[1] > 2


OUTSIDE: dict[str, tuple[T.Transform, list[float]]] = {
    "the inverse of a sigmoid": (T.SigmoidTransform().inv, [-0.1, 1.1, 1e6, math.inf]),
    "a square": (T.PowerTransform(torch.tensor(2.0, device="cpu")), [-1.0, -math.inf]),
    "within": (T.ComposeTransform([T.AffineTransform(0.0, 2.0), T.SigmoidTransform()]).inv, [-0.1, 7.0]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_there_is_no_density_outside_of_the_domain(name: str) -> None:
    """Where torch's transform is finite, q(z) was too."""
    transform, bad = OUTSIDE[name]
    step = Bijector.from_transform(transform, 2)
    z = torch.tensor([[0.5, 0.5], *([0.5, each] for each in bad)])
    for found in (step(z)[1], Inverse(step).inverse(z)[1]):
        assert found[0].isfinite()
        assert not found[1:].isfinite().any()


def test_a_distribution_within_validates_no_values() -> None:
    """For one row of nan the others failed too, and values were read."""
    step = Bijector.from_transform(T.CumulativeDistributionTransform(Normal(0.0, 2.0, validate_args=True)), 2)
    z = torch.tensor([[0.5, 0.5], [math.nan, 0.5]])
    image, log_det = step(z)
    torch.testing.assert_close(image[0], Normal(0.0, 2.0).cdf(z[0]))
    torch.testing.assert_close(log_det[0], Normal(0.0, 2.0).log_prob(z[0]).sum())
    assert log_det[1].isnan()


class Wrong(nn.Module):
    def forward(self) -> int:
        return 3


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a class": (lambda: T.ExpTransform, TypeError, "expected a Transform or what makes one"),
    "a number": (lambda: 3, TypeError, "expected a Transform or what makes one"),
    "a function of nothing": (lambda: lambda: T.ExpTransform(), TypeError, "got a function of no context"),
    "a maker of something else": (Wrong, TypeError, "got one that makes a int"),
    "not bijective": (lambda: T.AbsTransform(), ValueError, "expected a bijective one"),
    "a softmax": (lambda: T.SoftmaxTransform(), ValueError, "expected a bijective one|simplex|Simplex"),
    "matrices": (lambda: T.IndependentTransform(T.ExpTransform(), 2), ValueError, "expected event dim 0 or 1"),
    "sizes that change": (lambda: T.StickBreakingTransform(), ValueError, "Simplex"),
    "a triangle": (lambda: T.CorrCholeskyTransform(), ValueError, "CorrCholesky"),
    "another size": (lambda: T.AffineTransform(torch.zeros(5), 1.0), ValueError, "expected one of vectors of dim=3"),
    "an axis more": (lambda: T.AffineTransform(torch.zeros(2, 3), 1.0), ValueError, r"got image shape \(2, 3\)"),
    "one scale of vectors": (
        lambda: T.AffineTransform(0.0, torch.tensor(2.0), event_dim=1), ValueError,
        r"a scale for each variable.* got shape \(\); leave",
    ),
    "one scale of vectors, within": (
        lambda: T.ComposeTransform([T.TanhTransform(), T.AffineTransform(0.0, torch.ones(1), event_dim=1).inv]),
        ValueError, "a scale for each variable",
    ),
    "several intervals": (
        lambda: T.StackTransform([T.ExpTransform(), T.TanhTransform(), T.TanhTransform()], -1), ValueError, "interval",
    ),
    "a tensor to learn": (
        lambda: T.AffineTransform(torch.ones(3, requires_grad=True), 1.0), ValueError, "requires grad",
    ),
    "a tensor of a distribution to learn": (
        lambda: T.CumulativeDistributionTransform(Normal(torch.ones(3, requires_grad=True), 1.0)), ValueError,
        "requires grad",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_a_step_is_refused(name: str) -> None:
    make, error, message = WRONG[name]
    with pytest.raises(error, match="^transform: .*(" + message + ")"):
        Bijector.from_transform(make(), 3)  # pyright: ignore[reportArgumentType]


def test_a_function_with_a_module_s_parameters_is_told_of_or_refused() -> None:
    lazy = Lazy(DIM, 2)
    with pytest.raises(TypeError, match=r"^transform: .* is a Lazy whose parameters would not be trained; give a mod"):
        Bijector.from_transform(lazy.forward, DIM, 2)
    with pytest.warns(UserWarning, match=r"^transform: .* names a Lazy whose parameters would not be trained; give a"):
        Bijector.from_transform(lambda context: lazy(context), DIM, 2)


def test_a_transform_with_a_module_inside_is_refused() -> None:
    class Hidden(T.ExpTransform):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"^transform: expected one without modules in it"):
        Bijector.from_transform(T.ComposeTransform([Hidden()]), 3)
    with pytest.raises(ValueError, match="^context_size: expected 0 for a Transform"):
        Bijector.from_transform(T.ExpTransform(), 3, 2)


def test_a_posterior_in_a_transformed_distribution() -> None:
    """The use that the docs show."""
    posterior, h = small("iaf"), torch.randn(BATCH, FEATURES, dtype=torch.float64)
    q = TransformedDistribution(
        Normal(torch.zeros(DIM).double(), 1.0), [posterior.flow.as_transform(posterior.context(h))]
    )
    z, log_q, _ = posterior(h)
    torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-9, atol=1e-9)
