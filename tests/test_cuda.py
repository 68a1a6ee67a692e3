"""What only a GPU can show: the same numbers as the CPU, the same device, no wait for the device, a CUDA graph."""

import copy
from collections.abc import Iterator

import pytest
import torch
from registry import ENTRIES, Case, Entry, backward, draw
from test_engines import NETWORKS, every_result
from torch import Tensor

import flowpost
from flowpost import Bijector, FlowPosterior
from flowpost.evaluation import log_marginal
from flowpost.testing import PROPERTIES, check_bijector, push
from flowpost.vae import VAE, Bernoulli

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
every = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)


@pytest.fixture(autouse=True)
def _exact_matmul() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def cuda(context: Tensor | None) -> Tensor | None:
    return None if context is None else context.cuda()


@every
@dtypes
@pytest.mark.parametrize("dim", [1, 6])
def test_equals_the_cpu(entry: Entry, dtype: torch.dtype, tolerance: float, dim: int) -> None:
    step, z, context = draw(entry, Case(dim, seed=1, push=0.1), dtype=dtype, batch=(5, 7))
    other = copy.deepcopy(step).cuda()
    for here, there in ((step, other), (backward(step), backward(other))):
        expected = here(z, context)
        found = there(z.cuda(), cuda(context))
        for a, b in zip(found, expected, strict=True):
            assert a.device.type == "cuda"
            assert a.dtype == dtype
            torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * (1 + b.abs().max().item()))


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
@pytest.mark.parametrize("rows", [5, 2048])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
def test_a_network_s_gradients_equal_the_cpu_s(
    entry: Entry, direction: str, rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Few rows and many, which the kernels cut in other ways."""
    step, known, context = draw(entry, Case(6, seed=1, push=0.1), batch=(rows,))
    z = step(known, context)[0].detach() if direction == "known" else known
    expected = every_result(step, direction, z, context, known)
    other = copy.deepcopy(step).to("cuda", dtype)
    given = None if context is None else context.to("cuda", dtype)
    found = every_result(other, direction, z.to("cuda", dtype), given, known.to("cuda", dtype))
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= tolerance * (1 + b.abs().max())


@every
def test_everything_moves_with_the_step(entry: Entry) -> None:
    step = entry.make(4, 0).cuda()
    assert all(tensor.device.type == "cuda" for tensor in [*step.parameters(), *step.buffers()])
    if step.context_size:
        assert step.initial_context().shape == (step.context_size,)


@every
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_steps_never_wait_for_the_device(entry: Entry, direction: str, no_sync: None) -> None:
    with _syncing():
        step, z, context = draw(entry, Case(4, seed=2, push=0.1), dtype=torch.float32, batch=(5, 7))
        step, z, context = step.cuda(), z.cuda().requires_grad_(), cuda(context)
    image, log_det = (step if direction == "forward" else backward(step))(z, context)
    (image.sum() + log_det.sum()).backward()


def recipes() -> dict[str, FlowPosterior]:
    return {
        "diagonal": flowpost.diagonal(16, 8),
        "full_covariance": flowpost.full_covariance(16, 8),
        "planar": flowpost.planar(16, 8, steps=4),
        "iaf": flowpost.iaf(16, 8, steps=2, hidden=(64, 64), context_size=8),
    }


@pytest.mark.parametrize("name", recipes())
def test_posteriors_never_wait_for_the_device(name: str, no_sync: None) -> None:
    with _syncing():
        posterior, h = recipes()[name].cuda(), torch.randn(12, 16, device="cuda")
    z, log_prob, _ = posterior(h, (5,))
    log_prob.sum().backward()
    posterior.log_prob(z.detach(), h).sum().backward()


@pytest.mark.parametrize("name", recipes())
def test_a_training_step_is_a_cuda_graph(name: str) -> None:
    """Forward, inverse and backward with static noise, captured once and replayed on new data."""
    posterior = recipes()[name].cuda()
    h, noise = torch.randn(12, 16, device="cuda"), torch.randn(5, 12, 8, device="cuda")
    parameters = list(posterior.parameters())

    def step() -> tuple[Tensor, ...]:
        z, log_prob, _ = posterior(h, (5,), noise)
        elsewhere = posterior.log_prob(z.detach() + 0.1, h)
        loss = (log_prob + z.square().sum(-1) - elsewhere).mean()
        return (loss, *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    h.copy_(torch.randn_like(h))
    noise.copy_(torch.randn_like(noise))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", recipes())
def test_autocast_on_cuda_keeps_log_q_in_float32(name: str) -> None:
    posterior, h = recipes()[name].cuda(), torch.randn(12, 16, device="cuda")
    noise = torch.randn(12, 8, device="cuda")
    expected = posterior(h, noise=noise)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            found = posterior(h.to(dtype).to(h.dtype), noise=noise)
            again = posterior(h, noise=noise)
        assert found.log_prob.dtype == found.z.dtype == torch.float32
        # A fresh iaf's network ends in zeros, so all four are exact here.
        torch.testing.assert_close(again.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)


def test_log_marginal_on_cuda() -> None:
    torch.manual_seed(0)
    vae = VAE(torch.nn.Linear(20, 16), flowpost.planar(16, 4, steps=2), torch.nn.Linear(4, 20), Bernoulli())
    x = torch.rand(30, 20).round()
    on_cpu = log_marginal(vae, x, 4000)
    on_cuda = log_marginal(vae.cuda(), x.cuda(), 4000)
    assert on_cuda.device.type == "cuda"
    assert (on_cpu - on_cuda.cpu()).abs().mean() < 0.05  # other noise


class _syncing:
    """Waiting is allowed while a test sets up."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("error")


@every
def test_contract(entry: Entry) -> None:
    """The shipped suite, on the device; "identity" and "passes" say nothing of it, "compiles" takes too long."""

    def make(dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        del context_size
        return _push(entry.make(dim, seed).to(dtype), push, seed)

    skip = ["identity", "passes", "compiles"] + (["extremes"] if entry.name == "nested" else [])
    assert set(check_bijector(make, dims=(1, 2, 4), examples=3, skip=skip, device="cuda")) == set(PROPERTIES) - set(
        skip
    )


_push = push
