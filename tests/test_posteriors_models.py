"""The log joints of known evidence: held to values that others computed, to differences, and to their own draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.config import ConfigError
from benchmarks.posteriors.collection import Posterior, collection, posterior, published_data

CHECKS = np.load(Path(__file__).parent / "golden" / "posteriors.npz", allow_pickle=False)
"""Five draws of each posterior, its log joint there and the log-det of its unconstraining map."""
NAMES = list(collection())
every = pytest.mark.parametrize("name", NAMES)


def checks(name: str, what: str) -> Tensor:
    return torch.from_numpy(CHECKS[f"{name}/{what}"])


@every
def test_log_joints_are_those_of_another_program(name: str) -> None:
    one = posterior(name)
    values = one.values(checks(name, "draws"))
    torch.testing.assert_close(one.log_joint(values), checks(name, "log_joint"), rtol=1e-6, atol=1e-6)
    log_det = one.parameters.constrain(one.parameters.free(values))[1]
    torch.testing.assert_close(log_det, checks(name, "log_det"), rtol=1e-9, atol=1e-9)


@every
def test_float32_is_float64_rounded(name: str) -> None:
    one = posterior(name)
    values = one.values(checks(name, "draws"))
    single = one.log_joint({key: value.float() for key, value in values.items()})
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), one.log_joint(values), rtol=3e-6, atol=3e-5)


@every
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    one, rows = posterior(name), checks(name, "draws")
    alone = torch.cat([one.log_joint(one.values(row)) for row in rows.split(1)])
    torch.testing.assert_close(one.log_joint(one.values(rows)), alone, rtol=1e-12, atol=1e-9)


@every
def test_gradients_are_the_differences_of_the_density(name: str) -> None:
    """By central differences of fourth order along every coordinate; the step fits the coordinate's own scale."""
    one = posterior(name)
    scales = one.free(one.reference[:100]).std(0)
    point = one.free(checks(name, "draws")[:1]).requires_grad_()
    (gradient,) = torch.autograd.grad(one.log_density(point).sum(), point)
    steps = torch.diag(1e-3 * scales)
    with torch.no_grad():
        values = [one.log_density(point + count * steps) for count in (1, -1, 2, -2)]
    difference = (8 * (values[0] - values[1]) - (values[2] - values[3])) / 12
    torch.testing.assert_close(gradient[0] * 1e-3 * scales, difference, rtol=2e-6, atol=2e-9)


@every
def test_draws_are_of_the_density(name: str) -> None:
    """Stein's identity ``E[score] = 0`` over the shipped draws, within 5.5 standard errors of its mean."""
    one = posterior(name)
    points = one.free(one.reference).requires_grad_()
    (scores,) = torch.autograd.grad(one.log_density(points).sum(), points)
    errors = scores.mean(0) / (scores.std(0) / len(scores) ** 0.5)
    assert errors.abs().max() < 5.5


@every
def test_figures_agree_with_each_other(name: str) -> None:
    one = posterior(name)
    known, draws = one.figures, one.reference
    assert draws.shape == (1000, one.dim) == (1000, len(one.columns))
    assert one.parameters.dim == one.dim
    for family, gaussian in (("mean_field", one.mean_field), ("full_rank", one.full_rank)):
        assert gaussian.gap == pytest.approx(one.log_evidence - known[family]["elbo"], abs=2e-3)
    assert ((draws.mean(0) - one.mean) / one.sd).abs().max() < 0.25
    assert posterior(one.short) is one


def test_there_are_24_of_the_dimensions_and_supports_published() -> None:
    dims = sorted(each.dim for each in collection().values())
    assert dims == [2, 3, 3, 3, 3, 4, 4, 5, 5, 5, 5, 6, 7, 8, 8, 10, 10, 13, 26, 66, 90, 116, 175, 218]
    assert [each.dim for each in collection().values()] == dims
    known = published_data("diamonds-diamonds")
    assert known["X_transposed"].shape == (24, 5000)
    assert known["Y"].dtype == np.float64


def test_data_are_moved_once() -> None:
    one = posterior("dogs")
    values = one.values(one.reference[:2].float())
    one.log_joint(values)
    first = one._data(torch.float32, torch.device("cpu"))
    one.log_joint(values)
    assert one._data(torch.float32, torch.device("cpu")) is first


def test_rows_and_values_undo_each_other() -> None:
    one = posterior("electric_1c_chr")
    rows = one.reference[:3]
    assert one.values(rows)["sigma_a"].shape == (3, 4)
    assert torch.equal(one.parameters.flat(one.values(rows)), rows)
    assert one.columns[100] == "sigma_a[1]"
    assert torch.equal(one.values(rows)["sigma_a"][:, 0], rows[:, 100])


def test_all_draws_are_read_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "posteriordb" / "dogs-dogs"
    folder.mkdir(parents=True)
    np.savez(folder / "reference_draws.npz", draws=np.ones((7, 3)))
    monkeypatch.setenv("FLOWPOST_DATA", str(tmp_path))
    known = posterior("dogs")
    assert Posterior(known.name, known.model, known.figures).reference.tolist() == [[1.0] * 3] * 7
    wells = posterior("wells_dist")
    assert len(Posterior(wells.name, wells.model, wells.figures).reference) == 1000


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"posterior: expected one of .*dogs, .*got 'dog'"):
        posterior("dog")


def test_a_covariance_without_a_factor_has_density_0() -> None:
    """A scale so large that the jitter is lost: that row alone, and no gradient of it is nan."""
    one = posterior("gp_pois_regr")
    values = one.values(one.reference[:2])
    values["alpha"] = torch.tensor([values["alpha"][0].item(), 1e9], dtype=torch.float64).requires_grad_()
    values["rho"] = values["rho"].clone().index_fill(0, torch.tensor([1]), 1e6)
    found = one.log_joint(values)
    assert found[0].isfinite()
    assert found[1] == -torch.inf
    found[:1].sum().backward()
    assert values["alpha"].grad is not None
    assert values["alpha"].grad.isfinite().all()
