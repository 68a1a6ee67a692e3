"""The main job on a file and on networks of one's own: what it takes them for, and what it refuses in one line."""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from benchmarks import __main__ as cli
from benchmarks import job, plots
from benchmarks.config import ConfigError, configure, from_json
from benchmarks.data import Data, DataError, load
from benchmarks.figures import evaluate
from benchmarks.flows import parse_options
from benchmarks.heads import Standardize
from benchmarks.models import build, count_parameters
from benchmarks.own import archive, rows, values
from benchmarks.own.networks import source_hash
from benchmarks.own.setup import configure_own, load_own, sizes
from benchmarks.split import permuted_parts
from benchmarks.views import as_image
from flowpost.vae import VAE, Gaussian

DRAWS = np.random.default_rng(0)
WAVES = DRAWS.normal(size=(200, 12, 2)).astype(np.float32)
TINY = ["--epochs", "1", "--samples", "20", "--seeds", "1", "--kl-warmup", "0", "--trusted-images", "0"]
NETWORKS = """
from torch import nn

class Pair(nn.Module):
    def __init__(self, size, dim):
        super().__init__()
        self.loc, self.log_var = nn.Linear(size, dim), nn.Linear(size, dim)

    def forward(self, x):
        return self.loc(x.flatten(1)), self.log_var(x.flatten(1)) - 3

def pair(shape, dim, numbers):
    return Pair(shape[0] * shape[1], dim), nn.Linear(dim, numbers * shape[0] * shape[1])

def features(shape, dim, numbers):
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 5)), nn.Linear(dim, 24 * numbers)

def one(shape, dim, numbers):
    return nn.Linear(24, 5)

def narrow(shape, dim, numbers):
    return nn.Flatten(), nn.Linear(dim, 7)

def broken(shape, dim, numbers):
    return nn.Flatten(), shape["x"]

def normed(shape, dim, numbers):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)), nn.Linear(dim, 64)

nothing = 3
made = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), nn.Linear(2, 64)

def once(shape, dim, numbers):
    return made
"""

NUMPY = """
import random
import numpy as np
import torch
from torch import nn

def drawn(shape, dim, numbers):
    encoder = nn.Linear(24, 5)
    encoder.weight.data = torch.from_numpy(np.random.randn(5, 24)).float() + random.random()
    return nn.Sequential(nn.Flatten(), encoder), nn.Linear(dim, 24 * numbers)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file and a module; no picture is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    monkeypatch.setattr(job, "draw", lambda *_: None)
    np.savez(tmp_path / "waves.npz", x=WAVES)
    (tmp_path / "own_nets.py").write_text(NETWORKS)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_page_loads_a_trained_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, *_ = run(capsys, "--data", "waves.npz", "--posterior", "iaf", "--dim", "2", "--out", "runs/swings", *TINY)
    assert code == 0
    page = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text("utf-8")
    namespace: dict[str, Any] = {}
    exec(page.partition("```py\n")[2].partition("```")[0], namespace)
    assert namespace["new"].shape == (16, 12, 2)
    assert namespace["q"].sample((3,)).shape == (3, 5, 2)


# ------------------------------------------------------------------------------------------- what a file is taken for


def test_a_single_array_is_split_by_the_fixed_seed() -> None:
    found = rows.divide({"anything": WAVES, "labels": np.arange(200)})
    chosen = permuted_parts(200, (160, 20, 20))
    for part, index in zip(found.parts.values(), chosen, strict=True):
        assert np.array_equal(part, WAVES[index])
    assert found.labels is not None
    assert np.array_equal(found.labels, chosen[2])
    assert found.origin == "valid and test: a tenth of 200 rows each, drawn with seed 1998"


def test_parts_that_a_file_has_stay_as_they_are() -> None:
    train, test, labels = WAVES[:150], WAVES[150:], np.arange(50)
    found = rows.divide({"train": train, "test": test, "labels": labels, "notes": np.zeros(3)})
    assert found.test is test
    assert found.labels is labels
    index, others = permuted_parts(150, (135, 15))
    assert np.array_equal(found.train, train[index])
    assert np.array_equal(found.valid, train[others])
    whole = rows.divide({"train": train, "valid": test[:20], "test": test[20:]})
    assert whole.train is train
    assert whole.labels is None


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.array([[0, 1], [1, 0]], dtype=bool), "bernoulli"),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), "bernoulli"),
        (np.array([[0, 16], [3, 2]]), "binomial:16"),
        (np.array([[0, 31], [3, 2]], dtype=np.uint8), "discretized-logistic"),
        (np.array([[0.0, 255.0], [3.0, 2.0]]), "discretized-logistic"),
        (np.array([[0, 256], [3, 2]]), "gaussian"),
        (np.array([[-1, 2], [3, 2]]), "gaussian"),
        (np.array([[0.0, 1.0], [0.3, 1.0]]), "continuous-bernoulli"),
        (np.array([[0.0, 0.9], [0.3, 0.2]]), "gaussian"),
        (np.array([[0.0, 2.5], [0.3, 0.2]]), "gaussian"),
    ],
)
def test_values_say_which_likelihood(x: np.ndarray, expected: str) -> None:
    assert values.guess({"train": x, "test": x[:1] * 0})[0] == expected


def test_whole_numbers_that_are_taken_as_real_are_called_whole() -> None:
    """A scale that is learned can shrink to each of them, so that the NLL says little."""
    for x, seen in {
        (-5, 4): "whole numbers from -5 to 4, taken as real, though a density has no bound at them; from 0 on they "
        "would do for discretized-logistic:10",
        (0, 2**25): "whole numbers from 0 to 3.35544e+07, taken as real, though a density has no bound at them",
    }.items():
        assert values.guess({"train": np.array([x])}) == ("gaussian", seen)


@pytest.mark.parametrize(
    ("text", "spec", "levels"),
    [
        ("bernoulli", ("bernoulli", None), 1),
        ("binomial:16", ("binomial", 16), 16),
        ("categorical:5", ("categorical", 5), 4),
        ("discretized-logistic", ("discretized-logistic", 256), 255),
        ("discretized-logistic:8", ("discretized-logistic", 8), 7),
        ("gaussian", ("gaussian", None), 1),
        ("gaussian:0.5", ("gaussian", 0.5), 1),
    ],
)
def test_a_likelihood_is_read(text: str, spec: tuple, levels: int) -> None:
    assert values.parse(text) == spec
    assert values.parse(text).levels == levels


@pytest.mark.parametrize("text", ["poisson", "binomial", "binomial:0", "binomial:x", "categorical:1", "bernoulli:2"])
@pytest.mark.parametrize("more", ["", "gaussian:0", "gaussian:inf"])
def test_no_other_likelihood_is(text: str, more: str) -> None:
    with pytest.raises(ConfigError, match="^likelihood: expected"):
        values.parse(more or text)


def test_sizes_follow_from_the_data(here: Path) -> None:
    config, lines = configure_own("waves.npz", {}, quick=False)
    assert (config.data, config.likelihood) == ("waves.npz", "gaussian")
    assert (config.batch, config.epochs, config.dim, config.gap_images) == (20, 150, 6, 20)
    assert "x of shape (12, 2), 160 / 20 / 20 rows" in lines[0]
    assert "seed 1998" in lines[0]
    assert lines[1].startswith("Likelihood: gaussian, a guess, since x has real numbers from -")
    assert "--likelihood bernoulli | binomial:N | " in lines[1]
    config, lines = configure_own("waves.npz", {"likelihood": "gaussian:2", "dim": 5, "lr": None}, quick=True)
    assert (config.dim, config.epochs, config.likelihood) == (5, 40, "gaussian:2")
    assert lines[1] == "Likelihood: gaussian:2, as asked for."


def test_many_rows_and_elements_have_the_sizes_of_mnist() -> None:
    train, few = np.broadcast_to(0, (32_000, 20, 20)), np.broadcast_to(0, (1001, 20, 20))
    config = sizes(rows.Rows(train, few, few, None, ""), values.parse("categorical:256"), "many.npz")
    assert (config.batch, config.width, config.dim, config.epochs, config.patience) == (128, 400, 32, 60, 12)
    assert (config.samples, config.pairs) == (500, 50_000_000 // (400 * 256))


def test_data_are_those_of_the_file(here: Path) -> None:
    data = load_own(configure_own("waves.npz", {"likelihood": "gaussian:2"}, quick=False)[0])
    assert (data.name, data.likelihood, data.scale, data.unit) == ("waves.npz", "gaussian", 2.0, "example")
    assert torch.equal(data.test, torch.from_numpy(WAVES[permuted_parts(200, (180, 20))[1]]))


# -------------------------------------------------------------------------------------------------- what is refused


def save(**arrays: Any) -> Callable[[], None]:  # noqa: ANN401 - whatever numpy takes
    return lambda: np.savez("bad.npz", allow_pickle=True, **arrays)


def promise(shape: tuple[int, ...]) -> Callable[[], None]:
    """A file whose header promises more than it has."""

    def write() -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile("bad.npz", "w") as file:
            file.writestr("train.npy", header.getvalue())

    return write


def with_at(index: Any, value: float) -> np.ndarray:  # noqa: ANN401 - whatever numpy takes
    x = WAVES.copy()
    x[index] = value
    return x


BAD = [
    (lambda: None, "data: expected a file, got bad.npz: No such file"),
    (lambda: Path("bad.npz").write_bytes(b"x"), "data: expected arrays that numpy.savez wrote, got bad.npz: BadZip"),
    (promise((100, 7)), "data: expected arrays that numpy.savez wrote, got bad.npz: ValueError"),
    (promise((10**9, 784)), "data: expected arrays that fit in memory, got train (1000000000, 784) float32, which"),
    (save(x=np.array([{}] * 99)), "data: expected numbers in bad.npz, got x of Python objects, a pickle; save"),
    (save(x=np.array(["a"] * 99)), "data: expected real numbers in bad.npz, got x of <U1; save numbers"),
    (save(a=WAVES, b=WAVES), "data: expected an array train, or one array alone to be split, got a, b; name one"),
    (save(test=WAVES), "data: expected an array train, or one array alone to be split, got test; name one train"),
    (
        save(x=WAVES[:, 0, 0]),
        "train: expected a row for each example, (N, ...), got shape (200,); write train[:, None]",
    ),
    (save(x=WAVES[:, :0]), "train: expected examples with elements in them, got shape (200, 0, 2)"),
    (save(train=WAVES, test=WAVES[:, :5]), "test: expected examples of shape (12, 2), as in train, got (5, 2)"),
    (save(x=with_at((17, 2, 1), np.nan)), "train: expected finite numbers, got nan or infinity in 1 of 200 rows, the "),
    (save(train=WAVES, test=with_at((3, 0, 0), -np.inf)), "test: expected finite numbers, got nan or infinity in 1 of"),
    (save(x=WAVES[:60]), "train: expected at least 50 rows, got 48; valid and test: a tenth of 60 rows each"),
    (save(train=WAVES, test=WAVES[:9]), "test: expected at least 10 rows, got 9"),
    (save(train=WAVES, labels=np.zeros(7, int)), "labels: expected a whole number for each of the 200 rows of train"),
    (
        save(train=WAVES, test=WAVES, labels=np.zeros(200)),
        "labels: expected a whole number for each of the 200 rows of",
    ),
    (save(x=np.ones((200, 3))), "train: expected rows that differ, got 160 equal ones"),
    (
        save(x=with_at((slice(None), 1, 0), 4)),
        "got 1 of 24 others (the first is 0 of element 2); drop or rescale these",
    ),
    (
        save(x=1e9 + 10 * np.random.default_rng(1).normal(size=(200, 3))),
        "train: expected elements that float32 rounds by less than 0.01 of their scale, got 3 of 3 others (the first",
    ),
]


@pytest.mark.parametrize(("write", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_file_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], write: Callable[[], None], message: str
) -> None:
    write()
    code, out, err = run(capsys, "--data", "bad.npz")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        (
            "bernoulli",
            np.array([[0.0, 0.5]]),
            "whole numbers from 0 to 1 for bernoulli, got 1 others (the first is 0.5 in",
        ),
        (
            "binomial:3",
            np.array([[3, 4], [5, 0]]),
            "whole numbers from 0 to 3 for binomial, got 2 others (the first is 4",
        ),
        (
            "categorical:3",
            np.array([[2, 0], [3, 0]]),
            "from 0 to 2 for categorical, got 1 others (the first is 3 in row 1",
        ),
        (
            "discretized-logistic",
            np.array([[0, -1]]),
            "from 0 to 255 for discretized-logistic, got 1 others (the first",
        ),
        ("continuous-bernoulli", np.array([[0.5, 1.5]]), "numbers from 0 to 1 for continuous-bernoulli, got 1 others"),
        ("binomial:99999999", np.array([[0, 1]]), "likelihood: expected N of at most 16777216, got binomial:99999999"),
    ],
)
def test_values_outside_a_likelihood_are_named(likelihood: str, x: np.ndarray, message: str) -> None:
    with pytest.raises(DataError) as caught:
        values.check({"train": x * 0, "test": x}, values.parse(likelihood))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "waves.csv"], "got 'waves.csv'; a file of your own ends in .npz"),
        (
            ["--likelihood", "gaussian"],
            "likelihood: expected none for digits, which has one of its own, got 'gaussian'",
        ),
        (["--data", "waves.npz", "--likelihood", "normal"], "likelihood: expected one of bernoulli | binomial:N"),
        (
            ["--prior", "iaf"],
            "prior: expected one of full_covariance, nice, realnvp, maf, spline_coupling, or NAME:STEPS",
        ),
        (["--prior", "maf:0"], "prior: expected NAME, or NAME:STEPS of a flow that has steps, got 'maf:0'"),
        (["--prior", "full_covariance:2"], "prior: expected NAME, or NAME:STEPS of a flow that has steps, got 'full_"),
        (["--option", "iaf.gate=1"], "option: expected RECIPE.OPTION=VALUE of a recipe; iaf has steps, hidden, "),
        (["--option", "nvp.steps=1"], "option: expected RECIPE.OPTION=VALUE of a recipe, one of diagonal, "),
        (["--option", "iaf.steps"], "option: expected RECIPE.OPTION=VALUE of a recipe; iaf has "),
        (["--option", "iaf.steps=0"], "option: expected what iaf takes, got steps=0: steps: expected "),
        (
            ["--option", "iaf.steps=4", "--posterior", "planar,diagonal", "--prior", "maf"],
            "option: expected those of the job's posteriors (planar, diagonal) or of its prior, got iaf",
        ),
        (["--option", "iaf.steps=two"], "option: expected what iaf takes, got steps=two: steps: expected "),
        (["--encoder-width", "-1"], "encoder-width: expected an integer of at least 0, got -1"),
        (["--networks", "own_nets:pair", "--width", "3"], "width: expected none beside networks of your own, got 3"),
        (["--networks", "own_nets"], "networks: expected module:function, got 'own_nets'; write nets:networks for"),
        (["--networks", "own_nets:none"], "networks: expected a function networks(shape, dim, numbers) -> (encoder, d"),
        (["--networks", "own_nets:nothing"], "in own_nets, got no nothing"),
        (["--networks", "no_such:f"], "networks: import of no_such: ModuleNotFoundError: No module named 'no_such'"),
        (
            ["--networks", "own_nets:one"],
            "networks(shape, dim, numbers) -> (encoder, decoder), two modules, got Linear",
        ),
        (
            ["--networks", "own_nets:once", "--dim", "2"],
            "networks: expected new modules at each call, got encoder.1.weight again",
        ),
        (
            ["--networks", "own_nets:normed", "--batch", "1196"],
            "networks: one example, as in a batch of --batch 1196: ValueError: Expected more than 1 value per channel",
        ),
        (["--networks", "own_nets:narrow"], "two examples: ValueError: decoder: expected 1 x 64 outputs per example"),
        (
            ["--networks", "own_nets:broken"],
            "two examples: TypeError: tuple indices must be integers or slices, not str",
        ),
    ],
)
def test_wrong_options_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_an_error_of_somebody_s_networks_says_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = 1 + NETWORKS.splitlines().index('    return nn.Flatten(), shape["x"]')
    assert f"(own_nets.py, line {line})" in run(capsys, "--networks", "own_nets:broken")[2]


def test_memory_that_is_not_known_refuses_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "free_memory", lambda: 200 * 24 * 12 - 1)  # float32, and 8 bytes for copies
    with pytest.raises(DataError, match="^data: expected arrays that fit in memory, got x .200, 12, 2. float32"):
        archive.read(Path("waves.npz"))
    for free in (200 * 24 * 12, None):
        monkeypatch.setattr(archive, "free_memory", lambda free=free: free)
        assert np.array_equal(archive.read(Path("waves.npz"))["x"], WAVES)


# ------------------------------------------------------------------------------------------------------- the models


def model(data: Data, posterior: str = "diagonal", **options: Any) -> VAE:  # noqa: ANN401
    torch.manual_seed(0)
    return build(data, posterior, **{"dim": 2, "width": 8, "dropout": 0.0, "options": {}, **options})


def own(x: np.ndarray, likelihood: str) -> Data:
    np.savez("own.npz", x=x)
    return load_own(configure_own("own.npz", {"likelihood": likelihood}, quick=False)[0])


@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian:50"])
def test_columns_of_any_unit_start_at_their_mean_and_deviation(here: Path, likelihood: str) -> None:
    """Metres, thousands and thousandths in one table: the features are of one size, and p(x) is about N(mean, sd)."""
    units, means = np.array([1.0, 500.0, 0.01]), np.array([3.0, -2000.0, 0.5])
    data = own(means + units * DRAWS.normal(size=(2000, 3)), likelihood)
    vae, x = model(data), data.test
    assert torch.nn.Sequential(*list(vae.encoder)[:1])(x).std(0).sub(1).abs().max() < 0.15  # pyright: ignore
    loc, scale = data.train.mean(0), data.train.std(0) if likelihood == "gaussian" else torch.tensor(50.0)
    found = vae.likelihood.log_prob(vae.decode(torch.zeros(1, 2), 3), x).mean()
    assert found.item() == pytest.approx(Normal(loc, scale).log_prob(x).sum(-1).mean().item(), rel=0.1, abs=0.5)


def test_levels_start_near_their_histogram(here: Path) -> None:
    """A logistic of the pixels' mean and deviation is 0.014 nats worse than the entropy of N(128, 20^2)."""
    x = np.clip(np.round(128 + 20 * DRAWS.normal(size=(500, 3, 4, 4))), 0, 255).astype(np.uint8)
    data = own(x, "discretized-logistic")
    vae = model(data)
    per_level = -vae(data.test).log_likelihood.mean().item() / 48
    assert per_level == pytest.approx(np.log(20 * np.sqrt(2 * np.pi * np.e)), abs=0.1)


def test_levels_without_order_start_at_their_histogram(here: Path) -> None:
    """Where the features count nothing, every element of any shape has the histogram of all; its bits are told."""
    data = own(np.array([0, 0, 0, 1, 2, 2, 2, 2])[DRAWS.integers(0, 8, (100, 7))], "categorical:3")
    vae = model(data)
    vae.decoder.get_submodule("6.levels").get_parameter("weight").data.zero_()
    counts = torch.bincount(data.train.long().flatten()) + 1
    logits = vae.decode(torch.zeros(1, 2), 7)[0]
    torch.testing.assert_close(logits.softmax(0), (counts / counts.sum()).unsqueeze(-1).expand(-1, 7))
    config = configure(posteriors=("diagonal",), samples=20, trusted_images=0)
    found = evaluate(vae.eval(), data, config)
    assert found["nll_bits"] == pytest.approx(found["nll"] / (7 * np.log(2)))
    assert found["neg_elbo_bits"] == pytest.approx(found["neg_elbo"] / (7 * np.log(2)))


@pytest.mark.parametrize(("shape", "picture"), [((6, 7), (6, 7)), ((1, 6, 7), (6, 7)), ((3, 6, 7), (6, 7, 3))])
def test_images_are_told_from_other_shapes(shape: tuple[int, ...], picture: tuple[int, ...]) -> None:
    found = as_image(torch.zeros(shape))
    assert found is not None
    assert tuple(found.shape) == picture
    others = [(7,), (40, 2), (2, 6, 7), (3, 6, 7, 5), (3, 2, 50)]
    assert all(as_image(torch.zeros(other)) is None for other in others)


def test_what_is_no_image_is_drawn_as_lines(here: Path) -> None:
    data = own(WAVES, "gaussian")
    vae = model(data).eval()
    with torch.no_grad():
        figure = plots.reconstructions({"diagonal": vae}, data, torch.device("cpu"))
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert len(drawn) == 2
    for line, channel in zip(drawn, data.test[:10].movedim(-1, 0), strict=True):
        np.testing.assert_allclose(line[np.isfinite(line)], channel.flatten())
        assert len(line) == 10 * 13  # a gap after each
    colours = own(DRAWS.integers(0, 256, (100, 3, 4, 5)), "discretized-logistic")
    with torch.no_grad():
        figure = plots.reconstructions({"diagonal": model(colours).eval()}, colours, torch.device("cpu"))
    shown = figure.axes[0].get_images()[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown[:, :5], colours.test[0].movedim(0, -1) / 255)
    np.testing.assert_allclose(shown[:, 6:11], colours.test[1].movedim(0, -1) / 255)


def test_a_wider_encoder_and_a_prior_leave_the_rest_alone() -> None:
    """Parameters by hand: an encoder layer a row each, a head of four numbers, and N(0, I) with a full covariance."""
    digits = load("digits")
    plain, wide, prior = model(digits), model(digits, encoder_width=11), model(digits, prior="full_covariance")
    layers = lambda width: 64 * width + width + width * width + width + 4 * width + 4  # noqa: E731
    assert count_parameters(wide) - count_parameters(plain) == layers(11) - layers(8)
    assert count_parameters(prior) - count_parameters(plain) == 5
    assert prior.prior is not None
    assert prior.prior.is_gaussian
    config = configure(prior="maf:3", posteriors=("diagonal",))
    assert config.model("diagonal")["prior_options"] == {"hidden": (64, 64), "context_size": 32, "steps": 3}


def test_options_of_a_recipe_go_before_the_benchmark_s_own() -> None:
    given = parse_options(["iaf.hidden=[20,30]", "iaf.gain=1", "planar.steps=7", "maf.steps=5"])
    config = configure(prior="maf", options=given)
    assert config.model("iaf")["options"] == {"hidden": (20, 30), "context_size": 32, "steps": 2, "gain": 1}
    assert config.model("planar")["options"] == {"steps": 7}
    assert config.model("iaf")["prior_options"] == {"hidden": (64, 64), "context_size": 32, "steps": 5}
    assert from_json(json.loads(json.dumps(asdict(config)))) == config


# ---------------------------------------------------------------------------------------------------------- the job


@pytest.mark.full
def test_a_job_on_a_file_with_networks_goes_on_as_it_began(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The networks give the pair (loc, log_var), which `diagonal` keeps; then the file changes, then the module."""
    arguments = ["--data", "waves.npz", "--networks", "own_nets:pair", *TINY, "--posterior", "diagonal,iaf"]
    code, out, err = run(capsys, *arguments, "--out", "out")
    assert (code, err) == (0, "")
    assert out.startswith("waves.npz: x of shape (12, 2), 160 / 20 / 20 rows")
    content = json.loads(Path("out/results.json").read_text())
    config = from_json(content["configuration"])
    assert (config.data_hash, config.networks_hash) == tuple(
        archive.sha256(Path(name)) for name in ("waves.npz", "own_nets.py")
    )
    assert content["runs"][0]["parameters"] == 2 * 25 * 6 + 7 * 48
    assert "waves.npz, test part; p(x|z): gaussian:\n\n- `networks`: own_nets:pair" in Path("out/table.md").read_text()
    code, out, _ = run(capsys, "--resume", "out")
    assert code == 0
    assert "2 of 2 runs are already finished" in out
    assert "WARNING" not in out  # its models are read again
    np.savez("waves.npz", x=WAVES + 1)
    code, out, err = run(capsys, "--resume", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "data: expected waves.npz as it was when the job began, got SHA-256" in err
    np.savez("waves.npz", x=WAVES)
    Path("own_nets.py").write_text(NETWORKS + "\n")
    code, out, err = run(capsys, "--resume", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "networks: expected the file of own_nets:pair as the job began" in err


def test_networks_of_features_get_every_posterior(here: Path) -> None:
    config, _ = configure_own("waves.npz", {"networks": "own_nets:features", "dim": 2}, quick=True)
    vae = build(load_own(config), "iaf", **config.model("iaf"))
    assert vae.posterior.features == 5
    assert isinstance(vae.likelihood, Gaussian)


def test_networks_that_numpy_draws_follow_the_seed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They followed how often anything had drawn before: two jobs of one seed differed."""
    (here / "own_nets.py").write_text(NUMPY)
    job = ["--data", "waves.npz", "--networks", "own_nets:drawn", *TINY, "--dim", "2", "--posterior", "diagonal"]
    found = []
    for out in ("one", "other"):
        assert run(capsys, *job, "--out", out)[0] == 0
        found.append(json.loads(Path(out, "results.json").read_text())["runs"][0])
    assert found[0]["valid"] == found[1]["valid"]
    assert found[0]["nll"] == found[1]["nll"]


def test_no_more_examples_are_told_than_there_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 20 test rows neither 50 are annealed nor 100 given a q of their own, whatever is asked for."""
    config, _ = configure_own("waves.npz", {"trusted_images": 50, "gaps": True, "gap_images": 100}, quick=False)
    data = load_own(config)
    counted = job.counted(config, data)
    assert (counted.trusted_images, counted.gap_images) == (20, 20)
    few = job.counted(replace(config, images=7, gaps=False), data)
    assert (few.trusted_images, few.gap_images) == (7, 100)
    options = [*TINY[:-1], "50", "--posterior", "diagonal", "--width", "8", "--out", "job"]
    code, out, _ = run(capsys, "--data", "waves.npz", *options)
    assert code == 0
    assert "trusted: NLL of 20 examples" in " ".join(out.split())


def test_arrays_that_are_not_read_are_named() -> None:
    x = DRAWS.normal(size=(100, 2))
    found = rows.divide({"train": x, "val": x, "test": x, "labels": np.arange(100), "y": x})
    assert len(found.valid) == 10
    assert found.origin.endswith("; not read: val, y")
    assert "not read" not in rows.divide({"anything": x, "labels": np.arange(100)}).origin


def test_an_element_that_only_the_training_rows_hold_constant_blows_up_no_encoder() -> None:
    """It is divided by the spread of the others: by its own, 1e-6 of that, a step of 1 would be a million."""
    train, test = DRAWS.normal(size=(60, 3)), DRAWS.normal(size=(20, 3))
    train[:, 1] = 5.0
    first, other = torch.from_numpy(train).float(), torch.from_numpy(test).float()
    data = Data("x", first, other, other, 1, "gaussian", scale=1.0)
    standard = Standardize(data)(data.test)
    assert standard.abs().max() < 20
    free = torch.tensor([True, False, True])
    torch.testing.assert_close(Standardize(data)(data.train)[:, free].std(0), torch.ones(2))


def test_a_change_where_the_networks_come_from_is_seen(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that takes them from another one: either file may change."""
    for name in ("other_nets", "taking_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (here / "other_nets.py").write_text(NETWORKS)
    (here / "taking_nets.py").write_text("from other_nets import pair\n")
    before = source_hash("taking_nets:pair")
    (here / "other_nets.py").write_text(f"{NETWORKS}\n# changed\n")
    assert source_hash("taking_nets:pair") != before
    assert source_hash("own_nets:pair") == archive.sha256(here / "own_nets.py")


@pytest.mark.full
def test_jobs_on_other_files_are_not_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shift in (("first", 0), ("second", 1)):
        np.savez("waves.npz", x=WAVES + shift)
        assert run(capsys, "--data", "waves.npz", *TINY, "--posterior", "diagonal", "--out", name)[0] == 0
    code, _, err = run(capsys, "compare", "first", "second")
    assert code == 2
    assert err.startswith("folders: expected jobs of one data-hash, got ")
