"""FSDP2 over two processes: sharded steps, flows and posteriors give the numbers and gradients of whole ones."""

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

import flowpost
from flowpost import Bijector, FlowPosterior
from flowpost.vae import VAE, Bernoulli

pytestmark = [
    pytest.mark.full,  # two processes, each of which imports torch
    pytest.mark.skipif(
        not (hasattr(fsdp, "fully_shard") and dist.is_gloo_available()),
        reason="public from torch 2.6 on, and here by gloo",
    ),
]
FAMILIES = ["iaf", "maf", "realnvp"]


def by_step(posterior: FlowPosterior) -> None:
    """Each step that has parameters by itself, as a large flow is sharded; then what is left."""
    steps = [part for part in posterior.modules() if isinstance(part, Bijector) and hasattr(part, "net")]
    for step in steps:
        fsdp.fully_shard(step)
        fsdp.register_fsdp_forward_method(step, "inverse")
    whole(posterior)


def by_step_alone(posterior: FlowPosterior) -> None:
    """The steps, and nothing else: the head stays whole."""
    for step in posterior.modules():
        if isinstance(step, Bijector) and hasattr(step, "net"):
            fsdp.fully_shard(step)
            fsdp.register_fsdp_forward_method(step, "inverse")


def whole(posterior: FlowPosterior) -> None:
    fsdp.fully_shard(posterior)
    for name in ("log_prob", "path_log_prob"):
        fsdp.register_fsdp_forward_method(posterior, name)


def sample(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Tensor:
    drawn = posterior(h, noise=z)
    return drawn.z.sin().sum(-1) + drawn.log_prob


def log_prob(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Tensor:
    return posterior.log_prob(0.9 * z, h)


def path(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Tensor:
    return posterior.path_log_prob(posterior(h, noise=z), h)


SHARDINGS: dict[str, Callable[[FlowPosterior], None]] = {
    "by step": by_step,
    "by step alone": by_step_alone,
    "whole": whole,
}
USES: dict[str, Callable[[FlowPosterior, Tensor, Tensor], Tensor]] = {
    "sample": sample,
    "log_prob": log_prob,
    "path": path,
}
CHECKS = {
    f"{name}, {sharding}, {use}": (name, sharding, use) for name in FAMILIES for sharding in SHARDINGS for use in USES
}


def whole_tensor(value: Tensor | None) -> Tensor | None:
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # pyright: ignore


def assert_same_training(model: nn.Module, other: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """The loss, its gradients, and the parameters after a step, of a sharded model and of a whole one."""
    found, expected = loss(model), loss(other)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for each, value in ((model, found), (other, expected)):
        value.sum().backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (name, parameter), reference in pairs:
        for mine, theirs in ((parameter.grad, reference.grad), (parameter.detach(), reference.detach())):
            torch.testing.assert_close(whole_tensor(mine), theirs, rtol=1e-10, atol=1e-10, msg=name)


def check(name: str, sharding: str, use: str) -> None:
    posterior, other = small(name, dim=DIM), small(name, dim=DIM)
    SHARDINGS[sharding](posterior)
    torch.manual_seed(1)
    h, z = torch.randn(4, FEATURES, dtype=torch.float64), torch.randn(4, DIM, dtype=torch.float64)
    assert_same_training(posterior, other, lambda model: USES[use](model, h, z))  # pyright: ignore


def check_vae() -> None:
    """A model around it, its flow's parameters among the model's own."""

    def model() -> VAE:
        torch.manual_seed(2)
        return VAE(
            nn.Linear(6, FEATURES), flowpost.iaf(FEATURES, DIM, hidden=(8,)), nn.Linear(DIM, 6), Bernoulli()
        ).double()

    vae, other = model(), model()
    fsdp.fully_shard(vae.posterior.flow)
    fsdp.fully_shard(vae)
    x = (torch.arange(24).view(4, 6) % 2).double()

    def loss(module: nn.Module) -> Tensor:
        torch.manual_seed(3)
        out = module(x)
        return (out.log_likelihood + out.log_prior - out.log_q).sum()

    assert_same_training(vae, other, loss)


def work(rank: int, folder: str) -> None:
    """One of two processes: every check, and what it raised."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    init_device_mesh("cpu", (2,))
    found = {}
    for key, arguments in [*CHECKS.items(), ("vae", None)]:
        try:
            check_vae() if arguments is None else check(*arguments)
            found[key] = ""
        except Exception:  # whatever it is, the test of this name shows it
            found[key] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("fsdp")
    mp.spawn(work, (str(folder),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*CHECKS, "vae"])
def test_sharded_equals_whole(name: str, found: list[dict[str, str]]) -> None:
    assert [each[name] for each in found] == ["", ""]
