"""The presets of published tables: what their files say, the networks, a job stopped and resumed, the page."""

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from benchmarks import __main__ as cli
from benchmarks import checkpoint, job
from benchmarks.config import Config, from_json
from benchmarks.data import Data, load
from benchmarks.filling import origin
from benchmarks.flows import parse_options
from benchmarks.images import presets, toys
from benchmarks.images.page import table
from benchmarks.images.presets import NAMES, adapt
from benchmarks.models import build, count_parameters
from benchmarks.networks import gated, networks_of, residual
from benchmarks.networks.gated import Gated
from benchmarks.report import Report
from benchmarks.run import Run
from benchmarks.step import step
from benchmarks.train import History
from flowpost.vae import VAE

JOB = [
    "images",
    "--preset",
    "small-meanfield",
    "--data",
    "digits",
    "--epochs",
    "3",
    "--samples",
    "25",
    "--images",
    "20",
]
TIMINGS = {"seconds", "step_ms", "resumed_after"}


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def made(data: Data, config: Config) -> VAE:
    (name,) = config.posteriors
    options = dict(config.flows.get(name, {}))
    return build(data, name, dim=config.dim, width=8, dropout=0.0, options=options, networks=networks_of(config, data))


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_a_model_and_trains(name: str, digits: Data) -> None:
    preset = presets.load(name)
    few = 2 if "steps" in preset.config.flows.get(preset.config.posteriors[0], {}) else None
    config = adapt(preset, few)
    vae = made(digits, config)
    before = [parameter.clone() for parameter in vae.parameters()]
    optimizer = config.optimization.build(vae, config.lr)
    assert step(vae, optimizer, digits.train[:3], torch.tensor(0.5), config).isfinite()
    # Every parameter is reached: none is left where it was.
    assert not [i for i, p in enumerate(vae.parameters()) if torch.equal(p, before[i]) and p.grad is None]
    published = preset.row(preset.config, preset.config.posteriors[0])
    assert bool(published) == (name not in ("gated-small", "small-sylvester"))


def test_a_file_extends_another() -> None:
    config = presets.load("small-iaf").config
    assert (config.optimization.optimizer, config.optimization.decay) == ("rmsprop", "constant")
    assert (config.batch, config.lr, config.dim, config.kl_warmup, config.samples) == (128, 1e-3, 128, 0, 1000)
    assert config.flows["iaf"] == {"steps": 2, "hidden": (256, 256), "context_size": 128}
    assert from_json(json.loads(json.dumps({**vars(config), "optimization": vars(config.optimization)}))) == config
    assert presets.load("iwae-50").config.train_samples == 50


def test_parts_of_a_protocol_can_be_changed_and_are_named() -> None:
    preset = presets.load("small-iaf")
    assert adapt(preset, None, hidden=9).flows["iaf"]["hidden"] == (9, 9)
    config = adapt(preset, None, gradient="stl", optimizer="adam", decay="linear")
    assert (config.gradient, config.optimization.optimizer, config.optimization.decay) == ("stl", "adam", "linear")
    assert preset.changes(config) == ["gradient stl (standard)", "optimizer adam (rmsprop)", "decay linear (constant)"]
    assert preset.changes(preset.config) == []
    given = adapt(preset, None, options=parse_options(["iaf.gain=1", "iaf.steps=3"]))
    assert given.options_of("iaf") == {"steps": 3, "hidden": (256, 256), "context_size": 128, "gain": 1}
    assert preset.changes(given) == ["iaf gain=1, steps=3"]
    assert preset.sizes(given, "iaf") == "3"


def test_the_small_model_has_the_published_sizes(digits: Data) -> None:
    config = presets.load("small-meanfield").config
    mnist = replace(digits, train=torch.zeros(2, 28, 28), levels=1, likelihood="bernoulli")
    layers = [(784, 256), (256, 256), (256, 2 * 128), (128, 256), (256, 256), (256, 784)]
    assert count_parameters(made(mnist, config)) == sum((a + 1) * b for a, b in layers)


@pytest.mark.parametrize(("shape", "numbers"), [((28, 28), 1), ((28, 20), 256), ((8, 8), 1)])
def test_convolutions_fit_every_data_set(shape: tuple[int, int], numbers: int) -> None:
    x, z = torch.zeros(2, *shape), torch.zeros(2, 5)
    for kind, features in ((gated, 256), (residual, 450)):
        assert kind.encoder(shape)(x).shape == (2, features)
        assert kind.decoder(5, shape, numbers)(z).shape == (2, numbers, *shape)
    assert gated.encoder(shape, features=9, maps=3)(x).shape == (2, 9)
    assert gated.decoder(5, shape, numbers, maps=3)(z).shape == (2, numbers, *shape)


def test_gated_layers_are_the_paper_s() -> None:
    """Sizes of the public code, counted by hand; and one layer, written once more."""
    layers = [(1, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
    found = count_parameters(gated.encoder((28, 28)))
    assert found == 2 * sum((25 * a + 1) * b for a, b in layers) + 2 * (49 * 64 + 1) * 256
    layers = [(64, 64), (64, 32), (32, 32), (32, 32), (32, 32)]
    found = count_parameters(gated.decoder(64, (28, 28), 1))
    assert found == 2 * sum((25 * a + 1) * b for a, b in layers) + 2 * (49 * 64 + 1) * 64 + 33
    layer, x = Gated(nn.Conv2d, 1, 2, 3), torch.randn(1, 1, 5, 5)
    torch.testing.assert_close(layer(x), layer.value(x) / (1 + torch.exp(-layer.gate(x))))


def parts(name: str, data: Data) -> tuple[nn.Module, nn.Module]:
    """The encoder's first layer and the decoder's last one."""
    make = networks_of(presets.load(name).config, data)
    assert make is not None
    encoder, decoder = make(data.train.shape[1:], 50, data.levels + 1 if data.likelihood == "categorical" else 1)
    return next(encoder.children()), [*decoder.modules()][-1]


def test_frey_faces_and_means_reach_the_networks(digits: Data) -> None:
    """Grey levels in the middle of their bins; a decoder that starts at the mean image."""
    frey = replace(digits, train=digits.train[:9], levels=255, likelihood="categorical")
    assert parts("sylvester-vae", frey)[0](torch.full((1, 8, 8), 127.0)).unique().tolist() == [127.5 / 256]
    grey, last = parts("iwae-50", digits)
    assert grey(digits.train).mean(0).abs().max() < 1e-6
    start = cast(nn.Linear, last).bias.sigmoid() * digits.levels
    torch.testing.assert_close(start.clamp(0.02, 15.98).view(8, 8), digits.train.mean(0).clamp(0.02, 15.98))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "foo"], "preset: expected one of gated-small"),
        ([], "preset: expected one of"),
        (["--preset", "small-meanfield", "--depth", "3"], "depth: expected a posterior of several steps, got diagonal"),
        (["--preset", "small-iaf", "--depth", "0"], "depth: expected at least 1 step, got 0"),
        (["--preset", "small-meanfield", "--hidden", "9"], "hidden: expected a posterior with networks, got diagonal"),
        (["--preset", "small-iaf", "--hidden", "0"], "hidden: expected at least 1 unit, got 0"),
        (
            ["--preset", "small-iaf", "--option", "planar.steps=2"],
            "option: expected those of the job's posteriors (iaf)",
        ),
        (["--preset", "small-iaf", "--option", "iaf.stepz=2"], "option: expected RECIPE.OPTION=VALUE of a recipe"),
        (["--preset", "small-iaf", "--clip", "0"], "clip: expected a positive number, got 0"),
        (["--preset", "small-iaf", "--averaging", "1"], "averaging: expected a share in [0, 1), got 1"),
        (["--preset", "small-iaf", "--precision", "float16"], "precision: expected one of float32, bfloat16"),
        (["--preset", "small-iaf", "--minutes", "-1"], "minutes: expected a finite number >= 0"),
        (["--preset", "small-iaf", "--log", "foo"], "log: expected one of"),
        (["nowhere"], "folder: expected that of a job"),
        (["nowhere", "--preset", "small-iaf"], "folders: expected no other option, which it would not read, got --pre"),
        (["--resume", "runs", "--images", "4", "--epochs", "3"], "goes on as it began, got --epochs, --images"),
        (["--toys", "--preset", "small-iaf"], "toys: expected no other option, which it would not read, got --preset"),
        (["--toys", "--data", "mine.npz"], "data: expected one of digits, "),
        (["--preset", "small-iaf", "--data", "mine.npz"], "data: expected one of digits, "),
        (["--preset", "small-iaf", "--page", "page.md"], "page: expected folders of runs whose table goes there"),
    ],
)
def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(["images", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_a_wrong_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits: Data) -> None:
    text = (presets.FOLDER / "mlp-40.toml").read_text()
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    for change, said in (('"adam"', "optimizer: expected one of adam"), ("epochs = 500", "epoch")):
        (tmp_path / "mlp-40.toml").write_text(text.replace(change, '"lion"' if "adam" in change else "epoch = 500"))
        with pytest.raises(ValueError, match=f"^preset mlp-40: .*{said}"):
            presets.load("mlp-40")
    config = replace(Config(), encoder={"kind": "mlp", "hiden": (2,)}, decoder={"kind": "mlp"})
    with pytest.raises(ValueError, match=r"^encoder: expected options of mlp \(shape, hidden, activation\), got hiden"):
        made(digits, replace(config, posteriors=("diagonal",)))


# --------------------------------------------------------------------------------------------------------- a job


@pytest.fixture(scope="module")
def few(digits: Data) -> Iterator[Data]:
    """What every job here trains on, with a checkpoint after every epoch and no pictures."""
    few = replace(digits, train=digits.train[:256], valid=digits.valid[:64])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
        patch.setattr(job, "load", lambda _: few)
        patch.setattr(job, "draw", lambda *_: None)
        yield few


def figures(folder: Path) -> list[dict]:
    runs = json.loads((folder / "results.json").read_text())["runs"]
    return [{key: value for key, value in run.items() if key not in TIMINGS} for run in runs]


def stop_after_two(*_: object) -> Callable[[History], None]:
    def told(history: History) -> None:
        if len(history.valid) == 2:
            raise KeyboardInterrupt

    return told


@pytest.fixture(scope="module")
def whole(few: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main([*JOB, "--out", str(folder)]) == 0
    return folder


@pytest.mark.full
def test_a_stopped_job_is_resumed_to_the_same_bits_past_a_damaged_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.display.Display.watch", stop_after_two)
        assert cli.main([*JOB, "--out", str(stopped)]) == 130
    newest = max((stopped / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:999])
    assert cli.main(["images", "--resume", str(stopped)]) == 0
    assert "WARNING: checkpoint damaged" in capsys.readouterr().out
    assert figures(stopped) == figures(whole)
    for name in ("logs/diagonal-0.csv", "samples/diagonal-0-000001.npy", "samples/diagonal-0-000002.npy"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert not (stopped / "checkpoints").exists()


@pytest.mark.full
def test_the_log_has_a_line_for_each_epoch(whole: Path) -> None:
    (run,) = figures(whole)
    lines = list(csv.DictReader((whole / "logs" / "diagonal-0.csv").read_text().splitlines()))
    assert [float(line["valid"]) for line in lines] == run["valid"]
    assert [float(line["train"]) for line in lines] == run["train"]
    assert [(line["epoch"], float(line["lr"]), float(line["kl_weight"])) for line in lines] == [
        (str(epoch), 1e-3, 1.0) for epoch in (1, 2, 3)
    ]


@pytest.mark.full
def test_the_page_has_ours_theirs_and_what_was_changed(whole: Path, tmp_path: Path) -> None:
    report = Report.read(whole)
    (run,) = report.results
    (row,) = table([report]).rows
    assert row[:4] == ["small-meanfield*", "digits", "diagonal", "1"]
    assert row[4:7] == [f"{run['neg_elbo']:.2f}", "-", "-"]  # nothing was published on digits
    report.config = replace(report.config, data="mnist-static")
    (row,) = table([report]).rows
    assert row[4:7] == [f"{run['neg_elbo']:.2f}", "103.31", f"{run['neg_elbo'] - 103.31:+.2f}"]
    assert row[7:10] == [f"{run['nll']:.2f}", "97.10", f"{run['nll'] - 97.10:+.2f}"]
    page = tmp_path / "page.md"
    page.write_text("<!-- tables -->\n<!-- end of tables -->\n")
    assert cli.main(["images", str(whole), "--page", str(page)]) == 0
    text = page.read_text()
    assert "epochs 3 (256), samples 25 (1000), images 20 (0)" in text
    assert origin(report.run.head()) in text


def test_a_seed_that_is_repeated_is_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal runs would have a standard deviation of 0."""
    begun: list[Config] = []
    monkeypatch.setattr("benchmarks.images.job", lambda config, *_, **__: begun.append(config) or 0)
    assert cli.main(["images", "--preset", "small-iaf", "--seed", "3", "--seed", "1", "--seed", "3"]) == 0
    assert begun[0].seeds == (3, 1)


def test_remembered_numbers_are_marked_and_depths_have_their_own() -> None:
    preset = presets.load("iaf-mnist")
    assert [preset.row(adapt(preset, depth), "iaf").get("nll") for depth in (2, 3, 4, 8)] == [79.30, None, 79.17, 79.10]
    assert preset.row(preset.config, "diagonal")["nll"] == 81.08
    narrow = adapt(preset, 2, hidden=320)
    assert narrow.flows["iaf"]["hidden"] == (320,)
    assert preset.row(narrow, "iaf") == {"neg_elbo": 82.02, "nll": 79.77, "samples": 128}
    assert [preset.sizes(each, "iaf") for each in (preset.config, narrow)] == ["2", "2 of 320"]
    assert not preset.row(adapt(preset, 4, hidden=320), "iaf")
    small = presets.load("small-iaf")
    assert small.row(small.config, "iaf")["nll"] == 95.33
    assert not small.row(adapt(small, 8), "iaf")  # nobody published that of 8 steps
    assert not small.row(adapt(small, None, hidden=9), "iaf")
    frey = adapt(presets.load("sylvester-vae"), None, data="freyfaces")
    report = Report(Run(Path(), {}), frey, [{"posterior": "diagonal", "seed": 0, "error": None, "heavy_tails": 0.5}])
    report.results[0] |= {"neg_elbo_bits": 4.6, "nll_bits": 4.5}
    assert table([report]).rows[0][4:] == ["4.60", "4.53", "+0.07", "4.50", "~4.40", "+0.10", "0.50", "-"]
    report.results[0] |= {"trusted_nll": 97.5, "trusted_images_nll": 99.0}
    assert table([report]).rows[0][-1] == "-1.50"


def test_a_run_that_diverges_is_named(
    few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "load", lambda _: replace(few, train=few.train * torch.nan))
    assert cli.main([*JOB, "--epochs", "6", "--out", str(tmp_path)]) == 1
    said = "diagonal, seed 0 failed: no finite loss and gradient in 10 steps in a row (epoch 5; not finite: encoder."
    assert said in " ".join(capsys.readouterr().out.split())
    assert "lower --lr" in json.loads((tmp_path / "results.json").read_text())["runs"][0]["error"]


def test_the_toy_s_bound_rises_and_stays_below_the_entropy(tmp_path: Path, digits: Data) -> None:
    """Four equally likely points: no model's mean log p(x) exceeds -log 4."""
    few, more = (toys.toy("diagonal", steps, 0)[1] for steps in (2, 60))
    assert few < more < -math.log(4)
    small = replace(digits, test=digits.test[:50], labels=None)
    assert toys.draw(small, tmp_path, 2).keys() == toys.TOY.keys()
    assert {path.name for path in tmp_path.glob("*.png")} == {"tiling.png", "autoencoder.png"}
