"""What is tried on a GPU, as functions of the device: a CPU can try most of them too."""

from collections.abc import Callable

import pytest
import torch
from linear_gaussian import LinearGaussian, fitted
from small import DIM, FEATURES, small
from torch import Tensor, nn

from flowpost import Bijector, FlowPosterior
from flowpost._graphs import Backend
from flowpost.evaluation import annealed_estimate, sandwich
from flowpost.objectives import elbo
from flowpost.vae import VAE, Bernoulli


def made(name: str, device: str = "cuda") -> FlowPosterior:
    """With weights moved away from where they start."""
    return small(name).float().to(device)


def inputs(device: str = "cuda") -> list[Tensor]:
    """Features, noise, and points from elsewhere: of a seed the same numbers on all devices, as they have been tried.

    Of a hundred other draws one has a point so near a spline's knot that half precision puts it into the next bin.
    """
    return [torch.randn(*shape, device="cpu").to(device) for shape in ((5, FEATURES), (2, 5, DIM), (2, 5, DIM))]


def densities(posterior: FlowPosterior, h: Tensor, noise: Tensor, z: Tensor) -> list[Tensor]:
    """Of a sample, of its path and of points from elsewhere; and the gradients of each in all parameters."""
    sample = posterior(h, (2,), noise)
    found = [sample.log_prob, posterior.log_prob(z, h), posterior.path_log_prob(sample, h)]
    total = torch.cat([each.flatten() for each in [*found, sample.z.square()]]).sum()
    return [each.detach() for each in found] + list(torch.autograd.grad(total, list(posterior.parameters())))


def path_slopes(posterior: FlowPosterior, h: Tensor, noise: Tensor) -> list[Tensor]:
    """Of a sample's path gradient: what it is, and the gradients of its square at the features and parameters."""
    h = h.clone().requires_grad_()
    sample = posterior(h, (2,), noise)
    (slope,) = torch.autograd.grad(posterior.path_log_prob(sample, h).sum(), sample.z, create_graph=True)
    found = torch.autograd.grad(
        slope.square().sum(), [h, *posterior.parameters()], allow_unused=True, materialize_grads=True
    )
    return [slope.detach(), *found]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def vae_step(vae: VAE, x: Tensor, *, capturable: bool = False, fused: bool = False) -> Callable[[], list[Tensor]]:
    """A whole training step. An eps so large keeps Adam from making steps of what rounding leaves of a gradient."""
    optimizer = torch.optim.Adam(
        vae.parameters(), lr=1e-2, eps=1e-3, capturable=capturable, fused=fused, foreach=not fused
    )

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        out = vae(x, (2,))
        loss = -elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl).mean()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def vae_of(name: str, device: str = "cuda") -> VAE:
    return VAE(nn.Linear(6, FEATURES), small(name).float(), nn.Linear(DIM, 6), Bernoulli()).to(device)


def losses(step: Callable[[], list[Tensor]], x: Tensor, seed: int) -> list[Tensor]:
    """Three steps, the last on other data, from a seed of the default generator: a graph draws of it too."""
    torch.manual_seed(seed)
    found = [step()[0].clone() for _ in range(2)]
    x.copy_(1 - x)
    return [*found, step()[0].clone()]


def under_autocast(posterior: FlowPosterior, dtype: torch.dtype, device: str = "cuda") -> None:
    """A network's products are rounded to `dtype`, and nothing else: log q stays within some roundings."""
    h, noise, _ = inputs(device)
    expected = posterior(h, (2,), noise)
    with torch.autocast(device, dtype=dtype):
        found = posterior(h, (2,), noise)
    assert found.log_prob.dtype == found.z.dtype == torch.float32
    # Two networks of two layers of 8 units, with weights of about 0.6, whose outputs a gate or a spline amplifies.
    assert_near([*found[:2]], [*expected[:2]], 8 * torch.finfo(dtype).eps)
    if all(isinstance(part, (Bijector, nn.ModuleList)) for part in posterior.flow.modules()):
        assert torch.equal(found.log_prob, expected.log_prob)
    found.log_prob.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in posterior.parameters())


def evidence_in_graphs(graphs: type[Backend], monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> None:
    """Both bounds are those of a linear-Gaussian model, and every temperature but the first ones of a run is replayed.

    In the noise of q(z|x) and in that of p(z) a run is a pilot, or a way there or back.
    """
    captured: list[int] = []
    right = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda self, call: (captured.append(1), right(self, call))[1])
    model = LinearGaussian(2, scale=2.0)
    x = model.draw(50)[1]
    truth = model.evidence(x)
    vae = fitted(model, "diagonal", stretch=0.8, shift=0.3).float().to(device)
    found = annealed_estimate(vae, x.float().to(device), 64, 40, 2)
    assert len(captured) == 2 * 2
    assert found.log_p.device.type == device
    torch.testing.assert_close(found.log_p.cpu(), truth, rtol=0, atol=0.15)
    bounds = sandwich(vae, 100, (5,), 16, 40, 2)
    assert len(captured) == 2 * 2 + 2 * 3
    assert abs(bounds.gap.mean().item()) < 0.05
    assert bounds.residual.max() < 1e-4
