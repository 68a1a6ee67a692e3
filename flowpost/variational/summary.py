"""A fitted posterior in numbers, a row for each parameter."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowpost.variational.parameters import Parameters
from flowpost.variational.weighing import Weighed

LEVELS = (0.05, 0.5, 0.95)
ROUNDED = 1e12
"""A number so many sds from 0 is a constant, and its sd rounding."""
OFF, SURE = 0.1, 2.0
"""By how much of its sd a mean or a sd may be off, and how many standard errors more are chance."""


class Summary(NamedTuple):
    """Of every column of the parameters; it prints as a table."""

    names: tuple[str, ...]
    mean: Tensor
    """``(columns,)``"""
    sd: Tensor
    """``(columns,)``"""
    quantiles: Tensor
    """At 5, 50 and 95 %, ``(3, columns)``."""
    error: Tensor
    """The Monte Carlo standard error of the mean, ``(columns,)``: of q's draws, and not of q."""
    weighted: bool
    """Whether the draws were weighted by p/q."""

    def __str__(self) -> str:
        columns = torch.stack([self.mean, self.sd, *self.quantiles, self.error], -1).tolist()
        head = ("", "mean", "sd", "5%", "50%", "95%", "mc error")
        rows = [
            (name, *(_shown(value, row[1]) for value in row)) for name, row in zip(self.names, columns, strict=True)
        ]
        widths = [max(9, *map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            f"{row[0]:<{widths[0]}} "
            + " ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in (head, *rows)
        ]
        return "\n".join([*lines, "weighted by p/q" if self.weighted else "draws of q, not weighted"])


def _shown(value: float, sd: float) -> str:
    """To four digits, and to more where a sd is smaller than the fourth: a hundredth of it is seen."""
    ratio = abs(value) / sd if sd > 0 else 0.0
    digits = math.ceil(math.log10(ratio)) + 2 if 100 < ratio < ROUNDED else 4
    return f"{value:.{max(4, digits)}g}"


@torch.no_grad()
def summary(parameters: Parameters, draws: Weighed, *, weighted: bool) -> Summary:
    """Moments and quantiles of draws, in float64; `weighted` by p/q or as q has them."""
    columns, weight, mean, sd = _moments(parameters, draws, weighted=weighted)
    order = columns.argsort(0)
    ordered = weight.expand_as(columns).gather(0, order)
    reached = ordered.cpu().cumsum(0).to(ordered.device)  # a GPU has no deterministic one
    places = [(reached < level).sum(0, keepdim=True).clamp_max(len(columns) - 1) for level in LEVELS]
    quantiles = torch.cat([columns.gather(0, order.gather(0, place)) for place in places])
    error = (weight * (columns - mean)).square().sum(0).sqrt()
    return Summary(parameters.names, mean, sd, quantiles, error, weighted)


@torch.no_grad()
def misses(parameters: Parameters, draws: Weighed) -> list[str]:
    """Where q's own draws have another mean or sd than the weighted ones, a phrase for the worst of each.

    Both are of the same draws, so that much of their chance is in both: the errors are those of the differences.
    """
    columns, weight, mean, sd = _moments(parameters, draws, weighted=True)
    plain = draws.share.unsqueeze(-1)
    z = (columns - mean) / torch.where(sd * ROUNDED > mean.abs(), sd, math.inf)  # 0 where it is a constant
    shift = (plain * z).sum(0)
    spread = (plain * (z - shift).square()).sum(0).sqrt()
    of_shift = (plain * (z - shift) - weight * z).square().sum(0).sqrt()
    of_square = (plain * ((z - shift).square() - spread.square()) - weight * (z.square() - 1)).square().sum(0).sqrt()
    said = []
    for found, error, words in (
        (shift, of_shift, "a mean of {} that is off by {:+.2f} of its sd"),
        (torch.where(spread > 0, spread - 1, 0.0), of_square / (1 + spread), "a sd of {} that is off by {:+.0%}"),
    ):
        beyond = (found.abs() - SURE * error).nan_to_num(0.0, 0.0, 0.0)
        worst = int(beyond.argmax())
        if beyond[worst] > OFF:
            said.append(words.format(parameters.names[worst], found[worst].item()))
    return said


def _moments(parameters: Parameters, draws: Weighed, *, weighted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All numbers of the draws, ``(S, columns)``, what each draw weighs, ``(S, 1)``, and the columns' mean and sd."""
    columns = parameters.flat(parameters.constrain(draws.z)[0]).double()
    weight = (draws.share.log() + (draws.log_ratio if weighted else 0.0)).softmax(0).unsqueeze(-1)
    mean = (weight * columns).sum(0)
    return columns, weight, mean, (weight * (columns - mean).square()).sum(0).sqrt()
