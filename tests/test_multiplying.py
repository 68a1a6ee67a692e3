"""Products by oneDNN are torch's own, whatever the operands' layout, and are taken only where they are sooner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from flowpost.bijectors import Autoregressive
from flowpost.masked import staircase
from flowpost.masked.staircase import Staircase
from flowpost.numerics import multiplying
from tests.registry import Case, push

pytestmark = pytest.mark.skipif(multiplying._linear is None, reason="this torch has no oneDNN")

LAYOUTS = ["rows", "columns", "part of more rows", "part of more columns", "every other row"]


@pytest.fixture(autouse=True)
def helpful(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it helps, for products of any size."""
    monkeypatch.setattr(multiplying, "HELPS", True)
    monkeypatch.setattr(multiplying, "_LARGE", 0)


def laid(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers in memory in another way."""
    rows, columns = matrix.shape
    wide = torch.full((2 * rows, columns + 7), torch.nan)
    views = {
        "rows": torch.empty(rows, columns),
        "columns": torch.empty(columns, rows).t(),
        "part of more rows": wide[3 : 3 + rows, :columns],
        "part of more columns": torch.full((columns + 5, 2 * rows), torch.nan)[2 : 2 + columns, :rows].t(),
        "every other row": wide[::2, 3 : 3 + columns],
    }
    return views[layout].copy_(matrix)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("sizes", [(40, 33, 150), (150, 64, 40), (32, 32, 128)])
def test_every_layout(left: str, right: str, sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    a, b, bias = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)
    exact = a.double() @ b.double()
    a, b = laid(a, left), laid(b, right)
    assert multiplying.pays(a, b)
    torch.testing.assert_close(multiplying.product(a, b).double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(multiplying.linear(a, b.t(), bias).double(), exact + bias.double(), rtol=1e-5, atol=1e-4)
    result = torch.full((rows, columns + 4), 2.0)[:, 1:-3]
    multiplying.write_product(result, a, b)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-4)
    multiplying.add_product(result, a, b)
    torch.testing.assert_close(result.double(), 2 * exact, rtol=1e-5, atol=1e-4)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    x[3, 5], x[7, 1] = torch.nan, torch.inf
    found = multiplying.product(x, weight)
    torch.testing.assert_close(found.isfinite().all(-1), x.isfinite().all(-1))
    assert found[3].isnan().all()
    assert found[7].isinf().all()


@pytest.mark.filterwarnings("ignore:TF32")  # torch says so of every switch of oneDNN
def test_where_it_is_not_taken() -> None:
    x = torch.randn(64, 64)
    assert multiplying.pays(x, x)
    assert not multiplying.pays(x.double(), x.double())
    assert not multiplying.pays(x.bfloat16(), x.bfloat16())
    assert not multiplying.pays(x.to("meta"), x.to("meta"))
    assert not multiplying.pays(x[:, :16], x[:16])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not multiplying.pays(x, x)
    with FlopCounterMode(display=False) as counter:
        multiplying.product(x, x)
    assert counter.get_total_flops() == 2 * 64**3


@pytest.mark.parametrize("grain", [2**10, 2**30])
def test_a_network_s_pass_and_gradients(grain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block of weights or of many, beside MKL's in float64."""
    monkeypatch.setattr(staircase, "_GRAIN", grain)
    torch.manual_seed(0)
    step = Autoregressive(40, 36, (130, 160))
    push(step, Case(seed=0, push=0.1))
    z, context = torch.randn(50, 40), torch.randn(50, 36)
    results = []
    for each in (step, Autoregressive(40, 36, (130, 160)).double()):
        each.load_state_dict(step.state_dict())
        like = next(each.parameters())
        leaves = [given.to(like).requires_grad_() for given in (z, context)]
        image, log_det = each(*leaves)
        gradients = torch.autograd.grad((image**2).sum() + log_det.sum(), [*leaves, *each.parameters()])
        results.append([image.detach(), log_det.detach(), *gradients])
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def test_the_operator_of_a_compiler() -> None:
    """Its schema and its fake hold, at each layout that `product` takes."""
    for x, weight in ((torch.randn(40, 33), torch.randn(33, 150)), (torch.randn(33, 150).t(), torch.randn(33, 40))):
        torch.library.opcheck(torch.ops.flowpost.multiply.default, (x, weight, None))
        torch.testing.assert_close(torch.ops.flowpost.multiply(x, weight, None), x @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="that compiler cannot follow a step's way back")
def test_a_compiler_takes_a_batch_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplying, "_LARGE", 2**17)
    torch.compiler.reset()
    counter, step = CompileCounter(), Autoregressive(40, 0, (128, 160))
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for size in (200, 64, 5, 33, 31, 16, 129, 2):
        z = torch.randn(size, 40)
        torch.testing.assert_close(compiled(z), step(z))
    assert counter.frame_count == 2


def test_a_gradient_written_whole_is_zero_where_no_unit_reads() -> None:
    degrees = [unit // 4 for unit in range(256)]
    stairs = Staircase(degrees, degrees)
    x, grad = torch.randn(64, 256), torch.randn(64, 256)
    found = stairs.weight_gradient(grad, x)
    torch.testing.assert_close(found, (grad.T @ x) * stairs.mask.on(x), rtol=1e-5, atol=1e-4)
