"""`python -m benchmarks sandwich`, on a job of moments, and the integral that it holds two latents against."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian, fitted
from test_benchmarks import TINY, run_cli
from torch.distributions import MultivariateNormal

import flowpost
from benchmarks import __main__ as cli
from benchmarks import sandwich
from benchmarks.config import configure
from benchmarks.job import begin, load_data
from benchmarks.models import build
from benchmarks.own.setup import configure_own
from benchmarks.quadrature import quadrature
from benchmarks.report import summarize
from benchmarks.sandwich.page import Plan, picture, table
from flowpost.chains import Chains
from flowpost.vae import VAE, Gaussian

FEW = ["--count", "3", "--chains", "2", "--temperatures", "4", "--leapfrogs", "1", "--samples", "30"]


def test_the_integral_is_the_evidence() -> None:
    model = LinearGaussian(2)
    x = model.draw(20)[1]
    vae = fitted(model).float()
    found = quadrature(vae, x.float(), points=300)
    torch.testing.assert_close(found, model.evidence(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scale", "resolved"), [(0.2, True), (0.05, False)])
def test_an_integral_over_a_grid_that_is_too_coarse_is_none(
    scale: float,
    resolved: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was off by 13 nats, either way, where p(z|x) lay between the points."""
    torch.manual_seed(0)
    decoder = torch.nn.Linear(2, 3, bias=False)
    vae = VAE(torch.nn.Linear(3, 4), flowpost.diagonal(4, 2), decoder, Gaussian(scale))
    z, weight = torch.randn(20, 2), 3 * decoder.weight.data
    decoder.weight.data = weight
    x = z @ weight.T + scale * torch.randn(20, 3)
    exact = MultivariateNormal(torch.zeros(3), weight @ weight.T + scale**2 * torch.eye(3)).log_prob(x)
    monkeypatch.setattr("benchmarks.quadrature.MOST", 100)
    found = quadrature(vae, x, points=50)
    assert bool(found.isnan().all()) != resolved
    if resolved:
        torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.02)


def test_a_figure_of_some_seeds_is_their_mean() -> None:
    found = summarize([{"seed": 0, "nll": 1.0, "trusted_nll": 5.0}, {"seed": 1, "nll": 2.0}])
    assert found == {"nll": {"mean": 1.5, "sd": pytest.approx(0.5**0.5)}, "trusted_nll": {"mean": 5.0, "sd": None}}


@pytest.mark.full
def test_a_page_of_a_job(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.job.draw", lambda *_: None)
    job, out, page = tmp_path / "job", tmp_path / "out", tmp_path / "page.md"
    page.write_text("# A page\n\n<!-- own -->\n\n<!-- end of own -->\n\nthe end\n")
    assert cli.main([*TINY, "--posterior", "diagonal", "--dim", "2", "--out", str(job)]) == 0
    trained_on(job, "cuda:0")
    code, text, _ = run_cli(capsys, "sandwich", str(job), *FEW, "--out", str(out), "--page", str(page), "--mark", "own")
    assert code == 0
    assert "diagonal, 2 latents, its own: gap " in text
    rows = json.loads((out / "sandwich.json").read_text())["rows"]
    assert [(row["posterior"], row["images"], row["count"]) for row in rows] == [
        ("diagonal", "its own", 3),
        ("diagonal", "test", 3),
    ]
    assert all(abs(row[key]) < 10 for row in rows for key in ("gap", "sampled", "refined"))
    assert rows[1]["residual"] is None
    written = page.read_text()
    assert (out / "sandwich.md").read_text().strip() in written
    assert "![How far each estimate" in written
    assert "Measured on " in written
    assert written.endswith("the end\n")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def trained_on(job: Path, device: str) -> None:
    """Let the job say that it ran on another device."""
    content = json.loads((job / "results.json").read_text())
    content["configuration"]["device"] = device
    (job / "results.json").write_text(json.dumps(content))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    begin(configure(samples=50), tmp_path)
    code, _, error = run_cli(capsys, "sandwich", str(tmp_path), "--device", "cuda", "--out", str(tmp_path / "out"))
    assert code == 2
    assert error.startswith("device: cuda is asked for, but PyTorch finds no CUDA device")


def test_a_folder_without_a_job_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = run_cli(capsys, "sandwich", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 2
    assert error.startswith("folder: expected that of a job")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--count", "--chains", "--temperatures", "--leapfrogs", "--samples", "--threads"])
def test_numbers_out_of_range_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str) -> None:
    code, _, error = run_cli(capsys, "sandwich", str(tmp_path), option, "0")
    assert (code, error.count("\n")) == (2, 1)
    assert option in error


def test_a_job_on_a_file_of_one_s_own_is_bracketed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two latents and N(0, I) the integral too; how far out a learned prior reaches nobody knows."""
    np.savez(tmp_path / "mine.npz", x=np.random.default_rng(0).normal(size=(100, 3)))
    for prior, images in (("", ["its own", "test"]), ("full_covariance", ["its own"])):
        config, _ = configure_own(str(tmp_path / "mine.npz"), {"dim": 2, "width": 4, "prior": prior}, quick=True)
        begin(config, tmp_path / f"job{prior}")
        data = load_data(config)
        made = {"diagonal": build(data, "diagonal", **config.model("diagonal")).eval()}
        monkeypatch.setattr(sandwich, "models", lambda *_, made=made: made)
        out = tmp_path / f"out{prior}"
        code, _, error = run_cli(capsys, "sandwich", str(tmp_path / f"job{prior}"), *FEW, "--out", str(out))
        assert (code, error) == (0, "")
        rows = json.loads((out / "sandwich.json").read_text())["rows"]
        assert [row["images"] for row in rows] == images
        assert {row["job"] for row in rows} == {str(tmp_path / f"job{prior}")}


def test_rows_of_two_jobs_are_told_apart() -> None:
    """Before, both were `iaf` of 16 latents."""
    figures = dict.fromkeys(
        ("above", "gap", "gap_error", "worst", "sampled", "sampled_error", "heavy", "refined", "refined_error")
        + ("refined_heavy", "acceptance", "residual", "seconds"),
        1.0,
    )

    def named(*rows: dict) -> list[str]:
        whole = [{"dim": 16, "images": "its own", "count": 3, **figures, **row} for row in rows]
        plan = Plan(count=3, chains=2, temperatures=4, leapfrogs=1, samples=30)
        found = [row[0] for row in table(whole, plan).rows]
        ticks = [label.get_text() for label in picture(whole).axes[0].get_yticklabels()]
        assert len({*ticks}) == len(whole)
        return found

    elbo, iwae = ({"posterior": "iaf", "job": job} for job in ("elbo", "iwae"))
    assert named(elbo, iwae) == ["iaf, elbo", "iaf, iwae"]
    assert named(elbo, elbo | {"images": "test"}, elbo | {"posterior": "maf"}) == ["iaf", "iaf", "maf"]
    assert named({"posterior": "iaf"}, {"posterior": "maf"}) == ["iaf", "maf"]  # of an earlier version


def test_the_chains_from_the_prior_are_as_many_as_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(config := configure(samples=50, dim=2, width=4), tmp_path / "job")
    made = {"diagonal": build(load_data(config), "diagonal", **config.model("diagonal")).eval()}
    monkeypatch.setattr(sandwich, "models", lambda *_: made)
    walked: list[int] = []

    def counted(chains: Chains, *given: object) -> None:
        Chains.__init__(chains, *given)  # pyright: ignore[reportArgumentType]
        walked.append(chains.prior_chains)

    monkeypatch.setattr("flowpost.sandwich.Chains", type("Counted", (Chains,), {"__init__": counted}))
    for given, expected, said in (
        ([], 2, "half as many from the prior"),
        (["--prior-chains", "5"], 5, "5 from the prior"),
    ):
        walked.clear()
        out = tmp_path / f"out{expected}"
        code, _, error = run_cli(capsys, "sandwich", str(tmp_path / "job"), *FEW, *given, "--out", str(out))
        assert (code, error) == (0, "")
        assert walked == [expected, expected]  # on the model's own images, and on test images
        assert said in (out / "sandwich.md").read_text()


def test_the_images_are_drawn_again() -> None:
    """What the refined proposal is tried on is what the bounds are of."""
    vae = fitted(LinearGaussian(2))
    seen = []
    original = vae.encode
    vae.encode = lambda x, y=None: (seen.append(x), original(x, y))[1]  # pyright: ignore[reportAttributeAccessIssue]
    with sandwich.seeded(sandwich.EVALUATION_SEED, torch.device("cpu")):
        sandwich.sandwich(vae, 3, (5,), 2, 2, 1, samples=30)
    assert torch.equal(seen[0], sandwich._drawn_again(vae, 3, (5,)))
