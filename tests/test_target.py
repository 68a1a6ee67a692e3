"""How a log joint is called, the density of free coordinates that is made of it, and what is refused."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Distribution, Exponential, LKJCholesky, Normal, Uniform, constraints

from flowpost.variational.calling import REFUSALS, trial
from flowpost.variational.parameters import Parameters, Spec
from flowpost.variational.precision import precision
from flowpost.variational.target import Target

DATA = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SCHOOLS = {"mu": (), "tau": constraints.positive, "theta": 8}


def schools(p: dict[str, Tensor]) -> Tensor:
    """Of one draw: eight schools, centred."""
    prior = Normal(0.0, 5.0).log_prob(p["mu"]) - torch.log1p((p["tau"] / 5) ** 2)
    return prior + Normal(p["mu"], p["tau"]).log_prob(p["theta"]).sum() + Normal(p["theta"], 10.0).log_prob(DATA).sum()


def schools_of_many(p: dict[str, Tensor]) -> Tensor:
    """The same with a leading axis of draws."""
    mu, tau = p["mu"].unsqueeze(-1), p["tau"].unsqueeze(-1)
    prior = Normal(0.0, 5.0).log_prob(p["mu"]) - torch.log1p((p["tau"] / 5) ** 2)
    return prior + (Normal(mu, tau).log_prob(p["theta"]) + Normal(p["theta"], 10.0).log_prob(DATA)).sum(-1)


def schools_by_loop(p: dict[str, Tensor]) -> Tensor:
    """The same with a branch on a value, which vmap cannot follow."""
    return schools(p) if p["tau"] > 0 else p["tau"] * math.nan


def made(log_joint: Callable[[Any], Any], spec: Spec, dtype: torch.dtype = torch.float64) -> Target:
    return Target(log_joint, Parameters(spec), device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("log_joint", "calls"), [(schools_of_many, "vectorised"), (schools, "vmap"), (schools_by_loop, "loop")]
)
def test_all_three_ways_are_one_density(log_joint: Callable, calls: str, dtype: torch.dtype) -> None:
    """Against the definition, draw by draw, with autograd's gradient; the evaluations are counted."""
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target = made(log_joint, SCHOOLS, dtype)
    assert torch.equal(state, torch.get_rng_state())
    assert [str(each.message)[:47] for each in caught] == ["log_joint: is called in a Python loop over draw"] * (
        calls == "loop"
    )
    assert all(each.filename == __file__ for each in caught)
    assert (target.calls, target.evaluations) == (calls, 0)
    free = torch.randn(5, 10, dtype=dtype)
    value, slope = target.gradient(free)
    assert target.evaluations == 5
    assert not value.requires_grad
    assert value.dtype == slope.dtype == dtype
    for row, got, gradient in zip(free.double(), value, slope, strict=True):
        leaf = row.clone().requires_grad_()
        p = {"mu": leaf[0], "tau": leaf[1].exp(), "theta": leaf[2:]}
        due = schools(p) + leaf[1]
        rtol = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(got.double(), due.detach(), rtol=rtol, atol=0)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(due, leaf)[0], rtol=10 * rtol, atol=10 * rtol)
    with torch.no_grad():
        torch.testing.assert_close(target(free), value)
    assert target.evaluations == 5
    assert target(free.requires_grad_()).requires_grad
    assert target.evaluations == 10


def test_evidence_is_kept_by_the_map() -> None:
    """exp of the density, over the coordinates' plane, is the same mass: that of a Dirichlet times an LKJ, 1."""
    parameters = {"w": (2, constraints.simplex), "L": ((2, 2), constraints.corr_cholesky)}
    dirichlet, lkj = Dirichlet(torch.tensor([2.0, 3.0]).double()), LKJCholesky(2, torch.tensor(1.5).double())
    target = made(lambda p: dirichlet.log_prob(p["w"]) + lkj.log_prob(p["L"]), parameters)
    grid = torch.linspace(-20, 20, 401, dtype=torch.float64)
    mass = target(torch.cartesian_prod(grid, grid)).exp().sum() * 0.1**2
    torch.testing.assert_close(mass.item(), 1.0, rtol=1e-9, atol=0)


@pytest.mark.parametrize("spec", [1, 2, 7, {"a": 1, "b": ()}, {"a": 7, "b": (8, 9)}])
def test_no_shape_is_taken_for_the_draws(spec: Spec) -> None:
    """A scalar of one draw, however many numbers it has, is never read as a value for each of many."""

    def total(p: Tensor | dict[str, Tensor]) -> Tensor:
        return -torch.stack([part.square().sum() for part in (p.values() if isinstance(p, dict) else [p])]).sum()

    def totals(p: dict[str, Tensor]) -> Tensor:
        return -torch.stack([part.square().reshape(len(part), -1).sum(1) for part in p.values()]).sum(0)

    parameters = Parameters(spec)
    sizes = {size for shape in parameters.shapes.values() for size in shape}
    assert len(trial(parameters, "cpu", torch.float64)) not in {parameters.dim, *sizes}
    assert made(total, spec).calls == "vmap"
    if isinstance(spec, dict):
        assert made(totals, spec).calls == "vectorised"


def test_rows_that_mix_are_not_taken_for_a_batch() -> None:
    """Each returns (S,), of which a row is not that of its draw: broadcast along the wrong axis, or centred."""
    target = made(lambda p: Normal(p["mu"], 1.0).log_prob(p["x"]).sum(-1), {"mu": (), "x": 1})
    assert target.calls == "vmap"
    free = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(target(free), Normal(free[:, 0], 1.0).log_prob(free[:, 1]))
    with pytest.raises(ValueError, match=r"^log_joint: expected a tensor \(S,\) of parameters with a leading axis"):
        made(lambda z: -(z - z.mean(0)).square().sum(1), 2)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e8), (torch.float32, 1e5)])
def test_a_prior_that_is_summed_over_draws_does_not_hide_in_a_large_value(dtype: torch.dtype, size: float) -> None:
    """The sum passes for rounding of the value, and in a step of 512 draws its slope is 512 times a prior's."""

    def log_joint(p: dict[str, Tensor]) -> Tensor:
        return Normal(0.0, 1.0).log_prob(p["e"]).sum() - 0.5 * p["mu"].square() + size

    target = made(log_joint, {"mu": (), "e": 3}, dtype)
    assert target.calls == "vmap"
    free = torch.randn(5, 4, dtype=dtype)
    torch.testing.assert_close(target.gradient(free)[1], -free)
    with pytest.raises(ValueError, match=r"^log_joint: expected a tensor \(S,\) of parameters with a leading axis"):
        made(lambda z: size - z[:, 0].square() - z.square().sum(), 2, dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e8), (torch.float32, 1e4)])
def test_a_change_beside_a_large_value_is_told(dtype: torch.dtype, size: float) -> None:
    """By a nat, which is many roundings of the value."""
    data = torch.tensor(1.0, dtype=dtype)
    target = made(lambda z: size - (z[:, 0] - data).square(), 1, dtype)
    assert target.changed() == ""
    data += 1
    assert re.fullmatch(r"\d+\.?\d* at theta = \[0\.1541\], and now \d+\.?\d*", target.changed())


def test_a_number_that_all_draws_share_and_that_cancels_is_no_mixing() -> None:
    """The largest logarithm of all draws is taken off, as one does against overflow, and added again."""

    def log_joint(z: Tensor) -> Tensor:
        logs = Normal(torch.tensor([-1.0, 2.0], dtype=z.dtype), 0.1).log_prob(z)
        return (logs - logs.max()).exp().sum(-1).log() + logs.max()

    assert made(log_joint, 1).calls == "vectorised"


def short_of(z: Tensor) -> Tensor:
    return -z.square().sum(-1)


WRONG: dict[str, tuple[Callable[[Any], Any], Any, type[Exception], str]] = {
    "column": (
        lambda z: -z.square().sum(-1, keepdim=True),
        2,
        ValueError,
        r"got other values in shape \(7, 1\) and other values in shape \(1,\) at theta = \[[^]]*\]; write a sum",
    ),
    "entries": (lambda z: -z.square(), 2, ValueError, r"got other values in shape \(7, 2\) and .* \(2,\) at theta"),
    "float": (lambda z: -float(z.square().sum()), 2, TypeError, "got float and float at theta"),
    "numpy": (lambda z: np.square(z.numpy()).sum(-1), 2, TypeError, "got ndarray and float64 at theta"),
    "nothing": (lambda z: None, 2, TypeError, "got NoneType and NoneType at theta"),
    "error": (
        lambda p: p["b"],
        {"a": 2},
        ValueError,
        r"expected a value of one draw, got KeyError: 'b' at a = \[[^]]*\]$",
    ),
    "two errors": (
        lambda z: z.missing if z.ndim == 1 else z.view(5, 5),
        3,
        ValueError,
        r"got AttributeError: .* at theta = \[[^]]*\], and RuntimeError: .* of many draws at once$",
    ),
    "integers": (lambda z: z.sum(-1).long(), 2, TypeError, "expected a floating dtype, got torch.int64"),
    "detached": (
        lambda z: short_of(z.detach()),
        2,
        TypeError,
        "expected a value with a gradient at theta = .*, got none",
    ),
    "through numpy": (
        lambda z: torch.as_tensor(np.square(z.numpy()).sum(-1)),
        2,
        TypeError,
        "expected a value with a gradient at theta = .*numpy",
    ),
    "nan": (lambda z: short_of(z) + math.nan, 2, ValueError, r"expected a finite value, got nan at theta = \["),
    "inf": (
        lambda p: short_of(p["x"]) + math.inf,
        {"x": 9, "s": constraints.positive},
        ValueError,
        r"expected a finite value, got inf at x = \[[^]]*, \.\.\.\], s = [0-9.]+, and none at any of 7 draws$",
    ),
    "outside": (
        lambda z: torch.where(z.sum(-1) > 100, short_of(z), -math.inf),
        2,
        ValueError,
        r"expected a finite value, got -inf at theta = .* draws; give its parameters constraints that are the support",
    ),
    "slope": (
        lambda z: short_of((z * 0).sqrt() + z.detach()),
        2,
        ValueError,
        r"expected a finite gradient, got \[nan, nan\] at theta = .*torch.where and nansum pass on the nan of what",
    ),
    "in place": (
        lambda p: short_of(p["a"].mul_(2).unsqueeze(-1)),
        {"a": ()},
        ValueError,
        "expected one value for one theta, got .* and then .*, and change no parameter in place",
    ),
    "in place, to the same at each call": (
        lambda z: short_of(z.detach().abs_() * 0 + z - 2),  # of moved draws, the second time too
        2,
        ValueError,
        "expected its parameters left as they are, got them changed in place, .*; write x = x.abs",
    ),
    "random": (
        lambda z: short_of(z) + torch.randn(()).item(),
        2,
        ValueError,
        "expected one value for one theta, got .* and then .*; draw no random numbers in it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_log_joint_is_refused(name: str) -> None:
    log_joint, spec, error, message = WRONG[name]
    with pytest.raises(error, match=f"^log_joint: .*{message}"):
        made(log_joint, spec)


def test_what_is_detached_in_part_is_named() -> None:
    with pytest.warns(
        UserWarning, match="^log_joint: has no gradient with respect to b at any of 7 draws; expected one"
    ):
        made(lambda p: short_of(p["a"]) - p["b"].detach().square(), {"a": 2, "b": ()})


@pytest.mark.parametrize(
    "scale", [lambda tau: tau.detach(), lambda tau: tau.item()], ids=["detached", "read on the host"]
)
def test_a_gradient_that_is_not_that_of_the_values_is_named(scale: Callable[[Tensor], Any]) -> None:
    """A part of it does not follow tau, whose other part has a gradient: the fit would climb another density."""
    log_joint = lambda p: Normal(p["mu"], scale(p["tau"])).log_prob(DATA / 10).sum() - p["tau"]  # noqa: E731
    spec = {"mu": (), "tau": constraints.positive}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made(log_joint, spec)
    match = r"log_joint: has a gradient that is not that of its values: along tau it is .*, and a difference of values"
    assert sum(bool(re.match(match, str(each.message))) for each in caught) == 1


@pytest.mark.parametrize("size", [1.0, 1e4, 1e8])
def test_a_gradient_of_rough_values_is_taken(size: float) -> None:
    """A millionth of them that comes and goes, as a solver leaves it, kinks and steps, and swings within 1e-6."""
    rough = lambda z: size * (1 + 1e-7 * torch.sin(1e9 * z.detach()).sum(-1))  # noqa: E731
    made(lambda z: short_of(z) - rough(z) - z.abs().sum(-1) + z.sum(-1).floor(), 3)
    made(lambda z: short_of(z) - size * (1e6 * z).sin().sum(-1), 3)


@pytest.mark.parametrize("unit", [300.0, 2e3, 1e4, 1e5])
def test_a_gradient_where_float32_data_round_a_parameter_is_taken(unit: float) -> None:
    """A scalar is rounded as the data are: near 10,000 to a thousandth, so that values change by steps."""
    data = unit + 3 + torch.randn(1000, generator=torch.Generator().manual_seed(0))
    spec = {"mu": (), "tau": constraints.positive}
    made(lambda p: Normal(p["mu"] + unit, p["tau"]).log_prob(data).sum() - p["mu"].square() - p["tau"], spec)


def test_draws_with_a_value_and_no_gradient_are_named() -> None:
    """A `torch.where` hands on the nan of the branch not taken: the fit has none of the draws there."""
    root = lambda z: torch.where(z > 0, z.sqrt(), 0.0).sum(-1)  # noqa: E731
    match = r"^log_joint: has a finite value but no finite gradient at 4 of 7 draws, as at theta = \[-.*; put a number"
    with pytest.warns(UserWarning, match=match):
        target = made(lambda z: short_of(z) + root(z), 1)
    free = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    value, slope = target.gradient(free)
    assert target.torn(free, value, slope).startswith("a finite value but no finite gradient at 1 of 2 draws")
    assert target.torn(free[:1], value[:1], slope[:1]) == ""


def test_draws_outside_the_support_are_no_fault() -> None:
    """-inf for some, and their gradients are theirs alone; all of them outside is said with one of them."""
    target = made(lambda z: torch.where(z[..., 0] > 0, short_of(z), -math.inf), 2)
    free = torch.tensor([[1.0, 2.0], [-1.0, 2.0]], dtype=torch.float64)
    value, slope = target.gradient(free)
    assert value.tolist() == [-5.0, -math.inf]
    assert slope[0].tolist() == [-2.0, -4.0]
    target.check(free, value, slope)
    with pytest.raises(ValueError, match=r"^log_joint: expected a finite value, got -inf at theta = \[-1, 2\]"):
        target.check(free[1:], value[1:])


@pytest.mark.parametrize("error", [*REFUSALS[:1], ZeroDivisionError, AssertionError, ValueError])
@pytest.mark.parametrize("calls", ["vectorised", "loop"])
def test_a_draw_that_is_refused_has_no_value(calls: str, error: type[Exception]) -> None:
    """The other draws' values and slopes are theirs; what is raised is told, and any other error comes through."""
    kind, seen = [error], []

    def log_joint(z: Tensor) -> Tensor:
        seen.append(z)
        if (z[..., 0] < -0.3).any():
            raise kind[0]("too far")
        if calls == "vectorised":
            return short_of(z)
        return short_of(z) if z[0].item() else z[0]

    said = f"^log_joint: raises _?{error.__name__}: too far at theta = .*; such draws are left out"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log_joint: is called in a Python loop")
        with pytest.warns(UserWarning, match=said):
            target = made(log_joint, 2)
    assert target.calls == calls
    free = torch.tensor([[0.1, 1.0], [-1.0, 0.0], [0.2, 2.0], [0.3, 1.0], [0.4, 3.0]], dtype=torch.float64)
    kept = torch.tensor([0, 2, 3, 4])
    seen.clear()
    value, slope = target.gradient(free)
    assert len(seen) <= 9
    torch.testing.assert_close(value[kept], short_of(free[kept]))
    torch.testing.assert_close(slope[kept], -2 * free[kept])
    assert value[1].isnan()
    assert target.gradient(free[1:2])[0].isnan().all()
    assert target.refusal(free[1]) == f"{error.__name__}: too far at theta = [-1, 0]"
    assert not target.refusal(free[0])
    kind[0] = LookupError
    with pytest.raises(LookupError, match="^too far$"):
        target(free)


def test_a_factorization_that_fails_under_vmap_is_left_out() -> None:
    """The matrix of 1 and x is positive definite between -1 and 1."""

    def log_joint(p: dict[str, Tensor]) -> Tensor:
        ones = torch.ones(2, dtype=p["x"].dtype)
        return torch.linalg.cholesky(p["x"] + (1 - p["x"]) * ones.diag()).diagonal().log().sum()

    with pytest.warns(UserWarning, match=r"^log_joint: raises _?LinAlgError: .* at x = -?1\.\d+; such draws"):
        target = made(log_joint, {"x": ()})
    assert target.calls == "vmap"
    x = torch.tensor([0.5, 1.5, -0.2, -3.0], dtype=torch.float64)
    value, slope = target.gradient(x.unsqueeze(-1))
    torch.testing.assert_close(value, 0.5 * (1 - x.square()).log(), equal_nan=True)
    torch.testing.assert_close(slope[[0, 2], 0], -x[[0, 2]] / (1 - x[[0, 2]].square()))


def test_a_shape_that_comes_later_is_refused() -> None:
    target = made(lambda z: short_of(z) if len(z) != 3 else z, 2)
    with pytest.raises(ValueError, match=r"^log_joint: expected shape \(3,\), got \(3, 2\)$"):
        target(torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("log_joint", [schools, schools_of_many])
def test_distributions_read_no_values(log_joint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation reads them on the host: it is for the 7 draws of the trial, and as it was before afterwards."""
    seen = []

    def spied(p: dict[str, Tensor]) -> Tensor:
        seen.append(Distribution._validate_args)
        if len(seen) == 25:
            raise KeyError
        return log_joint(p)

    monkeypatch.setattr(Distribution, "_validate_args", True)  # a compiler may have turned it off for good
    target = made(spied, SCHOOLS)
    assert sum(seen) == sum(seen[-7:]) == 7
    seen[-7:] = [False] * 7
    while len(seen) < 24:
        target(torch.zeros(3, 10, dtype=torch.float64))
    with pytest.raises(KeyError):
        target(torch.zeros(3, 10, dtype=torch.float64))
    assert not any(seen)
    assert Distribution._validate_args


@pytest.mark.parametrize("vectorised", [False, True])
def test_a_prior_that_goes_on_beyond_its_support_is_told(vectorised: bool) -> None:  # noqa: FBT001
    """An exponential's formula is finite at a negative number; torch's validation, off in a fit, refuses it."""
    x = DATA if not vectorised else DATA.unsqueeze(-1)

    def log_joint(p: dict[str, Tensor], **options: bool) -> Tensor:
        return Exponential(1.0, **options).log_prob(p["tau"]) + Normal(p["tau"], 10.0).log_prob(x).sum(0)

    with pytest.warns(
        UserWarning, match=r"^log_joint: has a finite value at tau = -0.*Exponential\(.*\); expected -inf there; give"
    ):
        assert made(log_joint, {"tau": ()}).calls == ("vectorised" if vectorised else "vmap")
    made(log_joint, {"tau": constraints.positive})
    made(lambda p: log_joint(p, validate_args=False), {"tau": ()})
    made(lambda p: Uniform(0.0, 1.0).log_prob(p["a"]) - p["a"], {"a": ()})  # -inf there


def test_a_log_joint_has_a_mapping_of_its_own() -> None:
    """What it puts into it, or takes out, is seen by no other call."""

    def log_joint(p: dict[str, Tensor]) -> Tensor:
        p["tau"] = p["tau"].square()
        p["sum"] = p.pop("mu") + p["tau"]
        return -p["sum"].square()

    target = made(log_joint, {"mu": (), "tau": constraints.positive})
    assert target.calls == "vectorised"
    free = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(target(free), -(free[:, 0] + (2 * free[:, 1]).exp()).square() + free[:, 1])


def test_precision_follows_the_log_joint() -> None:
    narrow = torch.ones(5, 2)
    assert precision(lambda z: -(z - narrow.mean(0)).square().sum(-1), Parameters(2), "cpu") == torch.float64
    assert precision(lambda z: -(narrow @ z).square().sum(), Parameters(2), "cpu") == torch.float32
    assert precision(lambda z: short_of(z.float()), Parameters(2), "cpu") == torch.float32
    assert precision(lambda p: schools(p), Parameters(SCHOOLS), "cpu") == torch.float64


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.float32), (1e6, torch.float64), (1e60, torch.float64)])
def test_on_a_gpu_float64_is_taken_where_it_tells(
    scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference of large terms loses nats in float32, or overflows in it."""
    monkeypatch.setattr("flowpost.variational.precision._slow_in_float64", lambda device: True)
    assert precision(lambda z: short_of(z) + (scale + z[..., 0]) ** 2 - scale**2, Parameters(2), "cpu") == dtype
