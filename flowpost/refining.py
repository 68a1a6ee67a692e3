"""q(z|x) made better for single x: by Hamiltonian chains that draw from p(z|x), or by a proposal fitted to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Gamma

from flowpost.annealed import PILOT_CHAINS, anneal, pilot, schedule, vary
from flowpost.annealing import Gradient, noise_target
from flowpost.density import like_of, standard_normal_log_prob
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import wide_dtype

CHAINS, LEAPFROGS = 32, 3  # of a fitted proposal, for each example
TAIL = 8.0  # degrees of freedom: lighter tails than p's would make k-hat large again
DEFENCE = 0.1  # share of draws from q itself: no weight is more than ten times that of q's own


def refine(
    q: FlowDistribution,
    log_joint: Callable[[Tensor], Tensor],
    samples: int = 100,
    steps: int = 50,
    leapfrogs: int = 5,
    *,
    pairs: int = 5000,
) -> Tensor:
    """Draws of p(z|x) by Hamiltonian chains that start at draws of q(z|x), where q is not to be trusted itself.

    Each draw has a chain of its own, in the noise space of q: annealed from N(0, I) in `steps` temperatures, then moved
    by as many steps at p. Step sizes, for each example its own, come from a pilot run. A chain finds what lies around
    q, and farther out than q goes; of a mode that a valley keeps apart it may find too little: see that more `steps`
    change nothing.

    When to use: where `importance_estimate` says by a k-hat above 0.7 that q misses much of p(z|x), and z is what is
    wanted. Where it is log p(x), use ``importance_estimate(..., refine=25)`` or `annealed_estimate`.

    Args:
        q: ``posterior.at(h)``, or ``vae.encode(x)``.
        log_joint: of z ``(*samples, *batch, dim)``, log p(x, z) up to a constant, ``(*samples, *batch)``; such as
            ``lambda z: sum(vae.log_joint(x, z))``, of a model in eval mode.
        samples: for each x.
        steps: of the annealing, and again after it.
        leapfrogs: gradients of each step.
        pairs: how many (sample, example) pairs move at once.

    Returns:
        z ``(samples, *batch, dim)``, without gradient.

    Raises:
        ValueError: if a number is below 1.

    Reference:
        Hoffman et al. (2019), NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport.

    Example:
        >>> narrow = flowpost.diagonal(0, dim=2).at()
        >>> z = refine(narrow, lambda z: -0.5 * (z / 3).square().sum(-1), samples=500)
        >>> bool((z.std(0) > 2.5).all())
        True
    """
    samples, pairs = check_int("samples", samples, minimum=1), check_int("pairs", pairs, minimum=1)
    gradient, like = noise_target(q, log_joint), noise_like(q)
    size = max(1, pairs // max(1, q.batch_shape.numel()))
    moved = []
    for start in range(0, samples, size):
        noise = torch.randn_like(like.expand(min(size, samples - start), *like.shape))
        moved.append(wander(gradient, noise, steps, leapfrogs)[-1])
    with torch.no_grad():
        return q.rsample((samples,), torch.cat(moved))


def wander(gradient: Gradient, start: Tensor, steps: int, leapfrogs: int, *, keep: int = 1) -> Tensor:
    """The last `keep` states, ``(keep, chains, *batch, dim)``, of chains annealed to a density and moved on at it.

    Args:
        gradient: of the density, as `noise_target` makes it.
        start: draws of N(0, I), ``(chains, *batch, dim)``.
        steps: temperatures of the annealing, and steps after it; at least 1.
        leapfrogs: of each step, at least 1.
        keep: at most `steps`.
    """
    steps = check_int("steps", steps, minimum=1)
    draft = torch.randn_like(start[:1].expand(PILOT_CHAINS, *start.shape[1:]))
    sizes = pilot(gradient, draft, steps + 1, "linear", leapfrogs)
    state = anneal(gradient, start, schedule(steps + 1, "linear"), sizes, leapfrogs).state
    kept = [state]
    for _ in range(steps):
        kept.append(vary(kept[-1], gradient, sizes[-1], leapfrogs)[0])
        kept = kept[-keep:]
    return torch.stack([state.position for state in kept])


def noise_like(q: FlowDistribution) -> Tensor:
    """One e for each example, ``(*batch, dim)``, whose values mean nothing."""
    like = like_of(q.flow, q.context)
    return torch.empty(*q.batch_shape, *q.event_shape, dtype=like.dtype, device=like.device)


class Proposal(NamedTuple):
    """A density of noise e for each example: nine tenths Student's t, fitted to chains, and one tenth N(0, I)."""

    loc: Tensor
    """``(*batch, dim)``"""
    tril: Tensor
    """Cholesky factor of the t's scale matrix, ``(*batch, dim, dim)``."""

    def draw(self, samples: int) -> Tensor:
        """Noise ``(samples, *batch, dim)``."""
        normal = torch.randn(samples, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        half = torch.full_like(normal[..., :1], TAIL / 2)
        spread = Gamma(half, half, validate_args=False).sample().rsqrt()
        fitted = self.loc + spread * torch.einsum("...ij,s...j->s...i", self.tril, normal)
        return torch.where(torch.rand_like(spread) < DEFENCE, torch.randn_like(normal), fitted)

    def log_prob(self, noise: Tensor) -> Tensor:
        """The log density of noise ``(samples, *batch, dim)``, wide."""
        away, dim = (noise - self.loc).to(wide_dtype(noise)), noise.shape[-1]
        tril = self.tril.to(away.dtype)
        white = torch.einsum("...ij,s...j->s...i", torch.linalg.inv(tril), away)
        constant = math.lgamma((TAIL + dim) / 2) - math.lgamma(TAIL / 2) - 0.5 * dim * math.log(TAIL * math.pi)
        fitted = constant - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        fitted = fitted - 0.5 * (TAIL + dim) * torch.log1p(white.square().sum(-1) / TAIL)
        normal = standard_normal_log_prob(noise.to(away.dtype))
        return torch.logaddexp(math.log1p(-DEFENCE) + fitted, math.log(DEFENCE) + normal)


def fit_proposal(gradient: Gradient, like: Tensor, steps: int) -> Proposal:
    """One fitted to the states of 32 chains over their last `steps` steps; `like` is one e for each example.

    Its mean and covariance are theirs, the covariance drawn towards I as much as dim more states at N(0, I)'s would. An
    example whose chains are not finite gets N(0, I).
    """
    start = torch.randn_like(like.expand(CHAINS, *like.shape))
    states = wander(gradient, start, steps, LEAPFROGS, keep=steps).flatten(0, 1).to(wide_dtype(like))
    loc, eye = states.mean(0), torch.eye(like.shape[-1], dtype=states.dtype, device=like.device)
    away = states - loc
    scatter = torch.einsum("n...i,n...j->...ij", away, away)
    covariance = (scatter + like.shape[-1] * eye) / (len(states) + like.shape[-1])
    fine = covariance.isfinite().all(-1).all(-1)[..., None]
    loc, covariance = torch.where(fine, loc, 0.0), torch.where(fine[..., None], covariance, eye)
    tril, _ = torch.linalg.cholesky_ex(covariance)
    return Proposal(loc.to(like.dtype), tril.to(like.dtype))
