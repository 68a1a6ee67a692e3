"""Two-dimensional targets: the energies and their normalizers, the exact KL, independent fits, the command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as cli
from benchmarks import targets
from benchmarks.config import BASIC
from benchmarks.filling import fill
from benchmarks.models import POSTERIORS
from benchmarks.targets import fitting
from benchmarks.targets.contestants import build, has_steps
from benchmarks.targets.energies import ENERGIES, STRIP, Energy
from benchmarks.targets.fitting import Fit, Plan, draw, fit, free_energies, kl, place, temperature
from benchmarks.targets.pictures import cells, fitted
from benchmarks.targets.table import is_impossible
from flowpost import FlowPosterior, diagonal, planar

ROOT = Path(__file__).parents[1]
PUBLISHED = [1.877502, 2.082089, 2.641705, 2.710698]  # log Z
CENTRE = torch.tensor([1.0, -2.0])
BROAD = Energy("broad", lambda z: 0.5 * ((z - CENTRE) / 2).square().sum(-1), math.log(8 * math.pi), bounded=False)


# ---- energies ----------------------------------------------------------------------------------------------------


def naive(z1: np.ndarray, z2: np.ndarray) -> list[np.ndarray]:
    """The paper's table 1, term by term."""
    w1 = np.sin(2 * np.pi * z1 / 4)
    w2 = 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(z1 - 1) / 0.3))
    radius = np.sqrt(z1**2 + z2**2)
    return [
        0.5 * ((radius - 2) / 0.4) ** 2
        - np.log(np.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z1 + 2) / 0.6) ** 2)),
        0.5 * ((z2 - w1) / 0.4) ** 2,
        -np.log(np.exp(-0.5 * ((z2 - w1) / 0.35) ** 2) + np.exp(-0.5 * ((z2 - w1 + w2) / 0.35) ** 2)),
        -np.log(np.exp(-0.5 * ((z2 - w1) / 0.4) ** 2) + np.exp(-0.5 * ((z2 - w1 + w3) / 0.35) ** 2)),
    ]


@pytest.mark.parametrize("index", range(4))
def test_energies_are_the_paper_s(index: int) -> None:
    z = 2 * torch.randn(200, 2, dtype=torch.float64)
    torch.testing.assert_close(ENERGIES[index].potential(z), torch.from_numpy(naive(*z.T.numpy())[index]))


@pytest.mark.parametrize("index", range(4))
def test_normalizers_are_those_of_quadrature(index: int) -> None:
    """By the midpoint rule, which is exact to many digits where a smooth integrand dies out before the edges."""
    energy = ENERGIES[index]
    assert energy.log_normalizer == pytest.approx(PUBLISHED[index], abs=6e-7)
    first = (torch.arange(1600, dtype=torch.float64) + 0.5) * 0.005 - 4
    second = torch.arange(-10, 8, 0.01, dtype=torch.float64)
    if not energy.bounded:
        first = 2 * first
    z = torch.stack(torch.meshgrid(first, second, indexing="ij"), -1)
    area = float(first[1] - first[0]) * float(second[1] - second[0])
    assert math.log(float(energy.log_prob(z).exp().sum()) * area) == pytest.approx(0, abs=1e-6)


def test_nothing_is_outside_of_the_strip() -> None:
    z = torch.tensor([[4.1, 0.0], [-4.1, 0.0], [3.9, -1.0]])
    for energy in ENERGIES[1:]:
        assert energy.log_prob(z).isinf().tolist() == [True, True, False]
    assert ENERGIES[0].log_prob(z).isfinite().all()


def test_the_strip_s_map_is_4_tanh_half() -> None:
    z = (5 * torch.randn(50, 2, dtype=torch.float64)).requires_grad_()
    image, log_det = STRIP(z)
    torch.testing.assert_close(image, torch.stack([4 * torch.tanh(z[:, 0] / 2), z[:, 1]], -1))
    slope = torch.autograd.grad(image[:, 0].sum(), z)[0][:, 0]
    torch.testing.assert_close(log_det, slope.log())
    back, log_det_back = STRIP.inverse(image)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_det_back, -log_det)


# ---- KL ----------------------------------------------------------------------------------------------------------


def test_kl_between_gaussians_is_the_closed_form() -> None:
    """KL(N(0, I) || N(m, 4 I)) = log 4 + (2 + |m|^2) / 8 - 1, with m = (1, -2)."""
    figure, error = kl(diagonal(0, 2).double(), BROAD, 50_000)
    assert abs(figure - (math.log(4) + 7 / 8 - 1)) < 5 * error
    assert 0.001 < error < 0.01


def test_kl_on_the_strip_is_that_of_quadrature() -> None:
    """A standard normal pushed onto the strip, against a straight ridge: both variables by hand."""
    ridge = Energy("ridge", lambda z: 0.5 * (z[..., 1] / 0.4) ** 2, PUBLISHED[1])
    figure, error = kl(place(diagonal(0, 2), ridge).double(), ridge, 50_000)
    y = np.arange(-12, 12, 1e-3)
    weight = np.exp(-0.5 * y * y) / np.sqrt(2 * np.pi)
    slope = 2 / np.cosh(y / 2) ** 2  # of 4 tanh(y / 2)
    first = np.sum(weight * np.log(weight / slope * 8)) * 1e-3
    second = math.log(0.4) + 0.5 / 0.16 - 0.5
    assert abs(figure - (first + second)) < 5 * error
    assert error < 0.03


def test_samples_and_the_drawn_density_tell_of_the_same_kl() -> None:
    """The one by the forward pass, the other by the inverse, on a grid."""
    posterior = pushed(place(planar(0, 2, steps=3), ENERGIES[1])).double()
    figure, error = kl(posterior, ENERGIES[1], 50_000)
    z, cell = cells(120), (8 / 120) ** 2
    (q,) = fitted([posterior], 120)
    ratio = q * (q.clamp_min(1e-300).log() - ENERGIES[1].log_prob(z))
    assert float(q.sum()) * cell == pytest.approx(1, abs=5e-3)
    assert float(ratio.sum()) * cell == pytest.approx(figure, abs=5 * error + 0.02)


def pushed(posterior: FlowPosterior) -> FlowPosterior:
    for parameter in posterior.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return posterior


def test_a_wrong_density_is_impossible() -> None:
    """Log q less than it is by a quarter, of a posterior that fits: its KL is negative, and is told."""
    exact = Energy("normal", lambda z: 0.5 * z.square().sum(-1), math.log(2 * math.pi), bounded=False)
    right = kl(diagonal(0, 2).double(), exact, 1000)
    wrong = kl(diagonal(0, 2).double(), exact._replace(log_normalizer=math.log(2 * math.pi) - 0.25), 1000)
    rows = [Fit("diagonal", None, 2, "U1", *each, 0, 4, 0.0, 0.02) for each in ((right[0], 1e-6), (wrong[0], 1e-6))]
    assert [is_impossible(row) for row in rows] == [False, True]
    assert wrong[0] == pytest.approx(-0.25)


# ---- fits --------------------------------------------------------------------------------------------------------


def test_a_gaussian_fits_a_gaussian() -> None:
    plan = Plan(iterations=500, starts=1, batch=1024, pace=5.0, samples=5000)
    (posterior,), (row,) = fit("diagonal", None, plan, [BROAD])
    assert abs(row.kl) < 1e-3
    loc, scale_tril = posterior.gaussian()
    torch.testing.assert_close(loc, torch.tensor([1.0, -2.0]).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(scale_tril, 2 * torch.eye(2).double(), atol=0.05, rtol=0)
    assert (row.posterior, row.steps, row.energy) == ("diagonal", None, "broad")
    assert (row.skipped_steps, row.parameters) == (0, 4)


@pytest.mark.full
def test_more_steps_come_closer() -> None:
    plan = Plan(iterations=150, starts=1, samples=5000)
    rough, fine = (fit("planar", steps, plan, ENERGIES[1:2])[1][0].kl for steps in (1, 8))
    assert 0 < fine < rough - 0.2


def test_fits_are_independent() -> None:
    """No fit's loss depends on another's weights."""
    posteriors = [pushed(planar(0, 2, steps=2)) for _ in ENERGIES]
    parameters, buffers = torch.func.stack_module_state(posteriors)
    z, log_q = draw(posteriors[0], parameters, buffers, torch.randn(len(posteriors), 7, 2))
    losses = free_energies(z, log_q, ENERGIES, torch.zeros(4, 1, 2), 0.5)
    for index, loss in enumerate(losses):
        for gradient in torch.autograd.grad(loss, list(parameters.values()), retain_graph=True):
            moved = gradient.flatten(1).abs().sum(1) > 0
            assert moved.tolist() == [other == index for other in range(4)]


def test_losses_are_free_energies_of_each_energy_s_own_posterior() -> None:
    posteriors = [pushed(planar(0, 2, steps=2)) for _ in ENERGIES]
    parameters, buffers = torch.func.stack_module_state(posteriors)
    noises, centres = torch.randn(4, 9, 2), torch.randn(4, 1, 2)
    z, log_q = draw(posteriors[0], parameters, buffers, noises)
    losses = free_energies(z, log_q, ENERGIES, centres, 0.3)
    for posterior, energy, noise, centre, loss in zip(posteriors, ENERGIES, noises, centres, losses, strict=True):
        z, log_q, _ = place(posterior, energy)(sample_shape=(9,), noise=noise)
        start = 0.5 * (z - centre).square().sum(-1)
        torch.testing.assert_close(loss, (log_q + 0.3 * energy.potential(z) + 0.7 * start).mean())


def test_the_temperature_rises_from_a_hundredth_to_one() -> None:
    plan = Plan(iterations=100)
    rise = [temperature(t, plan) for t in range(100)]
    assert rise[0] == 0.01
    assert rise[25] == pytest.approx(0.505)
    assert rise[50:] == [1.0] * 50
    assert rise == sorted(rise)


@pytest.mark.parametrize("times", [3, 10])
def test_a_bad_step_moves_no_weight_of_its_fit_alone(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The second energy has no finite gradient for a while; ten times in a row are the end of its fit."""
    calls = 0

    def sick(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return BROAD.potential(z) * (math.nan if 5 < calls <= 5 + times else 1.0)

    seen: list[Tensor] = []
    step = fitting.step

    def watched(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], bad: Tensor) -> None:
        step(optimizer, parameters, bad)
        seen.append(torch.cat([value.detach().flatten(1) for value in parameters.values()], 1))

    monkeypatch.setattr(fitting, "step", watched)
    plan = Plan(iterations=20, starts=1, samples=1000)
    _, (well, ill) = fit("diagonal", None, plan, [BROAD, BROAD._replace(potential=sick)])
    moved = torch.stack([(after - before).abs().amax(1) > 0 for before, after in zip(seen, seen[1:], strict=False)])
    assert moved[:, 0].all()
    assert moved[:, 1].tolist() == [not 4 <= t < 4 + times for t in range(19)]
    assert (well.skipped_steps, ill.skipped_steps) == (0, times)
    assert math.isfinite(well.kl)
    assert math.isfinite(ill.kl) == (times < 10)


def test_a_finite_gradient_whose_square_overflows_is_shortened() -> None:
    """Its direction is as good as any other's: only what is not finite is skipped."""
    weight = torch.zeros(3, 2, requires_grad=True)
    weight.grad = torch.tensor([[3e30, -4e30], [0.3, 0.4], [math.inf, 0.0]])
    finite = fitting.shorten({"weight": weight}, torch.zeros(3))
    assert finite.tolist() == [True, True, False]
    torch.testing.assert_close(weight.grad, torch.tensor([[60.0, -80.0], [0.3, 0.4], [0.0, 0.0]]))


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_recipe_can_be_fitted_in_a_batch(name: str) -> None:
    """One step of all energies, and the density that is drawn is that of the samples."""
    steps = 2 if has_steps(name) else None
    posteriors, rows = fit(name, steps, Plan(iterations=2, starts=1, samples=100))
    assert [row.skipped_steps for row in rows] == [0] * 4
    for posterior in posteriors:
        z, log_q, _ = posterior(sample_shape=(20,))
        torch.testing.assert_close(posterior.log_prob(z), log_q, rtol=1e-6, atol=1e-6)


def test_sizes_reach_the_recipes() -> None:
    built = build("iaf", 3)
    assert sum(name.endswith("net.layers.0.weight") for name, _ in built.named_parameters()) == 3
    assert {len(value) for name, value in built.named_parameters() if name.endswith("net.layers.0.weight")} == {32}


# ---- the command -------------------------------------------------------------------------------------------------

TINY = ["targets", "--iterations", "3", "--starts", "1", "--quick"]


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, out = tmp_path / "page.md", tmp_path / "run"
    page.write_text("above\n<!-- tables -->\n<!-- end of tables -->\nbelow\n")
    threads = torch.get_num_threads()
    where = ["--out", str(out), "--page", str(page)]
    code, text, _ = run_cli(capsys, *TINY, "--posterior", "diagonal,planar", "--steps", "1,3", *where)
    assert code == 0
    assert torch.get_num_threads() == threads
    content = json.loads((out / "targets.json").read_text())
    rows = [(one["posterior"], one["steps"], one["energy"]) for one in content["fits"]]
    ks = [("diagonal", None), ("planar", 1), ("planar", 3)]
    assert rows == [(*k, f"U{number}") for k in ks for number in (1, 2, 3, 4)]
    assert all(one["kl"] > 0 and one["standard_error"] > 0 for one in content["fits"])
    assert content["plan"] == asdict(replace(targets.QUICK, iterations=3, starts=1))
    assert {path.name for path in out.glob("*.png")} == {"diagonal.png", "planar.png", "targets.png"}
    first = content["fits"][0]
    assert f"{first['kl']:.3f} ({first['standard_error']:.3f})" in text
    table = page.read_text()
    assert f"{first['kl']:.3f} ({first['standard_error']:.3f})" in table
    assert "![" in table
    assert "python -m benchmarks" in table
    assert (tmp_path / "page.png").read_bytes() == (out / "targets.png").read_bytes()


def test_several_seeds_are_in_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their mean, smallest and largest; each seed's figures are those of a run with it alone."""
    options = [*TINY, "--posterior", "diagonal,planar", "--steps", "1"]
    fits = {}
    for seed in ("0", "3", "3,0"):
        assert run_cli(capsys, *options, "--seed", seed, "--out", str(tmp_path / seed))[0] == 0
        fits[seed] = json.loads((tmp_path / seed / "targets.json").read_text())["fits"]

    def figures(found: list[dict]) -> dict[tuple, float]:
        return {tuple(each[key] for key in ("posterior", "energy", "seed")): each["kl"] for each in found}

    both = figures(fits["3,0"])
    assert both == figures(fits["0"]) | figures(fits["3"])
    table = (tmp_path / "3,0" / "targets.md").read_text()
    assert "| posterior | K | U1 | U2 | U3 | U4 | seeds | rate | params | s |" in table
    assert "seeds 0, 3" in table
    first, second = sorted(both["planar", "U2", seed] for seed in (0, 3))
    assert f"{(first + second) / 2:.3f} ({first:.3f} to {second:.3f})" in table
    row = next(line for line in table.splitlines() if line.startswith("| planar"))
    assert [cell.strip() for cell in row.split("|")][7] == "2"


@pytest.mark.long
def test_several_processes_come_to_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        options = ["--posterior", "diagonal,planar", "--steps", "1", "--jobs", jobs, "--out", str(out)]
        assert run_cli(capsys, *TINY, *options)[0] == 0
        found.append([one["kl"] for one in json.loads((out / "targets.json").read_text())["fits"]])
    assert found[0] == found[1]


def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, page = [*TINY, "--posterior", "diagonal,planar", "--steps", "1,3"], tmp_path / "page.md"
    page.write_text("<!-- tables -->\n<!-- end of tables -->\n")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_cli(capsys, *options, "--out", str(whole))[0] == 0
    fit = targets.fit
    fitted = []

    def two(name: str, steps: int | None, *rest: Any) -> Any:  # noqa: ANN401 - as it is called
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append((name, steps))
        return fit(name, steps, *rest)

    monkeypatch.setattr(targets, "fit", two)
    code, text, _ = run_cli(capsys, *options, "--out", str(stopped), "--page", str(page))
    assert code == 130
    assert f"the same command with --out {stopped}" in text.replace("\n", "")
    assert page.read_text() == "<!-- tables -->\n<!-- end of tables -->\n"
    fitted.clear()
    code, text, _ = run_cli(capsys, *options, "--out", str(stopped), "--page", str(page))
    assert (code, fitted) == (0, [("planar", 3)])
    assert "2 of 3 fits are already done." in text
    found, expected = (json.loads((folder / "targets.json").read_text())["fits"] for folder in (stopped, whole))
    assert [one["kl"] for one in found] == [one["kl"] for one in expected]
    for name in ("diagonal", "planar", "targets"):
        assert (stopped / f"{name}.png").read_bytes() == (whole / f"{name}.png").read_bytes()
    code, _, err = run_cli(capsys, *options, "--iterations", "4", "--out", str(stopped))
    assert code == 2
    assert "out: expected the folder's own plan" in err


def test_an_impossible_figure_is_told_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "kl", lambda *_: (-0.1, 0.01))
    code, text, _ = run_cli(capsys, *TINY, "--posterior", "diagonal", "--out", str(tmp_path))
    assert code == 1
    assert "diagonal, U1: KL -0.1000 is negative by more than 5 standard errors" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2,0"], "steps: expected integers of at least 1 with commas between them, got '2,0'"),
        (["--steps", "many"], "steps: expected integers of at least 1"),
        (["--posterior", "foo"], "posterior: expected one of diagonal"),
        (["--page", "nowhere.md"], "page: expected a page"),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run_cli(capsys, "targets", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_all_is_every_recipe_once() -> None:
    assert targets.posterior_names(["all"]) == POSTERIORS
    assert targets.posterior_names(["iaf, all", "iaf"]) == ("iaf", *(name for name in POSTERIORS if name != "iaf"))
    assert set(BASIC) <= set(POSTERIORS)


def test_the_committed_page_has_its_marks() -> None:
    assert "TABLES" in fill(ROOT / "docs" / "targets.md", "TABLES")
