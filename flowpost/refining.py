"""q(z|x) made better for single x: by Hamiltonian chains that draw from p(z|x), or by a proposal fitted to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Gamma

from flowpost.annealed import PILOT_CHAINS, Walk, anneal, pilot, schedule, vary
from flowpost.annealing import Gradient, State, noise_target
from flowpost.density import like_of, standard_normal_log_prob
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import wide_dtype

CHAINS, LEAPFROGS = 32, 3  # of each start of a fitted proposal, for each example
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
        TypeError: if `q` is no `FlowDistribution`.
        ValueError: if a number is below 1, or `log_joint` gives another shape.

    Reference:
        Hoffman et al. (2019), NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport.

    Example:
        >>> narrow = flowpost.diagonal(0, dim=2).at()
        >>> z = refine(narrow, lambda z: -0.5 * (z / 3).square().sum(-1), samples=500)
        >>> bool((z.std(0) > 2.5).all())
        True
    """
    samples, pairs = check_int("samples", samples, minimum=1), check_int("pairs", pairs, minimum=1)
    if not isinstance(q, FlowDistribution):
        raise TypeError(f"q: expected a FlowDistribution, as vae.encode(x) gives it, got {type(q).__name__}")
    q = q._of_flow()
    gradient, like = noise_target(q, log_joint), noise_like(q)
    size = max(1, pairs // max(1, q.batch_shape.numel()))
    moved = []
    for start in range(0, samples, size):
        noise = torch.randn_like(like.expand(min(size, samples - start), *like.shape))
        walk, step_size = _annealed(gradient, noise, steps, leapfrogs)
        moved.append(_moved(walk.state, gradient, step_size, steps, leapfrogs)[-1])
    with torch.no_grad():
        return q.rsample((samples,), torch.cat(moved))


def drawn_from(gradient: Gradient, like: Tensor, steps: int) -> Tensor:
    """Rough draws ``(32, *batch, dim)`` of a density: chains annealed to it, drawn again by their weights."""
    walk, _ = _annealed(gradient, torch.randn_like(like.expand(CHAINS, *like.shape)), steps, LEAPFROGS)
    weights = walk.log_weight.nan_to_num(-math.inf, posinf=-math.inf)
    nowhere = weights.amax(0) == -math.inf
    shares = weights.masked_fill(nowhere, 0.0).softmax(0).flatten(1).mT  # (B, chains)
    chosen = torch.multinomial(shares, CHAINS, replacement=True).mT.view(walk.log_weight.shape)
    return walk.state.position.take_along_dim(chosen.unsqueeze(-1), 0)


def _annealed(gradient: Gradient, start: Tensor, steps: int, leapfrogs: int) -> tuple[Walk, Tensor]:
    """Chains ``(chains, *batch, dim)`` annealed from N(0, I) to a density, and a step size that suits it."""
    steps = check_int("steps", steps, minimum=1)
    draft = torch.randn_like(start[:1].expand(PILOT_CHAINS, *start.shape[1:]))
    sizes = pilot(gradient, draft, steps + 1, "linear", leapfrogs)
    return anneal(gradient, start, schedule(steps + 1, "linear"), sizes, leapfrogs), sizes[-1]


def _moved(state: State, gradient: Gradient, size: Tensor, steps: int, leapfrogs: int, *, keep: int = 1) -> Tensor:
    """The last `keep` of so many steps at a density, ``(keep, chains, *batch, dim)``."""
    kept = [state]
    for _ in range(steps):
        kept.append(vary(kept[-1], gradient, size, leapfrogs)[0])
        kept = kept[-keep:]
    return torch.stack([state.position for state in kept])


def noise_like(q: FlowDistribution) -> Tensor:
    """One e for each example, ``(*batch, dim)``, whose values mean nothing."""
    like = like_of(q.flow, q.context)
    return torch.empty(*q.batch_shape, *q.event_shape, dtype=like.dtype, device=like.device)


class Proposal(NamedTuple):
    """A density of noise e for each example: Student's t's, each fitted to chains, and for one tenth N(0, I)."""

    loc: Tensor
    """Of each t, ``(T, *batch, dim)``."""
    tril: Tensor
    """Cholesky factor of each t's scale matrix, ``(T, *batch, dim, dim)``."""

    def draw(self, samples: int) -> Tensor:
        """Noise ``(samples, *batch, dim)``."""
        normal = torch.randn(samples, *self.loc.shape[1:], dtype=self.loc.dtype, device=self.loc.device)
        half = torch.full_like(normal[..., :1], TAIL / 2)
        spread = Gamma(half, half, validate_args=False).sample().rsqrt()
        noise, which, below = torch.randn_like(normal), torch.rand_like(spread), 0.0
        for share, loc, tril in zip(self._shares(), self.loc, self.tril, strict=True):
            fitted = loc + spread * torch.einsum("...ij,s...j->s...i", tril, normal)
            noise = torch.where((below <= which) & (which < below + share), fitted, noise)
            below += share
        return noise

    def log_prob(self, noise: Tensor) -> Tensor:
        """The log density of noise ``(samples, *batch, dim)``, wide."""
        noise = noise.to(wide_dtype(noise))
        parts = [math.log(DEFENCE) + standard_normal_log_prob(noise)]
        for share, loc, tril in zip(self._shares(), self.loc, self.tril, strict=True):
            parts.append(math.log(share) + _student_log_prob(noise - loc, tril.to(noise.dtype)))
        return torch.stack(parts).logsumexp(0)

    def _shares(self) -> list[float]:
        """Of the t's: the first, whose chains began at q, counts twice as much as any other."""
        count = len(self.loc)
        return [(1 - DEFENCE) * (2 if i == 0 else 1) / (count + 1) for i in range(count)]


def _student_log_prob(away: Tensor, tril: Tensor) -> Tensor:
    """The log density of Student's t, ``(samples, *batch)``, at a distance from its location."""
    dim = away.shape[-1]
    white = torch.einsum("...ij,s...j->s...i", torch.linalg.inv(tril), away)
    constant = math.lgamma((TAIL + dim) / 2) - math.lgamma(TAIL / 2) - 0.5 * dim * math.log(TAIL * math.pi)
    scale = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return constant - scale - 0.5 * (TAIL + dim) * torch.log1p(white.square().sum(-1) / TAIL)


def fit_proposal(gradient: Gradient, like: Tensor, steps: int, elsewhere: Tensor | None = None) -> Proposal:
    """Student's t's fitted to the states of chains over their last `steps` steps.

    The mean and covariance of each are those of its chains, the covariance drawn towards I as much as dim more states
    at N(0, I)'s would. An example whose chains are not finite gets N(0, I).

    Args:
        gradient: of the density, as `noise_target` makes it.
        like: one e for each example, ``(*batch, dim)``, whose values mean nothing.
        steps: temperatures of the chains from N(0, I), and again as many steps at the density, of the others too.
        elsewhere: where as many others begin, ``(32, *batch, dim)``, which move by steps at the density alone and get a
            t of their own: they may be at a mode that the first ones do not see.
    """
    walk, size = _annealed(gradient, torch.randn_like(like.expand(CHAINS, *like.shape)), steps, LEAPFROGS)
    groups = [_moved(walk.state, gradient, size, steps, LEAPFROGS, keep=steps)]
    if elsewhere is not None:
        # A way back that is not finite has found nothing: the chain goes on where one of the first ones is.
        lost = ~elsewhere.isfinite().all(-1, keepdim=True)
        position = torch.where(lost, walk.state.position, elsewhere)
        groups.append(_moved(State(position, *gradient(position)), gradient, size, steps, LEAPFROGS, keep=steps))
    fitted = [_moments(group.flatten(0, 1).to(wide_dtype(like))) for group in groups]
    loc, tril = (torch.stack(each).to(like.dtype) for each in zip(*fitted, strict=True))
    return Proposal(loc, tril)


def _moments(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance of states ``(n, *batch, dim)``."""
    loc, dim = states.mean(0), states.shape[-1]
    eye = torch.eye(dim, dtype=states.dtype, device=states.device)
    away = states - loc
    covariance = (torch.einsum("n...i,n...j->...ij", away, away) + dim * eye) / (len(states) + dim)
    fine = covariance.isfinite().all(-1).all(-1)[..., None]
    loc, covariance = torch.where(fine, loc, 0.0), torch.where(fine[..., None], covariance, eye)
    tril, _ = torch.linalg.cholesky_ex(covariance)
    return loc, tril
