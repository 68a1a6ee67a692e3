"""Encoders of other people's, `python -m benchmarks encoders`: the line that wraps each, and what it pays.

Needs the extra `encoders`; an encoder whose library is not installed is left out, and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from benchmarks.data import Data, load
from benchmarks.encoders.collection import CASES
from benchmarks.encoders.fitting import CONTESTS, Contest, Fit, fit
from benchmarks.encoders.starts import Start, starts
from benchmarks.encoders.table import elbos, lines
from benchmarks.run import Out, Page, Run, cpu_threads, terminal

QUICK: dict[str, Any] = {"before": 20, "after": 20, "images": 100, "samples": 4}


def encoders(
    *,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, 20 steps, and the digits alone.")] = False,
    out: Out = None,
    page: Page = None,
) -> None:
    """Wrap the encoders of public libraries, and train three of them on with their Gaussian and with a flow.

    Prints for each encoder the line that wraps it and how far from its own Gaussian it starts; for three of them the
    ELBO before and after. encoders.json has every figure, encoders.md the tables.
    """
    console = terminal()
    missing = {case.library for case in CASES if case.missing()}
    for library in sorted(missing):
        console.print(f"{library} is not installed, so its encoders are left out: the extra `encoders` has it")
    run = Run.begin("encoders", out, threads=threads, libraries=sorted(_libraries() - missing), page=page)
    contests = [contest for contest in CONTESTS if contest.library not in missing]
    if quick:
        contests = [replace(each, data="digits", plan=replace(each.plan, **QUICK)) for each in contests]
    data = {contest.data: load(contest.data) for contest in contests}
    with cpu_threads(threads):
        found = starts()
        console.print(lines(found))
        fits = hold(run, found, contests, data, 1 if quick else seeds)
        console.print(elbos(fits, contests))
    console.print(f"Tables and figures: {run.folder}", soft_wrap=True)


def _libraries() -> set[str]:
    return {case.library for case in CASES} - {"torch"}


def hold(
    run: Run, found: Sequence[Start], contests: Sequence[Contest], data: Mapping[str, Data], seeds: int
) -> list[Fit]:
    """Train every model with every seed; write after each."""
    fits: list[Fit] = []
    for seed in range(seeds):
        for contest in contests:
            fits.append(fit(contest, data[contest.data], seed))
            terminal().print(_line(fits[-1]), soft_wrap=True)
            write(run, found, fits, contests)
    run.publish((run.folder / "encoders.md").read_text(encoding="utf-8"))
    return fits


def _line(one: Fit) -> str:
    figures = f"{one.before:.2f} before, then {one.gaussian:.2f} with the Gaussian and {one.flow:.2f} with the flow"
    return f"{one.model}, seed {one.seed}: ELBO {figures}"


def write(run: Run, found: Sequence[Start], fits: Sequence[Fit], contests: Sequence[Contest]) -> None:
    """`encoders.json` and `encoders.md`."""
    plans = {contest.name: {"data": contest.data, **asdict(contest.plan)} for contest in contests}
    figures = {"plans": plans, "starts": [asdict(each) for each in found], "fits": [asdict(each) for each in fits]}
    run.write("encoders.json", figures)
    run.write("encoders.md", f"{elbos(fits, contests).markdown()}\n\n{lines(found).markdown()}\n\n{run.origin()}")
