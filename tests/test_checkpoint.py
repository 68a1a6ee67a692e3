"""An interrupted job goes on to the same bits, whatever was killed or cut; skipped steps say their tensors."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import __main__ as cli
from benchmarks import checkpoint, job
from benchmarks.checkpoint import KEPT, PARTS, Keeper
from benchmarks.config import Config, ConfigError, configure
from benchmarks.data import Data, load
from benchmarks.figures import evaluate
from benchmarks.models import build
from benchmarks.train import BAD_STEPS, History, TrainingError, fit, train_one, validate
from flowpost.vae import VAE

EPOCHS = 5
TIMINGS = {"seconds", "step_ms", "resumed_after"}
JOB = ["--width", "16", "--samples", "20", "--dim", "3", "--kl-warmup", "1", "--seeds", "2", "--trusted-images", "0"]
JOB += ["--posterior", "diagonal,iaf", "--dropout", "0.1"]
# A process of its own: every epoch is kept, and no picture is drawn, which would take longer than the training.
CODE = "import sys, benchmarks.checkpoint as c, benchmarks.job as j, benchmarks.__main__ as m; "
CODE += "c.CHECKPOINT_SECONDS = 0; j.draw = lambda *_: None; sys.exit(m.main(sys.argv[1:]))"


@pytest.fixture(autouse=True)
def _every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)


@pytest.fixture(scope="module")
def data() -> Data:
    """Few digits, their pixels drawn afresh in every epoch."""
    digits = load("digits")
    train = digits.train[:256] / digits.train.max()
    return replace(digits, train=train, valid=digits.valid[:64], test=digits.test[:32], dynamic=True)


@pytest.fixture(scope="module")
def config() -> Config:
    return configure(
        epochs=EPOCHS, width=16, dim=2, samples=20, batch=64, kl_warmup=0, patience=EPOCHS, dropout=0.2, seeds=(3,)
    )


class Training:
    """One run of iaf in a folder, stopped after an epoch or left to end."""

    def __init__(self, data: Data, config: Config, folder: Path) -> None:
        self.data, self.config, self.folder, self.said = data, config, folder, []

    def keeper(self, stop: int = 0) -> Keeper:
        def tell(history: History) -> None:
            if len(history.valid) == stop:
                raise KeyboardInterrupt

        return Keeper(tell, self.folder, "iaf", 3, self.config, self.said.append)

    def stop(self, epoch: int) -> "Training":
        with pytest.raises(KeyboardInterrupt):
            train_one(self.data, "iaf", 3, self.config, self.keeper(epoch))
        torch.rand(7)  # somebody else's draws
        return self

    def end(self) -> dict:
        """What must not depend on interruptions."""
        vae, history = train_one(self.data, "iaf", 3, self.config, self.keeper())
        figures = {key: value for key, value in asdict(history).items() if key not in TIMINGS}
        weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
        return {"weights": weights, "history": figures, "figures": evaluate(vae, self.data, self.config)}


def same(a: dict, b: dict) -> bool:
    equal = all(torch.equal(tensor, b["weights"][name]) for name, tensor in a["weights"].items())
    return equal and (a["history"], a["figures"]) == (b["history"], b["figures"])


@pytest.fixture(scope="module")
def whole(data: Data, config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The run that nothing interrupts, without checkpoints."""
    return Training(data, replace(config), tmp_path_factory.mktemp("whole") / "none").end()


@pytest.mark.parametrize("epoch", [1, 2, 4, EPOCHS])
def test_a_resumed_run_ends_in_the_same_bits(
    data: Data, config: Config, whole: dict, tmp_path: Path, epoch: int
) -> None:
    training = Training(data, config, tmp_path).stop(epoch)
    assert same(training.end(), whole)
    assert training.said == [f"iaf-3: resumed after epoch {epoch}, from iaf-3-epoch{epoch:06}.safetensors"]


def test_a_run_stopped_again_and_again_ends_in_the_same_bits(
    data: Data, config: Config, whole: dict, tmp_path: Path
) -> None:
    training = Training(data, config, tmp_path).stop(1).stop(2).stop(4)
    assert len(training.keeper().files()) == KEPT
    assert same(training.end(), whole)
    checkpoint.clear(tmp_path, "iaf-33")
    assert len(training.keeper().files()) == KEPT
    checkpoint.clear(tmp_path, "iaf-3")
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.long if i % 3 else pytest.mark.full) for i, part in enumerate(PARTS)]
)
def test_the_bits_differ_if_any_part_is_left_out(
    data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The negative control of the tests above; here the best epoch comes before the stop."""
    monkeypatch.setattr("benchmarks.train.validate", lambda *arguments: -validate(*arguments))
    whole = Training(data, config, tmp_path / "whole").end()
    assert whole["history"]["best_epoch"] <= 4
    assert same(Training(data, config, tmp_path / "all").stop(4).end(), whole)
    monkeypatch.delitem(PARTS, part)
    assert not same(Training(data, config, tmp_path / "cut").stop(4).end(), whole)


def test_an_early_stop_is_not_run_past(data: Data, config: Config, tmp_path: Path) -> None:
    """The last checkpoint may be of the very epoch that ended training."""
    scores = iter([3.0, 4.0, 5.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.train.validate", lambda *_: next(scores))
        training = Training(data, replace(config, patience=2), tmp_path).stop(3)
        assert training.end()["history"]["valid"] == [3.0, 4.0, 5.0]


def test_the_best_score_comes_back_to_its_last_bit(data: Data, config: Config, tmp_path: Path) -> None:
    scores = iter([0.1, 0.1 + 1e-10, 0.1 + 1e-10, 0.1 + 1e-10, 0.1 + 1e-10])  # float32's 0.1 lies above all these
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.train.validate", lambda *_: next(scores))
        assert Training(data, config, tmp_path).stop(2).end()["history"]["best_epoch"] == 1


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_cut_checkpoint_gives_way_to_the_one_before_it_aloud(
    data: Data, config: Config, whole: dict, tmp_path: Path, kept: int
) -> None:
    training = Training(data, config, tmp_path).stop(3)
    newest = training.keeper().files()[-1]
    newest.write_bytes(newest.read_bytes()[:kept])
    assert same(training.end(), whole)
    warning, resumed = training.said
    assert warning.startswith("WARNING: checkpoint damaged, the one before it is tried: ")
    assert newest.name in warning
    assert resumed.startswith("iaf-3: resumed after epoch 2")
    assert newest.with_suffix(".damaged").exists()


def test_without_a_whole_checkpoint_the_run_begins_anew(
    data: Data, config: Config, whole: dict, tmp_path: Path
) -> None:
    training = Training(data, config, tmp_path).stop(3)
    for path in training.keeper().files():
        path.write_bytes(b"<html>")
    assert same(training.end(), whole)
    assert [line.partition(":")[0] for line in training.said] == ["WARNING", "WARNING"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.5}, "lr 0.003 != 0.5"),
        ({"epochs": 9}, "curves"),
        ({"width": 8}, "(8, 2)"),
        ({"objective": "iwae"}, "objective elbo != iwae"),
        ({"train_samples": 2}, "train_samples 1 != 2"),
        ({"gradient": "stl"}, "gradient standard != stl"),
        ({"free_bits": 1.0}, "free_bits 0.0 != 1.0"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    data: Data, config: Config, tmp_path: Path, change: dict, said: str
) -> None:
    Training(data, config, tmp_path).stop(1)
    with pytest.raises(ConfigError, match="is of another configuration") as caught:
        Training(data, replace(config, **change), tmp_path).end()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_version_is_refused(
    data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Training(data, config, tmp_path).stop(1)
    monkeypatch.setattr(checkpoint, "versions", lambda: {"torch": "0.1", "numpy": "0.1", "flowpost": "0.1"})
    with pytest.raises(ConfigError, match=r"torch .* != 0\.1, numpy"):
        Training(data, config, tmp_path).end()


def test_a_full_disk_costs_a_line_and_not_the_run(
    data: Data, config: Config, whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowpost.save", full)
    training = Training(data, config, tmp_path)
    assert same(training.end(), whole)
    assert len(training.said) == EPOCHS
    assert all("No space left" in line for line in training.said)


def spoil(vae: VAE, when: Callable[[int], bool]) -> None:
    """Make two gradients of the decoder nan in the steps of these numbers, from 1."""
    for parameter in list(vae.decoder.parameters())[:2]:
        calls = iter(range(1, 10**6))
        parameter.register_hook(lambda gradient, calls=calls: gradient * (torch.nan if when(next(calls)) else 1))


def spoiled(data: Data, config: Config, when: Callable[[int], bool]) -> tuple[VAE, list[str]]:
    vae = build(data, "diagonal", dim=config.dim, width=config.width, dropout=0.0, options={})
    spoil(vae, when)
    return vae, [name for name, _ in vae.named_parameters() if name.startswith("decoder")][:2]


def test_skipped_steps_are_recorded_with_their_tensors(data: Data, config: Config) -> None:
    vae, names = spoiled(data, config, lambda step: step in (2, 7))  # 4 steps an epoch
    history = fit(vae, data, config, 0, lambda _: None)
    assert history.skipped_steps == 2
    assert history.skips == [{"epoch": 1, "step": 2, "tensors": names}, {"epoch": 2, "step": 7, "tensors": names}]


def test_after_ten_in_a_row_the_error_names_the_tensors(data: Data, config: Config) -> None:
    vae, names = spoiled(data, config, lambda step: step > 3)
    with pytest.raises(TrainingError, match=f"no finite loss and gradient in {BAD_STEPS} steps in a row") as caught:
        fit(vae, data, config, 0, lambda _: None)
    assert f"(epoch 4; not finite: {names[0]}, {names[1]})" in str(caught.value)


def test_skips_and_their_count_in_a_row_outlast_a_stop(
    data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad steps 3 to 11, around a stop after 8, are nine in a row; with step 12 they are ten."""

    def run(folder: str, last: int, done: int, stop: int) -> History:
        def planned(*arguments: object, **options: object) -> VAE:
            vae = build(*arguments, **options)  # pyright: ignore[reportArgumentType]
            spoil(vae, lambda step: 3 <= step + done <= last)
            return vae

        monkeypatch.setattr("benchmarks.train.build", planned)
        keeper = Training(data, config, tmp_path / folder).keeper(stop)
        return train_one(data, "diagonal", 3, config, keeper)[1]

    whole = run("whole", 11, 0, 0)
    assert whole.skipped_steps == len(whole.skips) == 9
    assert whole.train[1] is None
    with pytest.raises(KeyboardInterrupt):
        run("nine", 11, 0, 2)
    resumed = run("nine", 11, 8, 0)
    assert (resumed.skips, resumed.train, resumed.valid) == (whole.skips, whole.train, whole.valid)
    with pytest.raises(KeyboardInterrupt):
        run("ten", 12, 0, 2)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        run("ten", 12, 8, 0)


def process(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-c", CODE, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def figures(folder: Path) -> list[dict]:
    return [{key: value for key, value in run.items() if key not in TIMINGS} for run in results(folder)["runs"]]


@pytest.fixture(scope="module")
def short_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job's folder."""
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "draw", lambda *_: None)
        assert cli.main([*JOB, "--epochs", "1", "--out", str(folder)]) == 0
    return folder


def checkpoints(folder: Path) -> set[Path]:
    return set((folder / "checkpoints").glob("*.safetensors"))


def kill_in_training(folder: Path, job: subprocess.Popen, delay: float) -> None:
    """SIGKILL a process some time after it wrote its first checkpoint."""
    before = checkpoints(folder)
    while job.poll() is None and not checkpoints(folder) - before:
        time.sleep(0.005)
    time.sleep(delay)
    job.kill()
    job.communicate()


@pytest.mark.long
def test_a_killed_job_goes_on_to_the_same_results(tmp_path: Path) -> None:
    """SIGKILL at random times, in different runs of the job, one after the other; the last right after a checkpoint."""
    draws, killed, whole_job, tmp_path = random.Random(0), 0, tmp_path / "whole", tmp_path / "killed"
    _, err = (job := process(*JOB, "--epochs", 40, "--out", whole_job)).communicate(timeout=60)
    assert (job.returncode, err) == (0, "")
    job = process(*JOB, "--epochs", 40, "--out", tmp_path)
    for delay in (draws.uniform(0, 1.2), draws.uniform(0, 1.2), 0.0):
        kill_in_training(tmp_path, job, delay)
        killed += job.returncode != 0
        job = process("--resume", tmp_path)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, err, killed) == (0, "", 3)
    assert "resumed after epoch" in out
    assert figures(tmp_path) == figures(whole_job)
    assert results(tmp_path)["summary"].keys() == results(whole_job)["summary"].keys()
    assert not (tmp_path / "checkpoints").exists()
    for path in (whole_job / "models").iterdir():
        ours, theirs = load_file(tmp_path / "models" / path.name), load_file(path)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.full
def test_a_finished_job_resumed_draws_its_pictures_again(
    short_job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(job, "draw", lambda report, data, models: drawn.append(sorted(models)))
    before = figures(short_job)
    assert cli.main(["--resume", str(short_job)]) == 0
    assert "4 of 4 runs are already finished" in capsys.readouterr().out
    assert drawn == [["diagonal", "iaf"]]
    assert figures(short_job) == before


@pytest.mark.full
def test_runs_side_by_side_come_to_the_same_bits(
    short_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the options, whoever ends first; here those that a stopped job had left."""
    monkeypatch.setattr(job, "draw", lambda *_: None)
    folder = shutil.copytree(short_job, tmp_path / "job")
    content = results(folder)
    (folder / "results.json").write_text(json.dumps(content | {"runs": content["runs"][1:3]}))
    shutil.rmtree(folder / "models")
    assert cli.main(["--resume", str(folder), "--jobs", "2"]) == 0
    assert "2 of 4 runs are already finished" in capsys.readouterr().out
    assert figures(folder) == figures(short_job)
    assert len(list((folder / "models").iterdir())) == 2


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong `--resume` is answered in."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("resume: ")) == ("", 1, True)
    return err


@pytest.mark.full
@pytest.mark.parametrize("option", ["--lr=0.1", "--quick", "--device=cpu", "--out=elsewhere", "--data=digits"])
def test_other_options_beside_resume_are_refused(
    short_job: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert f"got {option.partition('=')[0]}" in refusal(capsys, "--resume", short_job, option)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"configuration": {"flows": 3}}'])
def test_a_folder_without_a_job_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert "expected the folder of an interrupted job" in refusal(capsys, "--resume", tmp_path)


@pytest.mark.full
def test_a_job_of_other_versions_is_refused(
    short_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = results(short_job)
    content["environment"]["torch"] = "0.1"
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert "torch 0.1 != " in refusal(capsys, "--resume", tmp_path)


def test_a_new_job_leaves_the_figures_of_another_alone(tmp_path: Path, config: Config) -> None:
    """Neither a command that is typed twice nor a second job beside the first one costs what is there."""
    begun = job.begin(config, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ConfigError, match="^out: expected a folder without a job, got .*go on with --resume"):
        job.begin(config, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    assert job.begin(config, tmp_path / "other").run.folder != begun.run.folder


def test_a_new_job_in_an_old_folder_takes_up_nothing(tmp_path: Path, data: Data, config: Config) -> None:
    folder = tmp_path / "checkpoints"
    Training(data, config, folder).stop(1)
    (folder / ".0123.tmp").write_bytes(b"half")
    job.begin(config, tmp_path)
    assert not folder.exists()
