"""The Gaussian nearest to a density, in coordinates of its own: it needs no rate that fits the density's scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From points ``(S, dim)`` to their log density ``(S,)`` and its gradient ``(S, dim)``."""
RATE = 0.5
"""Of the natural gradient, where nothing limits a step; it falls to 0 over the second half."""
STRETCH = 150
"""Steps whose mean ELBO is compared with that of the next ones."""
STEPS = 200
"""Of L-BFGS, at most."""
REACH = 1.0
"""The longest step, in standard deviations: a start far away is walked from, and not jumped from."""


class Gaussian(NamedTuple):
    """``N(loc, L L')``, or several."""

    loc: Tensor
    """``(*batch, dim)``"""
    scale_tril: Tensor
    """L, ``(*batch, dim, dim)``"""

    def entropy(self) -> Tensor:
        """In nats, ``(*batch)``."""
        half = 0.5 * self.loc.shape[-1] * (1 + math.log(2 * math.pi))
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + half

    def draw(self, noise: Tensor) -> Tensor:
        """What noise ``(S, *batch, dim)`` becomes."""
        return self.loc + torch.einsum("...ij,s...j->s...i", self.scale_tril, noise)

    def at(self, index: int) -> Gaussian:
        """One of several."""
        return Gaussian(self.loc[index], self.scale_tril[index])


def factorized(gaussian: Gaussian) -> Gaussian:
    """Of the factorized Gaussians q the one with the least KL(q || p), where p is the given one.

    It has p's mean and the diagonal of p's precision: the variances given all other coordinates, which are at most the
    marginal ones.
    """
    eye = torch.eye(gaussian.loc.shape[-1], dtype=gaussian.loc.dtype, device=gaussian.loc.device)
    inverse = torch.linalg.solve_triangular(gaussian.scale_tril, eye, upper=False)
    return Gaussian(gaussian.loc, torch.diag_embed(inverse.square().sum(-2).rsqrt()))


def standard_gaussian(loc: Tensor) -> Gaussian:
    """``N(loc, I)``."""
    eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
    return Gaussian(loc, eye.expand(*loc.shape, -1))


@torch.no_grad()
def natural_ascent(
    gradient: Gradient,
    start: Gaussian,
    steps: int,
    samples: int,
    generator: torch.Generator,
    *,
    diagonal: bool = False,
    falling: bool = True,
) -> tuple[Gaussian, Tensor]:
    """Raise the ELBO of Gaussians by its natural gradient, estimated by sticking the landing.

    In the coordinates ``e = L^-1 (z - loc)`` of the present Gaussian, the path gradient at a draw is
    ``r = L' dlog p/dz + e``. The Fisher information is there 1 for loc and for L below its diagonal, and 2 on it, so
    that a step is ``loc + k L mean(r)`` and ``L (I + k tril(mean(r e')))`` with a halved, exponentiated diagonal. It
    does not depend on the units of z: the same rate serves every density. Where p is Gaussian r is 0 at the optimum,
    without noise. Draws come in pairs ``e, -e``; those whose gradient is not finite are left out.

    Costs ``samples`` gradients a step and Gaussian, and O(samples dim^2).

    Args:
        gradient: of log p.
        start: where to begin; several Gaussians rise side by side.
        steps: how many.
        samples: draws for each step and Gaussian; one more where it is odd.
        generator: of the draws.
        diagonal: whether L stays diagonal, for factorized Gaussians.
        falling: whether the rate falls to 0 over the second half of the steps.

    Returns:
        The Gaussians after the last step, and the ELBO before every step, ``(steps, *batch)``.

    Reference:
        Lin, Nielsen, Khan & Schmidt (2021), Tractable Structured Natural-Gradient Descent Using Local
        Parameterizations; the estimator is that of Roeder, Wu & Duvenaud (2017).
    """
    now, elbos = start, []
    for step in range(steps):
        shape = (-(-samples // 2), *now.loc.shape)
        half = torch.randn(shape, dtype=now.loc.dtype, device=now.loc.device, generator=generator)
        noise = torch.cat([half, -half])
        points = now.draw(noise)
        value, slope = gradient(points.reshape(-1, shape[-1]))
        value, slope = value.reshape(points.shape[:-1]), slope.reshape(points.shape)
        path = torch.einsum("s...i,...ij->s...j", slope, now.scale_tril) + noise
        fine = path.isfinite().all(-1) & value.isfinite()
        share = fine / fine.sum(0).clamp_min(1)
        path = torch.where(fine.unsqueeze(-1), path, 0.0) * share.unsqueeze(-1)
        elbos.append((torch.where(fine, value, 0.0) * share).sum(0) + now.entropy())
        now = _moved(now, path, noise, RATE * (min(1.0, 2 - 2 * step / steps) if falling else 1.0), diagonal)
    return now, torch.stack(elbos) if elbos else now.loc.new_zeros(0, *now.loc.shape[:-1])


def _moved(now: Gaussian, path: Tensor, noise: Tensor, rate: float, diagonal: bool) -> Gaussian:  # noqa: FBT001
    """One step along the natural gradient; `path` has its share of the mean in it."""
    shift = path.sum(0)
    if diagonal:
        along, below = (path * noise).sum(0), torch.zeros_like(now.scale_tril)
    else:
        below = torch.einsum("s...i,s...j->...ij", path, noise).tril()
        along, below = below.diagonal(dim1=-2, dim2=-1), below.tril(-1)
    along = 0.5 * along
    length = (shift.square().sum(-1) + along.square().sum(-1) + below.square().sum((-2, -1))).sqrt()
    k = (REACH / length).clamp_max(rate).unsqueeze(-1)
    loc = now.loc + k * (now.scale_tril @ shift.unsqueeze(-1)).squeeze(-1)
    return Gaussian(loc, now.scale_tril @ (k.unsqueeze(-1) * below + torch.diag_embed((k * along).exp())))


def rise(
    gradient: Gradient, start: Gaussian, steps: int, samples: int, generator: torch.Generator, *, diagonal: bool
) -> tuple[Gaussian, Tensor]:
    """`natural_ascent` for as long as the ELBO rises, at most half of the steps, and then with a falling rate.

    Returns:
        The Gaussian, and the ELBO before every step, ``(made,)``.
    """
    now, elbos, made = start, [], 0
    while made < steps // 2:
        count = min(STRETCH, steps // 2 - made)
        now, found = natural_ascent(gradient, now, count, samples, generator, diagonal=diagonal, falling=False)
        elbos.append(found)
        made += count
        if len(elbos) > 1 and _still(*elbos[-2:]):
            break
    now, found = natural_ascent(
        gradient, now, min(max(made, STRETCH), steps - made), samples, generator, diagonal=diagonal
    )
    return now, torch.cat([*elbos, found])


def _still(before: Tensor, after: Tensor) -> bool:
    """Whether the ELBO rises by no more than its steps scatter; of one step nobody knows."""
    if len(after) < 2:
        return False
    error = (before.var() / len(before) + after.var() / len(after)).sqrt()
    return bool(after.mean() - before.mean() < 2 * error)


@torch.no_grad()
def elbo(gradient: Gradient, gaussian: Gaussian, samples: int, generator: torch.Generator) -> Tensor:
    """The ELBO of Gaussians ``(*batch)`` from fresh draws; minus infinity where one of them has no value."""
    noise = torch.randn(
        (samples, *gaussian.loc.shape), dtype=gaussian.loc.dtype, device=gaussian.loc.device, generator=generator
    )
    points = gaussian.draw(noise)
    value = gradient(points.reshape(-1, points.shape[-1]))[0].reshape(points.shape[:-1])
    return value.mean(0).nan_to_num(nan=-torch.inf, neginf=-torch.inf) + gaussian.entropy()


def laplace(gradient: Gradient, start: Tensor) -> Gaussian | None:
    """The Gaussian at a mode, with the curvature there: by L-BFGS and differences of gradients; None if there is none.

    A density without a highest point, such as that of a hierarchical model in centred form, has no such Gaussian.

    Args:
        gradient: of log p.
        start: ``(dim,)``.
    """
    point = _highest(gradient, start)
    width = torch.finfo(point.dtype).eps ** (1 / 3) * point.abs().clamp_min(1)
    _, above = gradient(point + width.diag())
    _, below = gradient(point - width.diag())
    curvature = (below - above) / (2 * width).unsqueeze(-1)
    precision = 0.5 * (curvature + curvature.mT)
    if not bool(precision.isfinite().all()):
        return None
    # The inverse of a matrix is L L' with L = flip(chol(flip(matrix)))^-1' flipped: no inverse is made.
    factor, failed = torch.linalg.cholesky_ex(precision.flip(0, 1))
    if bool(failed):
        return None
    eye = torch.eye(len(point), dtype=point.dtype, device=point.device)
    tril = torch.linalg.solve_triangular(factor.flip(0, 1).mT, eye, upper=False)
    return Gaussian(point, tril) if bool(tril.isfinite().all()) else None


def _highest(gradient: Gradient, start: Tensor) -> Tensor:
    point = start.clone().requires_grad_()
    search = torch.optim.LBFGS([point], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        value, slope = gradient(point.detach().unsqueeze(0))
        fine = value.isfinite().all() & slope.isfinite().all()
        point.grad = torch.where(fine, -slope[0], 0.0)
        return torch.where(fine, -value[0], torch.inf)

    search.step(loss)
    return point.detach()
