"""DistributedDataParallel over two processes: the gradients of one process with all of the data, on both."""

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from once import leave, once
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flowpost
from flowpost.terms import VAEOutput
from flowpost.vae import VAE, Bernoulli

pytestmark = [
    pytest.mark.full,  # two processes, each of which imports torch
    pytest.mark.skipif(not dist.is_gloo_available(), reason="here by gloo"),
]
FAMILIES = ["full_covariance", "planar", "iaf", "maf"]
ROWS, EACH = 4, 6


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(ROWS, EACH, dtype=torch.float64, generator=generator).round()
    return x, torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)


def encoder() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(EACH, FEATURES).double()


class Terms(nn.Module):
    """The module of which a loss is the whole forward: what the docs show for `elbo_terms`."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        terms = self.vae.elbo_terms(x)
        return -(terms.reconstruction - terms.kl).mean()


def vae(name: str) -> VAE:
    first = encoder()
    return VAE(first, small(name), nn.Linear(DIM, EACH).double(), Bernoulli())


def wrapped(name: str) -> nn.Module:
    options: dict[str, Any] = {"hidden": (8,)} if name in ("iaf", "maf") else {}
    return flowpost.wrap(encoder(), dim=DIM, example=inputs()[0][:1], flow=name, **options).double()


def wrapped_loss(model: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    z, log_q, _ = model(x, noise=noise)
    return (log_q + z.sin().sum(-1)).mean()


def vae_loss(model: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    with Noise(noise):
        out: VAEOutput = model(x)
    kl = out.log_q - out.log_prior if out.kl is None else out.kl
    return (kl - out.log_likelihood).mean()


def terms_loss(model: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    with Noise(noise):
        return model(x)


class Noise:
    """These numbers in the place of the next draws, so that two halves draw what the whole does."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.real = noise, torch.randn

    def __enter__(self) -> None:
        torch.randn = lambda *args, **kwargs: self.noise

    def __exit__(self, *_: object) -> None:
        torch.randn = self.real


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Callable[[str], nn.Module], Loss]] = {
    "wrap": (wrapped, wrapped_loss),
    "vae": (vae, vae_loss),
    "vae, elbo_terms": (lambda name: Terms(vae(name)), terms_loss),
}
CHECKS = [f"{name}, {case}" for name in FAMILIES for case in CASES]


def grads(model: nn.Module, loss: Loss, rows: slice) -> dict[str, Tensor]:
    x, noise = inputs()
    loss(model, x[rows], noise[rows]).backward()
    found = {name.removeprefix("module."): each.grad for name, each in model.named_parameters()}
    return {name: torch.zeros(()) if grad is None else grad for name, grad in found.items()}


def half(rank: int) -> slice:
    return slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)


def check(key: str, rank: int) -> None:
    name, case = key.split(", ", 1)
    make, loss = CASES[case]
    found = grads(DistributedDataParallel(make(name)), loss, half(rank))
    torch.testing.assert_close(found, grads(make(name), loss, slice(None)), rtol=1e-10, atol=1e-12)


def check_unseen(rank: int) -> None:
    """A method of the inner module is not synchronized: what the docs warn of, and why `Terms` is there."""
    model = DistributedDataParallel(vae("iaf"))
    loss: Loss = lambda module, x, noise: terms_loss(Terms(module.module), x, noise)  # noqa: E731  # pyright: ignore
    found, whole = grads(model, loss, half(rank)), grads(Terms(vae("iaf")), terms_loss, slice(None))
    alone = grads(Terms(vae("iaf")), terms_loss, half(rank))
    for key, value in alone.items():
        torch.testing.assert_close(found[key.removeprefix("vae.")], value)
    assert any((alone[key] - whole[key]).abs().max() > 1e-3 for key in whole)


def work(rank: int, folder: str) -> None:
    """One of two processes: every check, and what it raised."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {}
    for key in [*CHECKS, "unseen"]:
        try:
            check_unseen(rank) if key == "unseen" else check(key, rank)
            found[key] = ""
        except Exception:  # whatever it is, the test of this name shows it
            found[key] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    leave()


def launch(folder: Path) -> None:
    mp.spawn(work, (str(folder),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = once(tmp_path_factory, "ddp", launch)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*CHECKS, "unseen"])
def test_two_processes_have_the_gradients_of_one(name: str, found: list[dict[str, str]]) -> None:
    assert [each[name] for each in found] == ["", ""]
