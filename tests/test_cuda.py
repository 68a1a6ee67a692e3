"""What only a GPU can show: the same numbers as the CPU, no wait for the device, CUDA graphs, streams, kernels."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import swept
import torch
import torch.nn.functional as F
from on_device import assert_near, densities, inputs, losses, made, path_slopes, under_autocast, vae_of, vae_step
from registry import BY_NAME, ENTRIES, Case, Entry, backward, draw, push
from test_engines import NETWORKS, every_result
from torch import Tensor

import flowpost
from flowpost import Autoregressive, Bijector, DeepSigmoid, Inverse, Masked, Shift, Spline
from flowpost.evaluation import log_marginal
from flowpost.masked.activations import Activation
from flowpost.numerics import fusing
from flowpost.recipes import RECIPES
from flowpost.testing import PROPERTIES, check_bijector
from flowpost.vae import VAE, Bernoulli

if not torch.cuda.is_available():  # the file as a whole: its tests are 1,300
    pytest.skip("needs a CUDA device", allow_module_level=True)

# What torch asks for under deterministic algorithms. It looks once in a process, at the first product of matrices.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [
    pytest.mark.cuda,
    # Of torch, about itself: that the check of waits is new, and that a capture warms up on a stream of its own.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*AccumulateGrad node's stream does not match"),
]
recipes = pytest.mark.parametrize("name", RECIPES)
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


def every_result_is_near(
    step: Bijector, direction: str, z: Tensor, context: Tensor | None, known: Tensor, dtype: torch.dtype, least: float
) -> None:
    """Of a step in float64: on the GPU as near to it as on the CPU in the same dtype, or nearer than the least."""
    exact = every_result(step, direction, z, context, known)

    def rounded(device: str) -> list[Tensor]:
        other = copy.deepcopy(step).to(device, dtype)
        given = None if context is None else context.to(device, dtype)
        return every_result(other, direction, z.to(device, dtype), given, known.to(device, dtype))

    for found, by_cpu, expected in zip(rounded("cuda"), rounded("cpu"), exact, strict=True):
        rounding = (by_cpu.double() - expected).abs().max()
        bound = least * (1 + expected.abs().max()) + 8 * rounding
        assert (found.cpu().double() - expected).abs().max() <= bound


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
    every_result_is_near(step, direction, z, context, known, dtype, tolerance)


@every
def test_everything_moves_with_the_step(entry: Entry) -> None:
    step = entry.make(4, 0).cuda()
    assert all(tensor.device.type == "cuda" for tensor in [*step.parameters(), *step.buffers()])
    assert step.initial_context().device == step.head_scale().device == torch.empty(0, device="cuda").device
    assert step.initial_context().shape == (step.context_size,)


@every
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_steps_never_wait_for_the_device(entry: Entry, direction: str, no_sync: None) -> None:
    with _syncing():
        step, z, context = draw(entry, Case(4, seed=2, push=0.1), dtype=torch.float32, batch=(5, 7))
        step, z, context = step.cuda(), z.cuda().requires_grad_(), cuda(context)
    image, log_det = (step if direction == "forward" else backward(step))(z, context)
    (image.sum() + log_det.sum()).backward()


def captured(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A step as one CUDA graph, after three calls on a stream of its own, and what every replay fills anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@recipes
def test_posteriors_never_wait_for_the_device(name: str, no_sync: None) -> None:
    with _syncing():
        posterior, given = made(name), inputs()
    densities(posterior, *given)


@recipes
def test_log_densities_are_a_cuda_graph(name: str) -> None:
    """Captured once with fixed noise, and replayed on new features, noise and points."""
    posterior, given = made(name), inputs()
    graph, found = captured(lambda: densities(posterior, *given))
    for each in given:
        each.copy_(torch.randn_like(each))
    graph.replay()
    assert_near(found, densities(posterior, *given))


@recipes
def test_deterministic_algorithms_are_allowed(name: str) -> None:
    """Of samples, log q and their gradients, twice the same bits."""
    posterior, given, x = made(name), inputs(), torch.rand(5, 6, device="cuda").round()
    torch.use_deterministic_algorithms(True)  # noqa: FBT003
    try:
        first, again = (densities(posterior, *given) for _ in range(2))
        vae_step(vae_of(name), x)()
    finally:
        torch.use_deterministic_algorithms(False)  # noqa: FBT003
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@recipes
@pytest.mark.parametrize("kernel", [False, True], ids=["foreach", "fused"])
def test_a_vae_s_training_step_is_a_cuda_graph(name: str, kernel: bool) -> None:  # noqa: FBT001
    """With noise of the default generator, and Adam: the losses and the weights of as many steps without a graph."""
    vae = vae_of(name)
    other, x = copy.deepcopy(vae), torch.rand(5, 6, device="cuda").round()
    step = vae_step(vae, x, capturable=True, fused=kernel)
    torch.manual_seed(0)
    for _ in range(3):
        step()
    torch.manual_seed(0)
    graph, loss = captured(vae_step(other, x, capturable=True, fused=kernel))

    def replay() -> list[Tensor]:
        graph.replay()
        return loss

    expected = losses(step, x, seed=1)
    x.copy_(1 - x)  # as it was
    assert_near(losses(replay, x, seed=1), expected)
    assert_near([*other.parameters()], [*vae.parameters()])


@recipes
def test_two_streams_do_not_disturb_each_other(name: str) -> None:
    """Also in the first calls, which may bring constants."""
    posterior, given = made(name), [inputs(), inputs()]
    expected = [densities(posterior, *each) for each in given]
    fresh, found = made(name), []
    torch.cuda.synchronize()
    for each in given:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(densities(fresh, *each))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)


@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_log_q_near_that_of_float32(name: str, dtype: torch.dtype) -> None:
    under_autocast(made(name), dtype)


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
@pytest.mark.parametrize("rows", [3, 300])
def test_kernels_equal_the_plain_operations(
    entry: Entry, direction: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 both, which is all that the kernels know."""
    step, known, context = draw(entry, Case(6, seed=3, push=0.1), dtype=torch.float32, batch=(rows,))
    step, known, context = step.cuda(), known.cuda(), cuda(context)
    z = step(known, context)[0].detach() if direction == "known" else known
    found = every_result(step, direction, z, context, known)
    monkeypatch.setattr(fusing, "on_device", lambda z: False)
    assert_near(found, every_result(step, direction, z, context, known))


@pytest.mark.parametrize("activation", [F.relu, F.elu, torch.tanh], ids=["relu", "elu", "tanh"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_context_without_a_value_leaves_its_row_without_one(activation: Activation, direction: str) -> None:
    """A maximum, and a relu that is joined to a product, give a number for nan there."""
    flow = Autoregressive(4, 2, (9, 8, 7), activation=activation).cuda()
    z, context = torch.randn(3, 4, device="cuda"), torch.randn(3, 2, device="cuda")
    context[1, 0] = torch.nan
    image, log_det = getattr(flow, direction)(z, context)
    assert image.isnan().all(-1).tolist() == log_det.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["planar", "orthogonal_sylvester", "iaf", "maf", "realnvp"])
@dtypes
def test_second_derivatives_of_the_path_are_the_cpu_s(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Of which a GPU takes the inner ones in a thread of its own."""
    posterior = made(name, "cpu").double()
    h, noise, _ = (each.double() for each in inputs("cpu"))
    expected = path_slopes(posterior, h, noise)
    found = path_slopes(posterior.to("cuda", dtype), h.to("cuda", dtype), noise.to("cuda", dtype))
    assert_near([each.cpu().double() for each in found], expected, 100 * tolerance)


@pytest.mark.parametrize("name", swept.STEPS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("copies", [1, 100])
def test_a_column_s_solve_is_the_family_s(name: str, scale: float, copies: int) -> None:
    """By the kernel, against the closed form in float64; few rows and many, which the kernels cut in other ways."""
    step = swept.STEPS[name]()
    z, numbers = swept.drawn(step, scale)
    exact = swept.by_formula(step, z.double(), numbers.double())
    by_torch = swept.by_formula(step, z, numbers)
    found = swept.by_sweep(step, z.repeat(copies).cuda(), numbers.repeat(copies, 1).cuda()).cpu()
    size = 1 + exact.abs()
    bound = 8 * (((by_torch - exact) / size).abs().max() + torch.finfo(torch.float32).eps)
    assert ((found.double().view(copies, -1) - exact) / size).abs().max() <= bound


SOLVED: dict[str, Callable[[], Bijector]] = {
    "spline": lambda: Masked(Spline(6, bound=1.5), 3, (13, 8)),
    "spline in order": lambda: Masked(Spline(6), 0, (8,), order=[3, 1, 0, 5, 2, 4]),
    "spline of a wide network": lambda: Masked(Spline(6, bins=3), 3, (150, 150), activation=torch.tanh),
    "spline of many bins": lambda: Masked(Spline(6, bins=50), 3, (9,)),
    "spline, no layer": lambda: Masked(Spline(6, bins=5), 3, ()),
    "deep sigmoid": lambda: Masked(DeepSigmoid(6), 3, (13, 8), order=[3, 1, 0, 5, 2, 4]),
    "deep sigmoids": lambda: Masked(DeepSigmoid(6, units=3, layers=2), 3, (13,)),  # wide and pushed, float32 is too few
    "shift": lambda: Masked(Shift(6), 3, (13, 8), order=[3, 1, 0, 5, 2, 4]),
    "inverse shift": lambda: Masked(Inverse(Shift(6)), 3, (150,)),
}


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("direction", ["inverse", "known"])
@pytest.mark.parametrize("rows", [1, 5, 300, 2048])
def test_sweeps_of_splines_and_others_equal_the_cpu_s(name: str, direction: str, rows: int) -> None:
    """With all gradients, in float32; of slopes of 1e7, as some are, float32 keeps few digits anywhere."""
    step = SOLVED[name]().double()
    push(step, Case(seed=3, push=0.1))
    known = 2 * torch.randn(rows, 6, dtype=torch.float64)
    context = torch.randn(rows, 3, dtype=torch.float64) if step.context_size else None
    z = step(known, context)[0].detach() if direction == "known" else known
    every_result_is_near(step, direction, z, context, known, torch.float32, 1e-4)


def test_a_capture_that_fails_harms_nothing_after_it() -> None:
    """The speed benchmark's: of one that waits, before the capture, and of one that torch sees only within it."""
    steps = pytest.importorskip("benchmarks.speed.steps")
    weight = torch.ones(3, device="cuda", requires_grad=True)

    def loss() -> Tensor:
        return (weight * torch.randn(3, device="cuda")).sum()

    def waiting() -> Tensor:
        return loss() * float(weight.detach().sum())

    def synchronizing() -> Tensor:
        found = loss()
        torch.cuda.synchronize()
        return found

    for bad in (waiting, synchronizing):
        with pytest.raises(RuntimeError):
            steps.captured(steps.Step([weight], bad))
        assert torch.randn(3, device="cuda").isfinite().all()
        replay = steps.captured(steps.Step([weight], loss))
        replay()
        assert weight.grad is not None
        first = weight.grad.clone()
        replay()
        assert not torch.equal(weight.grad, first)  # other noise


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


def contract(entry: Entry, dims: Sequence[int], skip: set[str], *dtypes: torch.dtype) -> None:
    def make(dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        del context_size
        return flowpost.testing.push(entry.make(dim, seed).to(dtype), push, seed)

    tried = check_bijector(make, dims=dims, dtypes=dtypes, examples=3, skip=sorted(skip), device="cuda")
    assert set(tried) == set(PROPERTIES) - skip


@every
def test_contract(entry: Entry) -> None:
    """The shipped suite, on the device, in the cases that test_contract has on the CPU.

    "identity" and "passes" say nothing of a device; what compiles takes too long.
    """
    skip = {"identity", "passes", "compiles", "batch_sizes"} | ({"context_everywhere"} if entry.local else set())
    if entry.name != "nested":
        contract(entry, (3,), skip, torch.float64, torch.float32)
    else:
        contract(entry, (3,), skip | {"extremes"}, torch.float64, torch.float32)
        contract(entry, (3,), set(PROPERTIES) - {"extremes"}, torch.float64)


@pytest.mark.parametrize("name", ["lu_linear", "lu_linear_order", "inverse_lu_linear"])
def test_triangular_solves_at_extremes(name: str) -> None:
    """Near the end of float32, by sums of another order than the CPU's."""
    contract(BY_NAME[name], (1, 2, 4), set(PROPERTIES) - {"extremes"}, torch.float64, torch.float32)
