"""Pyro's guides on the posteriors of known evidence: the same coordinates, an exact KL, no global state left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from benchmarks.posteriors import guides
from benchmarks.posteriors.collection import posterior
from benchmarks.posteriors.fitting import GUIDES, Plan, fit
from benchmarks.posteriors.guides import PARTICLES, RECORDS, fit_guide

pytest.importorskip("pyro")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "AutoNormal" else pytest.mark.full) for name in GUIDES]
)
def test_a_guide_s_kl_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short fit of an easy posterior: what the best of its family leaves and little more, and never less."""
    monkeypatch.setattr(guides, "RATE", 5e-2)
    monkeypatch.setattr(guides, "PARTICLES", 16)
    one = posterior("eight_schools_noncentered")
    found, draws = fit(one.short, name, 0, Plan(budget=4800, samples=4000))
    least = {"AutoNormal": one.mean_field.gap, "AutoMultivariateNormal": one.full_rank.gap}.get(name, 0.0)
    assert not found.error
    assert least - 0.04 < found.kl < least + 0.3
    assert found.evaluations == 4800
    assert draws.shape == (1000, 10)
    assert found.w1_max < 0.4
    assert len(found.history) == RECORDS
    assert found.history[-1][1] == pytest.approx(found.kl, abs=0.4)


def test_a_guide_leaves_no_state_behind() -> None:
    states = torch.get_rng_state(), random.getstate()
    noise = np.random.RandomState()
    noise.set_state(np.random.get_state())
    one = posterior("dogs")
    first = fit_guide("AutoNormal", one, 10 * PARTICLES, seed=3).history
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.random() == noise.random()
    assert torch.get_default_dtype() == torch.float32
    assert fit_guide("AutoNormal", one, 10 * PARTICLES, seed=3).history == first
    assert fit_guide("AutoNormal", one, 10 * PARTICLES, seed=4).history != first
