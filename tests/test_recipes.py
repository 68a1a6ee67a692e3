"""The named posteriors: the architectures of their papers, and where they start."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.make import Halves
from torch import Tensor, nn

import flowpost
from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Coupling,
    DeepSigmoid,
    FlowPosterior,
    Inverse,
    Learned,
    Masked,
    Planar,
    Scaling,
    Shared,
    Shift,
    Spline,
    Sylvester,
    UnitLowerTriangular,
)
from flowpost.recipes import RECIPES
from flowpost.recipes.record import names, recipe

GATE = 1 / (1 + math.exp(-2))


def test_diagonal_is_one_affine_step() -> None:
    posterior = flowpost.diagonal(6, 4)
    assert isinstance(posterior.flow, Affine)
    assert (posterior.dim, posterior.features, posterior.flow.context_size) == (4, 6, 8)


def test_full_covariance_is_a_triangular_map_then_an_affine_one() -> None:
    flow = flowpost.full_covariance(6, 4).flow
    assert isinstance(flow, Chain)
    assert [type(step) for step in flow] == [UnitLowerTriangular, Affine]
    assert flow.context_size == 6 + 8


def test_planar_is_an_affine_step_then_planar_ones_or_planar_ones_before_the_mean() -> None:
    centred = flowpost.planar(6, 4, steps=3, centred=True)
    both = ((flowpost.planar(6, 4, steps=3), [Affine, *[Planar] * 3]), (centred, [Scaling, *[Planar] * 3, Shift]))
    for posterior, kinds in both:
        flow = posterior.flow
        assert isinstance(flow, Chain)
        assert [type(step) for step in flow] == kinds
        assert flow.context_size == 8 + 3 * 9


def test_centred_planar_steps_are_the_paper_s_with_their_offsets_moved() -> None:
    """``w.(z + loc) + b' = w.z + b`` for ``b' = b - w.loc``: one family, whichever comes first."""
    centred = flowpost.planar(2, 3, steps=2, centred=True).double().flow
    paper = flowpost.planar(2, 3, steps=2).double().flow
    noise, context = torch.randn(9, 3, dtype=torch.float64), 2 * torch.randn(9, 20, dtype=torch.float64)
    scale, *steps, loc = context.split([3, 7, 7, 3], -1)
    moved = []
    for step in steps:
        u, w, b = step.split([3, 3, 1], -1)
        moved += [u, w, b - (w * loc).sum(-1, keepdim=True)]
    torch.testing.assert_close(centred(noise, context), paper(noise, torch.cat([loc, scale, *moved], -1)))


CENTRED = ["planar", "householder", "cc_lin_iaf"] + [
    f"{k}_sylvester" for k in ("orthogonal", "householder", "triangular")
]


@pytest.mark.parametrize("name", CENTRED)
def test_a_state_of_the_other_order_is_refused(name: str) -> None:
    """Names and shapes are the same, and the map another."""
    one, other = (RECIPES[name](3, 2, centred=centred) for centred in (True, False))
    for into, state in ((one, other.state_dict()), (other, one.state_dict())):
        with pytest.raises(RuntimeError, match="flow.constant_centred"):
            into.load_state_dict(state)


@pytest.mark.parametrize("name", ["householder", "planar"])
def test_what_is_neither_centred_nor_not_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"^centred: expected True or False, got 'no'$"):
        RECIPES[name](3, 2, centred="no")


def test_planar_steps_start_in_directions_of_their_own() -> None:
    start = flowpost.planar(6, 4, steps=3).flow.initial_context()[8:].view(3, 9)
    assert (start[:, :4] == 0).all()
    assert len({tuple(direction) for direction in start[:, 4:8].tolist()}) == 3


def test_the_sylvester_forms() -> None:
    """Columns half as many as variables; reflections of full rank; and reversals between the triangular steps."""

    def parts(flow: Bijector) -> list[tuple[int, int] | None]:
        assert isinstance(flow, Chain)
        assert isinstance(next(iter(flow)), Affine)
        return [(step.rank, step.reflections) if isinstance(step, Sylvester) else None for step in [*flow][1:]]

    assert parts(flowpost.orthogonal_sylvester(6, 5, steps=2).flow) == [(3, 3)] * 2
    assert parts(flowpost.orthogonal_sylvester(6, 5, steps=3, rank=4).flow) == [(4, 4)] * 3
    assert parts(flowpost.householder_sylvester(6, 5, steps=2, reflections=7).flow) == [(5, 7)] * 2
    for steps in (1, 2, 3):
        flow = flowpost.triangular_sylvester(6, 5, steps=steps).flow
        assert parts(flow) == [(5, 0), None] * (steps // 2) * 2 + [(5, 0)] * (steps % 2)
        z = torch.randn(4, 5)
        torch.testing.assert_close(flow(z, flow.initial_context())[0], z)  # every variable in its place


def test_iaf_reverses_the_order_between_steps_that_share_c() -> None:
    flow = flowpost.iaf(6, 4, steps=3, hidden=(8, 9), context_size=5).flow
    assert isinstance(flow, Chain)
    first, shared = flow
    assert isinstance(first, Affine)
    assert isinstance(shared, Shared)
    assert [type(step) for step in shared] == [Autoregressive] * 3
    assert [step.causal_order().tolist() for step in shared] == [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]  # pyright: ignore[reportOptionalMemberAccess]
    assert flow.context_size == 8 + 5
    for step in shared:
        if isinstance(step, Autoregressive):
            assert [len(layer.bias) for layer in step.net.layers] == [8, 9, 8]  # pyright: ignore[reportArgumentType]
            assert step.context_size == 5


def test_iaf_reads_c_in_every_step() -> None:
    """Each step's projection of c has a gradient once its last layer has left zero."""
    posterior = flowpost.iaf(6, 4, steps=3, hidden=(16,), context_size=5)
    for parameter in posterior.flow.parameters():
        torch.nn.init.normal_(parameter)
    sample = posterior(torch.randn(9, 6))
    (sample.log_prob.sum() + sample.z.sum()).backward()
    projections = [p.grad for name, p in posterior.named_parameters() if name.endswith("project.weight")]
    assert len(projections) == 3
    assert all(grad is not None and (grad != 0).any(0).all() for grad in projections)


def test_iaf_mixes_all_variables_in_two_steps() -> None:
    """What the reversal is for: after two steps each output but the last-written reads every noise variable."""
    posterior = flowpost.iaf(0, 4, steps=2, hidden=(32,), context_size=2).double()
    for parameter in posterior.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    noise = torch.randn(4, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda x: posterior(noise=x).z, noise)
    assert isinstance(matrix, Tensor)
    assert (matrix != 0).sum() == 16


def shared_steps(posterior: FlowPosterior) -> list[Bijector]:
    """What follows the diagonal Gaussian."""
    flow = posterior.flow
    assert isinstance(flow, Chain)
    first, shared = flow
    assert isinstance(first, Affine)
    assert isinstance(shared, Shared)
    return list(shared)


@pytest.mark.parametrize("name", ["affine_iaf", "maf"])
def test_plain_autoregressive_flows_reverse_the_order_between_steps_that_share_c(name: str) -> None:
    steps = shared_steps(RECIPES[name](6, 4, steps=3, hidden=(8, 9), context_size=5))
    masked = [step.step if isinstance(step, Inverse) else step for step in steps]
    assert [isinstance(step, Inverse) for step in steps] == [name == "maf"] * 3
    for step, order in zip(masked, [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]], strict=True):
        assert isinstance(step, Masked)
        assert step.causal_order().tolist() == order
        assert [len(layer.bias) for layer in step.net.stack] == [8, 9, 8]
        assert step.context_size == 5


@pytest.mark.parametrize("name", ["nice", "realnvp"])
@pytest.mark.parametrize(("dim", "halves"), [(1, [[], []]), (4, [[0, 1], [2, 3]]), (5, [[0, 1], [2, 3, 4]])])
def test_couplings_pass_one_half_and_then_the_other(name: str, dim: int, halves: list[list[int]]) -> None:
    steps = shared_steps(RECIPES[name](6, dim, steps=3, hidden=(8, 9), context_size=5))
    z, c = torch.randn(7, dim), torch.randn(7, 5)
    for step, variables in zip(steps, [*halves, halves[0]], strict=True):
        assert isinstance(step, Coupling)
        for parameter in step.parameters():
            torch.nn.init.normal_(parameter)
        image, log_det = step(z, c)
        assert (image == z).all(0).nonzero().flatten().tolist() == variables
        assert (log_det == 0).all() == (name == "nice")


@pytest.mark.parametrize("name", ["spline_autoregressive", "spline_coupling"])
def test_splines_act_on_the_noise_and_the_gaussian_comes_last(name: str) -> None:
    """A posterior far from 0 has its noise where the bins are."""
    flow = RECIPES[name](6, 5, steps=2, hidden=(8, 9), context_size=5, bins=4, bound=2.5).flow
    assert isinstance(flow, Chain)
    shared, last = flow
    assert isinstance(last, Affine)
    assert isinstance(shared, Shared)
    kind = Masked if name == "spline_autoregressive" else Coupling
    sizes = [5, 5] if kind is Masked else [3, 2]
    for step, size in zip(shared, sizes, strict=True):
        assert isinstance(step, kind)
        spline = step.step
        assert isinstance(spline, Spline)
        assert (spline.dim, spline.bins, spline.bound, step.context_size) == (size, 4, 2.5, 5)


def test_naf_is_affine_iaf_with_deep_sigmoids() -> None:
    steps = shared_steps(RECIPES["naf"](6, 4, steps=3, hidden=(8, 9), context_size=5, units=3, layers=2))
    for step, order in zip(steps, [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]], strict=True):
        assert isinstance(step, Masked)
        assert step.causal_order().tolist() == order
        sigmoids = step.step
        assert isinstance(sigmoids, DeepSigmoid)
        assert (sigmoids.units, sigmoids.layers, step.context_size) == (3, 2, 5)
        assert [len(layer.bias) for layer in step.net.stack] == [8, 9, 18 * 4]


MIXING = ["affine_iaf", "maf", "nice", "realnvp", "spline_autoregressive", "spline_coupling", "naf"]


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("dim", [2, 5])
def test_alternating_mixes_all_variables(name: str, dim: int) -> None:
    posterior = RECIPES[name](0, dim, steps=3, hidden=(32,), context_size=2).double()
    for parameter in posterior.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    matrix = torch.autograd.functional.jacobian(lambda x: posterior(noise=x).z, torch.randn(dim, dtype=torch.float64))
    assert isinstance(matrix, Tensor)
    assert (matrix != 0).all()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("features", [6, 0])
@pytest.mark.parametrize("dim", [1, 3, 40])
def test_a_fresh_posterior_is_near_standard_normal(name: str, features: int, dim: int) -> None:
    """Against N(0, I), log q differs by a part of a nat."""
    posterior = RECIPES[name](features, dim)
    h = (torch.randn(64, 6),) if features else ()
    z, log_prob, noise = posterior(*h, sample_shape=(4,))
    tolerance = 0.12 if features else 1e-5
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert (z - noise).abs().max() < tolerance * (5 if dim == 40 else 1)
    assert (log_prob - expected).abs().mean() < (0.25 * math.sqrt(dim) if features else 1e-4 * dim)


@pytest.mark.parametrize("features", [6, 0])
def test_a_fresh_iaf_is_the_diagonal_gaussian_of_its_affine_step(features: int) -> None:
    """Its gates start as the identity, whatever h, so z and log q are those of the affine step alone."""
    posterior = flowpost.iaf(features, 4, steps=5, hidden=(16,)).double()
    h = (3 * torch.randn(7, 6, dtype=torch.float64),) if features else ()
    z, log_prob, noise = posterior(*h, sample_shape=(9,))
    flow = posterior.flow.step if isinstance(posterior.flow, Learned) else posterior.flow
    assert isinstance(flow, Chain)
    affine = next(iter(flow))
    context = posterior.head(*h) if posterior.head is not None else flow.initial_context()
    alone, log_det = affine(noise, context[..., :8])
    torch.testing.assert_close(z, alone, rtol=1e-14, atol=1e-14)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise.double()).sum(-1) - log_det
    torch.testing.assert_close(log_prob, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gain", [1.0, 1.3])
def test_iaf_with_another_gain_starts_wider_or_narrower(gain: float) -> None:
    z, log_prob, noise = flowpost.iaf(0, 3, steps=4, hidden=(16,), gain=gain)(sample_shape=(9,))
    scale = (gain * GATE) ** 4
    torch.testing.assert_close(z, scale * noise)
    torch.testing.assert_close(log_prob, torch.distributions.Normal(0.0, scale).log_prob(z).sum(-1))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_one_gaussian_at_its_ends(name: str) -> None:
    """In the place of which `wrap` puts the Gaussian of an encoder."""
    flow = RECIPES[name](6, 3).flow
    kinds = [type(step) for step in flow] if isinstance(flow, Chain) else [type(flow)]
    if kinds[0] is Scaling:
        assert kinds[-1] is Shift
        kinds = kinds[1:-1]
        assert not {Affine, Scaling, Shift} & {*kinds}
    else:
        assert kinds.count(Affine) == 1
        assert Affine in (kinds[0], kinds[-1])


def test_a_function_becomes_a_recipe_by_its_decorator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RECIPES`, the record, `load` and `wrap` follow from the function alone."""
    monkeypatch.setitem(RECIPES, "ridges", flowpost.planar)  # so that the entry goes when the test is over

    @recipe
    def ridges(features: int, dim: int, ranks: Sequence[int] = (1, 2)) -> FlowPosterior:
        return FlowPosterior(features, Chain(*(Sylvester(dim, rank) for rank in ranks), Affine(dim)))

    assert RECIPES["ridges"] is ridges
    assert names(__name__) == ["ridges"]
    ranks = [np.int64(1), 3]
    posterior = ridges(6, 3, ranks=ranks)  # pyright: ignore[reportArgumentType]
    assert vars(posterior)["recipe"] == {"name": "ridges", "arguments": {"features": 6, "dim": 3, "ranks": [1, 3]}}
    flowpost.save(posterior, tmp_path / "ridges.safetensors")
    h, noise = torch.randn(5, 6), torch.randn(5, 3)
    assert torch.equal(flowpost.load(tmp_path / "ridges.safetensors")(h, noise=noise).z, posterior(h, noise=noise).z)

    on_features = flowpost.wrap(nn.Linear(6, 7), 3, features=7, flow="ridges", ranks=(1,))
    assert vars(on_features.posterior)["recipe"]["arguments"] == {"features": 7, "dim": 3, "ranks": [1]}
    on_pair = flowpost.wrap(Halves(), 3, example=h, flow="ridges", ranks=(2, 2, 1))
    assert isinstance(on_pair.posterior.flow, Chain)
    assert [type(step) for step in on_pair.posterior.flow] == [Sylvester] * 3 + [Affine]
    torch.testing.assert_close(on_pair(h, noise=noise).z, h[:, :3] + torch.exp(h[:, 3:] / 2) * noise)


@pytest.mark.parametrize("name", RECIPES)
def test_two_seeds_make_two_posteriors(name: str) -> None:
    h, noise = torch.randn(5, 6), torch.randn(5, 3)
    torch.manual_seed(1)
    first = RECIPES[name](6, 3)
    torch.manual_seed(2)
    second = RECIPES[name](6, 3)
    torch.manual_seed(1)
    again = RECIPES[name](6, 3)
    assert torch.equal(first(h, noise=noise).z, again(h, noise=noise).z)
    assert not torch.equal(first(h, noise=noise).z, second(h, noise=noise).z)


def linear_gaussian() -> tuple[Tensor, Tensor]:
    """A correlated target N(mean, cov) for reverse KL, whose normalizer is known."""
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    return mean, torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)


TARGETS: list[tuple[Callable[[], FlowPosterior], float, float]] = [
    (lambda: flowpost.full_covariance(0, 2), 0.0, 0.01),
    # The best factorized q has precision 1 / (1 - 0.64): KL = -log(1 - 0.64) / 2.
    (lambda: flowpost.diagonal(0, 2), 0.51, 0.01),
    (lambda: flowpost.iaf(0, 2, steps=2, hidden=(16,), context_size=4), 0.0, 0.02),
    (lambda: flowpost.planar(0, 2, steps=4), 0.0, 0.51),
    (lambda: flowpost.affine_iaf(0, 2, steps=2, hidden=(16,), context_size=4), 0.0, 0.02),
    (lambda: flowpost.nice(0, 2, steps=2, hidden=(16,), context_size=4), 0.0, 0.02),
    (lambda: flowpost.realnvp(0, 2, steps=2, hidden=(16,), context_size=4), 0.0, 0.02),
    (lambda: flowpost.maf(0, 2, steps=2, hidden=(16,), context_size=4), 0.0, 0.02),
    # A spline onto its interval cannot shift, so it comes near a correlated Gaussian only.
    (lambda: flowpost.spline_autoregressive(0, 2, steps=2, hidden=(16,), context_size=4, bins=4), 0.0, 0.05),
    (lambda: flowpost.spline_coupling(0, 2, steps=2, hidden=(16,), context_size=4, bins=4), 0.0, 0.05),
    (lambda: flowpost.naf(0, 2, steps=2, hidden=(16,), context_size=4, units=3), 0.0, 0.02),
    (lambda: flowpost.householder_sylvester(0, 2), 0.0, 0.02),
    (lambda: flowpost.triangular_sylvester(0, 2), 0.0, 0.02),
]


KINDS = ["full", "diagonal", "iaf", "planar", "affine_iaf", "nice", "realnvp", "maf", "spline_ar", "spline_c", "naf"]
KINDS += ["householder_sylvester", "triangular_sylvester"]


def _by_level() -> list:
    """Two kinds in the full run; the others are of a kind with one of them."""
    marks = [pytest.mark.full if kind in ("diagonal", "iaf") else pytest.mark.long for kind in KINDS]
    return [
        pytest.param(*target, marks=mark, id=kind) for target, mark, kind in zip(TARGETS, marks, KINDS, strict=True)
    ]


@pytest.mark.parametrize(("make", "kl", "tolerance"), _by_level())
def test_reverse_kl_to_a_known_target(make: Callable[[], FlowPosterior], kl: float, tolerance: float) -> None:
    """Trained on a target with a known normalizer, the KL is its known best and never below zero."""
    mean, cov = linear_gaussian()
    target = torch.distributions.MultivariateNormal(mean, cov)
    posterior = make().double()
    optimizer = torch.optim.Adam(posterior.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        z, log_prob, _ = posterior(sample_shape=(256,))
        (log_prob - target.log_prob(z)).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z, log_prob, _ = posterior(sample_shape=(40_000,))
        terms = log_prob - target.log_prob(z)
    estimate, error = terms.mean(), terms.std() / 200
    assert estimate > kl - 5 * error - 1e-6 if kl == 0 else estimate > kl - 5 * error
    assert estimate < kl + tolerance


@pytest.mark.parametrize(("name", "dim"), [("radial", 19), ("planar", 34)])
def test_a_flow_s_head_is_smaller_than_full_covariance_s_from_so_many_variables_on(name: str, dim: int) -> None:
    """As the recipes and the page on choosing one say."""
    docstring = " ".join((flowpost.recipes.RECIPES[name].__doc__ or "").split())
    assert f"smaller than that of `full_covariance` from {dim} variables on" in docstring

    def size(recipe: str, dim: int) -> int:
        return flowpost.recipes.RECIPES[recipe](1, dim).flow.context_size

    assert size(name, dim) < size("full_covariance", dim)
    assert size(name, dim - 1) >= size("full_covariance", dim - 1)
