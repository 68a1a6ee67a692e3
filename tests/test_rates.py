"""The rate of a coupling's network; `test_masked.py` has that of a masked network."""

import pytest
import torch
from registry import Case, push

from flowpost import Affine, Coupling

F64 = torch.float64


@pytest.mark.parametrize("hidden", [(9, 8), ()], ids=str)
def test_a_rate_slows_what_adam_moves(hidden: tuple[int, ...]) -> None:
    """One step of Adam moves every weight by its rate: the numbers then move ``rate`` times as far."""
    moved = []
    for rate in (1.0, 0.25):
        torch.manual_seed(0)
        step = Coupling(3, Affine(1), 2, hidden, rate=rate).double()
        z, h = torch.randn(50, 3, dtype=F64), torch.randn(50, 2, dtype=F64)
        torch.testing.assert_close(step(z, h), (z, torch.zeros(50, dtype=F64)), rtol=0, atol=1e-15)
        optimizer, before = torch.optim.Adam(step.parameters(), 1e-3, eps=1e-30), step.net(z[:, :2], h)
        step(z, h)[1].sum().backward()
        optimizer.step()
        moved.append((step.net(z[:, :2], h) - before)[:, 1])
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-9, atol=1e-15)
    assert moved[0].abs().mean() > 1e-3


@pytest.mark.parametrize("hidden", [(9, 8), ()], ids=str)
def test_a_state_from_before_there_was_a_rate_is_the_same_map(hidden: tuple[int, ...]) -> None:
    old, new, other = (Coupling(3, Affine(1), 2, hidden, rate=rate).double() for rate in (1.0, 0.25, 0.125))
    push(old, Case(seed=1, push=0.5))
    state, (z, h) = old.state_dict(), (torch.randn(20, 3, dtype=F64), torch.randn(20, 2, dtype=F64))
    state._metadata["net"]["version"] = 1  # pyright: ignore[reportAttributeAccessIssue]
    new.load_state_dict(state)
    torch.testing.assert_close(new(z, h), old(z, h), rtol=1e-12, atol=1e-12)
    other.load_state_dict(new.state_dict())  # of a network with another rate: that is taken over
    torch.testing.assert_close(other(z, h), old(z, h), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="output_rate"):
        Coupling(3, Affine(1), 2, hidden, rate=0.25).double().load_state_dict(old.state_dict())


def test_a_rate_is_a_positive_number() -> None:
    with pytest.raises(ValueError, match=r"^rate: expected a positive finite number, got 0$"):
        Coupling(3, Affine(1), rate=0)
