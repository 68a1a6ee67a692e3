"""`python -m benchmarks posteriors`: flows, Gaussians and pyro's guides on posteriors whose evidence is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.config import ConfigError
from benchmarks.files import Content
from benchmarks.filling import origin, pictured
from benchmarks.peers import here, missing
from benchmarks.posteriors.collection import collection, posterior
from benchmarks.posteriors.fitting import FLOWS, GUIDES, Fit, Plan, contenders, fit
from benchmarks.posteriors.pictures import pairs, traces
from benchmarks.posteriors.table import beside_published, details, in_order, is_impossible, shortfalls, summary
from benchmarks.run import INTERRUPTED, Out, Page, Run, terminal
from benchmarks.workers import cpu_threads, side_by_side

QUICK = ("kilpisjarvi", "logmesquite_logvolume", "blr", "arK", "eight_schools_noncentered", "eight_schools_centered")
QUICK_PLAN = Plan(budget=40_000, samples=5_000)
FILE = "posteriors.json"
DPI = 110
GOALS = (
    "The goals are those of 1,000,000 gradients up to dimension 90, and of 3,000,000 above: 0.05 nats up to dimension "
    "26, 0.5 up to 90, above that what a real NVP left whose step size was searched for."
)


@dataclass(frozen=True)
class Task:
    """A fit to be made."""

    posterior: str
    contender: str
    seed: int


def posteriors(
    *,
    posterior: Annotated[
        list[str] | None,
        typer.Option(help="Posterior to fit, whole name or the model's; repeat it, or use commas.  [default: all 24]"),
    ] = None,
    flow: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What is fitted: {', '.join(FLOWS)}, and of pyro {', '.join(GUIDES)}; repeat it, or use commas.  "
            "[default: all that are installed; quick: flowpost's]"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Fits of each.  [default: 3; quick: 1]")] = None,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="Gradient evaluations of a fit.  [1000000, 3000000 above dimension 90; quick: 40000]"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that fit.  [default: 1; quick: 2]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: six small posteriors, two minutes.")] = False,
    out: Out = None,
    page: Page = None,
) -> None:
    """Fit flows and Gaussians to 24 posteriors whose evidence is known, and print the exact KL(q || p) in nats.

    Log evidence minus ELBO is the KL itself, so nothing is estimated but the ELBO. The marginals are compared with
    reference draws. posteriors.json in the --out folder has every figure and is written after every fit; the same
    command with the same --out goes on where it was stopped. posteriors.md has the tables, traces.png the KL along the
    fits, pairs-*.png draws of every q over the reference draws.
    """
    plan = QUICK_PLAN if quick else Plan()
    plan = replace(plan, budget=budget or plan.budget)
    names = (
        _posteriors(posterior) if posterior else QUICK if quick else tuple(one.short for one in collection().values())
    )
    asked = _contenders(flow) if flow else FLOWS if quick else contenders()
    tasks = [Task(*each) for each in _ordered(names, asked, range(seeds or (1 if quick else 3)))]
    libraries = ["pyro"] if any(name in GUIDES for name in asked) else []
    run, done = _begin(out, page, plan, threads, libraries)
    with cpu_threads(threads):
        raise typer.Exit(hold(run, tasks, plan, jobs or (2 if quick else 1), done))


def _ordered(names: Sequence[str], asked: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """Seeds outermost: whoever stops early can still compare all of them."""
    return ((name, what, seed) for seed in seeds for name in names for what in asked)


def _posteriors(given: Sequence[str]) -> tuple[str, ...]:
    parts = [part.strip() for each in given for part in each.split(",")]
    return tuple(dict.fromkeys(posterior(part).short for part in parts))


def _contenders(given: Sequence[str]) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip() for each in given for part in each.split(",")))
    for part in parts:
        if part not in (*FLOWS, *GUIDES):
            raise ConfigError(f"flow: expected one of {', '.join((*FLOWS, *GUIDES))}, got {part!r}")
        if part in GUIDES and not here("pyro"):
            raise ConfigError(f"flow: {part!r} is pyro's. {missing('it cannot be fitted')}")
    return parts


def _begin(
    out: Path | None, page: Path | None, plan: Plan, threads: int, libraries: Sequence[str]
) -> tuple[Run, list[Fit]]:
    """A new run, or the one of a folder that has a file of it, with what that one had finished."""
    run = Run.begin("posteriors", out, threads=threads, libraries=libraries, page=page, goes_on=True)
    content = run.resume()
    if content is None:
        return run, []
    if content["plan"] != asdict(plan):
        raise ConfigError(f"out: expected the folder's own plan, {content['plan']}, got {asdict(plan)}")
    return run, [Fit.from_json(each) for each in content["fits"]]


def hold(run: Run, tasks: Sequence[Task], plan: Plan, jobs: int, done: Sequence[Fit] = ()) -> int:
    """Make the fits that are not done, write after each, draw; 1 if one failed or is impossible, 130 if stopped."""
    console, fits = terminal(), {_task(one): one for one in done}
    waiting = [task for task in tasks if task not in fits]
    if len(waiting) < len(tasks):
        console.print(f"{len(tasks) - len(waiting)} of {len(tasks)} fits are already done.")
    code = 0
    try:
        for one, draws in side_by_side(work, [(task, plan) for task in waiting], jobs):
            fits[_task(one)] = one
            keep(run, one, draws)
            console.print(_line(one), soft_wrap=True)
            write(run, in_order(fits.values()), plan)
    except KeyboardInterrupt:
        console.print(f"Interrupted; to go on: the same command with --out {run.folder}", soft_wrap=True)
        code = INTERRUPTED
    found = in_order(fits.values())
    if found:
        finish(run, found, plan)
    return code or int(any(one.failed or is_impossible(one) for one in found))


def _task(one: Fit) -> Task:
    return Task(one.posterior, one.contender, one.seed)


def work(task: Task, plan: Plan) -> tuple[Fit, np.ndarray]:
    """The figures and the draws of one fit."""
    return fit(task.posterior, task.contender, task.seed, plan)


def _line(one: Fit) -> str:
    what = f"{one.posterior}, {one.contender}, seed {one.seed}"
    if one.failed:
        return f"{what} failed: {one.error or 'not finite'}"
    figures = f"KL {one.kl:.3f} ({one.standard_error:.3f}), k-hat {one.k_hat:.2f}, W1 {one.w1_mean:.3f}"
    return f"{what}: {figures}, {one.evaluations:,} gradients, {one.seconds:.0f} s"


def keep(run: Run, one: Fit, draws: np.ndarray) -> None:
    """The draws of the first seed, for the pictures."""
    if one.seed == 0 and len(draws):
        path = run.folder / "draws" / f"{one.posterior}-{one.contender}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, draws)


def write(run: Run, fits: Sequence[Fit], plan: Plan) -> None:
    """`posteriors.json` and `posteriors.md`."""
    content = run.head() | {"plan": asdict(plan), "fits": [one.as_json() for one in fits]}
    run.write(FILE, content)
    run.write("posteriors.md", shown(content))


def shown(content: Content, page: str = "") -> str:
    """The text of the page, or of a file that has no picture beside it: what fell short, then the tables."""
    runs = content["runs"] if "runs" in content else [content]
    fits = in_order([Fit.from_json(each) for run in runs for each in run["fits"]])
    short = "\n".join(f"- {line}" for line in shortfalls(fits)) or "- nothing"
    budgets = sorted({one.budget for one in fits})
    short += f"\n\nThe fits had {' or '.join(f'{budget:,}' for budget in budgets)} gradients. {GOALS}"
    tables = [table.markdown() for table in (summary(fits), beside_published(fits), details(fits)) if table]
    picture = [pictured(page, "KL(q || p) against gradients, a panel for each posterior")] if page else []
    origins = [f"{_whose(run)}{origin(run)}" if len(runs) > 1 else origin(run) for run in runs]
    return "\n\n".join([*picture, f"## What fell short\n\n{short}", *tables, *origins])


def _whose(run: Content) -> str:
    """Whose fits are a run's, where several make a table."""
    return f"{', '.join(dict.fromkeys(each['contender'] for each in run['fits']))}: "


def finish(run: Run, fits: Sequence[Fit], plan: Plan) -> None:
    """The tables on the terminal, the pictures, the page."""
    console = terminal()
    write(run, fits, plan)
    for table in (summary(fits), beside_published(fits)):
        if table:
            console.print(table)
    for line in shortfalls(fits):
        console.print(line, soft_wrap=True)
    console.print(GOALS, soft_wrap=True)
    draw(run, fits)
    run.publish(FILE, shown, "traces.png")
    console.print(f"Tables, figures and pictures: {run.folder}", soft_wrap=True)


def draw(run: Run, fits: Sequence[Fit]) -> None:
    """`traces.png`, and a `pairs-*.png` for each posterior with draws."""
    traces(fits).savefig(run.folder / "traces.png", dpi=DPI)
    for name in dict.fromkeys(one.posterior for one in fits):
        paths = {what: run.folder / "draws" / f"{name}-{what}.npy" for what in (*FLOWS, *GUIDES)}
        draws = {what: np.load(path, allow_pickle=False) for what, path in paths.items() if path.exists()}
        if draws:
            pairs(name, draws).savefig(run.folder / f"pairs-{name}.png", dpi=DPI)
