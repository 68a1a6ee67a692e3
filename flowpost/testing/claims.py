"""The property that a step is what it says of itself: element-wise, a Gaussian's map, onto an interval."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.testing.cases import SCALES, Case, eps, leaves, require, size, slopes, within


def claims(case: Case) -> float:
    """A step is what it says: ``elementwise``, ``triangular`` by `_push_gaussian`, onto its ``codomain``.

    Mean, entropy and KL of a Gaussian posterior, and its support, are by these words alone.
    """
    step, z, context = case.points(2)
    low, high = step.codomain
    anywhere = step(torch.cat([case.z(len(z) // len(SCALES), scale=scale) for scale in SCALES]), context)[0]
    require(bool(((anywhere >= low) & (anywhere <= high)).all()), case, f"claims: images outside of {step.codomain}")
    image = step(z, context)[0].detach()
    if step.elementwise:
        beside = _slopes_beside(step, z, context)
        require(beside == 0, case, f"claims: elementwise, and a variable follows another by {beside}")
    return _gaussian_error(step, z, image, context, case) if step.triangular else 0.0


def _slopes_beside(step: Bijector, z: Tensor, context: Tensor | None) -> float:
    """The largest slope of a variable in another, or in another's numbers."""
    z, context, _ = leaves(step, z, context)
    image, worst = step(z, context)[0], 0.0
    for i in range(step.dim):
        inputs = [z] if context is None else [z, context]
        for slope in slopes(image[:, i].sum(), inputs):
            others = slope.detach().unflatten(-1, (-1, step.dim)).clone()
            others[..., i] = 0
            worst = max(worst, others.abs().max().item())
    return worst


def _gaussian_error(step: Bijector, z: Tensor, image: Tensor, context: Tensor | None, case: Case) -> float:
    """The largest error of ``loc + L z``, of the Gaussian that N(0, I) becomes, and of one that is pushed further."""
    zeros, eye = z.new_zeros(step.dim), torch.eye(step.dim, dtype=z.dtype, device=z.device)
    worst = 0.0
    for start in (None, eye.cumsum(0)):
        loc, found = step._push_gaussian(zeros, start, context)
        loc, tril = loc.detach(), eye if found is None else found.detach()
        ends = image if start is None else step(z @ start.mT, context)[0].detach()
        size_of = (tril.abs() @ z.abs().unsqueeze(-1)).squeeze(-1) + loc.abs() + ends.abs()
        error = (loc + (tril @ z.unsqueeze(-1)).squeeze(-1) - ends).abs()
        worst = max(worst, within("claims: triangular", error, 64 * eps(case) * size(step) * (1 + size_of), case))
        require(bool((tril.diagonal(dim1=-2, dim2=-1) > 0).all()), case, "claims: the diagonal is not positive")
    if step.elementwise:
        shift, factor = (torch.as_tensor(each, dtype=z.dtype, device=z.device).detach() for each in step._line(context))
        error = (shift + factor * z - image).abs()
        bound = 64 * eps(case) * size(step) * (1 + (factor * z).abs() + shift.abs())
        worst = max(worst, within("claims: a line", error, bound, case))
    return worst
