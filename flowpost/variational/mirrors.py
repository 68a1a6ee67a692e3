"""Modes that are mirror images of those q holds: like entries of parameters exchanged, or signs turned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
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
"""The longest axis along which entries are turned, and up to how many parameters any two have their signs turned."""
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
    """One way of turning draws: two entries of some axes are exchanged, or the signs of one, or of all, turned."""

    axes: tuple[Axis, ...]
    entries: tuple[int, ...]
    """Two that are exchanged, one whose sign is turned, or none for whole parameters."""

    def __str__(self) -> str:
        names = [[f"{name}[{':,' * axis}{entry}]" for entry in self.entries] or [name] for name, axis in self.axes]
        if len(self.entries) == 2:
            return f"{', '.join(map(' and '.join, names))} exchanged"
        return f"the sign of {' and '.join(itertools.chain(*names))} turned"

    def turned(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        """Parameters ``(*batch, *shape)``, of so many axes in front, after it."""
        values = dict(values)
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
    cure = "make a parameter of like components `ordered`" if len(found.mirror.entries) == 2 else "constrain its sign"
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
    for mirror in mirrors(target.parameters.shapes, target.parameters.real):
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


def mirrors(shapes: Mapping[str, Shape], real: Sequence[str]) -> Iterator[Mirror]:
    """What is tried of parameters of these shapes.

    Neighbouring entries of an axis are exchanged, for these make up all permutations: in all parameters that have an
    axis of that length, in their first axes, in their last, and in one parameter. Signs are turned of real parameters,
    one, two or all, and of entries along their axes.

    Args:
        shapes: by the parameters' names.
        real: those that are real numbers.

    Example:
        >>> for mirror in mirrors({"mu": (2,), "tau": (2,)}, ["mu"]):
        ...     print(mirror)
        mu[0] and mu[1], tau[0] and tau[1] exchanged
        mu[0] and mu[1] exchanged
        tau[0] and tau[1] exchanged
        the sign of mu[0] turned
        the sign of mu[1] turned
        the sign of mu turned
    """
    for size, axes in _axes(shapes):
        yield from (Mirror(axes, (entry, entry + 1)) for entry in range(size - 1))
    for size, axes in _axes({name: shapes[name] for name in real}):
        yield from (Mirror(axes, (entry,)) for entry in range(size))
    for count in sorted({1, 2 if len(real) <= MANY else 1, len(real)}):
        for names in itertools.combinations(real, count) if real else ():
            yield Mirror(tuple((name, 0) for name in names), ())


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
    return parameters.free(turned if isinstance(values, dict) else turned["theta"])


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
