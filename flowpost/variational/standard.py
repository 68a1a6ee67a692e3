"""The map of standard coordinates onto those of a Gaussian: where a fit starts."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.numerics.products import wide
from flowpost.numerics.watchers import full_precision


class Standard(Bijector):
    """A fixed affine map ``z' = loc + L z``: what has mean 0 and covariance I gets mean `loc` and covariance ``L L'``.

    Use it as the last step of a flow that is fitted to a density of known place and scale. Its numbers are buffers, so
    that no optimizer moves them. Invertible as L has a positive diagonal. Costs O(dim^2) a point, both ways.

    Args:
        loc: ``(dim,)``.
        scale_tril: L, ``(dim, dim)``, lower-triangular.

    Shapes:
        z ``(*batch, dim)``; no context.

    Raises:
        ValueError: for other shapes, or a diagonal that is not positive.

    Example:
        >>> Standard(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.5, 2.0]]))(torch.ones(2))
        (tensor([2.0000, 4.5000]), tensor(0.6931))
    """

    triangular = True
    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        if loc.ndim != 1:
            raise ValueError(f"loc: expected shape (dim,), got {tuple(loc.shape)}")
        super().__init__(len(loc))
        positive = scale_tril.is_meta or bool((scale_tril.diagonal() > 0).all())
        if scale_tril.shape != (self.dim, self.dim) or not positive:
            raise ValueError(
                f"scale_tril: expected shape ({self.dim}, {self.dim}) and a positive diagonal, got shape "
                f"{tuple(scale_tril.shape)}"
            )
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale_tril", scale_tril.detach().tril())
        self._like = self.loc.new_empty(0)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            return self.loc + z @ self.scale_tril.mT, self._log_det()

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = (z - self.loc).reshape(-1, self.dim).mT  # autocast leaves a solve alone
        return torch.linalg.solve_triangular(self.scale_tril, flat, upper=False).mT.reshape(z.shape), -self._log_det()

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        pushed = self.scale_tril if tril is None else self.scale_tril @ tril
        return self.loc + loc @ self.scale_tril.mT, pushed.expand(*loc.shape[:-1], *pushed.shape[-2:])

    def _log_det(self) -> Tensor:
        return wide(self.scale_tril.diagonal()).log().sum()
