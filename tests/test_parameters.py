"""Constrained parameters: each map's log-det against autograd's Jacobian, its inverse, its ends, and bad specs."""

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from mpmath import mp
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from flowpost.variational.parameters import Parameters, ordered

BOUNDS = torch.tensor([-1.0, 0.0, 2.5], dtype=torch.float64)
CASES: dict[str, tuple[tuple[int, ...], Constraint]] = {
    "real": ((3,), constraints.real),
    "real_vector": ((2, 2), constraints.real_vector),
    "positive": ((3,), constraints.positive),
    "nonnegative": ((), constraints.nonnegative),
    "greater_than": ((2, 3), constraints.greater_than(BOUNDS)),
    "less_than": ((3,), constraints.less_than(1.5)),
    "interval": ((3,), constraints.interval(-2.0, 7.0)),
    "intervals": ((3,), constraints.interval(BOUNDS, BOUNDS + 1)),
    "unit_interval": ((), constraints.unit_interval),
    "half_open_interval": ((2,), constraints.half_open_interval(0.0, 3.0)),
    "independent": ((2, 3), constraints.independent(constraints.unit_interval, 2)),
    "simplex": ((4,), constraints.simplex),
    "simplexes": ((2, 3), constraints.simplex),
    "ordered": ((2, 4), ordered),
    "lower_cholesky": ((3, 3), constraints.lower_cholesky),
    "lower_choleskys": ((2, 2, 2), constraints.lower_cholesky),
    "corr_cholesky": ((4, 4), constraints.corr_cholesky),
    "corr_choleskys": ((2, 3, 3), constraints.corr_cholesky),
    "cat": ((3,), constraints.cat([constraints.positive, constraints.real], -1, [1, 2])),
}
every = pytest.mark.parametrize("name", CASES)


def full(scale: float) -> object:
    """A scale for the longer run."""
    return pytest.param(scale, marks=pytest.mark.full)


DIAGONAL = {"lower_cholesky": 0, "corr_cholesky": -1}


def independent_entries(name: str, values: Tensor) -> Tensor:
    """Those entries of values ``(*shape)`` that the others do not follow from, ``(dim,)``."""
    kind = name.removesuffix("s")
    if kind in DIAGONAL:
        row, column = torch.tril_indices(values.shape[-1], values.shape[-1], DIAGONAL[kind])
        return values[..., row, column].flatten()
    return (values[..., :-1] if kind in ("simplex", "simplexe") else values).flatten()


def one(name: str) -> tuple[Parameters, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The parameters of one case, and their map with the values out of the mapping."""
    parameters = Parameters({"x": CASES[name]})

    def constrain(free: Tensor) -> tuple[Tensor, Tensor]:
        values, log_det = parameters.constrain(free)
        assert isinstance(values, dict)
        return values["x"], log_det

    return parameters, constrain


def coordinates(parameters: Parameters, scale: float, *batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*batch, parameters.dim, generator=generator, dtype=torch.float64)


@every
@pytest.mark.parametrize("scale", [full(0.1), 1.0, 5.0, full(12.0)])
def test_log_det_is_the_jacobian_s(name: str, scale: float) -> None:
    """In float64; the slope of tanh, which autograd reckons as 1 - tanh^2, has an error of one rounding of 1."""
    parameters, constrain = one(name)
    for free in coordinates(parameters, scale, 3):
        if name.startswith("corr"):
            free = free.clamp(-8, 8)
        jacobian = torch.autograd.functional.jacobian(
            lambda u: independent_entries(name, constrain(u)[0]), free, vectorize=True
        )
        rounding = 1e-15 * math.cosh(free.abs().max()) ** 2 if name.startswith("corr") else 0
        expected = torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(constrain(free)[1], expected, rtol=1e-12, atol=1e-11 + rounding)


def exact_log_det(name: str, free: Tensor) -> float:
    """The slopes of a vector's or a row's entries as they are defined, multiplied with 100 digits."""
    with mp.workdps(100):
        total, left, n = mp.mpf(0), mp.mpf(1), len(free) + 1
        for k, u in enumerate(map(mp.mpf, free.tolist())):
            share = mp.sigmoid(u - mp.log(n - 1 - k)) if name == "simplex" else mp.tanh(u)
            slope = share * (1 - share) if name == "simplex" else 1 - share**2
            total += mp.log(left * slope)
            left *= 1 - share if name == "simplex" else mp.sqrt(1 - share**2)
        return float(total)


@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("name", ["simplex", "corr_cholesky"])
def test_log_det_is_exact_where_torch_s_saturates(name: str, scale: float) -> None:
    """Both signs, up to 30; of the matrix the last row alone counts, and the others are at 0."""
    parameters, constrain = one(name)
    for free in coordinates(parameters, 1.0, 5).clamp(-1, 1) * scale:
        row = free if name == "simplex" else free[3:]
        if name == "corr_cholesky":
            free = torch.cat([torch.zeros(3), row])
        assert constrain(free)[1].item() == pytest.approx(exact_log_det(name, row), rel=1e-14, abs=1e-14)


def test_torch_s_own_saturate() -> None:
    """Why these maps are ours: at 40 torch's log-dets of these two are wrong by nats, or infinite."""
    free = torch.tensor([40.0, -40.0, 40.0], dtype=torch.float64)
    for name, shape in (("simplex", (4,)), ("corr_cholesky", (3, 3))):
        transform = biject_to(CASES[name][1])
        theirs = transform.log_abs_det_jacobian(free, transform(free))
        ours = Parameters({"x": (shape, CASES[name][1])}).constrain(free)[1]
        assert not (theirs - ours).abs() < 1


@every
@pytest.mark.parametrize("scale", [full(0.1), 1.0])
def test_values_are_torch_s(name: str, scale: float) -> None:
    """The same point of the same space, so that a fit of one program goes on in another; where torch has the map."""
    _, constraint = CASES[name]
    if constraint is ordered or constraint is constraints.lower_cholesky:
        return
    parameters, constrain = one(name)
    transform = biject_to(constraint)
    free = coordinates(parameters, scale, 5)
    theirs = transform(free.reshape(5, *transform.inverse_shape(torch.Size(CASES[name][0]))))
    torch.testing.assert_close(constrain(free)[0], theirs, rtol=1e-9, atol=1e-13)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [full(0.1), 1.0, full(5.0)])
def test_free_undoes_constrain(name: str, scale: float, dtype: torch.dtype) -> None:
    """To as many digits as the values have of u: a rounding of the largest of them, by the inverse's steepest slope."""
    parameters, constrain = one(name)
    free = coordinates(parameters, scale, 2, 3).to(dtype)
    values, log_det = constrain(free)
    assert values.dtype == log_det.dtype == dtype
    assert values.shape == (2, 3, *CASES[name][0])
    again = parameters.free({"x": values})
    for back, u, value in zip(again.flatten(0, 1), free.flatten(0, 1), values.flatten(0, 1), strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda u: independent_entries(name, constrain(u)[0]), u.double(), vectorize=True
        )
        slope = torch.linalg.inv(jacobian).abs().sum(-1).max()
        size = 1 + value.abs().max()
        tolerance = 8 * torch.finfo(dtype).eps * (slope * size + scale)
        assert (back - u).abs().max() <= tolerance


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_all_is_finite_and_inside(name: str, dtype: torch.dtype) -> None:
    """At every corner of +-30: the values, the log-det and both gradients; and no value on the edge of its support."""
    parameters, constrain = one(name)
    corners = torch.tensor([[1.0], [-1.0]], dtype=dtype).expand(2, parameters.dim)
    mixed = coordinates(parameters, 1.0, 6).sign().to(dtype)
    free = (30 * torch.cat([corners, mixed])).requires_grad_()
    values, log_det = constrain(free)
    gradients = torch.autograd.grad(values.sum(), free, retain_graph=True)
    gradients += torch.autograd.grad(log_det.sum(), free, allow_unused=True) if log_det.requires_grad else ()
    for each in (values, log_det, *gradients):
        assert each.isfinite().all()
    constraint = CASES[name][1]
    if constraint is ordered:  # 1 + exp(-30) is 1
        assert (values.diff(dim=-1) >= 0).all()
    elif name not in ("cat", "intervals", "greater_than"):
        assert constraint.check(values).all()
    for end in ("lower_bound", "upper_bound"):
        bound = getattr(constraint, end, None)
        if bound is not None:
            assert (values != torch.as_tensor(bound).to(dtype)).all()


@pytest.mark.parametrize(("constraint", "shape"), [(constraints.simplex, (9,)), (constraints.corr_cholesky, (6, 6))])
def test_no_share_is_ever_zero(constraint: Constraint, shape: tuple[int, ...]) -> None:
    """Where it underflows: the logarithm that a Dirichlet or an LKJ takes of it stays finite."""
    parameters = Parameters({"x": (shape, constraint)})
    values, _ = parameters.constrain(torch.full((parameters.dim,), 60.0))
    assert isinstance(values, dict)
    last = values["x"] if constraint is constraints.simplex else values["x"].diagonal()
    assert last[-1] == torch.finfo(torch.float32).tiny


@every
def test_vmap_and_meta(name: str) -> None:
    parameters, constrain = one(name)
    free = coordinates(parameters, 1.0, 7)
    mapped = torch.func.vmap(constrain)(free)
    for got, due in zip(mapped, constrain(free), strict=True):
        torch.testing.assert_close(got, due)
    back = torch.func.vmap(lambda value: parameters.free({"x": value}))(mapped[0])
    torch.testing.assert_close(back, parameters.free({"x": mapped[0]}))
    values, log_det = constrain(free.to("meta"))
    assert values.shape == (7, *CASES[name][0])
    assert log_det.shape == (7,)
    assert values.is_meta
    assert parameters.free({"x": values}).shape == free.shape


@every
def test_second_derivatives(name: str) -> None:
    """A Laplace start reads the Hessian, at 0 too."""
    parameters, constrain = one(name)
    weights = torch.linspace(0.5, 1.5, math.prod(CASES[name][0]), dtype=torch.float64).reshape(CASES[name][0])

    def total(free: Tensor) -> Tensor:
        values, log_det = constrain(free)
        return (values.square() * weights).sum() + log_det.sum()

    for free in (torch.zeros(parameters.dim, dtype=torch.float64), coordinates(parameters, 1.0)):
        assert torch.autograd.gradgradcheck(total, free.requires_grad_())


def test_a_mapping_is_each_alone() -> None:
    spec = {"mu": (), "x": (2, 2), "tau": constraints.positive, "w": (3, constraints.simplex), "k": 2}
    parameters = Parameters(spec)
    assert parameters.dim == 1 + 4 + 1 + 2 + 2
    assert parameters.shapes == {"mu": (), "x": (2, 2), "tau": (), "w": (3,), "k": (2,)}
    assert parameters.names[:6] == ("mu", "x[0,0]", "x[0,1]", "x[1,0]", "x[1,1]", "tau")
    assert parameters.names[6:] == ("w[0]", "w[1]", "w[2]", "k[0]", "k[1]")
    free = coordinates(parameters, 1.0, 5, 4)
    values, log_det = parameters.constrain(free)
    assert isinstance(values, dict)
    total, start = torch.zeros(5, 4), 0
    for name, entry in spec.items():
        alone = Parameters({name: entry})
        part = free[..., start : start + alone.dim]
        start += alone.dim
        value, term = alone.constrain(part)
        assert isinstance(value, dict)
        torch.testing.assert_close(values[name], value[name])
        total = total + term
    torch.testing.assert_close(log_det, total)
    flat = parameters.flat(values)
    assert flat.shape == (5, 4, len(parameters.names))
    for column, name in enumerate(parameters.names):
        whole, _, place = name.partition("[")
        index = tuple(map(int, place[:-1].split(","))) if place else ()
        torch.testing.assert_close(flat[..., column], values[whole][(..., *index)])
    torch.testing.assert_close(parameters.free(values), free)
    again = pickle.loads(pickle.dumps(parameters))
    assert torch.equal(again.constrain(free)[1], log_det)


def test_columns_are_the_coordinates_of_each() -> None:
    """A simplex of one entry has none."""
    parameters = Parameters({"a": (), "one": (1, constraints.simplex), "w": (3, constraints.simplex), "b": 2})
    assert parameters.columns == {"a": slice(0, 1), "one": slice(1, 1), "w": slice(1, 3), "b": slice(3, 5)}
    assert Parameters(4).columns == {"theta": slice(0, 4)}


def test_a_bare_int_is_the_tensor_itself() -> None:
    parameters = Parameters(3)
    free = torch.randn(5, 3)
    values, log_det = parameters.constrain(free)
    assert values is free
    assert torch.equal(log_det, torch.zeros(5))
    assert parameters.names == ("theta[0]", "theta[1]", "theta[2]")
    assert torch.equal(parameters.free(free), free)
    assert torch.equal(parameters.flat(free), free)


def test_free_takes_numbers_and_broadcasts() -> None:
    parameters = Parameters({"tau": constraints.positive, "w": (2, constraints.simplex)})
    given = {"tau": 1.0, "w": torch.tensor([[0.5, 0.5], [0.25, 0.75]])}
    expected = torch.tensor([[0.0, 0.0], [0.0, -math.log(3)]])
    torch.testing.assert_close(parameters.free(given), expected)
    assert parameters.flat(given).tolist() == [[1.0, 0.5, 0.5], [1.0, 0.25, 0.75]]


OUTSIDE = {
    "positive": (constraints.positive, (), 0.0),
    "greater_than": (constraints.greater_than(1.0), (), 0.5),
    "less_than": (constraints.less_than(1.0), (), 1.0),
    "interval": (constraints.interval(0.0, 2.0), (), 2.0),
    "nan": (constraints.real, (), math.nan),
    "simplex": (constraints.simplex, (3,), [0.5, 0.5, 0.5]),
    "negative share": (constraints.simplex, (3,), [0.8, 0.7, -0.5]),
    "ordered": (ordered, (3,), [1.0, 3.0, 2.0]),
    "tied": (ordered, (2,), [1.0, 1.0]),
    "diagonal": (constraints.lower_cholesky, (2, 2), [[1.0, 0.0], [1.0, -1.0]]),
    "upper": (constraints.lower_cholesky, (2, 2), [[1.0, 0.5], [1.0, 1.0]]),
    "row": (constraints.corr_cholesky, (2, 2), [[1.0, 0.0], [0.9, 0.9]]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_free_refuses_what_lies_outside(name: str) -> None:
    constraint, shape, value = OUTSIDE[name]
    parameters = Parameters({"a b": (shape, constraint)})
    with pytest.raises(ValueError, match="^values: 'a b': expected values inside .*, got "):
        parameters.free({"a b": torch.tensor(value)})


WRONG = {
    "float": (2.0, TypeError, "expected an int, or a mapping of names to shapes and constraints, got float; write 3"),
    "list": ([2, 3], TypeError, "expected an int, or a mapping .*, got list; write 3, or {'mu': "),
    "alone": (constraints.positive, TypeError, "expected an int, or a mapping .*, got _GreaterThan; write 3"),
    "clash": ({"a": 2, "a[0]": ()}, ValueError, r"expected names apart, got 'a\[0\]', which is an entry of another"),
    "zero": (0, ValueError, "expected an int >= 1, got 0"),
    "empty": ({}, ValueError, "expected at least one free coordinate"),
    "nothing": ({"w": (1, constraints.simplex)}, ValueError, "expected at least one free coordinate"),
    "name": ({3: 2}, TypeError, "expected names that are strings, got 3"),
    "word": ({"a": "positive"}, TypeError, "'a': expected a shape or a constraint, got 'positive'; write a shape"),
    "class": ({"a": constraints.interval}, TypeError, "'a': expected a shape or a constraint, got <class"),
    "size": ({"a": (2, 0)}, ValueError, r"'a': expected sizes >= 1, got \(2, 0\)"),
    "scalar": ({"a": constraints.simplex}, ValueError, "'a': expected a vector, got a scalar; write a pair"),
    "square": ({"a": (3, constraints.corr_cholesky)}, ValueError, r"'a': expected a square matrix, got shape \(3,\)"),
    "integer": ({"a": constraints.nonnegative_integer}, ValueError, "'a': expected a constraint among real, positive"),
    "definite": ({"a": ((2, 2), constraints.positive_definite)}, ValueError, "'a': expected a .*ordered.*Definite"),
    "ends": ({"a": constraints.interval(1.0, 1.0)}, ValueError, "'a': expected a lower bound below the upper one"),
    "infinite": ({"a": constraints.interval(0.0, math.inf)}, ValueError, "'a': expected finite bounds, got inf"),
    "bounds": ({"a": (2, constraints.greater_than(torch.zeros(3)))}, ValueError, "'a': expected bounds that broadcast"),
    "rows": (
        {"a": (2, constraints.stack([constraints.real, constraints.positive], 0))},
        ValueError,
        "'a': .* whose biject_to makes",
    ),
    "parts": ({"a": (5, constraints.cat([constraints.real], -1, [2]))}, ValueError, "'a': .* whose biject_to makes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec_is_refused(name: str) -> None:
    spec, error, message = WRONG[name]
    with pytest.raises(error, match=f"^dim_or_spec: {message}"):
        Parameters(spec)


def test_wrong_values_are_refused() -> None:
    parameters = Parameters({"a": 2, "b": ()})
    with pytest.raises(ValueError, match=r"^free: expected shape \(\*, 3\), got \(4, 2\)$"):
        parameters.constrain(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="^values: expected the names a, b, got a, c$"):
        parameters.free({"a": torch.zeros(2), "c": torch.zeros(())})
    with pytest.raises(ValueError, match=r"^values: 'a': expected shape \(\*batch, \*\(2,\)\), got \(3,\)$"):
        parameters.free({"a": torch.zeros(3), "b": torch.zeros(())})
    with pytest.raises(TypeError, match="^values: expected a mapping of a, b, got Tensor$"):
        parameters.free(torch.zeros(3))
    with pytest.raises(TypeError, match="^values: expected a tensor, got dict$"):
        Parameters(3).free({"theta": torch.zeros(3)})
