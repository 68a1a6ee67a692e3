"""KL divergences to N(0, I) in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_kl(loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Closed-form ``KL(N(loc, L L^T) || N(0, I)) = (|L|^2 + |loc|^2 - dim) / 2 - sum(log diag L)``.

    Args:
        loc: ``(*batch, dim)``.
        scale_tril: L ``(*batch, dim, dim)``, lower-triangular with a positive diagonal.

    Returns:
        ``(*batch)``.

    Raises:
        ValueError: if `scale_tril` is of another shape; expand it where examples share it.

    Reference:
        Kingma & Welling (2014), appendix B, for a full covariance.
    """
    _check_like_loc("scale_tril", scale_tril, loc, (*loc.shape, *loc.shape[-1:]))
    square = scale_tril.square().sum((-2, -1)) + loc.square().sum(-1)
    log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.rsub(log_det, -0.5 * loc.shape[-1]).add(square, alpha=0.5)


def latent_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """Closed-form ``KL(N(loc, scale^2) || N(0, 1)) = (scale^2 + loc^2 - 1) / 2 - log scale`` of each latent.

    For a factorized Gaussian they add up to the whole KL. For the marginals of a correlated one they add up to less:
    what is missing is the latents' total correlation.

    Args:
        loc: any shape.
        scale: of the same shape, positive.

    Returns:
        Of the same shape.

    Raises:
        ValueError: if `scale` is of another shape; expand it where examples or latents share it.

    Reference:
        Kingma & Welling (2014), appendix B.

    Example:
        >>> latent_kl(torch.tensor([0.0, 2.0]), torch.ones(2))
        tensor([0., 2.])
    """
    _check_like_loc("scale", scale, loc, loc.shape)
    return torch.rsub(scale.log(), -0.5).add(scale.square() + loc.square(), alpha=0.5)


def _check_like_loc(name: str, value: Tensor, loc: Tensor, shape: tuple[int, ...]) -> None:
    """Raise for a scale that would broadcast against the loc, and mix examples or latents."""
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} for a loc of shape {tuple(loc.shape)}, got {tuple(value.shape)}; "
            f"expand what is shared"
        )
