"""The hard cases by design: depth in float32, bfloat16 autocast, training over several processes."""

import socket
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flowpost
from benchmarks.config import configure
from benchmarks.data import load
from benchmarks.train import train_one
from flowpost.objectives import elbo
from flowpost.testing import push
from flowpost.vae import VAE, Bernoulli


@pytest.mark.full
@pytest.mark.parametrize(("dim", "amount"), [(64, 0.0), (64, 0.3), (256, 0.0)])
def test_sixteen_steps_in_float32_come_back(dim: int, amount: float) -> None:
    """B3's residual at depth 16, where public flows lose all digits or turn to nan."""
    flow = cast(flowpost.Learned, flowpost.iaf(0, dim, 16, (64,), 8).flow).step
    push(flow, amount, seed=0)
    y, context = torch.randn(8, dim), flow.initial_context() + 0.1 * torch.randn(8, flow.context_size)
    with torch.no_grad():
        x, log_det_inverse = flow.inverse(y, context)
        back, log_det = flow(x, context)
    size = 64 * torch.finfo(torch.float32).eps * (dim * 17 + 16)
    assert ((back - y).abs() <= size * (1 + y.abs() + x.abs().amax(-1, keepdim=True))).all()
    torch.testing.assert_close(log_det, -log_det_inverse, rtol=1e-4, atol=1e-3)


def test_bfloat16_autocast_moves_log_q_by_less_than_a_hundredth_of_a_nat() -> None:
    torch.manual_seed(0)
    posterior = flowpost.iaf(64, dim=64, steps=4, hidden=(320, 320))
    push(posterior.flow, 0.1, seed=1)
    h, noise = torch.randn(256, 64), torch.randn(256, 64)
    with torch.no_grad():
        wanted = posterior(h, noise=noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = posterior(h, noise=noise)
    assert found.log_prob.dtype == torch.float32
    assert not torch.equal(found.z, wanted.z)  # the networks did run in half precision
    assert (found.log_prob - wanted.log_prob).abs().mean() < 0.01


@pytest.mark.full
def test_bfloat16_autocast_on_a_posterior_trained_on_the_digits() -> None:
    data = load("digits")
    flows = {"iaf": {"steps": 4, "hidden": (320, 320), "context_size": 64}}
    config = configure("digits", dim=64, epochs=12, kl_warmup=5, flows=flows)
    vae, history = train_one(data, "iaf", 0, config, lambda history: None)
    assert history.valid[-1] < 130  # nats; 250 before training
    with torch.no_grad():
        h, noise = vae.encoder(data.test), torch.randn(4, len(data.test), 64)
        wanted = vae.posterior(h, (4,), noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = vae.posterior(h, (4,), noise)
    assert (found.log_prob - wanted.log_prob).abs().mean() < 0.01


def _vae() -> VAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 16), nn.ELU())
    return VAE(encoder, flowpost.iaf(16, 3, steps=2, hidden=(16,), context_size=4), nn.Linear(3, 12), Bernoulli())


def _train(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(_vae())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(100 + rank)  # noise and data of its own on every rank
    for _ in range(3):
        out = model((torch.rand(8, 12) < 0.5).float())
        optimizer.zero_grad()
        (-elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl).mean()).backward()
        optimizer.step()
    torch.save([parameter.grad for parameter in model.parameters()], Path(folder) / f"grads{rank}.pt")
    torch.save(model.module.state_dict(), Path(folder) / f"state{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_stay_bit_equal(tmp_path: Path) -> None:
    """`VAE.forward` returns all that a step needs, so the wrapper sees every parameter's use and syncs it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train, args=(port, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    grads: list[list[Tensor]] = [torch.load(tmp_path / f"grads{rank}.pt", weights_only=True) for rank in range(2)]
    states: list[dict[str, Tensor]] = [torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    start = _vae().state_dict()
    assert any(not torch.equal(start[name], states[0][name]) for name in start)
