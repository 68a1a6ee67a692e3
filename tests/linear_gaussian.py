"""A linear-Gaussian VAE: every figure of `flowpost.evaluation`, `gaps` and `calibration` has its closed form here."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import flowpost
from flowpost import FlowPosterior
from flowpost.vae import VAE, Gaussian


class LinearGaussian(nn.Module):
    """``z ~ N(0, I)``, ``x = A z + b + s noise``, float64, as a decoder for the Gaussian likelihood."""

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int, elements: int = 5, scale: float = 0.8, last: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(elements, dim, dtype=torch.float64, generator=generator)
        weight[:, -1] *= last  # near 0, the last latent is hardly read
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.randn(elements, dtype=torch.float64, generator=generator))
        self.dim, self.scale = dim, scale
        self.precision = torch.eye(dim, dtype=torch.float64) + self.weight.mT @ self.weight / scale**2
        self.covariance = torch.linalg.inv(self.precision)
        self.gain = self.covariance @ self.weight.mT / scale**2

    def forward(self, z: Tensor) -> Tensor:
        loc = z @ self.weight.mT + self.bias
        return torch.stack([loc, torch.full_like(loc, 10 * math.atanh(math.log(self.scale) / 10))], 1)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """The latents and what they give, ``(count, dim)`` and ``(count, elements)``."""
        z = torch.randn(count, self.dim, dtype=torch.float64)
        return z, z @ self.weight.mT + self.bias + self.scale * torch.randn(count, len(self.bias)).double()

    def evidence(self, x: Tensor) -> Tensor:
        noise = self.scale**2 * torch.eye(len(self.bias), dtype=torch.float64)
        return MultivariateNormal(self.bias, self.weight @ self.weight.mT + noise).log_prob(x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal((x - self.bias) @ self.gain.mT, self.covariance)


def fitted(model: LinearGaussian, name: str = "full_covariance", *, stretch: float = 1.0, shift: float = 0.0) -> VAE:
    """A VAE on it whose posterior is exact for a stretch of 1 and a shift of 0, set by hand.

    "diagonal" is the best factorized Gaussian; "planar" is that with flat planar steps. The stretch multiplies the
    standard deviations, the shift moves the means.
    """
    dim = model.dim
    recipes = {"diagonal": flowpost.diagonal, "full_covariance": flowpost.full_covariance, "planar": flowpost.planar}
    unrated = {"rate": 1.0} if name == "full_covariance" else {}
    posterior: FlowPosterior = recipes[name](len(model.bias), dim, **unrated).double()
    tril = torch.linalg.cholesky(model.covariance)
    if name != "full_covariance":
        tril = torch.diag_embed(model.precision.diagonal().rsqrt())
    sigma = tril.diagonal()
    lower = tril / sigma.unsqueeze(-1)
    entries = [lower[i, j].item() for i in range(dim) for j in range(i)] if name == "full_covariance" else []
    raw = torch.log(torch.expm1(stretch * sigma - 1e-3)) - math.log(math.expm1(1 - 1e-3))
    head, at = posterior.head, len(entries)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[at : at + dim] = model.gain
        head.bias[:at] = torch.tensor(entries, dtype=torch.float64)
        head.bias[at : at + dim] = shift - model.gain @ model.bias
        head.bias[at + dim : at + 2 * dim] = raw
    return VAE(nn.Identity(), posterior, model, Gaussian())
