"""A mixture of posteriors: its density by hand, its ELBO by quadrature, its path gradient by finite differences."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import flowpost
from flowpost import Affine, FlowPosterior
from flowpost.variational.mixture import Mixture


def realnvps(count: int, dim: int = 2) -> Mixture:
    mixture = Mixture([flowpost.realnvp(0, dim, steps=2, hidden=(8,), context_size=4).double() for _ in range(count)])
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixture


def by_hand(mixture: Mixture, z: Tensor) -> Tensor:
    weights = mixture.logits.exp() / mixture.logits.exp().sum()
    densities = [part.log_prob(z).exp() for part in mixture.posteriors]  # pyright: ignore[reportCallIssue]
    return sum((w * density for w, density in zip(weights, densities, strict=True)), torch.zeros(())).log()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("path", [False, True])
def test_the_density_is_the_weighted_sum(count: int, path: bool) -> None:  # noqa: FBT001
    mixture = realnvps(count)
    z = torch.randn(5, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(z), by_hand(mixture, z))
    noise = torch.randn(count, 6, 2, dtype=torch.float64)
    draws = mixture.stratified(6, path=path, noise=noise)
    torch.testing.assert_close(draws.log_q, by_hand(mixture, draws.z))
    torch.testing.assert_close(draws.log_weights.exp().sum().item(), 1.0)
    for part, own, z in zip(mixture.posteriors, noise, draws.z, strict=True):
        torch.testing.assert_close(part(noise=own, sample_shape=(6,)).z, z)


def test_the_path_gradient_follows_z_alone() -> None:
    """Its value is log q; its gradient with respect to a shift of one component's draws is dlog q/dz, summed."""
    mixture = realnvps(3)
    draws = mixture.stratified(4, path=True)
    parameters = list(mixture.parameters())
    found = torch.autograd.grad(draws.log_q.sum(), parameters, allow_unused=True, retain_graph=True)
    leaf = draws.z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(mixture.log_prob(leaf).sum(), leaf)
    due = torch.autograd.grad((draws.z * slope).sum(), parameters, allow_unused=True)
    for name, got, expected in zip(dict(mixture.named_parameters()), found, due, strict=True):
        if name == "logits":
            assert got is None
        else:
            torch.testing.assert_close(got, expected)
    log_q = mixture.stratified(4, path=True).log_q
    (first, *_) = torch.autograd.grad(log_q.square().sum(), parameters[1:], create_graph=True)
    with pytest.raises(RuntimeError, match="^path gradient: .* of a Mixture first ones"):
        torch.autograd.grad(first.sum(), parameters[1])


def two_normals() -> tuple[Mixture, Tensor]:
    """Of one dimension, and noise at the middles of equal shares of N(0, 1): a mean over it is a quadrature."""
    mixture = Mixture([FlowPosterior(0, Affine(1)).double() for _ in range(2)])
    with torch.no_grad():
        for part, loc in zip(mixture.posteriors, (-1.0, 1.5), strict=True):
            next(part.parameters())[:] = torch.tensor([loc, 0.3 * loc], dtype=torch.float64)
        mixture.logits[:] = torch.tensor([0.4, -0.2], dtype=torch.float64)
    shares = (torch.arange(20_001, dtype=torch.float64) + 0.5) / 20_001
    return mixture, Normal(0.0, 1.0).icdf(shares).unsqueeze(-1).expand(2, -1, -1)


def log_p(z: Tensor) -> Tensor:
    """Two modes, of other places, widths and weights than the mixture's."""
    means = torch.tensor([-1.5, 1.0], dtype=torch.float64)
    return (Normal(means, 0.7).log_prob(z) + torch.tensor([0.3, 0.7], dtype=torch.float64).log()).logsumexp(-1)


def exact_elbo(mixture: Mixture) -> Tensor:
    """By the trapezoidal rule, from the definition ``int q (log p - log q)``."""
    z = torch.linspace(-15, 15, 6001, dtype=torch.float64).unsqueeze(-1)
    log_q = mixture.log_prob(z)
    return (log_q.exp() * (log_p(z) - log_q)).sum() * (z[1, 0] - z[0, 0])


def elbo(mixture: Mixture, noise: Tensor, *, path: bool) -> Tensor:
    z, log_q, log_weights = mixture.stratified(noise.shape[1], path=path, noise=noise)
    return (log_weights.exp() * (log_p(z) - log_q).mean(1)).sum()


@pytest.mark.parametrize("path", [False, True])
def test_the_stratified_elbo_and_its_gradient_are_exact_in_the_mean(path: bool) -> None:  # noqa: FBT001
    """Against the definition by another quadrature, differentiated by central differences: to what both leave."""
    mixture, noise = two_normals()
    value = elbo(mixture, noise, path=path)
    torch.testing.assert_close(value, exact_elbo(mixture), rtol=0, atol=2e-4)
    found = torch.autograd.grad(value, list(mixture.parameters()))
    for parameter, gradient in zip(mixture.parameters(), found, strict=True):
        for i in range(len(parameter)):
            sides = []
            for move in (1e-4, -1e-4):
                with torch.no_grad():
                    parameter[i] += move
                    sides.append(exact_elbo(mixture))
                    parameter[i] -= move
            due = (sides[0] - sides[1]) / 2e-4
            torch.testing.assert_close(gradient[i], due, rtol=0, atol=1e-3)


def test_at_the_target_the_path_gradient_is_zero_for_every_draw() -> None:
    """What sticking the landing is for: no noise is left where q = p; the other gradient has its noise."""
    mixture = realnvps(2)
    target = realnvps(2)
    target.load_state_dict(mixture.state_dict())
    norms = {}
    for path in (True, False):
        z, log_q, log_weights = mixture.stratified(10, path=path)
        value = (log_weights.exp() * (target.log_prob(z) - log_q).mean(1)).sum()
        norms[path] = max(g.abs().max().item() for g in torch.autograd.grad(value, list(mixture.parameters())))
    assert norms[True] < 1e-10
    assert norms[False] > 1e-3


def test_draws_have_the_weights_and_the_components() -> None:
    """20,000 of two far normals: shares, mean and width of each within 4.5 standard errors."""
    mixture, count = two_normals()[0], 20_000
    with torch.no_grad():
        for part, loc in zip(mixture.posteriors, (-50.0, 50.0), strict=True):
            next(part.parameters())[0] = loc
    z = mixture.sample(count).squeeze(-1)
    weight = mixture.log_weights[0].exp().item()
    left = z[z < 0]
    assert abs(len(left) / count - weight) < 4.5 * math.sqrt(weight * (1 - weight) / count)
    q = mixture.posteriors[0].at()  # pyright: ignore[reportCallIssue]
    assert abs(left.mean() + 50) < 4.5 * q.stddev.item() / math.sqrt(len(left))
    assert left.std().item() == pytest.approx(q.stddev.item(), rel=4.5 / math.sqrt(2 * len(left)))
    halves = (z < 0).double().view(2, -1).mean(1)  # in no order
    assert (halves - weight).abs().max() < 4.5 * math.sqrt(0.25 / (count / 2))


def test_a_draw_where_another_s_density_overflows_counts() -> None:
    """In float32: the other adds no density there, and no nan to a gradient."""
    mixture = Mixture([FlowPosterior(0, Affine(1)) for _ in range(2)])
    with torch.no_grad():
        next(mixture.posteriors[1].parameters())[:] = torch.tensor([1e38, -50.0])
    z, log_q, log_weights = mixture.stratified(5, path=True)
    alone = mixture.posteriors[0].log_prob(z[0]) + log_weights[0]  # pyright: ignore[reportCallIssue]
    assert mixture.posteriors[1].log_prob(z[0]).isnan().all()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(log_q[0], alone)
    gradients = torch.autograd.grad((log_weights.exp() * log_q.mean(1)).sum(), list(mixture.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert mixture.log_prob(torch.tensor([[math.nan]])).isnan().all()


SYLVESTER = {f"{kind}_sylvester" for kind in ("orthogonal", "householder", "triangular")}
SLOW = {"iaf", "affine_iaf", "naf", "spline_autoregressive", "planar"} | SYLVESTER


@pytest.mark.parametrize("name", flowpost.recipes.RECIPES)
def test_slow_densities_are_refused(name: str) -> None:
    posterior = flowpost.recipes.RECIPES[name](0, 2)
    if name in SLOW:
        with pytest.raises(ValueError, match="^posteriors: expected densities of one pass, got .*; write full_covaria"):
            Mixture([posterior])
    else:
        assert Mixture([posterior]).dim == 2


def test_bad_posteriors_are_refused() -> None:
    one = flowpost.diagonal(0, 2)
    for wrong, error, message in (
        ([], ValueError, "expected at least one, got none"),
        ([nn.Linear(2, 2)], TypeError, "expected FlowPosteriors, got Linear"),
        ([flowpost.diagonal(3, 2)], ValueError, "expected ones without features, got 3; write features=0"),
        ([one, flowpost.diagonal(0, 3)], ValueError, "expected one dim, got 2, 3"),
        ([one, flowpost.diagonal(0, 2).double()], ValueError, "expected one dtype, got torch.float32, torch.float64"),
    ):
        with pytest.raises(error, match=f"^posteriors: {message}"):
            Mixture(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="^n: expected an int >= 1, got 0$"):
        Mixture([one]).stratified(0)
