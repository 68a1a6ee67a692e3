"""Triton's kernels on the CPU, by its interpreter, against float64; and compiled for a GPU that need not be there.

`make test-kernels` runs them; without Triton, or its interpreter, they are skipped.
"""

import contextlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import swept
import torch
import torch.nn.functional as F
from packaging.version import Version
from registry import Case, push
from test_engines import every_result
from torch import Tensor

from flowpost import Affine, Autoregressive, Bijector, DeepSigmoid, Inverse, Masked, Shared, Shift, Spline
from flowpost.bijectors.gate import Gate
from flowpost.masked import device, engine
from flowpost.masked.activations import NAMED
from flowpost.masked.device import fused
from flowpost.masked.run import Column
from flowpost.numerics import fusing
from flowpost.numerics.scales import exp_scale
from flowpost.numerics.tanh_roots import tanh_root, tanh_roots

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # numpy's, which interprets
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # of Triton 3.6
]
TOO_NEW = Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or TOO_NEW,
    reason="needs TRITON_INTERPRET=1, and with Triton before 3.7 a NumPy before 2.4",
)
EPS = torch.finfo(torch.float32).eps
DIM = 5
STEPS: dict[str, Callable[[], Bijector]] = {
    "gate": lambda: Gate(DIM),
    "gate with a gain": lambda: Gate(DIM, forget_bias=-1.5, gain=1.2),
    "gate that is open": lambda: Gate(DIM, forget_bias=15.0),
    "exp": lambda: Affine(DIM, exp_scale),
    "softplus": lambda: Affine(DIM),
    "inverse exp": lambda: Inverse(Affine(DIM, exp_scale)),
    "inverse softplus": lambda: Inverse(Affine(DIM)),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "on_device", lambda z: True)
    monkeypatch.setattr(engine, "engine_on", lambda z: device)


def assert_rounded(found: Tensor, exact: Tensor, by_torch: Tensor) -> None:
    """As near to float64 as the same formula of torch's in float32, or as the last digits of the largest number."""
    assert found.shape == exact.shape
    rounding = (by_torch.double() - exact).abs().max() + EPS * (1 + exact.abs().max())
    assert (found.double() - exact).abs().max() <= 8 * rounding


def column_of(step: Bijector) -> Column:
    column = step.columns()[1]
    assert column is not None
    return column


def results(step: Bijector, z: Tensor, numbers: Tensor, grad: Tensor, of_log_det: Tensor) -> list[Tensor]:
    """By autodiff: the map and its gradients; its inverse at z, and what it adds to a log-det."""
    z, numbers = z.detach().requires_grad_(), numbers.detach().requires_grad_()
    image, log_det = step._forward(z, numbers)
    pulled = torch.autograd.grad((image, log_det), (z, numbers), (grad, of_log_det.to(log_det.dtype)))
    preimage, back = step._inverse(z, numbers, None)
    return [each.detach() for each in (image, log_det, *pulled, preimage, back)]


def by_kernels(step: Bijector, z: Tensor, numbers: Tensor, grad: Tensor, of_log_det: Tensor) -> list[Tensor]:
    column = column_of(step)
    image, log_det = fused.element(z, numbers, None, column, inverse=False)
    pulled = fused.element_pull(z, numbers, grad, of_log_det, column)
    preimage, sum_of_both = fused.element(z, numbers, log_det, column, inverse=True)
    assert log_det.dtype == sum_of_both.dtype == torch.float64
    return [image, log_det, *pulled, preimage, sum_of_both - log_det]


@interpreted
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("batch", [(), (1,), (3, 7)], ids=str)
def test_a_map_and_its_gradients_are_the_step_s(name: str, scale: float, batch: tuple[int, ...]) -> None:
    step = STEPS[name]()
    z, grad, numbers = (torch.randn(*batch, size) for size in (DIM, DIM, 2 * DIM))
    inputs = z, scale * numbers, grad, torch.randn(batch, dtype=torch.float64)
    exact = results(step, *(each.double() for each in inputs))
    for found, expected, by_torch in zip(by_kernels(step, *inputs), exact, results(step, *inputs), strict=True):
        assert_rounded(found, expected, by_torch)


@interpreted
@pytest.mark.parametrize("name", STEPS)
def test_the_slopes_of_a_map_s_inverse_are_autodiff_s(name: str) -> None:
    """``dx/dy`` and ``dx/dn`` of the inverse, and the gradient of its log-det at the numbers."""
    step = STEPS[name]()
    x, numbers, of_log_det = torch.randn(7, DIM), torch.randn(7, 2 * DIM), torch.randn(7, dtype=torch.float64)
    found = fused.element_slopes(x, numbers, of_log_det, column_of(step))
    exact = []
    for dtype in (torch.float64, torch.float32):
        n = numbers.to(dtype).requires_grad_()
        y = step._forward(x.to(dtype), n)[0].detach().requires_grad_()
        image, log_det = step._inverse(y, n, None)
        slopes = torch.autograd.grad(image.sum(), (y, n), retain_graph=True)
        exact.append([*slopes, *torch.autograd.grad(log_det, n, of_log_det.to(log_det.dtype))])
    for each in zip(found, *exact, strict=True):
        assert_rounded(*each)


@interpreted
def test_a_map_reads_slices_and_expanded_gradients() -> None:
    step, whole = Gate(DIM), torch.randn(4, 2 * DIM + 3)
    z, numbers, one = torch.randn(DIM, 4).t(), whole[:, 2 : 2 * DIM + 2], torch.ones(())
    inputs = z, numbers, one.expand(4, DIM), one.double().expand(4)
    copies = [each.clone(memory_format=torch.contiguous_format) for each in inputs]
    torch.testing.assert_close(by_kernels(step, *inputs), by_kernels(step, *copies), rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("shape", [(), (1,), (4,)], ids=str)
def test_a_log_det_of_fewer_axes_counts_for_every_row(shape: tuple[int, ...]) -> None:
    """As a shift's before, which is a constant."""
    z, numbers, total = torch.randn(4, DIM), torch.randn(4, 2 * DIM), torch.full(shape, 3.0, dtype=torch.float64)
    _, alone = fused.element(z, numbers, None, column_of(Gate(DIM)), inverse=False)
    _, both = fused.element(z, numbers, total, column_of(Gate(DIM)), inverse=False)
    torch.testing.assert_close(both, alone + 3.0)


@interpreted
def test_a_row_without_a_value_spoils_no_other() -> None:
    z, numbers = torch.randn(3, DIM), torch.randn(3, 2 * DIM)
    z[1, 2] = torch.nan
    image, log_det = fused.element(z, numbers, None, column_of(Gate(DIM)), inverse=False)
    assert image.isnan().sum() == 1
    assert log_det.isfinite().all()


@interpreted
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (70, 33), (600, 17), (1537, 5), (0, 4)])
def test_an_activation_s_gradient_and_its_sum(name: str, rows: int, width: int) -> None:
    known = NAMED[name]
    value = known.run(torch.randn(rows, 2 * width))[:, width:]  # a slice, as of links side by side
    grad = torch.randn(rows, width)
    found, bias = fused.activation_pull(known, grad, value)
    expected = known.gradient(grad.double(), value.double())
    assert bias is not None
    torch.testing.assert_close(found.double(), expected, rtol=4 * EPS, atol=4 * EPS)
    torch.testing.assert_close(bias.double(), expected.sum(0), rtol=0, atol=EPS * max(rows, 1) * 4)


def test_many_rows_fit_into_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its axes but the first end at 65,535, which at shares of 512 rows are 34 million."""
    from flowpost.masked.device import kernels

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(kernels, "launch", lambda _, programs, *inputs, **options: grids.append(programs))
    rows = torch.empty(40_000_000, 64, device="meta")
    kernels.activation_pull(rows, rows, "relu")
    assert grids[0][0] > 65_535 >= grids[0][1]


@interpreted
def test_a_gradient_that_is_not_finite_reaches_no_unit_that_is_off() -> None:
    found, _ = fused.activation_pull(NAMED["relu"], torch.full((1, 2), torch.inf), torch.tensor([[0.0, 1.0]]))
    assert found.tolist() == [[0.0, torch.inf]]


@interpreted
@pytest.mark.parametrize("name", NAMED)
def test_a_unit_without_a_value_has_torch_s_gradient(name: str) -> None:
    grad, value = torch.ones(1, 2), torch.tensor([[torch.nan, 0.5]])
    found, _ = fused.activation_pull(NAMED[name], grad, value)
    torch.testing.assert_close(found, NAMED[name].gradient(grad, value), equal_nan=True)


FLOWS: dict[str, Callable[[], Bijector]] = {
    "gates": lambda: Shared(
        Autoregressive(DIM, 3, (8, 11), activation=F.relu, order=[4, 3, 2, 1, 0], gain=1.1),
        Autoregressive(DIM, 3, (13, 4), activation=F.relu),
    ),
    "one layer": lambda: Autoregressive(DIM, 3, (13,), activation=F.elu, order=[2, 0, 3, 1, 4]),
    "three layers": lambda: Autoregressive(DIM, 0, (7, 3, 9), activation=torch.tanh),
    "no layer": lambda: Masked(Affine(DIM), 3, ()),
    "no layer in order": lambda: Masked(Affine(DIM, exp_scale), 3, (), order=[1, 0, 2, 4, 3]),
    "exp": lambda: Masked(Affine(DIM, exp_scale), 0, (6, 6), activation=F.relu),
    "inverse exp": lambda: Masked(Inverse(Affine(DIM, exp_scale)), 3, (6, 6), order=[1, 0, 2, 4, 3]),
    "maf": lambda: Inverse(Masked(Inverse(Affine(DIM)), 3, (6, 6))),
    "spline": lambda: Masked(Spline(DIM, bins=3, bound=1.5), 3, (6, 6)),
    "spline in order": lambda: Masked(Spline(DIM, bins=8), 0, (9,), order=[3, 1, 0, 2, 4]),
    "spline, no layer": lambda: Masked(Spline(DIM, bins=5, bound=0.8), 3, (), order=[1, 0, 2, 4, 3]),
    "shift": lambda: Masked(Shift(DIM), 3, (6, 6), order=[1, 0, 2, 4, 3]),
    "inverse shift": lambda: Masked(Inverse(Shift(DIM)), 3, ()),
    "deep sigmoid": lambda: Masked(DeepSigmoid(DIM, units=4), 3, (6, 6), order=[1, 0, 2, 4, 3]),
    "deep sigmoids": lambda: Masked(DeepSigmoid(DIM, units=3, layers=2), 0, (9,)),
    "a step that no kernel knows": lambda: Masked(Inverse(Spline(DIM, bins=3)), 3, (6, 6)),
}
TILES = {"few rows": {}, "many": {"_MANY": 2}, "many, wide": {"_MANY": 2, "_SMALLEST": 0}}


def cut(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have few rows cut as many are."""
    from flowpost.masked.device import tiles

    for key, value in TILES[tile].items():
        monkeypatch.setattr(tiles, key, value)


@interpreted
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(
    ("direction", "tile"), [("forward", "few rows"), *((way, tile) for way in ("inverse", "known") for tile in TILES)]
)
def test_the_engine_by_kernels_is_the_plain_operations_in_float64(
    name: str, direction: str, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, log-dets and all gradients, of contexts that samples share."""
    cut(tile, monkeypatch)
    flow = FLOWS[name]()
    push(flow, Case(seed=1, push=0.2))
    known, context = torch.randn(2, 3, DIM), torch.randn(3, 3) if flow.context_size else None
    z = flow(known, context)[0].detach() if direction == "known" else known
    found = every_result(flow, direction, z, context, known)
    monkeypatch.setattr(engine, "choose", lambda run, z: None)
    by_torch = every_result(flow, direction, z, context, known)
    double = None if context is None else context.double()
    exact = every_result(flow.double(), direction, z.double(), double, known.double())
    for each in zip(found, exact, by_torch, strict=True):
        assert_rounded(*each)


@interpreted
@pytest.mark.parametrize("name", ["gates", "exp", "three layers"])
@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
def test_parameters_may_lie_in_any_way(name: str, direction: str) -> None:
    """Column by column, and with gaps; without a context a sweep starts at a bias itself."""
    flow = FLOWS[name]()
    push(flow, Case(seed=1, push=0.2))
    known, context = torch.randn(3, DIM), torch.randn(3, 3) if flow.context_size else None
    z = flow(known, context)[0].detach() if direction == "known" else known
    expected = every_result(flow, direction, z, context, known)
    for parameter in flow.parameters():
        parameter.data = torch.stack([parameter.data.t()] * 2, -1)[..., 0].t()
    for found, each in zip(every_result(flow, direction, z, context, known), expected, strict=True):
        assert_rounded(found, each.double(), each)


@interpreted
@pytest.mark.parametrize("name", swept.STEPS)
@pytest.mark.parametrize(
    ("tile", "scale"), [("few rows", 1.0), ("many", 0.01), ("many", 10.0), ("many, wide", 1.0), ("many, wide", 1e4)]
)
def test_a_column_s_solve_is_the_family_s(name: str, tile: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At images inside a spline's bound, at it and outside; each against its own size."""
    cut(tile, monkeypatch)
    step = swept.STEPS[name]()
    z, numbers = swept.drawn(step, scale)
    found, by_torch = (solve(step, z, numbers) for solve in (swept.by_sweep, swept.by_formula))
    exact = swept.by_formula(step, z.double(), numbers.double())
    assert_rounded(*(each / (1 + exact.abs()) for each in (found, exact, by_torch)))


@pytest.mark.parametrize("count", [1, 4096])
@pytest.mark.parametrize("dim", [1, 2, 3, 784])
@pytest.mark.parametrize("width", [1, 512, 4096])
@pytest.mark.parametrize("numbers", [2, 1000])
def test_a_tile_fits_in_registers(count: int, dim: int, width: int, numbers: int) -> None:
    """A thread has 255, for a tile, its weights and their places; one that does not fit takes minutes to compile."""
    from flowpost.masked.device import tiles

    sizes = tiles.tile(count, dim, (width, width), numbers)[1]
    sums = [sizes["UNITS"] * sizes["BLOCK"], sizes["COLUMNS"] * sizes["COLUMN_BLOCK"]]
    if sizes["DOT"]:
        sums = [sizes["UNITS"], sizes["COLUMNS"]]
    assert sizes["ROWS"] * max(sums) <= 64 * 32 * sizes["num_warps"]


@interpreted
@pytest.mark.parametrize("activation", NAMED)
def test_what_reads_no_value_has_none(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables after one that is nan, and a row whose context is. On a GPU a maximum drops nan."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", lambda self, *both: self.binary_op(*both, np.fmax))
    monkeypatch.setattr(InterpreterBuilder, "create_minnumf", lambda self, *both: self.binary_op(*both, np.fmin))
    z, (start, first, last) = torch.randn(4, DIM), _network()
    z[0, 2] = start[1] = torch.nan
    found = fused.sweep(z, start, [first, last], [last[:, 0]], None, range(DIM), activation, column_of(Gate(DIM)))
    assert found.isnan().int().tolist() == [[0, 0, 1, 1, 1], [1] * 5, [0] * 5, [0] * 5]


@interpreted
@pytest.mark.parametrize("name", ["spline", "deep sigmoid"])
def test_an_image_without_a_value_has_no_preimage(name: str) -> None:
    step = swept.STEPS[name]()
    z, numbers = swept.drawn(step, 1.0)
    z[1], numbers[3, 2] = torch.nan, torch.nan
    z[3] = 0.5
    found = swept.by_sweep(step, z, numbers)
    assert found.isnan().nonzero().flatten().tolist() == [1, 3]


@interpreted
@pytest.mark.parametrize("name", ["gates", "maf", "no layer", "spline", "shift", "a step that no kernel knows"])
@pytest.mark.parametrize("direction", ["forward", "known"])
def test_kernels_read_and_write_half_precision(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, as the engine without kernels but for the roundings of single sums."""
    flow = FLOWS[name]()
    push(flow, Case(seed=2, push=0.2))
    known, context = torch.randn(2, 3, DIM), torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        z = flow(known, context)[0].detach() if direction == "known" else known
        found = every_result(flow, direction, z, context, known)
        monkeypatch.setattr(fusing, "on_device", lambda z: False)
        expected = every_result(flow, direction, z, context, known)
    for each, other in zip(found, expected, strict=True):
        assert each.dtype == torch.float32
        assert (each - other).abs().max() <= 2**-6 * (1 + other.abs().max())


@interpreted
@pytest.mark.parametrize(
    ("size", "scale"),
    [(size, scale) for size in (1, 2) for scale in (0.1, 3.0, 1e3, 1e6)]
    + [(9, 1e3), *(pytest.param(9, scale, marks=pytest.mark.long) for scale in (0.1, 3.0, 1e6))],
)
def test_roots_are_found_by_one_launch(scale: float, size: int) -> None:
    """Of a triangle and of single equations, gains near -1 among them; matrices that many targets share."""
    generator = torch.Generator().manual_seed(size)
    gain = (scale * torch.randn(3, size, size, generator=generator)).triu(1)
    diagonal = torch.exp(scale * torch.rand(3, size, generator=generator)).clamp_max(scale) - 0.999
    gain = gain + torch.diag_embed(diagonal)
    for shape in [(3,), (4, 3), (2, 1)]:
        target = scale * torch.randn(*shape, size, generator=generator)
        found = tanh_roots(gain, target)
        y = found.double()
        residual = y + (gain.double() @ y.tanh().unsqueeze(-1)).squeeze(-1) - target
        # The rounding of y, as the slope has it, and of the later roots that a row is given.
        bound = (1 + gain.double().abs().sum(-1)) * EPS * (1 + y.abs())
        assert (residual.abs() <= 4 * bound).all()
        single = tanh_root(diagonal, target).double()
        residual = single + diagonal.double() * single.tanh() - target
        slope = 1 + diagonal.double() * (1 - single.tanh() ** 2)
        assert (residual.abs() <= EPS * (slope * single.abs() + 1e-30)).all()
        assert torch.equal(tanh_root(diagonal, -target), -tanh_root(diagonal, target))


@interpreted
def test_the_operators_fakes_hold() -> None:
    z, numbers, of_log_det = torch.randn(4, DIM), torch.randn(4, 2 * DIM), torch.randn(4).double()
    gate, maps, (hidden, first, last) = column_of(Gate(DIM)), torch.ops.flowpost, _network()
    index = torch.tensor([4, 2, 0, 1, 3])
    for operator, inputs in [
        (maps.element, (z, numbers, of_log_det, *gate, True)),
        (maps.element_pull, (z, numbers, z, of_log_det, *gate)),
        (maps.element_slopes, (z, numbers, of_log_det, *gate)),
        (maps.activation_pull, (hidden, hidden, "elu")),
        (maps.activation_pull, (hidden.bfloat16(), hidden.bfloat16(), "elu")),
        (maps.element, (z, numbers.bfloat16(), None, *gate, False)),
        (maps.element_pull, (z, numbers.bfloat16(), z, of_log_det, *gate)),
        (maps.element_slopes, (z, numbers.bfloat16(), of_log_det, *gate)),
        (maps.sweep, (z, hidden, [first, last], [last[:, 0]], index, index.tolist(), "elu", *gate)),
        (maps.sweep, (z, hidden, [first, last], [last[:, 0]], None, range(DIM), "relu", "inverse shift", [])),
        (maps.tanh_root, (z, z)),
        (maps.tanh_roots, (torch.randn(4, DIM, DIM).triu(1), z)),
        (maps.transposed_sweep, (z, numbers, numbers, [first.t(), last.t()], [hidden], None, range(DIM), "elu")),
    ]:
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_another_number_of_rows_compiles_no_kernel_anew() -> None:
    """As the last batch of an epoch has: Triton makes one kernel for multiples of 16, and others for 1 and the rest."""
    from flowpost.masked.device import kernels, sweeps
    from flowpost.numerics import root_kernels

    found = [each for module in (kernels, sweeps, root_kernels) for each in vars(module).items()]
    launched = {name: each for name, each in found if name.endswith("_kernel")}
    assert len(launched) == 7
    for name, kernel in launched.items():
        options = getattr(kernel, "kwargs", vars(kernel))  # the interpreter's, or the compiler's
        assert options["do_not_specialize"] == ["gains" if name == "roots_kernel" else "count"]


def test_a_sweep_s_result_lies_as_its_fake_s_does() -> None:
    """Of points that lie column by column, and in float64, which no kernel knows: a compiler asserts it."""
    hidden, first, last = (each.double() for each in _network())
    z, (name, constants) = torch.randn(DIM, 4, dtype=torch.float64).t(), column_of(Gate(DIM))
    found = torch.ops.flowpost.sweep(z, hidden, [first, last], [last[:, 0]], None, range(DIM), "elu", name, constants)
    assert found.is_contiguous()


@pytest.mark.parametrize(("release", "fit"), [("2.7.1+cu126", False), ("2.8.0", True), ("2.11.0+cu130", True)])
def test_a_triton_without_tuples_is_left_alone(release: str, fit: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(release))
    assert runpy.run_path(fusing.__file__)["_TRITON"] is fit


class Driver:
    """A driver of Triton's, built when it is asked for where that is possible."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    @property
    def active(self) -> "Driver":
        if self.error is not None:
            raise self.error
        return self

    def get_current_target(self) -> None:
        pass


@pytest.mark.parametrize(
    ("capability", "error", "fit"),
    [
        ((6, 1), None, False),
        ((7, 5), None, True),
        ((12, 0), None, True),
        ((9, 0), RuntimeError("Failed to find C compiler.\nInstall one."), False),
        ((9, 0), AssertionError(), False),
    ],
)
def test_a_gpu_that_can_run_no_kernel_has_torch_s_operations(
    capability: tuple[int, int],
    error: Exception | None,
    fit: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An old one, or any where Triton cannot build what launches; that is said once."""
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.11.0"))  # of one that has the Triton for it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(triton.runtime, "driver", Driver(error))
    on_device = runpy.run_path(fusing.__file__)["on_device"]
    z = SimpleNamespace(device=torch.device("cuda", 0))
    said = (
        contextlib.nullcontext() if error is None else pytest.warns(UserWarning, match="got: (Failed|Assert).*; slow")
    )
    with said:
        assert on_device(z) is fit
    assert on_device(z) is fit


def _network() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 8), torch.randn(8, DIM), torch.randn(2 * DIM, 8)


@pytest.mark.full
def test_every_kernel_compiles_for_a_gpu() -> None:
    """The types that an interpreter lets pass."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compiled_kernels"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stacks = [int(each) for each in re.findall(r"STACK:(\d+) ", done.stdout)]
    assert len(stacks) == done.stdout.count("compiled") > 30
    # No register spills; Triton 3.6 puts four numbers of the widest transposed sweep on the stack.
    assert max(stacks) <= (16 if Version(triton.__version__) < Version("3.7") else 0), done.stdout
