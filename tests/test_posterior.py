"""The posterior: samples and their log q, features read once, and everything a training loop leans on."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

import flowpost
from flowpost import (
    Affine,
    Bijector,
    Chain,
    FlowPosterior,
    Learned,
    Planar,
    Reverse,
    Sample,
    Scale,
    UnitLowerTriangular,
)

RECIPES: dict[str, Callable[..., FlowPosterior]] = {
    "diagonal": flowpost.diagonal,
    "full_covariance": flowpost.full_covariance,
    "planar": lambda features, dim: flowpost.planar(features, dim, steps=3),
    "iaf": lambda features, dim: flowpost.iaf(features, dim, steps=2, hidden=(20,), context_size=7),
}
every = pytest.mark.parametrize("name", RECIPES)
compiled = pytest.mark.parametrize("name", [
    "diagonal", pytest.param("full_covariance", marks=pytest.mark.compile),
    pytest.param("planar", marks=pytest.mark.compile), pytest.param("iaf", marks=pytest.mark.full),
])  # fmt: skip
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def make(name: str, features: int = 5, dim: int = 3, *, push: float = 0.3, seed: int = 0) -> FlowPosterior:
    """A float64 posterior whose every parameter was moved."""
    torch.manual_seed(seed)
    posterior = RECIPES[name](features, dim).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(push * torch.randn_like(parameter))
    return posterior


def features(*batch: int) -> Tensor:
    return torch.randn(*batch, 5, dtype=torch.float64)


def normal_log_prob(noise: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(noise).sum(-1)


@every
@pytest.mark.parametrize("dim", [1, 3])
def test_log_q_is_the_density_of_the_drawn_z(name: str, dim: int) -> None:
    """B16, and log q = log N(noise) - log|det dz/dnoise| with the determinant by autodiff."""
    posterior = make(name, dim=dim)
    h = features(40)
    z, log_prob, noise = posterior(h)
    x = noise.clone().requires_grad_()
    image = posterior(h, noise=x).z
    matrix = torch.stack([torch.autograd.grad(image[:, i].sum(), x, retain_graph=True)[0] for i in range(dim)], -2)
    torch.testing.assert_close(log_prob, normal_log_prob(noise) - torch.linalg.slogdet(matrix)[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(image, z, rtol=0, atol=0)
    gap = (posterior.log_prob(z, h) - log_prob).abs()
    assert gap.median() <= 1e-9
    assert gap.max() <= 1e-5


@every
def test_log_q_by_inversion_in_float32(name: str) -> None:
    """B16: median 1e-4."""
    posterior = make(name).float()
    h = features(200).float()
    z, log_prob, _ = posterior(h)
    assert (posterior.log_prob(z, h) - log_prob).abs().median() <= 1e-4


@every
@both_dtypes
def test_sample_s_fields(name: str, dtype: torch.dtype) -> None:
    posterior = make(name).to(dtype)
    h = features(2, 4).to(dtype)
    for shape in [(), (6,), (1,), (3, 2), (0,)]:
        sample = posterior(h, sample_shape=shape)
        assert isinstance(sample, Sample)
        assert sample._fields == ("z", "log_prob", "noise")
        assert sample.z.shape == sample.noise.shape == (*shape, 2, 4, 3)
        assert sample.log_prob.shape == (*shape, 2, 4)
        assert sample.z.dtype == sample.log_prob.dtype == sample.noise.dtype == dtype
        again = posterior(h, sample_shape=shape, noise=sample.noise)
        assert torch.equal(again.z, sample.z)
        assert torch.equal(again.log_prob, sample.log_prob)
        assert again.noise is sample.noise


@every
def test_noise_is_standard_normal_and_follows_the_seed(name: str) -> None:
    posterior, h = make(name), features(4)
    torch.manual_seed(5)
    first = posterior(h, sample_shape=(5000,))
    torch.manual_seed(5)
    assert torch.equal(posterior(h, sample_shape=(5000,)).z, first.z)
    noise = first.noise.flatten()  # 60,000 draws: four standard errors are 0.017 and 0.023
    assert noise.mean().abs() < 0.017
    assert (noise.var() - 1).abs() < 0.024
    assert not torch.equal(posterior(h).noise, posterior(h).noise)


@every
def test_samples_of_one_row_are_as_if_it_were_alone(name: str) -> None:
    posterior, h = make(name), features(4)
    z, log_prob, noise = posterior(h, sample_shape=(6, 2))
    for row in range(4):
        alone = posterior(h[row], sample_shape=(6, 2), noise=noise[:, :, row])
        torch.testing.assert_close(alone.z, z[:, :, row], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.log_prob, log_prob[:, :, row], rtol=0, atol=1e-10)


@every
def test_features_are_read_once_however_many_samples(name: str) -> None:
    """One call of the head on (B, features), and no tensor of samples times context afterwards."""
    posterior, h = make(name), features(4)
    shapes: list[tuple[int, ...]] = []
    assert posterior.head is not None
    posterior.head.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    seen: list[int] = []
    size = posterior.flow.context_size
    for module in posterior.modules():
        if isinstance(module, nn.Linear) and module is not posterior.head:
            module.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    z, _, _ = posterior(h, sample_shape=(50,))
    posterior.log_prob(z, h)
    assert shapes == [(4, 5), (4, 5)]
    assert all(numel <= 4 * size for numel in seen)


@every
def test_log_prob_of_external_points_broadcasts(name: str) -> None:
    posterior, h = make(name), features(4)
    z = torch.randn(6, 4, 3, dtype=torch.float64)
    log_prob = posterior.log_prob(z, h)
    assert log_prob.shape == (6, 4)
    for s in range(6):
        for row in range(4):
            alone = posterior.log_prob(z[s, row], h[row])
            torch.testing.assert_close(log_prob[s, row], alone, rtol=0, atol=1e-10)
    one = posterior.log_prob(z[:, :1], h[:1])
    torch.testing.assert_close(one[:, 0], log_prob[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(posterior.log_prob(z[0, 0], h), posterior.log_prob(z[0, 0].expand(4, 3), h))


@pytest.mark.parametrize("name", ["diagonal", "full_covariance"])
def test_gaussians_are_torch_s(name: str) -> None:
    posterior, h = make(name), features(4)
    assert posterior.is_gaussian
    loc, scale_tril = posterior.gaussian(h)
    assert loc.shape == (4, 3)
    assert scale_tril.shape == (4, 3, 3)
    assert (scale_tril.triu(1) == 0).all()
    expected = MultivariateNormal(loc, scale_tril=scale_tril)
    z, log_prob, noise = posterior(h, sample_shape=(50,))
    torch.testing.assert_close(z, loc + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(log_prob, expected.log_prob(z))
    points = torch.randn(7, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(posterior.log_prob(points, h), expected.log_prob(points))
    if name == "diagonal":
        scale = scale_tril.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(scale_tril, torch.diag_embed(scale))
        torch.testing.assert_close(log_prob, Normal(loc, scale).log_prob(z).sum(-1))
        context = posterior.context(h)
        assert context is not None
        torch.testing.assert_close(loc, context[:, :3])


@pytest.mark.parametrize("flow", [
    lambda: Chain(Scale(3, 0.5), Affine(3), UnitLowerTriangular(3), Affine(3), Scale(3, 2.0)),
    lambda: Chain(UnitLowerTriangular(3), Chain(UnitLowerTriangular(3), Affine(3))),
    lambda: flowpost.Conditioned(Affine(3), 2),
    lambda: Chain(flowpost.Learned(UnitLowerTriangular(3)), Affine(3)),
])  # fmt: skip
def test_any_chain_of_triangular_steps_is_gaussian(flow: Callable) -> None:
    posterior = FlowPosterior(5, flow()).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.normal_(0, 0.5)
    h = features(4)
    loc, scale_tril = posterior.gaussian(h)
    z, log_prob, noise = posterior(h, sample_shape=(9,))
    torch.testing.assert_close(z, loc + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(log_prob, MultivariateNormal(loc, scale_tril=scale_tril).log_prob(z))


def test_a_head_with_an_axis_more_is_refused() -> None:
    """It broadcast against the rows of noise: each example got the draws of all."""
    flow = Chain(Affine(2), Planar(2))
    head = nn.Sequential(nn.Linear(4, flow.context_size), nn.Unflatten(-1, (1, flow.context_size)))
    with pytest.raises(ValueError, match=r"^head: expected a row for each of h, \(6, 9\), got \(6, 1, 9\)"):
        FlowPosterior(4, flow, head)(torch.randn(6, 4))


class Twice(Bijector):
    """``z' = 2 z``, by a function that may do it badly."""

    def __init__(self, dim: int, map_: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__(dim)
        self.map_ = map_

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.map_(z)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.div_(2), z.new_tensor(-self.dim * math.log(2))


def test_a_step_that_changes_z_in_place_is_refused() -> None:
    """The log q was of the noise as it was left, nats away, and the point whose log q was asked for had moved."""
    step = Twice(2, lambda z: (z.mul_(2), z.new_tensor(2 * math.log(2))))
    message = "^flow: expected its input left as it is, got it changed in place"
    for flow in (step, Chain(step, Scale(2, 1.0))):
        with pytest.raises(ValueError, match=message):
            FlowPosterior(0, flow)(sample_shape=(5,))
    with pytest.raises(ValueError, match=message):
        FlowPosterior(0, step).log_prob(torch.ones(5, 2))


@pytest.mark.parametrize(
    "log_det", [lambda z: torch.full_like(z, math.log(2)), lambda z: z[..., :1] * 0 + 2 * math.log(2)]
)
def test_a_step_that_leaves_the_variables_in_its_log_det_is_refused(log_det: Callable[[Tensor], Tensor]) -> None:
    """It broadcast, and log q was a matrix of all draws by all."""
    step = Twice(3, lambda z: (2 * z, log_det(z)))
    for flow in (step, Chain(step, Scale(3, 1.0))):
        with pytest.raises(ValueError, match=r"^flow: expected a log-det for each z, \(3,\), got shape \(3, [13]\)"):
            FlowPosterior(0, flow)(sample_shape=(3,))


def test_a_head_that_changes_the_features_in_place_is_refused() -> None:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6))
    with pytest.raises(ValueError, match="^head: expected its input left as it is"):
        FlowPosterior(4, Affine(3), head)(torch.randn(6, 4))


class Stretched(Affine):
    """As `Affine`, and twice as far."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = super()._forward(z, context)
        return 2 * image, log_det + self.dim * math.log(2)


class ToldStretched(Stretched):
    triangular = True

    def _line(self, context: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        loc, scale = super()._line(context)
        return 2 * loc, 2 * scale


def test_a_map_of_one_s_own_is_not_the_gaussian_of_its_parent() -> None:
    """The mean, the entropy and the KL were the parent's."""
    h = torch.randn(6, 4)
    assert not FlowPosterior(4, Chain(Stretched(3))).is_gaussian
    q = FlowPosterior(4, Chain(ToldStretched(3))).at(h)
    z, log_prob, _ = q.draw((5,))
    torch.testing.assert_close(MultivariateNormal(q.mean, scale_tril=q.gaussian()[1]).log_prob(z), log_prob)


class BentChain(Chain):
    """As `Chain`, and then its exponential."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = super()._forward(z, context)
        return image.exp(), log_det + image.sum(-1)


class BentLearned(Learned):
    """As `Learned`, and then its exponential."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = super()._forward(z, context)
        return image.exp(), log_det + image.sum(-1)


class Bending:
    """The exponential of noise, for any step."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.exp(), z.sum(-1)


class BentAffine(Bending, Affine):
    pass


class StraightChain(Chain):
    triangular = False


@pytest.mark.parametrize(
    "make",
    [
        lambda: BentChain(Affine(3)),
        lambda: BentLearned(Affine(3)),
        lambda: StraightChain(Affine(3)),
        lambda: Chain(BentAffine(3)),
    ],
)
def test_a_chain_of_gaussian_steps_with_a_map_of_its_own_is_not_gaussian(make: Callable) -> None:
    """It took its steps' mean, entropy and KL."""
    assert not FlowPosterior(4, Chain(make(), Affine(3))).is_gaussian


def test_a_step_with_a_forward_of_its_own_is_refused() -> None:
    """A posterior passed by it, and so drew from its parent's map."""
    with pytest.raises(TypeError, match=r"^Doubled: expected a _forward of its own, got a forward"):

        class Doubled(Affine):
            def forward(self, z: Tensor, context: Tensor | None = None, *, checked: bool = False) -> tuple:
                image, log_det = super().forward(z, context, checked=checked)
                return 2 * image, log_det + self.dim * math.log(2)


def test_only_gaussians_say_so() -> None:
    assert [RECIPES[name](5, 3).is_gaussian for name in RECIPES] == [True, True, False, False]
    assert not FlowPosterior(5, Chain(Affine(3), Reverse(3))).is_gaussian


@every
def test_a_posterior_without_an_encoder(name: str) -> None:
    posterior = make(name, features=0)
    z, log_prob, noise = posterior(sample_shape=(8,))
    assert z.shape == noise.shape == (8, 3)
    assert log_prob.shape == (8,)
    torch.testing.assert_close(posterior.log_prob(z), log_prob, rtol=0, atol=1e-6)
    assert posterior().z.shape == (3,)
    if posterior.is_gaussian:
        loc, scale_tril = posterior.gaussian()
        torch.testing.assert_close(z, loc + noise @ scale_tril.T)


@every
@pytest.mark.parametrize("width", [5, 0])
def test_every_parameter_learns(name: str, width: int) -> None:
    """Finite gradients from the start, and nonzero ones for every parameter after a step at the latest."""
    torch.manual_seed(1)
    posterior = RECIPES[name](width, 3)
    inputs = (torch.randn(64, 5),) if width else ()
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        z, log_prob, _ = posterior(*inputs, sample_shape=(16,))
        (log_prob + 2 * (z - 1).square().sum(-1) + z.prod(-1)).mean().backward()
        for parameter in posterior.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        optimizer.step()
    buffers = dict(posterior.named_buffers())
    for key, parameter in posterior.named_parameters():
        assert parameter.grad is not None
        alive, mask = parameter.grad != 0, buffers.get(key.replace("weight", "mask"))
        if mask is None or mask.any():  # a mask of nothing at dim 1
            assert alive.any(), key
        if key.startswith("head") or key == "flow.context":
            assert alive.flatten(1).any(-1).all() if alive.ndim > 1 else alive.all(), key


@every
def test_gradients_flow_through_the_sample(name: str) -> None:
    """The reparameterized gradient of E[f(z)] against a finite difference with the same noise."""
    posterior, h = make(name, dim=2), features(3)
    noise = torch.randn(10, 3, 2, dtype=torch.float64)

    def objective() -> Tensor:
        z, log_prob, _ = posterior(h, sample_shape=(10,), noise=noise)
        return (log_prob + z.square().sum(-1).cos()).mean()

    parameters = list(posterior.parameters())
    moves = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(objective(), parameters)
    slope = sum((g * m).sum() for g, m in zip(gradients, moves, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, m in zip(parameters, moves, strict=True):
                p.add_(sign * 1e-6 * m)
            values.append(objective())
            for p, m in zip(parameters, moves, strict=True):
                p.sub_(sign * 1e-6 * m)
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-6)


@every
def test_log_prob_has_the_gradient_of_the_density(name: str) -> None:
    posterior, h = make(name, dim=2), features(2)
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, h: posterior.log_prob(z, h), (z, h.requires_grad_()))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_another_dtype_are_cast(name: str, dtype: torch.dtype) -> None:
    posterior = make(name).float()
    h = features(4).to(dtype)
    noise = torch.randn(4, 3)
    found, expected = posterior(h, noise=noise), posterior(h.float(), noise=noise)
    assert found.log_prob.dtype == torch.float32
    assert torch.equal(found.z, expected.z)
    assert torch.equal(found.log_prob, expected.log_prob)
    assert torch.equal(posterior.log_prob(found.z, h), posterior.log_prob(found.z, h.float()))


@every
def test_autocast_leaves_log_q_in_float32(name: str) -> None:
    """Exactly, where no network runs; else within what bf16 moves a small network."""
    posterior = make(name, push=0.1).float()
    h = features(64).float()
    noise = torch.randn(64, 3)
    expected = posterior(h, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = posterior(h, noise=noise)
        external = posterior.log_prob(expected.z, h)
    assert found.z.dtype == found.log_prob.dtype == external.dtype == torch.float32
    if name == "iaf":
        assert (found.log_prob - expected.log_prob).abs().max() < 0.05
    else:
        assert torch.equal(found.log_prob, expected.log_prob)
        assert torch.equal(found.z, expected.z)


@every
def test_a_custom_head_runs_in_full_precision_under_autocast(name: str) -> None:
    flow = make(name).float().flow
    head = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, flow.context_size))
    posterior = FlowPosterior(5, flow, head)
    h = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = posterior.context(h)
    torch.testing.assert_close(context, head(h), rtol=0, atol=0)


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_a_row_that_is_not_finite_has_log_q_nan_and_stays_alone(name: str, poison: float) -> None:
    posterior, h = make(name).float(), features(5).float()
    noise = torch.randn(7, 5, 3)
    good = posterior(h, sample_shape=(7,), noise=noise)
    bad = h.clone()
    bad[2, 1] = poison
    found = posterior(bad, sample_shape=(7,), noise=noise)
    rest = [0, 1, 3, 4]
    assert torch.equal(found.z[:, rest], good.z[:, rest])
    assert torch.equal(found.log_prob[:, rest], good.log_prob[:, rest])
    assert found.log_prob[:, 2].isnan().all()
    log_prob, expected = posterior.log_prob(good.z, bad), posterior.log_prob(good.z, h)
    assert torch.equal(log_prob[:, rest], expected[:, rest])
    assert log_prob[:, 2].isnan().all()
    z = good.z.clone()
    z[3, 2, 0] = poison
    log_prob = posterior.log_prob(z, h)
    assert log_prob[3, 2].isnan()
    assert log_prob.isnan().sum() == 1


@every
def test_log_q_sums_in_float64(name: str) -> None:
    """float32 results are the float64 ones of the same weights to a few ulp of log q, at a width where sums matter."""
    torch.manual_seed(2)
    posterior = RECIPES[name](5, 200)
    h, noise = torch.randn(8, 5), torch.randn(8, 200)
    found = posterior(h, noise=noise).log_prob.double()
    expected = copy.deepcopy(posterior).double()(h.double(), noise=noise.double()).log_prob
    assert ((found - expected).abs() <= 16 * torch.finfo(torch.float32).eps * expected.abs()).all()


@every
def test_state_and_copies(name: str) -> None:
    posterior, fresh = make(name), make(name, seed=7)
    fresh.load_state_dict(posterior.state_dict())
    h, noise = features(4), torch.randn(4, 3, dtype=torch.float64)
    for other in (fresh, copy.deepcopy(posterior)):
        assert torch.equal(other(h, noise=noise).log_prob, posterior(h, noise=noise).log_prob)


@every
def test_torch_func_over_examples(name: str) -> None:
    posterior, h = make(name), features(4)
    noise = torch.randn(4, 3, dtype=torch.float64)
    expected = posterior(h, noise=noise)
    found = torch.func.vmap(lambda h, noise: posterior(h, noise=noise))(h, noise)
    torch.testing.assert_close(found.z, expected.z, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-10)


class _Fixed(nn.Module):
    """Features and noise in, z and log q out: what is exported."""

    def __init__(self, posterior: FlowPosterior) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, h: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        sample = self.posterior(h, noise=noise)
        return sample.z, sample.log_prob


@compiled
def test_exports(name: str) -> None:
    model = _Fixed(make(name).float())
    h, noise = torch.randn(4, 5), torch.randn(4, 3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (h, noise), dynamic_shapes=({0: batch}, {0: batch}))
    h, noise = torch.randn(9, 5), torch.randn(9, 3)
    torch.testing.assert_close(program.module()(h, noise), model(h, noise), rtol=1e-5, atol=1e-6)


@compiled
def test_compiles_into_one_graph(name: str) -> None:
    """B18, with fresh noise drawn inside."""
    posterior, h = make(name), features(4)
    torch._dynamo.reset()
    compiled = torch.compile(posterior, fullgraph=True, backend="aot_eager")
    z, log_prob, noise = compiled(h, sample_shape=(3,))
    expected = posterior(h, sample_shape=(3,), noise=noise)
    torch.testing.assert_close((z, log_prob), (expected.z, expected.log_prob), rtol=1e-10, atol=1e-10)
    parameters = list(posterior.parameters())
    found = torch.autograd.grad(log_prob.sum() + z.sin().sum(), parameters)
    wanted = torch.autograd.grad(expected.log_prob.sum() + expected.z.sin().sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- own heads


def test_a_head_of_one_s_own() -> None:
    head = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7))
    posterior = FlowPosterior(5, Planar(3), head)
    h, noise = torch.randn(4, 5), torch.randn(4, 3)
    z, log_prob, _ = posterior(h, noise=noise)
    expected, log_det = Planar(3)(noise, head(h))
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log_prob, normal_log_prob(noise) - log_det)


def test_features_that_the_flow_does_not_read_give_the_batch() -> None:
    posterior = FlowPosterior(5, Scale(3, 2.0))
    z, log_prob, noise = posterior(torch.zeros(4, 5), (6,))
    torch.testing.assert_close(z, 2 * noise)
    torch.testing.assert_close(log_prob, Normal(0.0, 2.0).log_prob(z).sum(-1))
