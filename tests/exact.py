"""Autodiff without its rounding: the judge of a log-det where float64 autodiff is no more exact than what it judges.

A Jacobian by autodiff is that of every operation at the float64 numbers which that operation was given, multiplied up
in float64. Here the same map is traced to the same operations, and what depends on z is moved by 1e-30, in 80-digit
arithmetic, around the same float64 numbers: the quotients are the same Jacobian to 20 digits and more. What depends on
context and weights alone is not rounded at all. No formula for a log-det is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import registry
import torch
from mpmath import mp, mpf
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from flowpost.bijectors import _by_hand, deep_sigmoid, planar
from flowpost.masked import engine
from flowpost.numerics import tanh_roots

Map = Callable[..., tuple[Tensor, Tensor]]
Array = np.ndarray[Any, Any]
"""Of integers, booleans, or mpmath's numbers (dtype object)."""

DIGITS = 80
STEP = mpf(10) ** -30
"""The error of the quotients, times the map's curvature."""


def judge(function: Map, z: Tensor, context: Tensor | None, n: int) -> Tensor:
    """Raise unless `function` holds B1 and B2 in every row, in float64; its image, where it does.

    B1: the log-det is that of the Jacobian to 8 eps (N + cond), where cond < 1e8. B2: its determinant has one sign.
    Autodiff judges first. Where it finds a log-det over the bound, or a sign turned, all rows are judged again here.
    """
    z = z.detach().clone().requires_grad_()
    image, log_det = function(z, context)
    matrix = registry.jacobian(image, z)
    cond = torch.linalg.cond(matrix)
    fair, bound = cond < 1e8, 8 * torch.finfo(z.dtype).eps * (n + cond)
    sign, expected = torch.linalg.slogdet(matrix)
    if not _holds((log_det - expected)[fair], bound[fair], sign):
        sign, expected = slogdet(function, z, context)
    if not _holds((log_det - expected)[fair], bound[fair], sign):
        excess = ((log_det - expected).abs() / bound)[fair].tolist()
        raise AssertionError(f"log-det: off by {excess} times the bound, signs {sign.tolist()}")
    return image


def _holds(error: Tensor, bound: Tensor, sign: Tensor) -> bool:
    return bool((error.abs() <= bound).all() and (sign == sign[0]).all() and (sign != 0).all())


def slogdet(function: Map, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `torch.linalg.slogdet` of the Jacobian of ``function(z, context)[0]`` in every row, but rounded only at last.

    Args:
        function: a bijector or its ``inverse``, in float64, made of operations that have a rule here.
        z: ``(n, dim)``.
        context: ``(n, context_size)``, or None.
    """
    with mp.workdps(DIGITS):
        dets = [mp.det(mp.matrix(matrix.tolist())) for matrix in jacobian(function, z, context)]
        rows = [(float(mp.sign(det)), float(mp.log(abs(det)))) for det in dets]
    sign, log_abs_det = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    return sign, log_abs_det


def jacobian(function: Map, z: Tensor, context: Tensor | None = None) -> Array:
    """The Jacobians ``(n, dim, dim)`` of ``function(z, context)[0]``."""
    given = [tensor.detach() for tensor in (z, context) if tensor is not None]
    # Engines and a Sylvester step's node write in place; tests/test_engines.py and tests/test_sylvester.py hold them to
    # the plain operations, which are traced here.
    # A search carries no gradient: its roots are held where float64 put them, and the corrections differentiated.
    found = {place: [] for place in _SEARCHES}
    plain = mock.patch.object(_by_hand, "fits", return_value=False)
    with mock.patch.object(engine, "choose", return_value=None), plain:
        with _searching(lambda search, kept: lambda *args: kept.append(search(*args)) or kept[-1], found):
            expected = function(*given)[0]
        with _searching(lambda _, kept: mock.Mock(side_effect=kept), found):
            module = make_fx(lambda *inputs: function(*inputs)[0])(*given)
    module.graph.eliminate_dead_code()  # what only the log-det needs
    with mp.workdps(DIGITS):
        point = numbers(z)
        moved = [point + STEP * unit for unit in np.eye(z.shape[-1], dtype=int)]
        image = _Exact(module).run(_value(given[0], point, moved), *map(_still, given[1:]))
        if not torch.equal(image.rounded, expected):
            raise AssertionError("function: its traced operations give another image than it does")
        return np.stack([(to - image.point) / STEP for to in image.moved], -1)


_SEARCHES = ((deep_sigmoid, "increasing_root"), (planar, "tanh_root"), (tanh_roots, "tanh_roots"))


@contextmanager
def _searching(
    replace: Callable[[Callable[..., Tensor], list[Tensor]], Callable[..., Tensor]],
    found: dict[tuple[ModuleType, str], list[Tensor]],
) -> Iterator[None]:
    """Put in place of each search what `replace` makes of it and of its list of roots."""
    with ExitStack() as patches:
        for place, kept in found.items():
            patches.enter_context(mock.patch.object(*place, replace(getattr(*place), kept)))
        yield


def numbers(tensor: Tensor) -> Array:
    """The values of a tensor, floats as mpmath's numbers."""
    values = tensor.detach().numpy()
    return _each(mpf, 1)(values.astype(object)) if tensor.is_floating_point() else values


class _Value(NamedTuple):
    """What stands for a tensor in a traced map."""

    rounded: Tensor
    """The tensor itself."""
    point: Array
    """The same numbers where they depend on z; elsewhere what they would be without rounding."""
    moved: Sequence[Array]
    """What becomes of it when z moves along each axis; empty where it does not depend on z."""
    version: int
    """The tensor's when this was written: what has since been changed in place, or its base, stands for it no more."""


def _value(rounded: Tensor, point: Array, moved: Sequence[Array] = ()) -> _Value:
    return _Value(rounded, point, moved, rounded._version)


def _still(tensor: Tensor) -> _Value:
    return _value(tensor, numbers(tensor))


class _Exact(fx.Interpreter):
    """Runs a traced map on `_Value`s."""

    def fetch_attr(self, target: str) -> _Value:
        return _still(super().fetch_attr(target))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if target is operator.getitem:
            return args[0][args[1]]
        values = [x for x in tree_leaves(args, is_leaf=_is_value) if _is_value(x)]
        if any(x.rounded._version != x.version for x in values):
            raise NotImplementedError(f"function: expected no operation to read what was written over, got {target}")
        rule = _RULES.get(target.overloadpacket.__name__.removesuffix("_"))
        if rule is None:
            raise NotImplementedError(f"function: expected operations with a rule in tests/exact.py, got {target}")
        options = {name: value for name, value in kwargs.items() if name not in _STORAGE}

        def exactly(choose: Callable[[_Value], Array]) -> Any:  # noqa: ANN401
            return rule(*tree_map_only(_Value, choose, args, is_leaf=_is_value), **options)

        moves = max((len(x.moved) for x in values), default=0)
        point = exactly(lambda x: x.point)
        moved = [exactly(lambda x, i=i: x.moved[i] if x.moved else x.point) for i in range(moves)]
        # Last, for an operation in place changes what it is given.
        rounded = target(*tree_map_only(_Value, lambda x: x.rounded, args, is_leaf=_is_value), **kwargs)
        if isinstance(rounded, Tensor):
            return _around(rounded, point, moved)
        return [_around(part, point[i], [to[i] for to in moved]) for i, part in enumerate(rounded)]


def _around(rounded: Tensor, point: Array, moved: Sequence[Array]) -> _Value:
    """Shift what depends on z to where rounding took it."""
    if not moved or not rounded.is_floating_point():
        return _value(rounded, point, moved)
    there = numbers(rounded)
    return _value(rounded, there, [to + (there - point) for to in moved])


def _is_value(x: object) -> bool:
    return isinstance(x, _Value)


_STORAGE = {"dtype", "device", "layout", "memory_format", "pin_memory"}


def _each(function: Callable[..., object], inputs: int) -> Callable[..., Array]:
    """Element by element, with broadcasting."""
    ufunc = np.frompyfunc(function, inputs, 1)
    return lambda *args: np.asarray(ufunc(*args), dtype=object)


def _split(x: Array, sizes: int | Sequence[int], dim: int = 0) -> list[Array]:
    stops = range(sizes, x.shape[dim], sizes) if isinstance(sizes, int) else np.cumsum(sizes)[:-1]
    return np.split(x, stops, dim)


_softplus = _each(lambda x, threshold: x if x > threshold else mp.log1p(mp.exp(x)), 2)  # as torch defines it


def _logsumexp(x: Array, dims: Sequence[int], *, keepdim: bool) -> Array:
    return _each(mp.log, 1)(np.sum(_each(mp.exp, 1)(x), axis=tuple(dims), keepdims=keepdim))


def _expand(x: Array, shape: Sequence[int]) -> Array:
    kept = (1,) * (len(shape) - x.ndim) + x.shape
    return np.broadcast_to(x, [old if new == -1 else new for old, new in zip(kept, shape, strict=True)])


def _solve(matrix: Array, columns: Array, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Array:
    """Substitution, from the row that has one unknown on."""
    if not left:
        turned = np.swapaxes(matrix, -1, -2), np.swapaxes(columns, -1, -2)
        return np.swapaxes(_solve(*turned, upper=not upper, unitriangular=unitriangular), -1, -2)
    rows: dict[int, Array] = {}
    for i in range(columns.shape[-2])[:: -1 if upper else 1]:
        total = columns[..., i, :] - sum(matrix[..., i, j, None] * row for j, row in rows.items())
        rows[i] = total if unitriangular else total / matrix[..., i, i, None]
    return np.stack([rows[i] for i in sorted(rows)], -2)


def _pad(x: Array, pad: Sequence[int], value: float = 0) -> Array:
    """The widths come in pairs, the last axis's first."""
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
    return np.pad(x, widths, constant_values=mpf(value))


def _diag_embed(x: Array, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Array:
    if (offset, dim1, dim2) != (0, -2, -1):
        raise NotImplementedError("diag_embed: expected the main diagonal of the last two axes")
    return np.expand_dims(x, -1) * np.eye(x.shape[-1], dtype=object)


def _diagonal_scatter(x: Array, values: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    x, every = x.copy(), np.arange(values.shape[-1])
    if offset or {dim1 % x.ndim, dim2 % x.ndim} != {x.ndim - 2, x.ndim - 1}:
        raise NotImplementedError("diagonal_scatter: expected the main diagonal of the last two axes")
    x[..., every, every] = values
    return x


def _scatter(x: Array, dim: int, places: Array, values: Array) -> Array:
    x = x.astype(object)  # a copy
    np.put_along_axis(x, places, values, dim)
    return x


_RULES: dict[str, Callable[..., Any]] = {
    # Numbers
    "abs": np.abs,
    "_softmax": lambda x, dim, _: _each(mp.exp, 1)(x) / np.sum(_each(mp.exp, 1)(x), axis=dim, keepdims=True),
    "_log_softmax": lambda x, dim, _: x - _logsumexp(x, [dim], keepdim=True),
    "add": lambda x, y, alpha=1: x + alpha * y,
    "addcdiv": lambda x, a, b, value=1: x + value * a / b,
    "addcmul": lambda x, a, b, value=1: x + value * a * b,
    "addmm": lambda x, a, b: x + a @ b,
    "amax": lambda x, dims, keepdim=False: np.max(x, axis=tuple(dims), keepdims=keepdim),
    "amin": lambda x, dims, keepdim=False: np.min(x, axis=tuple(dims), keepdims=keepdim),
    "bitwise_and": operator.and_,
    "bmm": operator.matmul,
    "clamp": lambda x, low, high: np.clip(x, low, high),
    "clamp_max": np.minimum,
    "clamp_min": np.maximum,
    "copysign": _each(lambda x, y: -abs(x) if y < 0 else abs(x), 2),
    "div": operator.truediv,
    "elu": _each(lambda x, alpha: x if x > 0 else alpha * mp.expm1(x), 2),
    "eq": operator.eq,
    "exp": _each(mp.exp, 1),
    "expm1": _each(mp.expm1, 1),
    "floor_divide": operator.floordiv,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lerp": lambda a, b, weight: a + weight * (b - a),
    "linalg_solve_triangular": _solve,
    "log": _each(mp.log, 1),
    "log1p": _each(mp.log1p, 1),
    "log_sigmoid_forward": lambda x: [-_each(lambda v: mp.log1p(mp.exp(-v)), 1)(x)] * 2,
    "logsumexp": lambda x, dims, keepdim=False: _logsumexp(x, dims, keepdim=keepdim),
    "lt": operator.lt,
    "maximum": np.maximum,
    "mm": operator.matmul,
    "mul": operator.mul,
    "neg": operator.neg,
    "pow": lambda x, power: x**power,
    "reciprocal": lambda x: 1 / x,
    "relu": lambda x: np.maximum(x, 0),
    "remainder": operator.mod,
    "rsub": lambda x, y: y - x,
    "sigmoid": _each(lambda x: 1 / (1 + mp.exp(-x)), 1),
    "softplus": lambda x, beta=1, threshold=20: _softplus(x * beta, threshold) / beta,
    "sqrt": _each(mp.sqrt, 1),
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "sum": lambda x, dims, keepdim=False: np.sum(x, axis=tuple(dims), keepdims=keepdim),
    "tanh": _each(mp.tanh, 1),
    "where": np.where,
    # Places
    "_to_copy": lambda x: x,
    "_unsafe_view": np.reshape,
    "alias": lambda x: x,
    "arange": np.arange,
    "cat": np.concatenate,
    "cumsum": np.cumsum,
    "clone": lambda x: x,
    "constant_pad_nd": _pad,
    "detach": lambda x: x,  # it stops autodiff, not the map
    "diag_embed": _diag_embed,
    "diagonal_scatter": _diagonal_scatter,
    "diagonal": lambda x, offset=0, dim1=0, dim2=1: np.diagonal(x, offset, dim1, dim2),
    "expand": _expand,
    "eye": lambda *sizes: np.eye(*sizes, dtype=object),
    "flip": np.flip,
    "full_like": lambda x, value: np.full(x.shape, mpf(value)),
    "gather": lambda x, dim, places: np.take_along_axis(x, places, dim),
    "index": lambda x, places: x[tuple(slice(None) if place is None else place for place in places)],
    "index_select": lambda x, dim, places: np.take(x, places, dim),
    "new_ones": lambda _, shape: np.full(shape, mpf(1)),
    "new_zeros": lambda _, shape: np.full(shape, mpf(0)),
    "ones_like": lambda x: np.full(x.shape, mpf(1)),
    "permute": np.transpose,
    "scatter": _scatter,
    "scalar_tensor": lambda value: np.array(mpf(value) if isinstance(value, float) else value),
    "select": lambda x, dim, index: np.take(x, index, dim),
    "slice": lambda x, dim=0, start=None, end=None: x[(slice(None),) * (dim % x.ndim) + (slice(start, end),)],
    "sort": lambda x: [np.sort(x), np.argsort(x)],
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": np.squeeze,
    "stack": np.stack,
    "t": np.transpose,
    "transpose": np.swapaxes,
    "tril": np.tril,
    "triu": np.triu,
    "unbind": lambda x, dim=0: list(np.moveaxis(x, dim, 0)),
    "unsqueeze": np.expand_dims,
    "view": np.reshape,
}
