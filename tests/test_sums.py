"""Running sums of a GPU under deterministic algorithms, by the way that is taken there."""

import pytest
import torch
from on_device import densities
from small import DIM, FEATURES, small

from flowpost.masked import device, engine
from flowpost.numerics import sums


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_the_other_way_is_cumsum(dim: int) -> None:
    values = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(sums._one_by_one(values, dim), values.cumsum(dim))
    assert torch.autograd.gradcheck(lambda v: sums._one_by_one(v, dim), values)
    with torch.no_grad():
        values[1, 3, 2], values[2, 5, 4] = torch.inf, torch.nan
    torch.testing.assert_close(sums._one_by_one(values, dim), values.cumsum(dim), equal_nan=True)


@pytest.mark.parametrize("name", ["spline_autoregressive", "spline_coupling"])
def test_splines_take_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other running sum, of which a GPU has none."""
    monkeypatch.setattr(engine, "engine_on", lambda z: device)
    posterior = small(name)
    given = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, FEATURES), (2, 5, DIM), (2, 5, DIM))]
    expected = densities(posterior, *given)
    monkeypatch.setattr(sums, "_refused", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "cumsum", None)
    monkeypatch.setattr(torch, "cumsum", None)
    torch.testing.assert_close(densities(posterior, *given), expected, rtol=1e-9, atol=1e-9)
