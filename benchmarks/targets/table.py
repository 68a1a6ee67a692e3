"""The table of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.table import Table, grouped
from benchmarks.targets.energies import ENERGIES
from benchmarks.targets.fitting import Fit, Plan

FLOOR = -5.0  # standard errors: no KL is smaller, unless log q is not that of the samples


def tables(fits: Sequence[Fit], plan: Plan, threads: int) -> list[Table]:
    """One for each size; the first one's caption and the last one's notes are for all."""
    found = [_table(group, dim) for dim, group in grouped(fits, lambda fit: fit.dim).items()]
    found[0] = replace(found[0], caption=caption(plan, threads))
    found[-1] = replace(found[-1], notes=notes(fits))
    return found


def _table(fits: Sequence[Fit], dim: int) -> Table:
    """A row for each posterior and number of steps."""
    rows = []
    for (name, steps), group in grouped(fits, lambda fit: (fit.posterior, fit.steps)).items():
        k = "" if steps is None else str(steps)
        rate = f"{group[0].rate:g}"
        rows.append([name, k, *map(_cell, group), rate, f"{group[0].parameters:,}", f"{group[0].seconds:.0f}"])
    header = ["posterior", "K", *(fit.energy for fit in fits[: len(ENERGIES)]), "rate", "params", "s"]
    return Table(header, rows, title="" if dim == 2 else f"{dim} variables")  # noqa: PLR2004


def _cell(fit: Fit) -> str:
    return f"{fit.kl:.3f} ({fit.standard_error:.3f})" if math.isfinite(fit.kl) else "failed"


def caption(plan: Plan, threads: int) -> str:
    """What the table's numbers are."""
    return (
        f"KL(q || p) = E_q[log q + U] + log Z in nats (standard error), from {plan.samples:,} fresh samples, with the "
        f"exact log Z; the best of {plan.starts} starts, {plan.iterations:,} steps of Adam of {plan.batch} samples "
        f"each, seed {plan.seed}. rate: Adam's at the start; params: numbers learned; s: of training all energies and "
        f"starts, CPU threads: {threads}"
    )


def notes(fits: Sequence[Fit]) -> list[str]:
    """A line for each fit that cannot be trusted, or that skipped steps."""
    lines = []
    for fit in fits:
        what = f"{fit.what}, {fit.energy}{'' if fit.dim == 2 else f' of {fit.dim} variables'}"  # noqa: PLR2004
        if is_impossible(fit):
            lines.append(f"{what}: KL {fit.kl:.4f} is negative by more than 5 standard errors: log q is wrong")
        if not math.isfinite(fit.kl):
            lines.append(f"{what}: no start gave finite samples and gradients")
        if fit.skipped_steps:
            lines.append(f"{what}: {fit.skipped_steps} steps skipped, not finite")
    return lines


def is_impossible(fit: Fit) -> bool:
    """Whether the KL is so far below 0 that the density cannot be that of the samples."""
    return fit.kl < FLOOR * fit.standard_error
