"""Targets that are known, `python -m benchmarks targets`: how close each posterior comes to a density, exactly.

The four energies of Rezende & Mohamed (2015), each recipe without an encoder at K = 2, 8 and 32 steps, flows of public
libraries beside them, and the exact KL: the energies' normalizers are known. Other sizes have the densities of `known`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.canvas import title
from benchmarks.config import ALL, ConfigError, posterior_names
from benchmarks.files import Content, written
from benchmarks.filling import TABLES, origin, pictured
from benchmarks.run import INTERRUPTED, Out, Page, Run, terminal
from benchmarks.targets.contestants import PEERS, has_steps, installed
from benchmarks.targets.fitting import Fit, Plan, fit
from benchmarks.targets.known import energies
from benchmarks.targets.pictures import DRAWN, Densities, drawn, fitted, one_recipe, overview
from benchmarks.targets.table import is_impossible, notes, tables
from benchmarks.workers import cpu_threads, side_by_side
from flowpost.recipes import RECIPES

FULL, FULL_STEPS = Plan(), (2, 8, 32)
QUICK, QUICK_STEPS = Plan(iterations=200, starts=2, batch=64, pace=1.5, samples=20_000, cells=60), (2, 8)
DPI = 110
FILE = "targets.json"
NONE = "none"
MORE = "more variables"  # where on the page targets of other sizes go

Task = tuple[str, int | None, int, int]
"""A posterior, K, the size and the seed."""
Result = tuple[list[Fit], Densities]


def targets(
    *,
    posterior: Annotated[
        list[str] | None,
        typer.Option(help="Posterior to fit; repeat it, or list several with commas.  [default: all]"),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Public flows beside them, with commas; all, none.  [default: all installed; quick: none]"),
    ] = None,
    dim: Annotated[
        str, typer.Option(help="Sizes of z, with commas: 2 has the paper's targets, more have others.")
    ] = "2",
    steps: Annotated[
        str | None, typer.Option(help="K of the flows, with commas.  [default: 2,8,32; quick: 2,8]")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Adam's steps of each fit.  [default: 3000; quick: 200]")
    ] = None,
    starts: Annotated[
        int | None, typer.Option(min=1, help="Fits of each, the best one kept.  [default: 3; quick: 2]")
    ] = None,
    seed: Annotated[
        str, typer.Option(help="Of weights and noise; of several, with commas, the table has the means.")
    ] = "0",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that fit side by side.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look within two minutes: short fits, no K = 32.")
    ] = False,
    out: Out = None,
    page: Page = None,
) -> None:
    """Fit every posterior to densities that are known, and print the exact KL(q || p).

    No encoder, no data: the four energies of Rezende & Mohamed (2015) at --dim 2; at other sizes a funnel, a Student, a
    banana and an ill-conditioned Gaussian. A picture for each recipe has its density beside the target for every K, as
    figure 3 of the paper; targets.png has all of them. targets.json in the --out folder has every figure and is written
    after every fit; the same command with the same --out goes on where it was stopped. targets.md has the tables.
    """
    seeds = _integers("seed", seed, 0)
    plan = replace(QUICK if quick else FULL, seed=seeds[0])
    given = {"iterations": iterations, "starts": starts}
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    ks = _integers("steps", steps, 1) if steps is not None else QUICK_STEPS if quick else FULL_STEPS
    names = *posterior_names(posterior or ["all"]), *_peers(peers or (NONE if quick else ALL))
    sizes = _integers("dim", dim, 2)
    run, done = _begin(out, page, plan, threads, TABLES if DRAWN in sizes else MORE)
    sized = [(name, k, size) for size in sizes for name in names for k in (ks if has_steps(name) else (None,))]
    tasks = [(*each, one) for each in sized for one in seeds]
    with cpu_threads(threads):
        code = hold(run, tasks, plan, jobs, done)
        if code != INTERRUPTED:
            run.publish(FILE, shown, "targets.png")
    raise typer.Exit(code)


def _begin(out: Path | None, page: Path | None, plan: Plan, threads: int, mark: str) -> tuple[Run, dict[Task, Result]]:
    """A new run, or the one of a folder that has a file of it, with what that one had finished."""
    run = Run.begin("targets", out, threads=threads, page=page, mark=mark, goes_on=True)
    content = run.resume()
    if content is None:
        return run, {}
    if content["plan"] | {"seed": plan.seed} != asdict(plan):
        raise ConfigError(f"out: expected the folder's own plan, {content['plan']}, got {asdict(plan)}")
    found: dict[Task, list[Fit]] = {}
    for one in map(Fit.from_json, content["fits"]):
        found.setdefault((one.posterior, one.steps, one.dim, one.seed), []).append(one)
    return run, {task: (fits, _kept(run, task)) for task, fits in found.items()}


def _integers(name: str, text: str, minimum: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= minimum for part in parts):
        raise ConfigError(f"{name}: expected integers of at least {minimum} with commas between them, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def _peers(text: str) -> tuple[str, ...]:
    if text in (ALL, NONE):
        return installed() if text == ALL else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in installed():
            raise ConfigError(
                f"peers: expected {ALL}, {NONE}, or some of {', '.join(PEERS)} installed here, got {name!r}"
            )
    return names


def hold(run: Run, tasks: Sequence[Task], plan: Plan, jobs: int, before: Mapping[Task, Result]) -> int:
    """Make the fits that are not done, write after each, draw after every posterior.

    Returns:
        1 if a figure is missing or impossible, 130 if it was stopped.
    """
    console, done = terminal(), dict(before)
    waiting = [task for task in tasks if task not in done]
    if len(waiting) < len(tasks):
        console.print(f"{len(tasks) - len(waiting)} of {len(tasks)} fits are already done.")
    # The longest first, where they do not come in turn.
    order = waiting if jobs == 1 else sorted(waiting, key=lambda task: -(task[1] or 0) * task[2])
    try:
        for task, result in side_by_side(work, [(task, plan) for task in order], jobs):
            done[task] = result
            keep(run, task, result[1])
            console.print(_line(result[0]))
            write(run, _fits(done), plan)
            picture(run, task[0], tasks, done)
    except KeyboardInterrupt:
        console.print(f"Interrupted; to go on: the same command with --out {run.folder}", soft_wrap=True)
        return INTERRUPTED
    fits = _fits(done)
    drawable = sorted_as(_first(tasks), done)
    last = {title(name): densities for (name, *_), (_, densities) in drawable if densities}
    if last:
        overview(last).savefig(run.folder / "targets.png", dpi=DPI)
    for each in tables(fits, plan, torch.get_num_threads()):
        console.print(each)
    for note in notes(fits):
        console.print(note, soft_wrap=True)
    console.print(f"Table, figures and pictures: {run.folder}", soft_wrap=True)
    return int(any(is_impossible(one) or one.kl != one.kl for one in fits))


def keep(run: Run, task: Task, densities: Densities) -> None:
    """The densities of a fit that is drawn, for a process that goes on after this one."""
    if densities:
        with written(run.folder):
            _path(run, task).parent.mkdir(parents=True, exist_ok=True)
            np.save(_path(run, task), torch.stack(densities).numpy())


def _kept(run: Run, task: Task) -> Densities:
    path = _path(run, task)
    return [*torch.from_numpy(np.load(path, allow_pickle=False))] if path.exists() else []


def _path(run: Run, task: Task) -> Path:
    return run.folder / "densities" / f"{'-'.join(map(str, task))}.npy"


def _fits(done: Mapping[Task, Result]) -> list[Fit]:
    return in_order([one for fits, _ in done.values() for one in fits])


def sorted_as(tasks: Sequence[Task], done: Mapping[Task, Result]) -> list[tuple[Task, Result]]:
    """What is done, in the order of the tasks."""
    return [(task, done[task]) for task in tasks if task in done]


def picture(run: Run, name: str, tasks: Sequence[Task], done: Mapping[Task, Result]) -> None:
    """The densities of a posterior, once all that can be drawn of it is done."""
    own = [task for task in _first(tasks) if task[0] == name and drawn(name, task[2])]
    if own and all(task in done for task in own):
        by_steps = {"q" if task[1] is None else f"K = {task[1]}": done[task][1] for task in own}
        one_recipe(name, by_steps).savefig(run.folder / f"{name}.png", dpi=DPI)


def _first(tasks: Sequence[Task]) -> list[Task]:
    """Those of the first seed, which are drawn."""
    return [task for task in tasks if task[3] == tasks[0][3]]


def work(task: Task, plan: Plan) -> tuple[Task, Result]:
    """The figures of one posterior, K, size and seed, and the densities where they are drawn."""
    name, steps, dim, seed = task
    posteriors, figures = fit(name, steps, replace(plan, seed=seed), energies(dim))
    return task, (figures, fitted(posteriors, plan.cells) if drawn(name, dim) else [])


def _line(figures: Sequence[Fit]) -> str:
    first = figures[0]
    found = ", ".join(f"{one.energy} {one.kl:.3f}" for one in figures)
    return f"{first.what}, dim {first.dim}, seed {first.seed}: KL {found}, {first.seconds:.0f} s"


def write(run: Run, fits: Sequence[Fit], plan: Plan) -> None:
    """`targets.json` and `targets.md`."""
    content = run.head() | {"plan": asdict(plan), "fits": [one.as_json() for one in fits]}
    run.write(FILE, content)
    run.write("targets.md", shown(content))


def shown(content: Content, page: str = "") -> str:
    """The text of the page, or of a file that has no picture beside it; of several runs of one plan, too."""
    runs = content["runs"] if "runs" in content else [content]
    fits = in_order([Fit.from_json(each) for run in runs for each in run["fits"]])
    found = tables(fits, Plan(**runs[0]["plan"]), runs[0]["environment"]["threads"])
    caption = "The target and every posterior's density, a row for each energy"
    picture = pictured(page, caption) if page and any(one.dim == DRAWN for one in fits) else ""
    origins = [f"{_rows(run)}{origin(run)}" if len(runs) > 1 else origin(run) for run in runs]
    return "\n\n".join(filter(None, [picture, *(each.markdown() for each in found), *origins]))


def in_order(fits: Sequence[Fit]) -> list[Fit]:
    """Sizes, then recipes, then libraries, each from few steps to many, and the seeds."""
    names = [*RECIPES, *PEERS]
    return sorted(fits, key=lambda one: (one.dim, names.index(one.posterior), one.steps or 0, one.seed))


def _rows(run: Content) -> str:
    """Which rows of a table of several runs are a run's, and of which seeds."""
    steps: dict[str, list[str]] = {}
    fits = [Fit.from_json(each) for each in run["fits"]]
    seeds = sorted({one.seed for one in fits})
    for one in fits:
        found = steps.setdefault(one.posterior, [])
        found += [str(one.steps)] if one.steps is not None and str(one.steps) not in found else []
    rows = [f"{name} (K = {' and '.join(found)})" if found else name for name, found in steps.items()]
    return f"{', '.join(rows)}, seed {', '.join(map(str, seeds))}: "
