"""What the GPU's engine launches, counted on the CPU and on the meta device: few calls, no host read, little kept."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from registry import Case, push
from test_device import DIRECTIONS, RUNS, assert_close
from test_engines import every_result
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from versions import OLDEST

from flowpost import (
    ActNorm,
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    DeepSigmoid,
    FlowPosterior,
    Inverse,
    Learned,
    Masked,
    Scale,
    Shared,
    Shift,
    Spline,
)
from flowpost.masked import device, engine
from flowpost.masked.device import full
from flowpost.masked.run import Parameters, flat
from flowpost.objectives import elbo
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli, closed_kl


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tensors are."""
    monkeypatch.setattr(engine, "engine_on", lambda z: device)


class Launches(TorchDispatchMode):
    """Counts the operations other than views by name; refuses a host read, and a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        name = str(func)
        assert name not in {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}
        if not func.is_view:  # pyright: ignore[reportFunctionMemberAccess]
            self.names[name.removeprefix("aten.").removeprefix("flowpost.").rpartition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_number_is_read_on_the_host(name: str, direction: str) -> None:
    flow = RUNS[name]().double()
    push(flow, Case(seed=7, push=0.3))
    known, context = (torch.randn(3, size, dtype=torch.float64) for size in (4, 2))
    given = context if flow.context_size else None
    z = known if direction == "forward" else flow(known, given)[0].detach()
    expected = every_result(flow, direction, z, given, known)
    with Launches():
        found = every_result(flow, direction, z, given, known)
    assert_close(found, expected)


def on_meta(step: Bijector, direction: str, dtype: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    """What a pass or an inverse launches there, and the way back; all that comes is on meta too."""
    step = step.to("meta", dtype)
    z = torch.empty(5, step.dim, dtype=dtype, device="meta", requires_grad=True)
    size = step.context_size
    context = torch.empty(5, size, dtype=dtype, device="meta", requires_grad=True) if size else None
    getattr(step, direction)(z, context)  # the first call may bring constants there
    with Launches() as there:
        image, log_det = getattr(step, direction)(z, context)
    grads = torch.empty_like(image), torch.empty_like(log_det)
    inputs = [z, *([] if context is None else [context]), *step.parameters()]
    with Launches() as back:
        found = torch.autograd.grad((image, log_det), inputs, grads, allow_unused=True)
    assert all(each is None or each.is_meta for each in (image, log_det, *found))
    return there.names, back.names


def iaf(steps: int) -> Bijector:
    return Shared(*(Autoregressive(6, 4, (8, 8), activation=F.relu) for _ in range(steps)))


COUNTS = {
    ("forward", torch.float32): ([9, 17, 29], [15, 27, 47]),
    ("forward", torch.float64): ([15, 31, 59], [24, 45, 83]),
    ("inverse", torch.float32): ([10, 19, 33], [17, 30, 52]),
}
"""Launches of runs of 1, 2 and 4 links, there and back, with kernels and, in float64, without."""


@pytest.mark.parametrize(("direction", "dtype"), COUNTS, ids=str)
def test_a_run_launches_few(direction: str, dtype: torch.dtype) -> None:
    found = [on_meta(iaf(steps), direction, dtype) for steps in (1, 2, 4)]
    for names, most in zip(zip(*found, strict=True), COUNTS[direction, dtype], strict=True):
        counts = [each.total() for each in names]
        assert all(count <= bound for count, bound in zip(counts, most, strict=True)), (counts, names[0])


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_weights_are_masked_once_a_call(direction: str) -> None:
    """However many links: by one call there, one back, and one for the gradients."""
    there, back = on_meta(iaf(3), direction, torch.float32)
    assert there["_foreach_mul"] == 1
    assert (back["_foreach_mul"], back["_foreach_mul_"]) == (1, 1)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_of_large_weights_one_link_s_are_masked_at_a_time(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way back, where the gradients of all weights already take as much memory as the weights."""
    monkeypatch.setattr(full, "_SMALL", 0)
    made: list[list[weakref.ref[Tensor]]] = []
    masked = full.masked

    def watched(*inputs: Any) -> list[Parameters]:  # noqa: ANN401
        assert not [each for earlier in made for each in earlier if each() is not None]
        groups = masked(*inputs)
        made.append([weakref.ref(weight) for group in groups for weight in group.weights])
        return groups

    flow = iaf(3).double()
    z, context = (torch.randn(5, size, dtype=torch.float64, requires_grad=True) for size in (6, 4))
    image, log_det = getattr(flow, direction)(z, context)
    monkeypatch.setattr(full, "masked", watched)
    (image.sum() + log_det.sum()).backward()
    assert [len(each) for each in made] == [3, 3, 3]
    assert not [each for each in made[-1] if each() is not None]


def test_the_sweeps_cost_no_launch_a_variable_with_kernels_and_few_without() -> None:
    counts = [
        [on_meta(Autoregressive(dim, 4, (dim, dim)), "inverse", dtype) for dim in (6, 16)]
        for dtype in (torch.float32, torch.float64)
    ]
    (few, more), (loop, longer) = ([sum(names.total() for names in pair) for pair in row] for row in counts)
    assert few == more
    assert (longer - loop) / 10 <= 24, [names for pair in counts[1] for names in pair]


SOLVED: dict[str, tuple[Callable[[int], Bijector], int, int]] = {
    "gate": (lambda dim: Autoregressive(dim, 4, (dim, dim)), 10, 17),
    "affine": (lambda dim: Masked(Affine(dim), 4, (dim, dim)), 10, 17),
    "shift": (lambda dim: Masked(Shift(dim), 4, (dim, dim)), 13, 21),
    "inverse shift": (lambda dim: Masked(Inverse(Shift(dim)), 4, (dim, dim)), 13, 20),
    "spline": (lambda dim: Masked(Spline(dim), 4, (dim, dim)), 70, 225),
    "deep sigmoid": (lambda dim: Masked(DeepSigmoid(dim), 4, (dim, dim)), 83, 196),
}
"""Steps whose column solve a kernel has, and the launches of an inverse, there and back."""


@pytest.mark.parametrize("name", SOLVED)
def test_a_column_s_solve_is_swept_by_one_launch_each_way(name: str) -> None:
    make, there, back = SOLVED[name]
    for dim in (6, 16):
        counts = on_meta(make(dim), "inverse", torch.float32)
        assert (counts[0]["sweep"], counts[1]["transposed_sweep"]) == (1, 1)
        assert counts[0].total() <= there, counts[0]
        assert counts[1].total() <= back + 2 * OLDEST, counts[1]


def test_the_masked_weights_are_not_kept_for_the_way_back() -> None:
    flow = iaf(2).double()
    kept: list[Tensor] = []
    z, context = (torch.randn(5, size, dtype=torch.float64, requires_grad=True) for size in (6, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        flow(z, context)
    own = {parameter.data_ptr() for parameter in flow.parameters()}
    shapes = {parameter.shape for parameter in flow.parameters() if parameter.ndim == 2}
    assert kept
    assert not [tensor.shape for tensor in kept if tensor.shape in shapes and tensor.data_ptr() not in own]


@torch.no_grad()
def test_a_pass_that_records_nothing_keeps_nothing() -> None:
    run = [cast(Autoregressive, step)._link() for step in cast(Shared, iaf(2).double())]
    inputs = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    parameters = [parameter.detach() for parameter in flat(run)]
    assert device.values(run, *inputs, parameters, recording=False)[2] == []
    assert device.solve(run, *inputs, parameters, None, recording=False)[2] == []


def test_autocast_casts_all_weights_and_all_gradients_at_once() -> None:
    flow, counts = iaf(4), []
    z, context = torch.randn(5, 6), torch.randn(5, 4)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), Launches() as launches:
            every_result(flow, "forward", z, context, None)
        counts.append(launches.names)
    assert counts[1]["_foreach_copy_"] == 3
    # Each link's z, numbers and the gradients there are cast, and a product that cannot add to float32 is added.
    assert counts[1].total() - counts[0].total() <= 4 * 6 + 9, counts


# ---------------------------------------------------------------------------------------------- whole posteriors

FEATURES, DIM, PIXELS = 64, 32, 784
USES: tuple[str, ...] = ("sample", "sample, back", "log_prob", "VAE", "VAE, back", "terms", "terms, back")
MOST = {
    "diagonal": (14, 35, 15, 35, 71, 25, 59),
    "full_covariance": (22, 51, 22, 53, 109, 43, 97),
    "planar": (82, 242, None, 92, 274, 93, 272),
    "realnvp": (81, 223, 90, 91, 255, 92, 253),
}
"""Operations of each of the `USES`, there alone, and there and back; None where others bound it."""


def counted(call: Callable[[], Tensor], parameters: Sequence[Tensor] | None = None) -> int:
    """The launches of a call's second run, and with parameters those of its mean's gradients there."""
    call()  # the first may bring constants there
    with torch.set_grad_enabled(parameters is not None), Launches() as launches:
        found = call()
        if parameters is not None:
            torch.autograd.grad(found.mean(), parameters)
    return launches.names.total()


def uses(name: str) -> dict[str, Callable[[], int]]:
    posterior = RECIPES[name](FEATURES, DIM)
    model = VAE(nn.Linear(PIXELS, FEATURES), posterior, nn.Linear(DIM, PIXELS), Bernoulli()).to("meta")
    x, h, z = (torch.empty(128, size, device="meta") for size in (PIXELS, FEATURES, DIM))
    own, all_of_them = list(posterior.parameters()), list(model.parameters())

    def both() -> Tensor:
        z, log_prob, _ = posterior(h)
        return z.sum(-1) + log_prob

    def bound() -> Tensor:
        return elbo(*model(x)[:4])

    def terms() -> Tensor:
        found = model.elbo_terms(x)
        return found.reconstruction - found.kl

    calls = (
        lambda: counted(lambda: posterior(h).log_prob),
        lambda: counted(both, own),
        lambda: counted(lambda: posterior.log_prob(z, h)),
        lambda: counted(lambda: model(x).log_likelihood),
        lambda: counted(bound, all_of_them),
        lambda: counted(lambda: model.elbo_terms(x).kl),
        lambda: counted(terms, all_of_them),
    )
    return dict(zip(USES, calls, strict=True))


@pytest.mark.parametrize("name", MOST)
def test_a_posterior_launches_few(name: str) -> None:
    bounds = dict(zip(USES, MOST[name], strict=True))
    counts = {use: call() for use, call in uses(name).items() if bounds[use] is not None}
    print(name, counts)
    assert all(count <= (bounds[use] or 0) for use, count in counts.items()), counts


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(each.numel() for each in tree_leaves(found) if isinstance(each, Tensor)), 0)
        return found


@pytest.mark.parametrize(
    "flow",
    [Affine(DIM), Chain(Affine(DIM), Shift(DIM), Scale(DIM, 2.0), ActNorm(DIM)), Learned(Affine(DIM))],
    ids=lambda flow: type(flow).__name__,
)
def test_the_kl_of_a_factorized_posterior_makes_no_matrix(flow: Bijector) -> None:
    q = FlowPosterior(FEATURES, flow).at(torch.zeros(128, FEATURES))
    with Largest() as largest:
        kl, latents = closed_kl(q)
        (kl + q.mean.sum(-1) + q.variance.sum(-1)).sum().backward()
    assert latents is not None
    assert largest.numbers <= 128 * max(flow.context_size, DIM)
