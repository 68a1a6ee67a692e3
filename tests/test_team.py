"""Two processes of `accelerate launch`, here by gloo: the losses, weights and figures of one."""

import json
import os
import socket
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from once import leave, once

from benchmarks import __main__ as cli
from benchmarks import checkpoint, job
from benchmarks.config import Config, ConfigError, configure
from benchmarks.data import Data, load
from benchmarks.figures import evaluate
from benchmarks.job import shared
from benchmarks.optimizers import Optimization
from benchmarks.team import Team
from benchmarks.train import train_one

EPOCHS = 3
EQUAL = 1e-6  # of a loss of some hundred nats: rounding in float32, over 12 steps
OBJECTIVES = {
    "elbo, diagonal": {},
    "elbo, iaf": {"optimization": Optimization(optimizer="adamax", averaging=0.9)},
    "iwae, iaf": {"objective": "iwae", "train_samples": 3, "gradient": "dreg"},
}
IMAGES = ["images", "--preset", "small-iaf", "--data", "digits", "--epochs", "2", "--samples", "30", "--images", "40"]
IMAGES += ["--trusted-images", "0"]


def data() -> Data:
    """Few digits with pixels drawn afresh, in batches that two processes cannot share evenly."""
    digits = load("digits")
    train = digits.train[:101] / digits.train.max()
    return replace(digits, train=train, valid=digits.valid[:33], test=digits.test[:15], dynamic=True)


def config(name: str) -> Config:
    usual = {
        "epochs": EPOCHS,
        "width": 16,
        "dim": 3,
        "samples": 20,
        "batch": 27,
        "kl_warmup": 2,
        "seeds": (3,),
        "trusted_images": 0,
    }
    return configure(**usual, patience=EPOCHS, pairs=64, **OBJECTIVES[name])


def trained(name: str) -> dict:
    settings = shared(config(name), Team.on("cpu"))
    vae, history = train_one(data(), name.partition(", ")[2], 3, settings, lambda _: None)
    weights = torch.cat([value.flatten() for value in vae.state_dict().values()]).tolist()
    neg_elbo = evaluate(vae, data(), settings)["neg_elbo"]
    return {"train": history.train, "valid": history.valid, "weights": weights, "neg_elbo": neg_elbo}


def work(rank: int, folder: str, port: int) -> None:
    """One of two processes: every training, then a job that is stopped and resumed."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    found: dict = {}
    try:
        for name in OBJECTIVES:
            found[name] = trained(name)
        job.draw = lambda *_: None
        checkpoint.CHECKPOINT_SECONDS = 0
        found["code"] = cli.main([*IMAGES, "--out", f"{folder}/job-{rank}"])
    except Exception:  # whatever it is, the test shows it
        found["error"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    leave()


def launch(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (str(folder), port), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "team", launch)


def ranks(folder: Path) -> list[dict]:
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [each.get("error") for each in found] == [None, None], found
    return found


needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="here by gloo")


@pytest.mark.full  # two processes, each of which imports torch and accelerate
@needs_gloo
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_have_the_losses_of_one(folder: Path, name: str) -> None:
    first, second = (found[name] for found in ranks(folder))
    alone = trained(name)
    assert first == second
    assert first["train"] == pytest.approx(alone["train"], rel=EQUAL)
    assert first["valid"] == pytest.approx(alone["valid"], rel=EQUAL)
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-3, abs=1e-4)
    # Evaluation is of other noise: each process draws for its own images.
    assert first["neg_elbo"] == pytest.approx(alone["neg_elbo"], rel=1e-2)


@pytest.mark.full
@needs_gloo
def test_the_first_process_writes_and_the_other_does_not(folder: Path) -> None:
    assert [found["code"] for found in ranks(folder)] == [0, 0]
    assert (folder / "job-0" / "results.json").exists()
    assert not (folder / "job-1").exists()
    content = json.loads((folder / "job-0" / "results.json").read_text())
    assert content["configuration"]["eager"]
    assert content["runs"][0]["error"] is None


def test_what_only_one_process_can_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team()
    assert shared(config("elbo, iaf"), team) == config("elbo, iaf")
    team.count = 2
    for change, said in (({"dropout": 0.1}, "^dropout"), ({"free_bits": 1.0}, "^free-bits"), ({"batch": 1}, "^batch")):
        with pytest.raises(ConfigError, match=said):
            shared(replace(config("elbo, iaf"), **change), team)


def test_the_rows_of_all_processes_are_all_rows() -> None:
    for count in (2, 3, 7):
        team, found = Team(), []
        team.count = count
        for team.rank in range(count):
            found += range(20)[team.rows(20)]
        assert found == list(range(20))
