"""Targets of any size: their normalizers, and the public flows that are fitted beside ours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from benchmarks import __main__ as cli
from benchmarks.config import ConfigError
from benchmarks.peers import here
from benchmarks.targets import _peers, fitting
from benchmarks.targets.contestants import PEERS, build, installed, rate
from benchmarks.targets.energies import ENERGIES
from benchmarks.targets.fitting import Plan, draw, fit, kl
from benchmarks.targets.known import banana, energies, funnel, gaussian, student
from flowpost import FlowPosterior, full_covariance


def normal(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


def matrix_of(square: Callable[[Tensor], Tensor], dim: int) -> Tensor:
    """M of a quadratic ``z' M z``, by its values at sums of two unit vectors."""
    one = torch.eye(dim, dtype=torch.float64)
    return 0.5 * (square(one.unsqueeze(1) + one) - square(one).unsqueeze(1) - square(one))


@pytest.mark.parametrize("dim", [3, 10])
def test_the_funnel_is_neal_s(dim: int) -> None:
    z = torch.randn(50, dim, dtype=torch.float64)
    first, others = z[:, 0], normal(torch.zeros(dim - 1).double(), (z[:, :1] / 2).exp().expand(-1, dim - 1))
    wanted = Normal(0, 3).log_prob(first) + others.log_prob(z[:, 1:])
    torch.testing.assert_close(funnel(dim).log_prob(z), wanted)


@pytest.mark.parametrize("dim", [3, 10])
def test_the_banana_is_a_bent_normal(dim: int) -> None:
    """Bent back, every variable is normal; at an odd size the last one is as it was."""
    z = torch.randn(50, dim, dtype=torch.float64)
    straight, scale = z.clone(), torch.ones(dim, dtype=torch.float64)
    for second in range(1, dim, 2):
        straight[:, second] -= z[:, second - 1] ** 2 - 1
        scale[second] = 0.5
    torch.testing.assert_close(banana(dim).log_prob(z), normal(torch.zeros(dim).double(), scale).log_prob(straight))


def test_the_gaussian_is_normalized_and_ill_conditioned() -> None:
    """Twice U is the square of the precision."""
    dim = 10
    energy = gaussian(dim)
    precision = matrix_of(lambda z: 2 * energy.potential(z), dim)
    values = torch.linalg.eigvalsh(precision)
    torch.testing.assert_close(values[[0, -1]], torch.tensor([0.01, 100.0], dtype=torch.float64))
    z = torch.randn(50, dim, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(dim).double(), precision_matrix=precision)
    torch.testing.assert_close(energy.log_prob(z), exact.log_prob(z))


@pytest.mark.parametrize("dim", [2, 10])
def test_the_student_is_a_scale_mixture_of_normals(dim: int) -> None:
    """``Normal(0, S nu / g)``, g of chi squared: by quadrature over g's log."""
    energy = student(dim)
    precision = matrix_of(lambda z: 5 * torch.expm1(2 * energy.potential(z) / (5 + dim)), dim)
    values = torch.linalg.eigvalsh(precision)
    assert float(values[-1] / values[0]) == pytest.approx(100)
    z = 2 * torch.randn(20, dim, dtype=torch.float64)
    log_g = torch.linspace(-25, 8, 20_000, dtype=torch.float64)
    chi = 2.5 * log_g - 0.5 * log_g.exp() - 2.5 * math.log(2) - math.lgamma(2.5)  # with the slope of exp
    log_det = values.log().sum() + dim * (log_g - math.log(5))
    square = ((z @ precision) * z).sum(-1, keepdim=True) * log_g.exp() / 5
    mixture = torch.logsumexp(chi + 0.5 * (log_det - dim * math.log(2 * math.pi) - square), -1)
    torch.testing.assert_close(energy.log_prob(z), mixture + (log_g[1] - log_g[0]).log(), rtol=1e-6, atol=1e-6)


def test_each_size_has_four_targets() -> None:
    assert energies(2) == ENERGIES
    assert [(one.name, one.dim) for one in energies(10)] == [
        (name, 10) for name in ("funnel", "student", "banana", "gaussian")
    ]


def test_a_posterior_of_many_variables_is_fitted() -> None:
    """A Gaussian to a Gaussian: far from the start, the KL falls to what 200 steps reach."""
    target = gaussian(5)
    begin, _ = kl(full_covariance(0, 5).double(), target, 5000)
    (posterior,), (row,) = fit(
        "full_covariance", None, Plan(iterations=200, starts=1, samples=5000, pace=5.0), [target]
    )
    assert begin > 50
    assert 0 < row.kl < 1
    assert (row.dim, row.rate) == (5, 0.1)
    assert posterior.dim == 5


# ---- the public libraries' flows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_fitted_by_the_same_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log q is that of its samples: the KL of the fresh one is what a Monte Carlo of its map's Jacobian says."""
    if name not in installed():
        pytest.skip(f"{PEERS[name].library} is not installed")
    torch.manual_seed(0)
    posterior = build(name, 2, 3).double()
    for parameter in posterior.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    z, log_q, noise = posterior(sample_shape=(4,))

    def image(one: Tensor) -> Tensor:
        return posterior(noise=one.unsqueeze(0), sample_shape=(1,)).z[0]

    for at, point, density in zip(noise, z, log_q, strict=True):
        jacobian = torch.autograd.functional.jacobian(image, at)
        torch.testing.assert_close(image(at), point)
        wanted = Normal(0, 1).log_prob(at).sum() - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(density, wanted, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(fitting, "CHUNK", 50)  # a whole number of them: no draw of nothing, which zuko refuses
    _, rows = fit(name, 2, Plan(iterations=2, starts=1, samples=100), [banana(3), gaussian(3)])
    assert [(row.posterior, row.skipped_steps, math.isfinite(row.kl)) for row in rows] == [(name, 0, True)] * 2


@pytest.mark.skipif(not here("nflows"), reason="nflows is not installed")
def test_what_cannot_be_batched_is_drawn_one_by_one() -> None:
    """The draws of a set of weights are those of its posterior, batched or not."""
    for name, together in (("nflows RQS coupling", False), ("realnvp", True), ("realnvp", False)):
        posteriors = [_moved(build(name, 2)) for _ in range(3)]
        parameters, buffers = torch.func.stack_module_state(posteriors)
        noise = torch.randn(3, 7, 2)
        z, log_q = draw(posteriors[0], parameters, buffers, noise, together=together)
        for index, posterior in enumerate(posteriors):
            wanted = posterior(sample_shape=(7,), noise=noise[index])
            torch.testing.assert_close((z[index], log_q[index]), (wanted.z, wanted.log_prob))


def _moved(posterior: FlowPosterior) -> FlowPosterior:
    for parameter in posterior.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return posterior


def test_peers_are_chosen_by_name() -> None:
    assert _peers("all") == installed()
    assert _peers("none") == ()
    with pytest.raises(ConfigError, match="^peers: expected all, none, or some of zuko MAF, .*, got 'zuko'$"):
        _peers("zuko")


def test_splines_move_slower() -> None:
    assert rate("spline_coupling") < rate("realnvp") == 0.02


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_has_a_table_for_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["normflows planar"] if here("normflows") else []
    out, page = tmp_path / "run", tmp_path / "page.md"
    page.write_text("<!-- more variables -->\n<!-- end of more variables -->\n")
    options = ["--iterations", "2", "--starts", "1", "--quick", "--steps", "1", "--dim", "3,4", "--posterior", "radial"]
    options += ["--peers", ",".join(peers) or "none", "--out", str(out), "--page", str(page)]
    assert cli.main(["targets", *options]) == 0
    capsys.readouterr()
    content = json.loads((out / "targets.json").read_text())
    rows = [(one["posterior"], one["dim"], one["energy"]) for one in content["fits"]]
    names = ("funnel", "student", "banana", "gaussian")
    assert rows == [(name, dim, energy) for dim in (3, 4) for name in ("radial", *peers) for energy in names]
    assert all(one["kl"] > 0 and one["rate"] == pytest.approx(0.03) for one in content["fits"])
    assert [path.name for path in out.glob("*.png")] == []
    text = page.read_text()
    assert text.count("| posterior | K | funnel | student | banana | gaussian | rate | params | s |") == 2
    assert text.index("## 3 variables") < text.index("## 4 variables") < text.index("python -m benchmarks")
    assert text.count("KL(q || p) = ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim", "1"], "dim: expected integers of at least 2 with commas between them, got '1'"),
        (["--peers", "zuko"], "peers: expected all, none, or some of zuko MAF"),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code = cli.main(["targets", *arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
