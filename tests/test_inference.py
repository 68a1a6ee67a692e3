"""What the benchmark trains on and says of inference, against hands and closed forms."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import flowpost
from benchmarks import __main__ as cli
from benchmarks import pages, plots
from benchmarks.compare import compare, table
from benchmarks.config import Config, ConfigError, configure, from_json
from benchmarks.data import Data, load
from benchmarks.figures import ANNEALED, evaluate
from benchmarks.inference import RANKED, SIMULATIONS, draw_pixels, model_ranks
from benchmarks.job import begin
from benchmarks.models import build
from benchmarks.objective import bound_name, negative_bound, objective_loss, objective_name, objective_pass
from benchmarks.report import Result
from benchmarks.train import validate
from flowpost.calibration import rank_ecdf
from flowpost.evaluation import annealed_estimate
from flowpost.posterior import Sample
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical, Likelihood, VAEOutput
from tests.linear_gaussian import LinearGaussian, fitted

CPU = torch.device("cpu")
IWAE = {"objective": "iwae", "train_samples": 2}


def output(log_likelihood: list, log_prior: list, log_q: list, kl: Tensor | None = None) -> VAEOutput:
    first, second, third = (torch.tensor(v, dtype=torch.float64) for v in (log_likelihood, log_prior, log_q))
    return VAEOutput(first, second, third, kl, Sample(first, third, first))


@pytest.fixture(scope="module")
def digits() -> tuple[VAE, Data]:
    torch.manual_seed(0)
    data = load("digits")
    return build(data, "planar", dim=3, width=16, dropout=0.0, options={"steps": 2}), data


# ------------------------------------------------------------------------------------------------ what is maximized


def test_the_loss_is_the_objective_by_hand() -> None:
    two = output([[-1.0, -2.0], [-3.0, -4.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [3.0, 1.0]])
    weights = torch.tensor([[-2.0, -3.0], [-6.0, -5.0]]).double().exp()  # exp(log_likelihood + log_prior - log_q)
    elbos = torch.tensor([-4.0, -4.0]).double()
    assert torch.allclose(negative_bound(two, configure()), -elbos)
    assert torch.allclose(negative_bound(two, configure(**IWAE)), -weights.mean(0).log())
    assert objective_loss(two, 1.0, configure(**IWAE)).item() == pytest.approx(-weights.mean(0).log().mean().item())
    renyi = -2 * weights.sqrt().mean(0).log()
    assert torch.allclose(negative_bound(two, configure(objective="renyi", train_samples=2)), renyi)
    # Reconstruction -2, -3; KL 2, 1.
    assert objective_loss(two, 0.5, configure()).item() == pytest.approx(2.5 + 0.5 * 1.5)
    assert objective_loss(two, 0.5, configure(free_bits=1.4)).item() == pytest.approx(2.5 + 0.5 * 1.5)
    assert objective_loss(two, 0.5, configure(free_bits=6.0)).item() == pytest.approx(2.5 + 0.5 * 6.0)
    closed = output([-1.0, -2.0], [0.0, 0.0], [9.0, 9.0], torch.tensor([1.0, 3.0]).double())
    assert objective_loss(closed, 1.0, configure()).item() == pytest.approx(1.5 + 2.0)
    assert objective_loss(closed, 1.0, configure(free_bits=3.0)).item() == pytest.approx(1.5 + 3.0)


@pytest.mark.parametrize(
    ("options", "shape", "gradient"),
    [
        ({}, (), "standard"),
        ({"gradient": "stl"}, (), "stl"),
        ({"train_samples": 3}, (3,), "standard"),
        ({"objective": "iwae", "gradient": "dreg"}, (5,), "dreg"),
        ({"objective": "renyi", "alpha": 0.8}, (5,), "standard"),
        ({"objective": "renyi", "alpha": 0.8, "gradient": "dreg"}, (5,), "dreg"),
    ],
)
def test_a_step_s_gradient_is_the_one_asked_for(
    digits: tuple[VAE, Data], options: dict, shape: tuple[int, ...], gradient: str
) -> None:
    vae, data = digits
    config, x = configure(**options), data.train[:16]

    def gradients(out: VAEOutput) -> Tensor:
        loss = objective_loss(out, 0.7, config)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(vae.parameters()))])

    torch.manual_seed(1)
    found = gradients(objective_pass(vae, x, config))
    torch.manual_seed(1)
    alpha = config.alpha if gradient == "dreg" else 0.0
    assert torch.equal(found, gradients(vae(x, shape, gradient, alpha=alpha)))
    torch.manual_seed(1)
    other = gradients(vae(x, shape, "stl" if gradient == "standard" else "standard"))
    assert not torch.allclose(found, other)  # the control: another estimator of the same noise


def test_early_stopping_reads_the_bound_that_is_trained(digits: tuple[VAE, Data]) -> None:
    """The same noise, 4 samples: -IWAE(4) is below -ELBO, which free bits leave alone."""
    vae, data = digits
    elbo, free = (validate(vae, data.valid, configure(free_bits=nats)) for nats in (0.0, 50.0))
    assert elbo == free
    iwae = validate(vae, data.valid, configure(objective="iwae", train_samples=4))
    assert iwae < elbo - 0.1
    assert iwae < validate(vae, data.valid, configure(objective="renyi", train_samples=4)) < elbo


def test_an_objective_has_its_name_and_defaults() -> None:
    dreg = configure(objective="iwae", gradient="dreg")
    assert (dreg.train_samples, bound_name(dreg), objective_name(dreg)) == (5, "-IWAE(5)", "iwae5-dreg")
    renyi = configure(objective="renyi")
    assert (renyi.alpha, bound_name(renyi), objective_name(renyi)) == (0.5, "-Renyi(0.5, 5)", "renyi0.5-5")
    assert (objective_name(configure()), bound_name(configure())) == ("", "-ELBO")
    assert objective_name(configure(gradient="stl", train_samples=2, free_bits=1.5)) == "elbo2-stl-free1.5"
    configure(objective="iwae", train_samples=1, gradient="stl")  # one sample: the ELBO, where stl is unbiased


# --------------------------------------------------------------------------------------------- what is read of a model


class Images(nn.Module):
    """Makes a model's vectors look like images to the benchmark."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def linear(*, shift: float = 0.0, name: str = "full_covariance", dim: int = 3) -> tuple[VAE, Data, LinearGaussian]:
    torch.manual_seed(5)
    model = LinearGaussian(dim)
    vae = fitted(model, name, shift=shift)
    vae.encoder = Images()
    x = model.draw(200)[1].unsqueeze(1)
    return vae, Data("linear", x, x, x, 1, "gaussian"), model


SETTINGS = Config(samples=400, gaps=True, gap_images=200, gap_steps=400, threads=1, trusted_images=0)


def test_an_exact_posterior_has_no_gap_and_weights_that_are_all_equal() -> None:
    vae, data, model = linear()
    settings = replace(SETTINGS, gap_steps=20, trusted_images=20, seeds=(3, 4))
    figures = evaluate(vae, data, settings, seed=3)
    each = model.evidence(data.test.flatten(1))
    assert figures["trusted_images_nll"] == pytest.approx(-each[:20].mean().item(), abs=1e-6)
    alone = annealed_estimate(vae, data.test[:20], *ANNEALED, prior_chains=0)
    torch.testing.assert_close(alone.log_p, each[:20].double(), rtol=0, atol=1e-6)
    assert (alone.standard_error < 1e-6).all()
    # An eighth of the annealed estimate is that of chains from the prior, whose weights are not all equal.
    assert figures["trusted_nll"] == pytest.approx(-each[:20].mean().item(), abs=0.02)
    assert figures["trusted_error"] == pytest.approx(0, abs=0.02)
    assert "trusted_nll" not in evaluate(vae, data, replace(settings, gaps=False), seed=4)
    evidence = each.mean().item()
    assert figures["nll"] == pytest.approx(-evidence, abs=1e-6)
    assert figures["local_nll"] == pytest.approx(-evidence, abs=0.01)  # the fits stray a little from where they start
    assert figures["neg_elbo"] == pytest.approx(-evidence, abs=0.1)  # the closed-form KL leaves the likelihood's noise
    assert figures["ess"] == pytest.approx(400, abs=1e-3)
    assert (figures["heavy_tails"], figures["active_units"]) == (0, 3)
    for key in ("approximation_gap", "amortization_gap"):
        assert figures[key] == pytest.approx(0, abs=0.01)
    information = -0.5 * torch.logdet(model.covariance).item()
    assert figures["mutual_information"] == pytest.approx(information, abs=0.35)


@pytest.mark.full
def test_the_gap_is_split_as_its_closed_form_says() -> None:
    """The best factorized Gaussian, moved by 0.5: the family loses log det, the encoder ``shift' P shift / 2``."""
    vae, data, model = linear(shift=0.5, name="diagonal")
    figures = evaluate(vae, data, SETTINGS)
    family = 0.5 * (model.precision.diagonal().log().sum() - model.precision.logdet()).item()
    encoder = 0.5 * 0.25 * model.precision.sum().item()
    assert family > 0.05
    assert figures["approximation_gap"] == pytest.approx(family, abs=0.03)
    assert figures["amortization_gap"] == pytest.approx(encoder, rel=0.1)
    without = evaluate(vae, data, replace(SETTINGS, gaps=False))
    assert without == {key: figures[key] for key in without}
    assert set(figures) - set(without) == {"approximation_gap", "amortization_gap", "local_nll", "local_heavy_tails"}


def test_two_latents_are_integrated_under_a_prior_whose_reach_is_known() -> None:
    vae, data, model = linear(dim=2)
    settings = replace(SETTINGS, dim=2, gap_steps=1, gap_images=2)
    evidence = model.evidence(data.test.flatten(1)).mean().item()
    assert evaluate(vae, data, settings)["exact_nll"] == pytest.approx(-evidence, abs=1e-4)
    for other in ({"prior": "maf:3"}, {"gaps": False}, {"dim": 3}):
        assert "exact_nll" not in evaluate(vae, data, replace(settings, **other))


class Constant(nn.Module):
    """A decoder that does not read z."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("outputs", outputs)

    def forward(self, z: Tensor) -> Tensor:
        return self.get_buffer("outputs").expand(len(z), *self.get_buffer("outputs").shape)


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [
        (Binomial(16), torch.tensor([[-2.0, 0.0, 1.0, 3.0]])),
        (Bernoulli(), torch.tensor([[-2.0, 0.0, 1.0, 3.0]])),
        (Categorical(3), torch.tensor([[0.0, 1.0, -1.0, 2.0], [1.0, 1.0, 3.0, -4.0], [2.0, 0.0, 1.0, 1.0]])),
    ],
)
def test_images_drawn_from_a_model_have_its_mean(likelihood: Likelihood, outputs: Tensor) -> None:
    """Six standard errors over four pixels: a false alarm in 1e8."""
    torch.manual_seed(0)
    vae = VAE(nn.Flatten(), flowpost.diagonal(4, 2), Constant(outputs), likelihood)
    x = draw_pixels(vae, torch.randn(4000, 2), torch.Size((2, 2)))
    assert x.shape == (4000, 2, 2)
    error = x.std(0).flatten() / 4000**0.5
    assert ((x.mean(0).flatten() - likelihood.mean(outputs)).abs() < 6 * error).all()


@pytest.mark.parametrize(("stretch", "inside"), [(1.0, 2), (0.7, 0)])
def test_ranks_are_uniform_where_the_posterior_is_right(stretch: float, inside: int) -> None:
    """A decoder that does not read z: the posterior is the prior. Control: one that is too narrow."""
    torch.manual_seed(0)
    posterior = flowpost.diagonal(4, 2)
    assert isinstance(posterior.head, nn.Linear)
    raw = math.log(math.expm1(stretch - 1e-3)) - math.log(math.expm1(1 - 1e-3))
    with torch.no_grad():
        posterior.head.weight.zero_()
        posterior.head.bias.copy_(torch.tensor([0.0, 0.0, raw, raw]))
    vae = VAE(nn.Flatten(), posterior, Constant(torch.zeros(1, 4)), Bernoulli())
    image = torch.zeros(1, 2, 2)
    ranks = model_ranks(vae, Data("none", image, image, image, 1, "bernoulli"), CPU)
    assert ranks.shape == (SIMULATIONS, 2)
    assert rank_ecdf(ranks, RANKED, 0.999).inside.sum() == inside


# ------------------------------------------------------------------------------------------------------ whole jobs


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, threads = tmp_path_factory.mktemp("iwae"), torch.get_num_threads()
    arguments = ["--objective", "iwae", "--gradient", "dreg", "--train-samples", "3", "--warmup", "1", "--gaps"]
    arguments += ["--quick", "--epochs", "2", "--width", "16", "--dim", "3", "--samples", "50"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.configure.__globals__["QUICK"], "gap_steps", 5)
        for name in ("curves", "bounds", "reconstructions", "samples", "interpolation", "latent"):
            patch.setattr(plots, name, lambda *_: Figure())  # those of every job
        code = cli.main([*arguments, "--posterior", "diagonal,iaf", "--out", str(folder)])
    torch.set_num_threads(threads)
    assert code == 0
    return folder


@pytest.mark.full
def test_a_job_keeps_its_objective_and_splits_the_gap(job_folder: Path) -> None:
    content = json.loads((job_folder / "results.json").read_text())
    config = from_json(content["configuration"])
    assert (config.objective, config.gradient, config.train_samples, config.gaps) == ("iwae", "dreg", 3, True)
    assert config.kl_warmup == 1
    words = (job_folder / "table.md").read_text()
    head, _, *body = [line for line in words.splitlines() if line.startswith("|")]
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    run = content["runs"][0]
    cells = dict(zip(titles, [cell.strip() for cell in body[0].strip("|").split("|")], strict=True))
    titled = {"approx": "approximation_gap", "amort": "amortization_gap", "local": "local_nll"}
    titled |= {"k local": "local_heavy_tails", "k>0.7": "heavy_tails"}
    for title, key in titled.items():
        assert cells[title] == f"{run[key]:,.2f}"
    assert (cells["ESS"], cells["MI"]) == (f"{run['ess']:.0f}", f"{run['mutual_information']:.2f}")
    assert "trained on IWAE(3), gradient dreg" in words
    assert {path.stem for path in job_folder.glob("*.png")} >= {"gaps", "calibration"}


def runs(*figures: float, posterior: str = "diagonal", first: int = 0) -> list[Result]:
    keys = ("neg_elbo", "nll")
    return [
        {"posterior": posterior, "seed": seed, "error": None, "parameters": 7000, **dict.fromkeys(keys, figure)}
        for seed, figure in enumerate(figures, first)
    ]


def test_compared_rows_are_paired_by_seed() -> None:
    """Of seeds 1 and 2, which both have: 1 - 4 and 2 - 6, mean -3.5, standard error 0.5."""
    rows = [
        (configure(), "diagonal", runs(9.0, 4.0, 6.0)),
        (configure(objective="iwae", gradient="dreg"), "diagonal", runs(1.0, 2.0, first=1)),
        (configure(options={"iaf": {"gain": 1, "hidden": (9, 9)}}), "iaf", runs(3.0, posterior="iaf", first=7)),
    ]
    found = table(rows)
    assert found.header == [
        "posterior",
        "trained on",
        "dim",
        "seeds",
        "-ELBO",
        "NLL",
        "less the reference's -ELBO",
        "less the reference's NLL",
        "params",
    ]
    body = [found.rows[2], *found.rows[:2]]  # by -ELBO, 1.50, 3.00 and 6.33
    assert body[0] == ["diagonal", "ELBO", "16", "3", "6.33 ± 1.45", "6.33 ± 1.45", *["+0.00 ± 0.00"] * 2, "7,000"]
    assert body[1] == ["diagonal", "IWAE(5) dreg", "16", "2", *["1.50 ± 0.50"] * 2, *["-3.50 ± 0.50"] * 2, "7,000"]
    assert body[2] == ["iaf", "ELBO gain=1, hidden=[9, 9]", "16", "1", "3.00", "3.00", "-", "-", "7,000"]


def test_compared_rows_say_in_what_their_training_differs() -> None:
    """Jobs of other widths, rates or free bits were rows of one name."""
    configs = configure(), configure(width=64, lr=0.001), configure(free_bits=2.0), configure(train_samples=4)
    found = table([(config, "diagonal", runs(float(i))) for i, config in enumerate(configs)])
    assert [row[1] for row in found.rows] == [
        "ELBO width 256 lr 0.003",
        "ELBO width 64 lr 0.001",
        "ELBO free bits 2 width 256 lr 0.003",
        "ELBO 4 samples width 256 lr 0.003",
    ]


def test_a_figure_that_only_some_jobs_have_is_compared_where_it_is() -> None:
    split = [run | {"local_nll": run["nll"] - 1} for run in runs(9.0, 4.0)]
    found = table([(configure(gaps=True), "diagonal", split), (configure(), "iaf", runs(3.0, posterior="iaf"))])
    columns = ["local", "less the reference's local"]
    assert [[row[found.header.index(name)] for name in columns] for row in found.rows] == [
        ["-", "-"],
        ["5.50 ± 2.50", "+0.00 ± 0.00"],
    ]


def test_compared_rows_are_ranked_by_the_trusted_nll() -> None:
    """Differences stay those from the first that came; where one row has no such figure, -ELBO ranks them."""
    figures = {"diagonal": 9.0, "iaf": 8.0, "planar": 8.5}
    rows = [
        (configure(), name, [run | {"trusted_nll": figure} for run in runs(figure, posterior=name)])
        for name, figure in figures.items()
    ]
    found = table(rows)
    apart = found.header.index("less the reference's NLL")
    assert [(row[0], row[apart]) for row in found.rows] == [
        ("iaf", "-1.00"),
        ("planar", "-0.50"),
        ("diagonal", "+0.00"),
    ]
    rows[1][2][0].pop("trusted_nll")
    rows[0][2][0]["trusted_nll"] = 1.0
    assert [row[0] for row in table(rows).rows] == ["iaf", "planar", "diagonal"]


def test_posteriors_of_other_sizes_are_told_apart() -> None:
    """Of a preset with --hidden or --depth, or of another data set's usual sizes; before, the rows looked alike."""
    small, wide = ({"steps": 2, "hidden": [width], "context_size": 4} for width in (8, 16))
    configs = [replace(configure(), flows={"iaf": sizes}) for sizes in (small, wide)]
    configs.append(replace(configs[0], options={"iaf": {"hidden": [32]}}))
    found = table([(config, "iaf", runs(float(i), posterior="iaf")) for i, config in enumerate(configs)])
    assert [row[1] for row in found.rows] == ["ELBO hidden=[8]", "ELBO hidden=[16]", "ELBO hidden=[32]"]
    other = [(config, "maf", runs(float(i), posterior="maf")) for i, config in enumerate(configs[:2])]
    assert {row[1] for row in table(other).rows} == {"ELBO"}


def test_compared_jobs_fill_a_page(job_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are kept beside it without the curves, and give the page again."""
    page = tmp_path / "some.md"
    page.write_text("above\n<!-- both -->\n<!-- end of both -->\nbelow\n")
    assert cli.main(["compare", str(job_folder), str(job_folder), "--page", str(page), "--mark", "both"]) == 0
    kept = tmp_path / "_figures" / "some" / "both.json"
    found = json.loads(kept.read_text())
    job = json.loads((job_folder / "results.json").read_text())
    assert [each["command"] for each in found["runs"]] == [job["command"]] * 2
    assert [each["seconds"] for each in found["runs"]] == [job["seconds"]] * 2
    assert found["runs"][0]["runs"][0]["local_nll"] == job["runs"][0]["local_nll"]
    assert "train" not in found["runs"][0]["runs"][0]
    printed = capsys.readouterr().out
    assert printed.partition("\n\n")[0] in page.read_text()
    assert pages.text(kept) == page.read_text()
    assert cli.main(["compare", str(job_folder), "--page", str(page)]) == 2
    assert "expected the marks <!-- tables -->" in capsys.readouterr().err


def test_what_failed_is_told_beside_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mean over the seeds that are left would pass for one over all."""
    report = begin(configure(seeds=(0, 1)), tmp_path)
    report.add(runs(4.0)[0] | {"skipped_steps": 0})
    report.add({"posterior": "diagonal", "seed": 1, "error": "no finite loss", "skipped_steps": 10})
    assert cli.main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\| diagonal \| ELBO \| 16 \| 1 \| 4.00 ", out, re.MULTILINE)
    assert "diagonal trained on ELBO, seed 1: failed: no finite loss" in out


def test_jobs_are_compared_from_the_command_line(job_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(job_folder), str(job_folder)]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^\| (diagonal|iaf) \| IWAE\(3\) dreg \| 3 \| 1 \|", out, re.MULTILINE)) == 4
    assert "less the reference's local" in out


@pytest.mark.parametrize(
    ("key", "option", "values"),
    [
        ("trusted_nll", "trusted_images", (50, 20)),
        ("approximation_gap", "gap_steps", (500, 200)),
        ("nll", "images", (0, 20)),
    ],
)
def test_figures_of_unequal_meaning_are_not_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, option: str, values: tuple[int, int]
) -> None:
    """Where neither has the figure, what is behind it does not matter."""
    folders = [tmp_path / str(value) for value in values]
    for folder, value in zip(folders, values, strict=True):
        report = begin(replace(configure(), **{option: value}), folder)
        report.add(runs(4.0)[0] | {"error": None, "skipped_steps": 0, "neg_elbo": 4.0, key: 4.0})
    assert cli.main(["compare", *map(str, folders)]) == 2
    assert capsys.readouterr().err.startswith(f"folders: expected jobs of one {option.replace('_', '-')}, got ")
    for folder in folders if key != "nll" else ():
        text = (folder / "results.json").read_text()
        (folder / "results.json").write_text(text.replace(f'"{key}"', '"unknown"'))
        assert cli.main(["compare", *map(str, folders[:1])]) == 0
    assert cli.main(["compare", *map(str, folders)]) == (2 if key == "nll" else 0)


def test_jobs_that_cannot_be_compared_are_refused(job_folder: Path, tmp_path: Path) -> None:
    begin(configure("mnist-static", samples=50), tmp_path)
    with pytest.raises(ConfigError, match="^folders: expected jobs of one data, got digits, mnist-static"):
        compare([job_folder, tmp_path])
    with pytest.raises(ConfigError, match="^folder: expected that of a job, got .*nowhere"):
        compare([tmp_path / "nowhere"])
