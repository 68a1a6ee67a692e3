"""Modes that are mirror images of those that q holds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.variational.bound import Fitted
from flowpost.variational.draws import named
from flowpost.variational.families import assemble, components
from flowpost.variational.gaussian import Gaussian, factorized
from flowpost.variational.mirrors import Mirror, mirrors
from flowpost.variational.parameters import Parameters
from flowpost.variational.starts import Start, barrier
from flowpost.variational.target import Target
from flowpost.variational.weighing import Weighed, weigh

TRIED, LOOKED, COUNTED = 10, 100, 1000
"""Draws on which every mirror is tried, on which those that leave p as it is are looked through, and on which the share
that q misses is counted, where it misses any."""
EVEN = 1.0
"""Nats by which log p may differ at an image: a mode of that much more or less mass is one too."""
SLOPE, SPREAD = 2.0, 3.0
"""Nats by which log q must be lower at an image, and standard deviations of log p/q: less is a rough q's own error."""
SHARE = 0.05
"""Of q's draws, whose images q all but misses, for a word."""


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
        found = find_mirrored(fitted, target, weigh(fitted, target, COUNTED, generator))
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

    Costs `TRIED` values of the log joint for each mirror, and twice `LOOKED` for each that leaves p as it is.

    Args:
        fitted: q.
        target: p.
        weighed: draws of q.
    """
    few, some, more = (_evenly(weighed, count) for count in (TRIED, LOOKED, COUNTED))
    spread = more.log_ratio.std().item()
    if not math.isfinite(spread):
        return None
    found, density, least = [], _density(target, few.z), max(SLOPE, SPREAD * spread) + EVEN
    for mirror in mirrors(target.parameters):
        if _images(target, mirror, few.z, density)[2].double().mean() <= 0.5:
            continue
        if not _missed(fitted, target, mirror, some, least)[2].any():
            continue
        image, log_p, lost = _missed(fitted, target, mirror, more, least)
        best = int(torch.where(lost, log_p, -math.inf).argmax())
        if lost[best] and _apart(target, image[best], more.z[best]):
            found.append(Mirrored(mirror, (more.share * lost).sum().item(), image[best]))
    worst = max(found, key=lambda each: each.share, default=None)
    return worst if worst and worst.share > SHARE else None


def _missed(
    fitted: Fitted, target: Target, mirror: Mirror, drawn: Weighed, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The images of draws, their log p, and which q has by so many nats less than p has them."""
    image, log_p, even = _images(target, mirror, drawn.z, _density(target, drawn.z))
    ratio = (log_p - fitted.log_prob(image)).double().nan_to_num(nan=math.inf, posinf=math.inf)
    return image, log_p, even & (ratio - drawn.log_ratio > least)


def _apart(target: Target, one: Tensor, other: Tensor) -> bool:
    """Whether log p falls between two points."""
    try:
        return barrier(lambda points: (target(points), points), one, other)
    except Exception:  # noqa: BLE001 - whatever a log joint may raise on the way
        return False


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


def _density(target: Target, z: Tensor) -> Tensor:
    """The log p of coordinates over the parameters, whose volume no mirror changes."""
    return target(z) - target.parameters.constrain(z)[1]


def _images(target: Target, mirror: Mirror, z: Tensor, density: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The images of draws, their log p in free coordinates, and which have about the density of their draw."""
    try:
        image = _turned(target.parameters, mirror, z)
        log_p, after = target(image), target.parameters.constrain(image)[1]
    except Exception:  # noqa: BLE001 - it is outside the support, or the log joint has a fault there
        return z, density, torch.zeros_like(density, dtype=torch.bool)
    return image, log_p, ((log_p - after) - density).abs() <= EVEN
