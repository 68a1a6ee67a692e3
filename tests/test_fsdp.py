"""FSDP2 over two processes: sharded steps, flows and posteriors give the numbers and gradients of whole ones."""

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from once import leave, once
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

import flowpost
from flowpost import Bijector, FlowPosterior
from flowpost.vae import VAE, Bernoulli
from flowpost.wrapped import WrappedPosterior

pytestmark = [
    pytest.mark.long,  # two processes, each of which imports torch
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


def vae(name: str = "iaf") -> VAE:
    torch.manual_seed(2)
    return VAE(nn.Linear(6, FEATURES).double(), small(name), nn.Linear(DIM, 6).double(), Bernoulli())


def wrapped() -> WrappedPosterior:
    torch.manual_seed(2)
    return flowpost.wrap(nn.Linear(6, FEATURES), dim=DIM, example=torch.zeros(1, 6), flow="iaf", hidden=(8,)).double()


def binary() -> Tensor:
    return (torch.arange(24).view(4, 6) % 2).double()


def vae_loss(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    out = model(binary())
    return (out.log_likelihood + out.log_prior - out.log_q).sum()


def terms_loss(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    terms = model.elbo_terms(binary())  # pyright: ignore[reportCallIssue]
    return (terms.reconstruction - terms.kl).sum()


def wrapped_loss(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    z, log_q, _ = model(binary())
    return (z.sin().sum(-1) + log_q).sum()


def shard_steps(model: nn.Module) -> None:
    for step in model.modules():
        if isinstance(step, Bijector) and hasattr(step, "net"):
            fsdp.fully_shard(step)


def check_model(make: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], *parts: str) -> None:
    """A model around a posterior, sharded whole after the parts of it, or its steps, that are named."""
    model = make()
    for part in parts:
        if part == "steps":
            shard_steps(model)
        elif part == "elbo_terms":
            fsdp.fully_shard(model)
            fsdp.register_fsdp_forward_method(model, part)
        else:
            fsdp.fully_shard(model.get_submodule(part))
    if "elbo_terms" not in parts:
        fsdp.fully_shard(model)
    assert_same_training(model, make(), loss)


MODELS: dict[str, Callable[[], None]] = {
    "vae": lambda: check_model(vae, vae_loss),
    "vae, flow": lambda: check_model(vae, vae_loss, "posterior.flow"),
    "vae, by step": lambda: check_model(vae, vae_loss, "steps"),
    "vae, elbo_terms": lambda: check_model(lambda: vae("full_covariance"), terms_loss, "elbo_terms"),
    "wrap": lambda: check_model(wrapped, wrapped_loss),
    "wrap, posterior": lambda: check_model(wrapped, wrapped_loss, "posterior"),
    "wrap, by step": lambda: check_model(wrapped, wrapped_loss, "steps"),
}


def work(rank: int, folder: str) -> None:
    """One of two processes: every check, and what it raised."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    init_device_mesh("cpu", (2,))
    found = {}
    checks = {**{key: partial(check, *arguments) for key, arguments in CHECKS.items()}, **MODELS}
    for key, run in checks.items():
        try:
            run()
            found[key] = ""
        except Exception:  # whatever it is, the test of this name shows it
            found[key] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    leave()


def launch(folder: Path) -> None:
    mp.spawn(work, (str(folder),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = once(tmp_path_factory, "fsdp", launch)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*CHECKS, *MODELS])
def test_sharded_equals_whole(name: str, found: list[dict[str, str]]) -> None:
    assert [each[name] for each in found] == ["", ""]
