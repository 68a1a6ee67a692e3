"""Encoders of other people's, `python -m benchmarks encoders`: the line that wraps each, and what it pays.

Needs the extra `encoders`; an encoder whose library is not installed is left out, and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from benchmarks.data import load
from benchmarks.encoders.collection import CASES
from benchmarks.encoders.fitting import CONTESTS, Contest, Fit, Plan, fit
from benchmarks.encoders.starts import Start, starts
from benchmarks.encoders.table import Trained, elbos, lines
from benchmarks.files import Content
from benchmarks.filling import origin
from benchmarks.run import Out, Page, Run, terminal
from benchmarks.workers import cpu_threads, side_by_side

QUICK: dict[str, Any] = {"before": 20, "after": 20, "images": 100, "samples": 4}


def encoders(
    *,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that train side by side.")] = 1,
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
    for name in {contest.data for contest in contests}:
        load(name)  # so that a missing file is told before anything is trained
    with cpu_threads(threads):
        found = starts()
        console.print(lines(found))
        fits = hold(run, found, contests, range(1 if quick else seeds), jobs)
        console.print(elbos(fits, {each.name: Trained(each.data, each.plan) for each in contests}))
    console.print(f"Tables and figures: {run.folder}", soft_wrap=True)


def _libraries() -> set[str]:
    return {case.library for case in CASES} - {"torch"}


def hold(run: Run, found: Sequence[Start], contests: Sequence[Contest], seeds: Sequence[int], jobs: int) -> list[Fit]:
    """Train every model with every seed; write after each."""
    tasks = [(contest, seed) for seed in seeds for contest in contests]
    done: dict[tuple[str, int], Fit] = {}
    for one in side_by_side(work, tasks, jobs):
        done[one.model, one.seed] = one
        terminal().print(_line(one), soft_wrap=True)
        fits = [done[contest.name, seed] for contest, seed in tasks if (contest.name, seed) in done]
        write(run, found, fits, contests)
    run.publish("encoders.json", shown)
    return [*done.values()]


def work(contest: Contest, seed: int) -> Fit:
    """The figures of one model and seed."""
    return fit(contest, load(contest.data), seed)


def _line(one: Fit) -> str:
    figures = f"{one.before:.2f} before, then {one.gaussian:.2f} with the Gaussian and {one.flow:.2f} with the flow"
    return f"{one.model}, seed {one.seed}: ELBO {figures}"


def write(run: Run, found: Sequence[Start], fits: Sequence[Fit], contests: Sequence[Contest]) -> None:
    """`encoders.json` and `encoders.md`."""
    plans = {contest.name: {"data": contest.data, "plan": asdict(contest.plan)} for contest in contests}
    figures = {"plans": plans, "starts": [asdict(each) for each in found], "fits": [asdict(each) for each in fits]}
    content = run.head() | figures
    run.write("encoders.json", content)
    run.write("encoders.md", shown(content))


def shown(content: Content, page: str = "") -> str:
    """The page's text."""
    trained = {name: Trained(one["data"], Plan(**one["plan"])) for name, one in content["plans"].items()}
    fits, found = [Fit(**each) for each in content["fits"]], [Start(**each) for each in content["starts"]]
    return f"{elbos(fits, trained).markdown()}\n\n{lines(found).markdown()}\n\n{origin(content)}"
