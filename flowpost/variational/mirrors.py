"""Modes that are mirror images of those q holds: like entries or like parameters exchanged, or signs turned."""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.variational.bound import Fitted
from flowpost.variational.draws import named
from flowpost.variational.families import assemble, components
from flowpost.variational.gaussian import Gaussian, factorized
from flowpost.variational.maps import Shape
from flowpost.variational.parameters import Parameters
from flowpost.variational.starts import Start, barrier
from flowpost.variational.target import Target
from flowpost.variational.weighing import Weighed, weigh

LONGEST, MANY = 16, 8
"""The longest axis along which entries are turned, and of how many parameters at most any two are turned together."""
TRIED, LOOKED = 10, 1000
"""Draws on which every mirror is tried, and on which those that leave p as it is are looked through."""
EVEN = 1.0
"""Nats by which log p may differ at an image: a mode of that much more or less mass is one too."""
SLOPE, SPREAD = 2.0, 3.0
"""Nats by which log q must be lower at an image, and standard deviations of log p/q: less is a rough q's own error."""
SHARE = 0.05
"""Of q's draws, whose images q all but misses, for a word."""


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


class Mirrored(NamedTuple):
    """A mirror that leaves p as it is, and q not."""

    mirror: Mirror
    share: float
    """Of q's draws, whose images q all but misses."""
    place: Tensor
    """The image of the highest log p, in free coordinates ``(dim,)``."""


def with_images(
    start: Start, most: int, flow: Bijector, target: Target, generator: torch.Generator, *, diagonal: bool
) -> Start:
    """A start with the images of its Gaussians that it misses, until there are so many; no gradient is taken."""
    gaussians, elbos = [*start.gaussians], [*start.elbos]
    while len(gaussians) < most:
        fitted = assemble(flow, gaussians, elbos)
        found = find_mirrored(fitted, target, weigh(fitted, target, LOOKED, generator))
        if found is None:
            break
        with torch.no_grad():  # what is turned twice is back
            back = _turned(target.parameters, found.mirror, found.place)
            owner = int(torch.stack([part.log_prob(back) for part in components(fitted)]).argmax())
        try:
            gaussian = _image(target.parameters, found.mirror, gaussians[owner])
        except ValueError:  # its middle is outside the support, or too near to the edge
            break
        gaussians.append(factorized(gaussian) if diagonal else gaussian)
        elbos.append(elbos[owner])
    return start._replace(gaussians=gaussians, elbos=elbos)


def where_mirrored(fitted: Fitted, target: Target, weighed: Weighed) -> list[str]:
    """What is said of modes that are images of those that q holds; nothing where it holds them too."""
    found = find_mirrored(fitted, target, weighed)
    if found is None:
        return []
    sign = "constrain its sign" if found.mirror.axes else "allow one half of the interval"
    cure = "make a parameter of like components `ordered`" if found.mirror.exchanges else sign
    return [
        f"with {found.mirror} the log joint is about the same and q is not: it has next to nothing at the images of "
        f"{found.share:.0%} of its draws, as near {target.describe(found.place)}, and misses modes there; a mixture "
        f"holds them, of modes={len(components(fitted)) + 1} or more, or {cure}, which leaves one"
    ]


@torch.no_grad()
def find_mirrored(fitted: Fitted, target: Target, weighed: Weighed) -> Mirrored | None:
    """The mirror whose images q misses most; None where q holds the images of all that it holds.

    A mirror leaves p as it is if log p over the parameters, whose volume it does not change, is about the same at a
    draw and at its image. Where log q is not, and log p falls on the way from one to the other, q has the one's mode
    and misses the other's.

    Costs `TRIED` values of the log joint for each mirror, and `LOOKED` for each that leaves p as it is.

    Args:
        fitted: q.
        target: p.
        weighed: draws of q.
    """
    few, more = _evenly(weighed, TRIED), _evenly(weighed, LOOKED)
    spread = more.log_ratio.std().item()
    if not math.isfinite(spread):
        return None
    found = []
    for mirror in mirrors(target.parameters):
        if _images(target, mirror, few.z)[2].double().mean() <= 0.5:
            continue
        image, log_p, even = _images(target, mirror, more.z)
        ratio = (log_p - fitted.log_prob(image)).double().nan_to_num(nan=math.inf, posinf=math.inf)
        lost = even & (ratio - more.log_ratio > max(SLOPE, SPREAD * spread) + EVEN)
        best = int(torch.where(lost, log_p, -math.inf).argmax())
        if lost[best] and _apart(target, image[best], more.z[best]):
            found.append(Mirrored(mirror, (more.share * lost).sum().item(), image[best]))
    worst = max(found, key=lambda each: each.share, default=None)
    return worst if worst and worst.share > SHARE else None


def _apart(target: Target, one: Tensor, other: Tensor) -> bool:
    """Whether log p falls between two points."""
    try:
        return barrier(lambda points: (target(points), points), one, other)
    except Exception:  # noqa: BLE001 - whatever a log joint may raise on the way
        return False


def mirrors(parameters: Parameters) -> Iterator[Mirror]:
    """What is tried of parameters.

    Neighbouring entries of an axis are exchanged, for these make up all permutations: in all parameters that have an
    axis of that length, in their first axes, in their last, and in one parameter. Parameters of one shape and
    constraint are exchanged, all whose names differ alike, and any two. Those of an interval are turned over, alone and
    with what exchanges two of a kind. Signs are turned of real parameters, one, two or all, and of entries along their
    axes.

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
    bounded = parameters.bounded
    for names in dict.fromkeys([(), *((name,) for name in bounded), tuple(bounded)]):
        turned = (each._replace(over=names) for each in of_two if {*names}.isdisjoint(itertools.chain(*each.pairs)))
        yield from (each for each in turned if each != Mirror())
    for size, axes in _axes({name: shapes[name] for name in real}):
        yield from (Mirror(axes, (entry,)) for entry in range(size))
    for count in sorted({1, 2 if len(real) <= MANY else 1, len(real)}):
        for names in itertools.combinations(real, count) if real else ():
            yield Mirror(tuple((name, 0) for name in names))


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


def _evenly(weighed: Weighed, count: int) -> Weighed:
    """About so many of the draws, of all components of a mixture."""
    z, ratio, share = (column[:: max(1, len(column) // count)] for column in weighed)
    return Weighed(z, ratio, share / share.sum())


def _turned(parameters: Parameters, mirror: Mirror, z: Tensor) -> Tensor:
    """The image of coordinates; a ValueError where it is outside the support."""
    values, _ = parameters.constrain(z)
    turned = mirror.turned(named(values), z.ndim - 1)
    free = parameters.free(turned if isinstance(values, dict) else turned["theta"])
    return parameters.turned_over(free, mirror.over) if mirror.over else free


def _image(parameters: Parameters, mirror: Mirror, gaussian: Gaussian) -> Gaussian:
    """Of a Gaussian: exactly, where the mirror is linear in the coordinates, as of like ones it is."""
    slope = torch.autograd.functional.jacobian(lambda z: _turned(parameters, mirror, z), gaussian.loc)
    tril = torch.linalg.qr((slope @ gaussian.scale_tril).mT).R.mT
    return Gaussian(_turned(parameters, mirror, gaussian.loc), tril * tril.diagonal().sign())


def _images(target: Target, mirror: Mirror, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The images of draws, their log p, both in free coordinates, and which have about the density of their draw."""
    parameters = target.parameters
    before = parameters.constrain(z)[1]
    try:
        image = _turned(parameters, mirror, z)
        log_p, after = target(image), parameters.constrain(image)[1]
    except Exception:  # noqa: BLE001 - it is outside the support, or the log joint has a fault there
        return z, before, torch.zeros_like(before, dtype=torch.bool)
    return image, log_p, ((log_p - after) - (target(z) - before)).abs() <= EVEN
