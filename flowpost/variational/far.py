"""What q misses far out, where none of its draws goes: tails of p, and densities without an end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.variational.bound import Fitted
from flowpost.variational.target import Target
from flowpost.variational.weighing import CHUNK, Weighed, estimate

WIDER = 10.0
"""How many times as far out draws look for what q misses."""
LINES, LOOKED = 256, 10_000
"""Coordinates along which they look, at most, and how many draws do so along all of them together, about."""
FEWEST, MOST = 100, 1000
"""Draws along one."""
MISSED = 3.0
"""Nats of log p/q above its mean's, where q has next to nothing."""
SURE = 4.0
"""Standard errors."""
GAP = 0.5
"""Nats between two estimates of the log evidence: more of it is a fit that misses something."""


class Far(NamedTuple):
    """What draws far out say of q."""

    rise: float
    """Nats by which they raise the log evidence, at least."""
    sd: float
    """The share of the sd along them that q lacks, at least."""
    where: str
    """The parameters of one of them."""


class _Line(NamedTuple):
    """A way on which draws are moved out."""

    read: Tensor
    """``(dim,)``: how far out a draw is, is ``read'(z - m)``."""
    way: Tensor
    """``(dim,)``: where it is moved, by so much; ``read'way`` is 1."""
    spread: Tensor
    """Variance of how far out q's draws are."""


class _Drawn(NamedTuple):
    """Draws of q that are moved out."""

    z: Tensor
    off: Tensor
    """Less their mean, float64."""
    log_q: Tensor
    """``(S,)``, float64."""
    share: Tensor


@torch.no_grad()
def where_far(fitted: Fitted, target: Target, weighed: Weighed) -> Far:
    """What q misses far out on one of several lines, four standard errors off.

    The draws are q's, ten times as far from its mean m, ``z' = z + 9 way read'(z - m)``, of the density ``q(z) / 10``.
    The mean of their weights is the evidence too, so that it rises only if q misses mass. It rises for every q where p
    has no finite integral, as after an improper prior that the data do not cure.

    Of a heavy tail it rises little. But q has the sd of p without what is where it has next to nothing, and that part
    of p's second moment is the mean of ``w (read'(z' - m))^2`` over the draws there.
    """
    off = weighed.z.double() - weighed.share @ weighed.z.double()
    lines, usual = _lines(off, weighed.share), estimate(weighed).log_p
    # Evenly: the draws of a mixture's components come one after the other.
    step = max(1, len(off) // min(max(FEWEST, LOOKED // len(lines)), MOST))
    z, ratio, share = (column[::step] for column in weighed)
    drawn = _Drawn(z, off[::step], target(z).double() - ratio, share / share.sum())
    found, together = [], max(1, CHUNK // len(z))
    for first in range(0, len(lines), together):
        try:
            found += _found(fitted, target, drawn, lines[first : first + together], usual)
        except Exception:  # noqa: BLE001, PERF203 - whatever a log joint may raise so far out, the fit is done
            continue
    rise, sd, place = max(found, key=lambda each: (each[0] > GAP, each[1], each[0]), default=(0.0, 0.0, None))
    return Far(rise, sd, "" if place is None else target.describe(place))


def _lines(off: Tensor, share: Tensor) -> list[_Line]:
    """That on which the standardized draws are widest, and each coordinate's own, with what goes along with it.

    None depends on the parameters' units. Of very many coordinates those whose draws have the heaviest tails are taken.
    """
    covariance = off.mT @ (share.unsqueeze(-1) * off)
    variances = covariance.diagonal()
    sds = variances.sqrt()
    correlation = covariance / sds / sds.unsqueeze(-1)
    # What comes by chance would lead a draw far out away from where many other coordinates have to be.
    sure = torch.where(correlation.abs() > SURE / math.sqrt(len(off)), correlation, 0.0)
    units, ways = torch.eye(len(sds), dtype=off.dtype, device=off.device), sure / sds.unsqueeze(-1) * sds
    heaviest = ((share @ off.pow(4)) / variances.square()).topk(min(LINES, len(sds))).indices.tolist()
    own = [_Line(units[j], ways[j], variances[j]) for j in heaviest]
    if len(sds) == 1 or not bool(correlation.isfinite().all()):
        return own
    spreads, directions = torch.linalg.eigh(correlation)
    return [_Line(directions[:, -1] / sds, directions[:, -1] * sds, spreads[-1]), *own]


def _found(
    fitted: Fitted, target: Target, drawn: _Drawn, lines: Sequence[_Line], usual: Tensor
) -> Iterator[tuple[float, float, Tensor]]:
    """The rise and the sd of each line, as in `Far`, and the draw that says so, given the log evidence of q's own."""
    read, way, spread = map(torch.stack, zip(*lines, strict=True))
    along = WIDER * read @ drawn.off.mT
    far = drawn.z + ((1 - 1 / WIDER) * along.unsqueeze(-1) * way.unsqueeze(-2)).to(drawn.z)
    log_p, log_q = (of(far.flatten(0, 1)).view(along.shape) for of in (target, fitted.log_prob))
    missed = (log_p - log_q).double()
    log_w = log_p.double() - drawn.log_q + math.log(WIDER)
    log_w = log_w.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    beyond = (missed > usual + MISSED) | missed.isnan()
    part = torch.where(beyond, (log_w - usual).exp() * along.square() / spread.unsqueeze(-1), 0.0)
    lacking = _surely(part, drawn.share)
    sds = torch.where(lacking.isfinite(), 1 - (1 + lacking).rsqrt(), 0.0)
    most = log_w.amax(-1)
    rises = most + _surely((log_w - most.unsqueeze(-1)).exp(), drawn.share).log() - usual
    places = torch.where(sds > 0, part.argmax(-1), log_w.argmax(-1)).tolist()
    for z, rise, sd, place in zip(far, rises.tolist(), sds.tolist(), places, strict=True):
        yield rise, sd, z[place]


def _surely(values: Tensor, share: Tensor) -> Tensor:
    """The means of rows of values that are not negative, at least: less so many standard errors."""
    mean = values @ share
    return (mean - SURE * (share * (values - mean.unsqueeze(-1))).square().sum(-1).sqrt()).clamp_min(0)
