"""The benchmark job: its command line, what it writes, and how it meets a stop or a bad step."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import Run

from benchmarks import __main__ as cli
from benchmarks import figures, job, plots
from benchmarks.canvas import colour, panels
from benchmarks.config import DEFAULTS, Config, configure, from_json
from benchmarks.data import Data, DataError, load
from benchmarks.models import POSTERIORS, build, posterior_grid
from benchmarks.step import step
from benchmarks.train import BAD_STEPS, History, TrainingError, fit, train_one, validate
from flowpost.vae import VAE

Tell = Callable[[History], None]
PICTURES = {"curves", "nll", "reconstructions", "samples", "interpolation", "latent", "calibration"}
FIGURES = ["neg_elbo", "nll", "gap", "ess", "heavy_tails", "active_units", "mutual_information"]
FIGURES += ["parameters", "step_ms", "seconds"]
TINY = [
    "--epochs",
    "2",
    "--width",
    "16",
    "--samples",
    "50",
    "--seeds",
    "1",
    "--kl-warmup",
    "1",
    "--trusted-images",
    "0",
]


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    threads = torch.get_num_threads()
    code = cli.main(arguments)
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    return code, out, err


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def pictures(folder: Path) -> set[str]:
    return {
        path.stem
        for path in folder.glob("*.png")
        if path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    }


@pytest.fixture(scope="module")
def tiny_model() -> tuple[VAE, Data, Config]:
    data, config = load("digits"), configure(width=16, epochs=2, dim=2)
    return build(data, "diagonal", dim=2, width=16, dropout=0.0, options={}), data, config


def test_help_names_every_option_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0
    options = "data posterior seeds epochs patience kl-warmup dim width batch lr samples device out quick help "
    options += (
        "eager warmup objective alpha train-samples gradient free-bits gaps likelihood networks prior decoder-of "
    )
    options += "encoder-width"
    assert not [name for name in options.split() if f"--{name}" not in out]
    assert "python -m benchmarks --quick" in out
    assert all(name in out for name in POSTERIORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--posterior", "foo"], f"posterior: expected one of {', '.join(POSTERIORS)}, all, got 'foo'"),
        (["--posterior", "iaf,foo"], f"posterior: expected one of {', '.join(POSTERIORS)}, all, got 'foo'"),
        (["--data", "foo"], f"data: expected one of {', '.join(DEFAULTS)}, got 'foo'"),
        (["--epochs", "0"], "epochs: expected an integer of at least 1, got 0"),
        (["--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
        (["--lr", "nan"], "lr: expected a positive number, got nan"),
        (["--dropout", "1"], "dropout: expected a share in [0, 1), got 1.0"),
        (["--device", "tpu"], "device: expected one of cpu, cuda, got 'tpu'"),
        (["--objective", "vae"], "objective: expected one of elbo, iwae, renyi, got 'vae'"),
        (["--gradient", "dreg"], "gradient: expected standard or stl for the elbo"),
        (["--gradient", "dreg", "--train-samples", "5"], "gradient: expected standard or stl for the elbo"),
        (["--objective", "iwae", "--gradient", "stl"], "where stl is biased, got stl with train-samples 5"),
        (["--objective", "iwae", "--free-bits", "2"], "free-bits: expected 0 for iwae"),
        (["--objective", "renyi", "--free-bits", "2"], "free-bits: expected 0 for renyi"),
        (["--objective", "renyi", "--gradient", "stl"], "where stl is biased, got stl with train-samples 5"),
        (["--objective", "renyi", "--alpha", "1"], "alpha: expected a number in [0, 1), got 1.0; at 1 it is the elbo"),
        (["--objective", "iwae", "--alpha", "0.5"], "alpha: expected none for iwae, only renyi has one, got 0.5"),
        (["--free-bits", "-1"], "free-bits: expected a finite number of nats >= 0, got -1.0"),
        (["--train-samples", "0"], "train-samples: expected an integer of at least 1, got 0"),
        (["--foo"], "--foo"),
        (["--epochs", "many"], "--epochs"),
        (["foo"], "foo"),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run_cli(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_cli(capsys, "--device", "cuda")
    assert code == 2
    assert err.startswith("device: ")
    assert err.count("\n") == 1


def test_missing_data_is_said_plainly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise DataError("no such file.\nPut it there.")

    monkeypatch.setattr(job, "load", missing)
    assert run_cli(capsys, "--out", str(tmp_path / "out")) == (1, "", "no such file.\nPut it there.\n")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("run")
    trusted = ["--trusted-images", "2"]
    posteriors = ["--posterior", "diagonal,iaf", "--posterior", "planar"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "ANNEALED", (8, 25, 5))
        patch.setattr(plots, "TRUE_POSTERIORS", 1)
        return cli.main([*TINY, *trusted, *posteriors, "--dim", "2", "--out", str(folder)]), folder


def test_a_run_writes_finite_figures_and_its_configuration(tiny_run: tuple[int, Path]) -> None:
    code, folder = tiny_run
    content = results(folder)
    assert code == 0
    assert [run["posterior"] for run in content["runs"]] == ["diagonal", "iaf", "planar"]
    for run in content["runs"]:
        numbers = [*(run[key] for key in FIGURES), *run["train"], *run["valid"]]
        assert all(math.isfinite(number) for number in numbers)
        assert run["gap"] == pytest.approx(run["neg_elbo"] - run["nll"])
        assert -0.2 < run["gap"] < 20
        assert (run["error"], run["skipped_steps"], len(run["valid"])) == (None, 0, 2)
        assert (run["trusted_nll"], run["trusted_acceptance"]) == (
            pytest.approx(run["trusted_images_nll"], abs=20),
            pytest.approx(0.8, abs=0.15),
        )
    config = from_json(content["configuration"])
    assert config == configure(
        posteriors=("diagonal", "iaf", "planar"),
        seeds=(0,),
        epochs=2,
        width=16,
        samples=50,
        kl_warmup=1,
        dim=2,
        trusted_images=2,
    )
    assert {"python", "torch", "numpy", "flowpost", "cpu", "device", "commit"} <= content["environment"].keys()


def test_the_table_has_a_row_for_each_posterior_and_says_how_it_was_measured(tiny_run: tuple[int, Path]) -> None:
    _, folder = tiny_run
    table = (folder / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    runs = sorted(results(folder)["runs"], key=lambda run: run["trusted_nll"])
    assert [row.split()[1] for row in rows] == ["posterior", "---", *(run["posterior"] for run in runs)]
    for run, row in zip(runs, rows[2:], strict=True):
        assert f"{run['neg_elbo']:.2f}" in row
        assert f"{run['nll']:.2f}" in row
    assert "50 importance samples" in table


def test_every_picture_is_drawn(tiny_run: tuple[int, Path]) -> None:
    _, folder = tiny_run
    assert pictures(folder) == PICTURES | {"true_posterior", "grid"}
    assert not list(folder.glob("*.part"))


def test_an_interrupt_leaves_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(data: Data, posterior: str, seed: int, config: Config, tell: Tell) -> tuple[VAE, History]:
        if posterior == "planar":
            raise KeyboardInterrupt
        return train_one(data, posterior, seed, config, tell)

    monkeypatch.setattr(job, "train_one", interrupted)
    code, out, _ = run_cli(capsys, *TINY, "--posterior", "diagonal,planar", "--dim", "3", "--out", str(tmp_path))
    assert code == 130
    assert "1 of 2" in out
    assert [run["posterior"] for run in results(tmp_path)["runs"]] == ["diagonal"]
    assert "diagonal" in (tmp_path / "table.md").read_text()
    assert pictures(tmp_path) == PICTURES


def test_a_failed_run_is_told_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(data: Data, posterior: str, seed: int, config: Config, tell: Tell) -> tuple[VAE, History]:
        if posterior == "diagonal":
            raise TrainingError("lower --lr")
        return train_one(data, posterior, seed, config, tell)

    monkeypatch.setattr(job, "train_one", failing)
    monkeypatch.setattr(job, "draw", lambda *_: None)
    code, out, _ = run_cli(capsys, *TINY, "--posterior", "diagonal,planar", "--dim", "3", "--out", str(tmp_path))
    assert code == 1
    assert "diagonal, seed 0 failed: lower --lr" in out
    assert [run["error"] for run in results(tmp_path)["runs"]] == ["lower --lr", None]
    assert "lower --lr" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("epochs", "figure", "error"),
    [
        ([5.0, math.nan], 1.0, None),
        ([math.nan, math.inf], 1.0, "no finite bound of the validation part in 2 epochs; lower --lr"),
        ([5.0, 4.0], math.nan, "figures of the test part that are not finite: nll"),
    ],
)
def test_figures_that_are_not_finite_stop_no_job(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    epochs: list[float],
    figure: float,
    error: str | None,
) -> None:
    scores, evaluated = iter([*epochs, 3.0, 2.0]), job.evaluate

    def evaluate(vae: VAE, data: Data, config: Config, seed: int) -> dict[str, float]:
        return evaluated(vae, data, config, seed) | ({"nll": figure} if seed == 0 else {})

    monkeypatch.setattr("benchmarks.train.validate", lambda *_: next(scores))
    monkeypatch.setattr(job, "evaluate", evaluate)
    options = "--posterior", "diagonal", "--dim", "3", "--seeds", "2", "--out", str(tmp_path)
    code, out, err = run_cli(capsys, *TINY, *options)
    first, second = results(tmp_path)["runs"]
    assert (code, err) == (int(error is not None), "")
    assert (first["error"], second["error"], second["valid"]) == (error, None, [3.0, 2.0])
    assert (f"seed 0 failed: {error}" in out) == (error is not None)
    assert first.get("valid", [5.0, None]) == [5.0, None]


def state(vae: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in vae.state_dict().values()]


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_no_weight(tiny_model: tuple[VAE, Data, Config], where: str) -> None:
    vae, data, config = tiny_model
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    x = data.train[:8].clone()
    weight = torch.tensor(1.0)
    assert step(vae, optimizer, x, weight, config).isfinite()  # so that Adam has moments that could move a weight
    before = state(vae)
    parameter = next(vae.decoder.parameters())
    handle = parameter.register_hook(lambda gradient: gradient * math.nan) if where == "gradient" else None
    assert step(vae, optimizer, x if handle else x * math.nan, weight, config).isnan()
    assert all(torch.equal(old, new) for old, new in zip(before, state(vae), strict=True))
    if handle:
        handle.remove()
    assert step(vae, optimizer, x, weight, config).isfinite()
    assert not all(torch.equal(old, new) for old, new in zip(before, state(vae), strict=True))


def test_training_counts_bad_steps_and_gives_up_after_ten_in_a_row(
    tiny_model: tuple[VAE, Data, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, data, config = tiny_model
    calls = iter([math.nan] * 9 + [5.0] + [math.nan] * 9 + [5.0] * 10**6)
    monkeypatch.setattr("benchmarks.step.step", lambda *_: torch.tensor(next(calls)))
    assert fit(vae, data, configure(epochs=3), 0, lambda _: None).skipped_steps == 18
    calls = iter([math.nan] * BAD_STEPS)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        fit(vae, data, config, 0, lambda _: None)


def test_a_training_figure_is_the_mean_over_images(
    tiny_model: tuple[VAE, Data, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 300 images 256 and then 44: the last batch counts by its size, and one that is skipped not at all."""
    vae, data, _ = tiny_model
    few = replace(data, train=data.train[:300], valid=data.valid[:8])
    outcomes = iter([1.0, 7.0, math.nan, 7.0])
    monkeypatch.setattr("benchmarks.step.step", lambda *_: torch.tensor(next(outcomes)))
    history = fit(vae, few, configure(epochs=2, batch=256), 0, lambda _: None)
    assert history.train == pytest.approx([(256 * 1.0 + 44 * 7.0) / 300, 7.0])


def test_counts_of_runs_stand_as_the_rows_do(tmp_path: Path) -> None:
    """A posterior that lost a run, and is ranked before one that did not."""
    report = job.begin(configure(posteriors=("diagonal", "iaf"), seeds=(0, 1)), tmp_path)
    common = {"error": None, "skipped_steps": 0, "neg_elbo": 1.0, "nll": 1.0}
    for name, seed, trusted in (("diagonal", 0, 9.0), ("diagonal", 1, None), ("iaf", 0, 8.0)):
        report.add({"posterior": name, "seed": seed, **common, **({"trusted_nll": trusted} if trusted else {})})
    report.add({"posterior": "iaf", "seed": 1, "error": "lower --lr"})
    table = report.table()
    assert [row[0] for row in table.rows] == ["iaf", "diagonal"]
    assert "over seeds (1/2 runs)" in table.caption


def test_a_folder_that_cannot_be_written_to_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    code, _, err = run_cli(capsys, *TINY, "--out", str(tmp_path / "file" / "job"))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("out: expected a folder that can be written to, got ")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowpost.save", full)
    code, _, err = run_cli(capsys, *TINY, "--posterior", "diagonal", "--dim", "3", "--out", str(tmp_path / "job"))
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith("No space left on device\n")


def test_early_stopping_restores_the_best_weights(
    tiny_model: tuple[VAE, Data, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, data, _ = tiny_model
    scores, seen = iter([9.0, 5.0, 7.0, 6.0, 5.5, 1.0]), []

    def scored(model: VAE, *_: object) -> float:
        seen.append(state(model))
        return next(scores)

    monkeypatch.setattr("benchmarks.train.validate", scored)
    history = fit(vae, data, configure(epochs=6, patience=3, kl_warmup=1), 0, lambda _: None)
    assert (history.best_epoch, history.valid) == (2, [9.0, 5.0, 7.0, 6.0, 5.5])
    assert all(torch.equal(old, new) for old, new in zip(seen[1], state(vae), strict=True))
    assert not all(torch.equal(old, new) for old, new in zip(seen[4], state(vae), strict=True))
    assert not vae.training


def test_a_run_depends_on_its_seed_alone(tiny_model: tuple[VAE, Data, Config]) -> None:
    _, data, _ = tiny_model
    config = configure(epochs=1, width=16, dim=2)

    def weights(seed: int) -> list[torch.Tensor]:
        torch.rand(3)  # somebody else's draws
        return state(train_one(data, "diagonal", seed, config, lambda _: None)[0])

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_posteriors_start_from_the_same_encoder_and_decoder(tiny_model: tuple[VAE, Data, Config]) -> None:
    _, data, _ = tiny_model
    models = []
    for name in POSTERIORS:
        torch.manual_seed(0)
        models.append(
            build(data, name, dim=2, width=16, dropout=0.0, options=dict(DEFAULTS["digits"].flows.get(name, {})))
        )
    for part in ("encoder", "decoder"):
        first, *others = (state(getattr(vae, part)) for vae in models)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_dynamic_pixels_are_drawn_afresh_and_shared(
    tiny_model: tuple[VAE, Data, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The x that the encoder reads is the x that the likelihood scores, and differs from epoch to epoch."""
    vae, digits, _ = tiny_model
    half = torch.full((4, 8, 8), 0.5)
    data = replace(digits, train=half, dynamic=True)
    fed, scored = [], []
    likelihood = vae.likelihood.log_prob
    monkeypatch.setattr(vae.likelihood, "log_prob", lambda outputs, x: (scored.append(x), likelihood(outputs, x))[1])
    hook = vae.encoder.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0]))
    monkeypatch.setattr("benchmarks.train.validate", lambda *_: 1.0)
    fit(vae, data, configure(epochs=2), 0, lambda _: None)
    hook.remove()
    assert len(fed) == len(scored) == 2
    assert all(torch.equal(a.flatten(1), b) for a, b in zip(fed, scored, strict=True))
    assert not torch.equal(*fed)
    assert set(torch.cat(fed).unique().tolist()) == {0.0, 1.0}


def test_validation_repeats_itself_and_leaves_the_noise_alone(tiny_model: tuple[VAE, Data, Config]) -> None:
    vae, data, config = tiny_model
    before = torch.get_rng_state()
    assert validate(vae, data.valid, config) == validate(vae, data.valid, config)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.full
@pytest.mark.parametrize("name", POSTERIORS)
def test_the_grid_holds_both_posteriors_mass(tiny_model: tuple[VAE, Data, Config], name: str) -> None:
    _, data, _ = tiny_model
    torch.manual_seed(0)
    vae = build(data, name, dim=2, width=16, dropout=0.0, options=dict(DEFAULTS["digits"].flows.get(name, {})))
    with torch.no_grad():
        grid = posterior_grid(vae, data.test[:1])
    left, right, bottom, top = grid.box
    cell = (right - left) * (top - bottom) / (grid.log_true.shape[0] - 1) ** 2
    assert grid.log_true.exp().sum().item() * cell == pytest.approx(1, abs=1e-4)
    assert grid.log_fitted.exp().sum().item() * cell == pytest.approx(1, abs=0.02)
    assert grid.kl > -0.02


def test_many_posteriors_go_on_below() -> None:
    """Columns of two panels, five side by side; what is left over is blank, and one axis is shared by a whole row."""
    figure, found = panels(12, 1.0, 2.0, rows=2, sharey=True)
    assert found.shape == (2, 12)
    assert figure.get_size_inches().tolist() == [5.6, 6.0]
    places = {(panel.get_subplotspec().rowspan.start, panel.get_subplotspec().colspan.start) for panel in found[1]}
    assert places == {(1, column) for column in range(5)} | {(3, column) for column in range(5)} | {(5, 0), (5, 1)}
    assert sum(panel.axison for panel in figure.axes) == 24
    found[1, 0].set_ylim(0, 7)
    assert found[1, 11].get_ylim() == (0, 7)
    assert found[0, 11].get_ylim() != (0, 7)


def test_every_posterior_has_a_colour() -> None:
    assert len({colour(name) for name in POSTERIORS}) == min(len(POSTERIORS), 14)


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_data_set_has_defaults_for_every_flow(name: str) -> None:
    config = configure(name)
    assert isinstance(config, Config)
    assert config.data == name
    assert config.flows.keys() <= set(POSTERIORS)


@pytest.mark.full
def test_importing_the_benchmarks_leaves_the_threads_alone(python: Run) -> None:
    code = "import torch; n = torch.get_num_threads(); import benchmarks.__main__; assert torch.get_num_threads() == n"
    done = python(code)
    assert not done.returncode, done.stderr
