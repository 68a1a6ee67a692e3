"""Mass that q all but misses: it is looked for where a draw of q weighs most, and q is given a component there."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch

from flowpost.bijectors.base import Bijector
from flowpost.variational.bound import Fitted
from flowpost.variational.families import component, components
from flowpost.variational.gaussian import Gaussian, Gradient, laplace, natural_ascent
from flowpost.variational.mixture import Mixture
from flowpost.variational.starts import NEGLIGIBLE
from flowpost.variational.target import Target
from flowpost.variational.weighing import mean_and_error, weigh

DRAWS, FEW = 10_000, 64
"""Of q, to find the one that weighs most; and of a Gaussian there, for each step of its climb."""
SLOPE, SPREAD = 2.0, 3.0
"""Nats by which log p/q must be higher at a Gaussian than both ELBOs, and standard deviations that it has over q's own
draws: where it is less, q has the place, if not quite in its shape or its share, which a flow learns by itself."""
GAIN, SURE = 0.05, 4.0
"""Nats by which the ELBO must rise with one more component, and standard errors."""
PROBES = 500


class Missed(NamedTuple):
    """A Gaussian at a place that q all but misses."""

    gaussian: Gaussian
    elbo: float
    """Its own."""
    before: float
    """Q's."""


@torch.no_grad()
def find_missed(
    fitted: Fitted, target: Target, gradient: Gradient, steps: int, generator: torch.Generator
) -> Missed | None:
    """The Gaussian to which the draw of the largest weight p/q leads, if q has next to nothing there; None if it has.

    A step from q towards a Gaussian N raises the ELBO at first by ``E_N[log p/q] - E_q[log p/q]`` for each unit of
    weight. Where q has N's place that is about 0, whatever p's shape is; where it has not, log q is far too low there,
    and ``KL(N || q)`` is large, also beside what a q is off that is rough everywhere, as in the middle of an ascent.

    Costs some 100 gradients, and where something is found `FEW` for each of the steps.

    Args:
        fitted: q.
        target: p.
        gradient: of log p, that counts.
        steps: of the Gaussian's climb.
        generator: of all draws.

    Reference:
        Miller, Foti & Adams (2017), Variational Boosting: Iteratively Refining Posterior Approximations.
    """
    weighed = weigh(fitted, target, DRAWS, generator)
    before, error = mean_and_error(weighed)
    if not math.isfinite(before):
        return None
    height = max(SLOPE, SPREAD * error * math.sqrt(len(weighed.z)))
    heaviest = weighed.z[int((weighed.log_ratio + weighed.share.log()).argmax())]
    found = laplace(gradient, heaviest)
    if found is None:
        return None
    ratio, elbo = _probed(fitted, target, found, generator)
    if not ratio > max(before, elbo) + height:
        return None
    several = Gaussian(*(value.unsqueeze(0) for value in found))
    found = natural_ascent(gradient, several, steps, FEW, generator)[0].at(0)
    ratio, elbo = _probed(fitted, target, found, generator)
    enough = ratio > max(before, elbo) + height and elbo > before - NEGLIGIBLE
    return Missed(found, elbo, before) if enough else None


def grown(fitted: Fitted, flow: Bijector, missed: Missed, target: Target, generator: torch.Generator) -> Mixture | None:
    """Q with a component more, which starts at the Gaussian; None where the ELBO is not clearly higher for it."""
    parts, like = components(fitted), missed.gaussian.loc
    logits = fitted.log_weights.detach() if isinstance(fitted, Mixture) else like.new_zeros(1)
    mixture = Mixture([*copy.deepcopy(parts), component(flow, missed.gaussian)])
    with torch.no_grad():
        mixture.logits.copy_(torch.cat([logits, like.new_tensor([missed.elbo - missed.before])]))
    after, error = mean_and_error(weigh(mixture, target, DRAWS, generator))
    return mixture if after - missed.before > max(GAIN, SURE * error) else None


def _probed(fitted: Fitted, target: Target, gaussian: Gaussian, generator: torch.Generator) -> tuple[float, float]:
    """The median of log p/q over draws of a Gaussian, some of which may be where p is next to nothing, and its ELBO."""
    like = gaussian.loc
    noise = torch.randn(PROBES, len(like), dtype=like.dtype, device=like.device, generator=generator)
    z = gaussian.draw(noise)
    log_p, log_q = target(z), fitted.log_prob(z)
    ratio = (log_p - log_q).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return ratio.median().item(), log_p.mean().item() + gaussian.entropy().item()
