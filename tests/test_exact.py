"""The judge of the log-dets is judged: closed forms, autodiff where it is good, and what float64 alone gets wrong."""

import math
from itertools import combinations, count

import exact
import pytest
import torch
from registry import BY_NAME, ENTRIES, Case, Entry, by_level, draw, jacobian, size
from torch import Tensor

from flowpost import Planar

ZERO = torch.zeros(())


def points(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def test_a_linear_map_that_float64_can_hardly_invert() -> None:
    """A Vandermonde matrix of integers: its determinant is the product of the nodes' differences."""
    nodes = [1, 2, 4, 7, 11, 16, 22, 29]
    matrix = torch.tensor([[float(node**power) for power in range(8)] for node in nodes], dtype=torch.float64)
    assert torch.linalg.cond(matrix) > 1e10
    expected = math.log(math.prod(b - a for a, b in combinations(nodes, 2)))
    for turned, wanted in ((matrix, 1), (matrix.flip(0)[[1, 0, 2, 3, 4, 5, 6, 7]], -1)):
        sign, log_abs_det = exact.slogdet(lambda z, m=turned: (z @ m.T, ZERO), torch.randn(2, 8, dtype=torch.float64))
        assert sign.tolist() == [wanted, wanted]
        torch.testing.assert_close(log_abs_det, torch.full_like(sign, expected), rtol=4e-16, atol=0)


def test_the_tail_that_autodiff_loses() -> None:
    """``z + tanh z``: where tanh rounds to 1, its slope 1 - tanh^2 is 0 by autodiff, and ``4 e^-2z`` in truth."""
    z = points(0.5, 20.0, 30.0).requires_grad_()
    found = exact.slogdet(lambda z: (z + torch.tanh(z), ZERO), z)[1]
    expected = torch.log1p(torch.cosh(z.detach().squeeze(-1)) ** -2)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert found[2] > 0
    assert torch.linalg.slogdet(jacobian(z + torch.tanh(z), z))[1][2] == 0


def test_what_depends_on_z_is_judged_where_float64_put_it() -> None:
    """Autodiff's slope of tanh is that at the rounded ``(z + 1e8) - 1e8``, and so is this one."""
    z = points(0.3, -1.7)
    rounded = ((z + 1e8) - 1e8).squeeze(-1)
    found = exact.slogdet(lambda z: (torch.tanh((z + 1e8) - 1e8), ZERO), z)[1]
    torch.testing.assert_close(found, -2 * torch.cosh(rounded).log(), rtol=1e-14, atol=0)
    assert (found + 2 * torch.cosh(z.squeeze(-1)).log()).abs().min() > 1e-10


def test_what_depends_on_the_context_alone_is_not_rounded() -> None:
    z, context = points(0.3), points(1e-20)
    sign, found = exact.slogdet(lambda z, c: (z * ((c + 1) - 1), ZERO), z, context)
    assert sign.item() == 1
    assert found.item() == pytest.approx(math.log(1e-20), rel=1e-15)


@pytest.mark.long
@by_level(ENTRIES, pytest.mark.full)
def test_autodiff_agrees_where_it_is_good(entry: Entry) -> None:
    """Every family in both directions: to the bound by which the judge itself is needed."""
    step, z, context = draw(entry, Case(dim=2, spread=0.5), batch=(1,))
    for function in (step, step.inverse):
        z = z.detach().requires_grad_()
        image = function(z, context)[0]
        matrix = jacobian(image, z)
        wanted_sign, expected = torch.linalg.slogdet(matrix)
        sign, found = exact.slogdet(function, z, context)
        assert torch.equal(sign, wanted_sign)
        bound = 8 * torch.finfo(z.dtype).eps * (size(step) + torch.linalg.cond(matrix))
        assert ((found - expected).abs() <= bound).all()
        z = image


def test_an_operation_without_a_rule_is_named() -> None:
    with pytest.raises(NotImplementedError, match="got aten.erf.default"):
        exact.slogdet(lambda z: (torch.erf(z), ZERO), points(0.3))


def test_a_map_that_is_not_the_one_traced_is_refused() -> None:
    numbers = count(1)
    with pytest.raises(AssertionError, match="another image"):
        exact.slogdet(lambda z: (z * next(numbers), ZERO), points(0.3))


def test_a_value_read_after_it_was_written_over_is_refused() -> None:
    def function(z: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = z * 2
        view = whole.squeeze(-1)
        whole.mul_(3)
        return view.unsqueeze(-1), ZERO

    with pytest.raises(NotImplementedError, match="no operation to read what was written over, got aten.unsqueeze"):
        exact.slogdet(function, points(0.3))


@pytest.mark.parametrize(
    "name",
    [
        "planar",
        "shared_planar",
        pytest.param("autoregressive_2_context", marks=pytest.mark.full),
        pytest.param("inverse_autoregressive", marks=pytest.mark.long),
    ],
)
def test_no_wrong_log_det_is_excused(name: str) -> None:
    """The negative control: half the bound passes, twice the bound does not, nor a reflection of some rows."""
    step, z, context = draw(BY_NAME[name], Case())
    z.requires_grad_()
    bound = 8 * torch.finfo(z.dtype).eps * (size(step) + torch.linalg.cond(jacobian(step(z, context)[0], z)))

    def off(bounds: float) -> exact.Map:
        return lambda z, context: (step(z, context)[0], step(z, context)[1] + bounds * bound)

    def reflected(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = step(z, context)
        first, others = image.split([1, len(image) - 1])
        return torch.cat([first, others.flip(-1)]), log_det

    exact.judge(off(0.5), z, context, size(step))
    for wrong in (off(2), off(-2), reflected):
        with pytest.raises(AssertionError, match="times the bound"):
            exact.judge(wrong, z, context, size(step))


def test_no_right_log_det_is_blamed() -> None:
    """At the foot of a steep planar step autodiff is four times over the bound, the log-det a hundredth of it."""
    step, z, context = Planar(1), points(0.0).requires_grad_(), torch.tensor([[-100.0, 0.28, 0.0]], dtype=torch.float64)
    image, log_det = step(z, context)
    bound = 8 * torch.finfo(z.dtype).eps * (size(step) + 1)
    assert (log_det - torch.linalg.slogdet(jacobian(image, z))[1]).abs() > 2 * bound
    assert (log_det - exact.slogdet(step, z, context)[1]).abs() < 0.01 * bound
    assert torch.equal(exact.judge(step, z, context, size(step)), image)
