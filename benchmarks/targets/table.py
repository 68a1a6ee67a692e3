"""The table of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from benchmarks.table import Table, grouped
from benchmarks.targets.fitting import Fit, Plan

FLOOR = -5.0  # standard errors: no KL is smaller, unless log q is not that of the samples


def tables(fits: Sequence[Fit], plan: Plan, threads: int) -> list[Table]:
    """One for each size; the first one's caption and the last one's notes are for all."""
    found = [_table(group, dim) for dim, group in grouped(fits, lambda fit: fit.dim).items()]
    found[0] = replace(found[0], caption=caption(plan, sorted({fit.seed for fit in fits}), threads))
    found[-1] = replace(found[-1], notes=notes(fits))
    return found


def _table(fits: Sequence[Fit], dim: int) -> Table:
    """A row for each posterior and number of steps."""
    rows = []
    several = len({fit.seed for fit in fits}) > 1
    for (name, steps), group in grouped(fits, lambda fit: (fit.posterior, fit.steps)).items():
        by_energy = grouped(group, lambda fit: fit.energy)
        k, rate = "" if steps is None else str(steps), f"{group[0].rate:g}"
        seconds = sum({fit.seed: fit.seconds for fit in group}.values())
        found = [rate, f"{group[0].parameters:,}", f"{seconds:.0f}"]
        seeds = [str(len({fit.seed for fit in group}))] if several else []
        rows.append([name, k, *map(_cell, by_energy.values()), *seeds, *found])
    energies = list(grouped(fits, lambda fit: fit.energy))
    header = ["posterior", "K", *energies, *(["seeds"] if several else []), "rate", "params", "s"]
    return Table(header, rows, title="" if dim == 2 else f"{dim} variables")  # noqa: PLR2004


def _cell(fits: Sequence[Fit]) -> str:
    """Of one energy, a fit for each seed."""
    found = [fit.kl for fit in fits]
    if not all(map(math.isfinite, found)):
        return "failed"
    if len(found) == 1:
        return f"{found[0]:.3f} ({fits[0].standard_error:.3f})"
    return f"{fmean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def caption(plan: Plan, seeds: Sequence[int], threads: int) -> str:
    """What the table's numbers are."""
    spread = "standard error; of several seeds the mean, smallest and largest" if len(seeds) > 1 else "standard error"
    of = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    return (
        f"KL(q || p) = E_q[log q + U] + log Z in nats ({spread}), from {plan.samples:,} fresh samples, with the "
        f"exact log Z; the best of {plan.starts} starts, {plan.iterations:,} steps of Adam of {plan.batch} samples "
        f"each, {of}. rate: Adam's at the start; params: numbers learned; s: of training all energies, "
        f"starts and seeds, CPU threads: {threads}"
    )


def notes(fits: Sequence[Fit]) -> list[str]:
    """A line for each fit that cannot be trusted, or that skipped steps."""
    lines, several = [], len({fit.seed for fit in fits}) > 1
    for fit in fits:
        what = f"{fit.what}, {fit.energy}{'' if fit.dim == 2 else f' of {fit.dim} variables'}"  # noqa: PLR2004
        what += f", seed {fit.seed}" if several else ""
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
