"""Named, shaped, constrained parameters as one vector of real coordinates, with the log-det."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from flowpost.numerics.arguments import check_int
from flowpost.numerics.watchers import watched
from flowpost.variational.constraints import map_to
from flowpost.variational.constraints import ordered as ordered
from flowpost.variational.maps import Interval, Line, Map, Shape

Size: TypeAlias = int | tuple[int, ...]
Entry: TypeAlias = Size | Constraint | tuple[Size, Constraint]
Spec: TypeAlias = int | Mapping[str, Entry]
Values: TypeAlias = Tensor | dict[str, Tensor]
_WRITE = "write a shape as 3 or (3, 2), () of a scalar, a constraint, or a pair (shape, constraint)"


class Parameters:
    """Constrained parameters theta, as a function of one vector of real coordinates: ``theta = g(u)``.

    An int is that many real numbers, in one tensor. A mapping gives each name a shape, a constraint, or both. The
    coordinates of its parameters lie one after the other. Every constraint has a smooth bijection from the whole line
    that neither overflows nor saturates within +-30; the prior that a user writes stays one over theta, for
    ``log|det dtheta/du|`` makes up for g.

    Lower-triangular matrices have the coordinates of their lower triangle, a simplex of n entries has n - 1, and their
    log-det is that of the entries that are free.

    Args:
        spec: an int, or a mapping of names to shapes and constraints of `torch.distributions.constraints`; `ordered` of
            this module, for ascending vectors, is one more.

    Attributes:
        dim: the number of coordinates.
        names: of the columns of `flat`: ``mu``, ``theta[0]``, ``L[1,0]``; of a bare int ``theta[0]``, ``theta[1]``.

    Raises:
        TypeError: for what is no size, no shape and no constraint.
        ValueError: for a constraint without a bijection, or with none of that shape.

    Example:
        >>> from torch.distributions import constraints
        >>> parameters = Parameters({"mu": (), "tau": constraints.positive, "theta": (3, constraints.unit_interval)})
        >>> parameters.dim, parameters.names
        (5, ('mu', 'tau', 'theta[0]', 'theta[1]', 'theta[2]'))
        >>> values, log_det = parameters.constrain(torch.zeros(7, 5))
        >>> values["theta"].shape, values["tau"][0].item(), log_det.shape
        (torch.Size([7, 3]), 1.0, torch.Size([7]))
    """

    def __init__(self, spec: Spec) -> None:
        self._bare = not isinstance(spec, Mapping)
        if self._bare and not hasattr(spec, "__index__"):
            raise TypeError(
                f"dim_or_spec: expected an int, or a mapping of names to shapes and constraints, got "
                f"{type(spec).__name__}; write 3, or {{'mu': (), 'tau': constraints.positive}}"
            )
        entries = spec if isinstance(spec, Mapping) else {"theta": check_int("dim_or_spec", spec, minimum=1)}
        self._maps: dict[str, Map] = {}
        self._constraints: dict[str, Constraint] = {}
        for name, entry in entries.items():
            if not isinstance(name, str):
                raise TypeError(f"dim_or_spec: expected names that are strings, got {name!r}")
            shape, self._constraints[name] = _read(name, entry)
            self._maps[name] = _map(name, shape, self._constraints[name])
        self._sizes = [each.size for each in self._maps.values()]
        self.dim = sum(self._sizes)
        if not self.dim:
            raise ValueError(f"dim_or_spec: expected at least one free coordinate, got none of {spec!r}")
        self.names = tuple(column for name, each in self._maps.items() for column in _columns(name, each.shape))
        if twice := [name for name in self._maps if self.names.count(name) > 1]:
            raise ValueError(f"dim_or_spec: expected names apart, got {twice[0]!r}, which is an entry of another too")

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each parameter's values; of a bare int under the name theta."""
        return {name: each.shape for name, each in self._maps.items()}

    @property
    def columns(self) -> dict[str, slice]:
        """Where each parameter's coordinates lie."""
        ends = [*itertools.accumulate(self._sizes)]
        return {name: slice(end - size, end) for name, size, end in zip(self._maps, self._sizes, ends, strict=True)}

    @property
    def real(self) -> list[str]:
        """The names of parameters that are real numbers, without a constraint."""
        return [name for name, each in self._maps.items() if isinstance(each, Line)]

    @property
    def bounded(self) -> list[str]:
        """The names of parameters within an interval, each of whose ends is finite."""
        return [name for name, each in self._maps.items() if isinstance(each, Interval)]

    def kind(self, name: str) -> tuple[Shape, str]:
        """What two parameters that may take each other's values have alike."""
        return self._maps[name].shape, repr(self._constraints[name])

    def constrain(self, free: Tensor) -> tuple[Values, Tensor]:
        """The parameters that coordinates stand for, and ``log|det dtheta/du|``.

        Args:
            free: coordinates u, ``(*batch, dim)``.

        Returns:
            A mapping of ``(*batch, *shape)``, or for an int the tensor itself; and ``(*batch)``.

        Raises:
            ValueError: for another last axis.
        """
        if not free.ndim or free.shape[-1] != self.dim:
            raise ValueError(f"free: expected shape (*, {self.dim}), got {tuple(free.shape)}")
        if self._bare:
            return free, free.new_zeros(free.shape[:-1])
        values, log_det = {}, None
        for (name, each), part in zip(self._maps.items(), free.split(self._sizes, -1), strict=True):
            values[name], term = each.forward(part)
            log_det = term if log_det is None else log_det if term is None else log_det + term
        return values, free.new_zeros(free.shape[:-1]) if log_det is None else log_det

    def free(self, values: Tensor | Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """The coordinates of given parameters, ``(*batch, dim)``: what `constrain` undoes.

        Args:
            values: as `constrain` returns them; batches broadcast, numbers and arrays are taken too.
            dtype: in which they are read; by default their own, and of numbers torch's default dtype.

        Raises:
            ValueError: for values outside their support, other names or other shapes.
        """
        parts = [self._free(name, value) for name, value in self._read(values, dtype).items()]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, -1) for part in parts], -1)

    def turned_over(self, free: Tensor, names: Collection[str]) -> Tensor:
        """Coordinates ``(*batch, dim)`` of parameters, some of which, `real` or `bounded`, are turned over."""
        parts = zip(self._maps, free.split(self._sizes, -1), strict=True)
        return torch.cat([-part if name in names else part for name, part in parts], -1)

    def flat(self, values: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The entries of all parameters side by side, ``(*batch, columns)``, in the order of `names`."""
        parts = []
        for name, value in self._read(values).items():
            batch = value.shape[: value.ndim - len(self._maps[name].shape)]
            parts.append(value.reshape(*batch, math.prod(self._maps[name].shape)))
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, -1) for part in parts], -1)

    def __repr__(self) -> str:
        parts = [f"{name}: {each.shape} {self._constraints[name]!r}" for name, each in self._maps.items()]
        return f"{type(self).__name__}({', '.join(parts)}; dim={self.dim})"

    def _read(self, values: Tensor | Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of whole shapes, by their names."""
        if self._bare != (not isinstance(values, Mapping)):
            expected = "a tensor" if self._bare else f"a mapping of {', '.join(self._maps)}"
            raise TypeError(f"values: expected {expected}, got {type(values).__name__}")
        given = values if isinstance(values, Mapping) else {"theta": values}
        if set(given) != set(self._maps):
            raise ValueError(f"values: expected the names {', '.join(self._maps)}, got {', '.join(map(str, given))}")
        tensors = {name: _tensor(given[name], dtype) for name in self._maps}
        for name, value in tensors.items():
            shape = self._maps[name].shape
            if value.ndim < len(shape) or value.shape[value.ndim - len(shape) :] != shape:
                raise ValueError(f"values: {name!r}: expected shape (*batch, *{shape}), got {tuple(value.shape)}")
        return tensors

    def _free(self, name: str, value: Tensor) -> Tensor:
        """One parameter's coordinates; refused where they are not finite, or do not lead back."""
        free = self._maps[name].inverse(value)
        if watched() or value.is_meta:
            return free
        back = self._maps[name].forward(free)[0]
        if not (free.isfinite().all() and torch.isclose(back, value, rtol=1e-5, atol=1e-6).all()):
            raise ValueError(f"values: {name!r}: expected values inside {self._constraints[name]!r}, got {value}")
        return free


def _tensor(value: object, dtype: torch.dtype | None) -> Tensor:
    # A tensor stays where it is: as_tensor would take it to the default device.
    value = value.to(dtype=dtype) if isinstance(value, Tensor) else torch.as_tensor(value, dtype=dtype)
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _read(name: str, entry: object) -> tuple[Shape, Constraint]:
    """Shape and constraint of one entry of a spec."""
    if isinstance(entry, Constraint):
        return (), entry
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Constraint):
        return _shape(name, entry[0]), entry[1]
    return _shape(name, entry), constraints.real


def _shape(name: str, given: object) -> Shape:
    sizes: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
    for size in sizes:
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"dim_or_spec: {name!r}: expected a shape or a constraint, got {given!r}; {_WRITE}")
        if size < 1:
            raise ValueError(f"dim_or_spec: {name!r}: expected sizes >= 1, got {given!r}")
    return tuple(map(operator.index, sizes))


def _map(name: str, shape: Shape, constraint: Constraint) -> Map:
    try:
        return map_to(constraint, shape)
    except ValueError as error:
        raise ValueError(f"dim_or_spec: {name!r}: {error}") from None


def _columns(name: str, shape: Shape) -> list[str]:
    """The names of one parameter's entries, those of the last axis running fastest."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, place))}]" for place in itertools.product(*map(range, shape))]
