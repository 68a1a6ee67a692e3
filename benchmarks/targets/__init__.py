"""Two-dimensional targets, `python -m benchmarks targets`: how close each posterior comes to a density that is known.

The four energies of Rezende & Mohamed (2015), each recipe without an encoder at K = 2, 8 and 32 steps, and the exact
KL: the energies' normalizers are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Annotated

import torch
import typer

from benchmarks.canvas import title
from benchmarks.config import ConfigError, posterior_names
from benchmarks.run import Out, Page, Run, cpu_threads, terminal
from benchmarks.targets.fitting import Fit, Plan, fit, has_steps
from benchmarks.targets.pictures import Densities, fitted, one_recipe, overview
from benchmarks.targets.table import is_impossible, notes, table

FULL, FULL_STEPS = Plan(), (2, 8, 32)
QUICK, QUICK_STEPS = Plan(iterations=200, starts=2, batch=64, lr=3e-2, samples=20_000, cells=60), (2, 8)
DPI = 110

Task = tuple[str, int | None]
"""A recipe and K."""
Result = tuple[list[Fit], Densities]


def targets(
    *,
    posterior: Annotated[
        list[str] | None,
        typer.Option(help="Posterior to fit; repeat it, or list several with commas.  [default: all]"),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="K of the flows, with commas.  [default: 2,8,32; quick: 2,8]")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Adam's steps of each fit.  [default: 1000; quick: 200]")
    ] = None,
    starts: Annotated[
        int | None, typer.Option(min=1, help="Fits of each, the best one kept.  [default: 3; quick: 2]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that fit side by side.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look within two minutes: short fits, no K = 32.")
    ] = False,
    out: Out = None,
    page: Page = None,
) -> None:
    """Fit every posterior to the four energies of Rezende & Mohamed (2015), and print the exact KL(q || p).

    No encoder, no data: two variables and a density that is known. A picture for each posterior has its density beside
    the target for every K, as figure 3 of the paper; targets.png has all of them. targets.json has every figure,
    targets.md the table.
    """
    plan = replace(QUICK if quick else FULL, seed=seed)
    given = {"iterations": iterations, "starts": starts}
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    ks = _ks(steps) if steps is not None else QUICK_STEPS if quick else FULL_STEPS
    names = posterior_names(posterior or ["all"])
    run = Run.begin("targets", out, threads=threads, page=page)
    tasks = [(name, k) for name in names for k in (ks if has_steps(name) else (None,))]
    with cpu_threads(threads):
        code = hold(run, tasks, plan, jobs)
        publish(run)
    raise typer.Exit(code)


def _ks(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"steps: expected integers of at least 1 with commas between them, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def hold(run: Run, tasks: Sequence[Task], plan: Plan, jobs: int) -> int:
    """Fit, write after every fit and draw after every posterior; 1 if a figure is missing or impossible."""
    console = terminal()
    done: dict[Task, Result] = {}
    fits: list[Fit] = []
    for task, result in results(tasks, plan, jobs):
        done[task] = result
        fits = [one for each in tasks if each in done for one in done[each][0]]
        console.print(_line(result[0]))
        write(run, fits, plan)
        own = {each: done[each][1] for each in tasks if each[0] == task[0] and each in done}
        if len(own) == sum(each[0] == task[0] for each in tasks):
            by_steps = {"q" if k is None else f"K = {k}": densities for (_, k), densities in own.items()}
            one_recipe(task[0], by_steps).savefig(run.folder / f"{task[0]}.png", dpi=DPI)
    last = {title(task[0]): done[task][1] for task in tasks}
    overview(last).savefig(run.folder / "targets.png", dpi=DPI)
    console.print(table(fits, plan, torch.get_num_threads()))
    for note in notes(fits):
        console.print(note, soft_wrap=True)
    console.print(f"Table, figures and pictures: {run.folder}", soft_wrap=True)
    return int(any(is_impossible(one) or one.kl != one.kl for one in fits))


def results(tasks: Sequence[Task], plan: Plan, jobs: int) -> Iterator[tuple[Task, Result]]:
    """Every task with its result, as they come: from this process, or from others, which begin with the longest."""
    if jobs == 1:
        yield from ((task, work(*task, plan)) for task in tasks)
        return
    start = torch.set_num_threads, (torch.get_num_threads(),)
    with ProcessPoolExecutor(jobs, get_context("spawn"), *start) as pool:
        longest_first = sorted(tasks, key=lambda task: -(task[1] or 0))
        waiting = {pool.submit(work, *task, plan): task for task in longest_first}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def work(name: str, steps: int | None, plan: Plan) -> Result:
    """The figures and densities of one recipe and K."""
    posteriors, figures = fit(name, steps, plan)
    return figures, fitted(posteriors, plan.cells)


def _line(figures: Sequence[Fit]) -> str:
    first = figures[0]
    what = first.posterior if first.steps is None else f"{first.posterior}, K = {first.steps}"
    return f"{what}: KL {', '.join(f'{one.energy} {one.kl:.3f}' for one in figures)}, {first.seconds:.0f} s"


def write(run: Run, fits: Sequence[Fit], plan: Plan) -> None:
    """`targets.json` and `targets.md`."""
    run.write("targets.json", {"plan": asdict(plan), "fits": [one.as_json() for one in fits]})
    run.write("targets.md", f"{table(fits, plan, torch.get_num_threads()).markdown()}\n\n{run.origin()}")


def publish(run: Run) -> None:
    """Put the picture and the table on the page."""
    picture = run.picture("targets.png", "The target and every posterior's density, a row for each energy")
    run.publish(f"{picture}\n\n{(run.folder / 'targets.md').read_text(encoding='utf-8')}")
