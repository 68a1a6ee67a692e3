"""`--decoder-of FOLDER`: posteriors from a cold start, on a decoder that is trained already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.__main__ import main

SMALL = ["--quick", "--epochs", "2", "--width", "16", "--dim", "2", "--samples", "2", "--trusted-images", "0"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job of two posteriors."""
    folder = tmp_path_factory.mktemp("frozen") / "job"
    assert main([*SMALL, "--posterior", "diagonal,planar", "--out", str(folder)]) == 0
    return folder


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "models" / f"{name}-0.safetensors")


def test_the_first_model_s_decoder_stays_and_the_rest_learns(job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cold"
    assert main([*SMALL, "--decoder-of", str(job), "--posterior", "planar", "--out", str(folder)]) == 0
    first, cold, warm = tensors(job, "diagonal"), tensors(folder, "planar"), tensors(job, "planar")
    decoder = [name for name in first if name.startswith("decoder.")]
    assert len(decoder) == 6
    assert all(torch.equal(cold[name], first[name]) for name in decoder)
    assert not any(torch.equal(cold[name], warm[name]) for name in decoder)
    table = " ".join((folder / "table.md").read_text().split())
    assert f"`decoder, frozen, of`: {job}" in table
    # The same seed, the same start: what another decoder teaches is another posterior.
    assert not torch.equal(cold["posterior.head.weight"], warm["posterior.head.weight"])


def test_posteriors_on_two_decoders_are_told_apart(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, both rows were trained on `ELBO frozen decoder`, with the difference of the decoders as theirs."""
    other = tmp_path / "other"
    shutil.copytree(job, other)
    for name, of in (("a", job), ("b", other), ("c", job)):
        assert main([*SMALL, "--decoder-of", str(of), "--posterior", "diagonal", "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert f"| ELBO frozen decoder of {job} |" in said
    assert f"| ELBO frozen decoder of {other} |" in said
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.count("| ELBO frozen decoder |") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "8"], "job: RuntimeError: Error(s) in loading state_dict for Sequential: size mismatch"),
        (["--prior", "maf"], "prior: expected none beside decoder-of, which was trained for N(0, I), got maf"),
    ],
)
def test_what_does_not_fit_is_one_line(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    command = [*SMALL, "--decoder-of", str(job), "--posterior", "diagonal", *options, "--out", str(tmp_path / "no")]
    assert main(command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_no_job_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--decoder-of", str(tmp_path), "--out", str(tmp_path / "no")]) == 2
    assert "decoder-of: expected the folder of a job with a model of these sizes, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("models/diagonal-0.safetensors", "cut", "SafetensorError: Error while deserializing header"),
        ("results.json", "[]", "TypeError: list indices must be integers"),
    ],
)
def test_a_damaged_job_is_one_line(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, message: str
) -> None:
    folder = shutil.copytree(job, tmp_path / "job")
    (folder / file).write_text(text)
    assert main([*SMALL, "--decoder-of", str(folder), "--posterior", "diagonal", "--out", str(tmp_path / "no")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_decoder_of_a_learned_prior_is_refused(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was trained for that prior, and the posteriors here would be measured with N(0, I)."""
    folder = shutil.copytree(job, tmp_path / "job")
    report = json.loads((folder / "results.json").read_text())
    report["configuration"]["prior"] = "maf"
    (folder / "results.json").write_text(json.dumps(report))
    assert main([*SMALL, "--decoder-of", str(folder), "--posterior", "diagonal", "--out", str(tmp_path / "no")]) == 2
    wanted = "decoder-of: expected a decoder that was trained for N(0, I), got one for prior maf"
    assert capsys.readouterr().err.splitlines()[-1] == wanted


def test_a_decoder_of_other_data_is_refused(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of equal sizes it would be loaded, and what a posterior makes of it would say nothing."""
    folder = shutil.copytree(job, tmp_path / "job")
    report = json.loads((folder / "results.json").read_text())
    report["configuration"] |= {"data": "mine.npz", "data_hash": "abc", "likelihood": "bernoulli"}
    (folder / "results.json").write_text(json.dumps(report))
    assert main([*SMALL, "--decoder-of", str(folder), "--posterior", "diagonal", "--out", str(tmp_path / "no")]) == 2
    wanted = "decoder-of: expected a decoder that was trained on the same data, digits, got abc, bernoulli"
    assert capsys.readouterr().err.splitlines()[-1] == wanted
