"""Ways in which draws are turned to look for mirror images: entries or parameters exchanged, or signs turned."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowpost.variational.maps import Shape
from flowpost.variational.parameters import Parameters

LONGEST, MANY = 16, 8
"""The longest axis along which entries are turned, and of how many parameters at most any two are turned together."""
COMBINED = 256
"""How many exchanges together with parameters turned over, at most."""

Axis: TypeAlias = tuple[str, int]
"""A parameter's name and one of its axes; of a whole parameter 0."""


class Mirror(NamedTuple):
    """One way of turning draws: entries of some axes, or parameters, are exchanged, or the signs of some turned."""

    axes: tuple[Axis, ...] = ()
    entries: tuple[int, ...] = ()
    """Two that are exchanged, one whose sign is turned, or none for whole parameters."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Parameters that are exchanged."""
    over: tuple[str, ...] = ()
    """Parameters that are turned over within their intervals, as the weight of the first of two components is."""

    def __str__(self) -> str:
        names = [[f"{name}[{':,' * axis}{entry}]" for entry in self.entries] or [name] for name, axis in self.axes]
        said = []
        if self.exchanges:
            said.append(f"{', '.join(map(' and '.join, [*names, *self.pairs]))} exchanged")
        elif names:
            said.append(f"the sign of {' and '.join(itertools.chain(*names))} turned")
        if self.over:
            said.append(f"{' and '.join(self.over)} turned over in the interval")
        return " and ".join(said)

    @property
    def exchanges(self) -> bool:
        """Whether entries or parameters change places."""
        return len(self.entries) == 2 or bool(self.pairs)

    def turned(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        """Parameters ``(*batch, *shape)``, of so many axes in front, after it; none is turned over yet."""
        values = dict(values)
        for one, other in self.pairs:
            values[one], values[other] = values[other], values[one]
        for name, axis in self.axes:
            values[name] = self._turned(values[name], batch + axis)
        return values

    def _turned(self, value: Tensor, axis: int) -> Tensor:
        if not self.entries:
            return -value
        rows = [*value.unbind(axis)]
        if len(self.entries) == 1:
            rows[self.entries[0]] = -rows[self.entries[0]]
        else:
            one, other = self.entries
            rows[one], rows[other] = rows[other], rows[one]
        return torch.stack(rows, axis)


def mirrors(parameters: Parameters) -> Iterator[Mirror]:
    """What is tried of parameters.

    Neighbouring entries of an axis are exchanged, for these make up all permutations: in all parameters that have an
    axis of that length, in their first axes, in their last, and in one parameter. Parameters of one shape and
    constraint are exchanged, all whose names differ alike, and any two. Those of an interval are turned over, alone and
    with what exchanges two of a kind, in `COMBINED` ways at most. Signs are turned of real parameters, one, two or all,
    and of entries along their axes.

    Example:
        >>> from torch.distributions import constraints
        >>> for mirror in mirrors(Parameters({"mu_1": (), "mu_2": (), "weight": constraints.unit_interval})):
        ...     print(mirror)
        mu_1 and mu_2 exchanged
        weight turned over in the interval
        mu_1 and mu_2 exchanged and weight turned over in the interval
        the sign of mu_1 turned
        the sign of mu_2 turned
        the sign of mu_1 and mu_2 turned
    """
    shapes, real = parameters.shapes, parameters.real
    of_two = [Mirror()]
    for size, axes in _axes(shapes):
        exchanged = [Mirror(axes, (entry, entry + 1)) for entry in range(size - 1)]
        yield from exchanged if size > 2 else ()
        of_two += exchanged if size == 2 else []
    of_two = [each._replace(pairs=pairs) for pairs in _swaps(parameters) for each in of_two]
    yield from of_two[1:]
    bounded = parameters.bounded
    named = [*dict.fromkeys([*((name,) for name in bounded), tuple(bounded)])] if bounded else []
    yield from (Mirror(over=names) for names in named)
    yield from itertools.islice(_combined(of_two[1:], named), COMBINED)
    for size, axes in _axes({name: shapes[name] for name in real}):
        yield from (Mirror(axes, (entry,)) for entry in range(size))
    for count in sorted({1, 2 if len(real) <= MANY else 1, len(real)}):
        for names in itertools.combinations(real, count) if real else ():
            yield Mirror(tuple((name, 0) for name in names))


def _combined(exchanges: Sequence[Mirror], named: Sequence[tuple[str, ...]]) -> Iterator[Mirror]:
    """Each exchange with each of some parameters turned over that it does not exchange."""
    for each, names in itertools.product(exchanges, named):
        if {*names}.isdisjoint(itertools.chain(*each.pairs)):
            yield each._replace(over=names)


def _swaps(parameters: Parameters) -> Iterator[tuple[tuple[str, str], ...]]:
    """Parameters of one kind that are exchanged together: none, all whose names differ alike, and any two."""
    kinds, alike = defaultdict(list), defaultdict(list)
    for name in parameters.shapes:
        kinds[parameters.kind(name)].append(name)
    pairs = [pair for kind in kinds.values() if len(kind) <= MANY for pair in itertools.combinations(kind, 2)]
    for pair in pairs:
        alike[_difference(*pair)].append(pair)
    yield from dict.fromkeys([(), *map(tuple, alike.values()), *((pair,) for pair in pairs)])


def _difference(one: str, other: str) -> tuple[str, str]:
    """What is between the beginning and the end that two names share: of ``mu_1`` and ``mu_2`` the figures."""
    head = len(os.path.commonprefix([one, other]))
    tail = len(os.path.commonprefix([one[head:][::-1], other[head:][::-1]]))
    return one[head : len(one) - tail], other[head : len(other) - tail]


def _axes(shapes: Mapping[str, Shape]) -> Iterator[tuple[int, tuple[Axis, ...]]]:
    """Axes of one length that are turned together, and that length."""
    for size in sorted({size for shape in shapes.values() for size in shape if 1 < size <= LONGEST}):
        every = [(name, axis) for name, shape in shapes.items() for axis in range(len(shape)) if shape[axis] == size]
        first = [each for each in every if each[1] == 0]
        last = [each for each in every if each[1] == len(shapes[each[0]]) - 1]
        for group in dict.fromkeys(map(tuple, (every, first, last, *([one] for one in every)))):
            if group:
                yield size, group
