"""Annealed importance sampling in a flow's noise space: from N(0, I) to p by Hamiltonian steps, or back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.annealing import Gradient, State, draws, hamiltonian_step
from flowpost.density import standard_normal_log_prob
from flowpost.numerics.arguments import check_int
from flowpost.numerics.products import wide_dtype
from flowpost.training import Captured

ACCEPTANCE = 0.8  # of the pilot's proposals
GAIN = 0.3  # of a pilot's log step size, for each temperature: what it follows, and how much it wavers
PILOT_CHAINS = 4  # for each example, which share a step size
PILOT_SHARE, PILOT_LEAST = 4, 30  # a pilot has a quarter of the temperatures, but as many as it takes to settle
PATHS = ("sigmoidal", "linear")
STEEPNESS = 4.0  # Wu et al.'s

Tell = Callable[[], None]
"""Called after each temperature; nothing waits for the device."""


class Walk(NamedTuple):
    """Where chains have come, and what their way weighs."""

    state: State
    log_weight: Tensor
    """``(chains, *batch)``, wide: of a way from N(0, I) its ``exp`` has the mean ``Z``, of one back ``1 / Z``."""
    acceptance: Tensor
    """The mean probability of acceptance, ``(*batch)``; nan where there was no step."""


def schedule(temperatures: int, path: str = "sigmoidal") -> Tensor:
    """Betas from 0 to 1, the share of p in ``N(e; 0, I)^(1 - beta) p^beta``: ``(temperatures + 1,)``, float64, rising.

    Args:
        temperatures: how many steps of beta; 1 is importance sampling.
        path: "sigmoidal", ``sigmoid(4 (2 t / T - 1))`` brought to 0 and 1, or "linear".

    Raises:
        ValueError: if `temperatures` is below 1, or there is no such path.

    Reference:
        Wu, Burda, Salakhutdinov & Grosse (2017), On the Quantitative Analysis of Decoder-Based Generative Models.

    Example:
        >>> schedule(4, "linear")
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    if path not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(PATHS)}, got {path!r}")
    count = check_int("temperatures", temperatures, minimum=1) + 1
    line = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
    if path == "linear":
        return line
    bent = torch.sigmoid(STEEPNESS * (2 * line - 1))
    return (bent - bent[0]) / (bent[-1] - bent[0])


def anneal(
    gradient: Gradient,
    start: Tensor,
    betas: Tensor,
    step_sizes: Tensor,
    leapfrogs: int,
    *,
    backwards: bool = False,
    tell: Tell | None = None,
) -> Walk:
    """Chains through all temperatures, one Hamiltonian step at each, and the logarithm of what their ways weigh.

    From e_0 ~ N(0, I), ``log w = sum_t (beta_t - beta_(t-1)) (log p(e_(t-1)) - log N(e_(t-1); 0, I))``, where e_t comes
    of e_(t-1) by a step that leaves the density of beta_t as it is. ``E exp(log w)`` is p's integral Z. Backwards, from
    an exact draw of p, the same kernels in the other order give ``log w = -sum_t ...``, and ``E exp(log w) = 1 / Z``.
    Both hold for any step sizes that were fixed before. On a CUDA device a temperature is one launch.

    Args:
        gradient: of log p, as `noise_target` makes it; it must treat each row by itself.
        start: e ``(chains, *batch, dim)``.
        betas: as `schedule` gives them, ``(T + 1,)``.
        step_sizes: at the betas between 0 and 1, ``(T - 1, *batch)``, as `pilot` gives them.
        leapfrogs: of each step, as many gradients.
        backwards: whether the start is of p.
        tell: called after each temperature.

    Returns:
        ``Walk(state, log_weight, acceptance)``. The state is of the last beta but one.

    Reference:
        Neal (2001), Annealed Importance Sampling; Grosse, Ghahramani & Adams (2015), Sandwiching the Marginal
        Likelihood Using Bidirectional Monte Carlo.

    Example:
        >>> p = lambda e: (-0.5 * (e / 2).square().sum(-1), -e / 4)  # its integral is 2 sqrt(2 pi)
        >>> betas, start = schedule(50), torch.randn(500, 1)
        >>> walk = anneal(p, start, betas, torch.full((49,), 0.8), leapfrogs=2)
        >>> log_z = walk.log_weight.logsumexp(0) - math.log(500)
        >>> round(log_z.item(), 1), round(math.log(2 * math.sqrt(2 * math.pi)), 1)
        (1.6, 1.6)
    """
    check_int("leapfrogs", leapfrogs, minimum=1)
    betas = betas.to(start)  # what the steps see is what the weights are of
    gains, inner = betas.to(wide_dtype(start)).diff(), betas[1:-1]
    if backwards:
        gains, inner, step_sizes = -gains.flip(0), inner.flip(0), step_sizes.flip(0)

    def advance(
        position: Tensor, value: Tensor, slope: Tensor, log_weight: Tensor, shares: Tensor, *now: Tensor
    ) -> tuple[Tensor, ...]:
        beta, size, gain = now
        state = State(position, value, slope)
        state, share = vary(state, gradient, size, leapfrogs, beta)
        return *state, log_weight + gain * _ratio(state), shares + share.mean(0)

    state = State(start, *gradient(start))
    shares = torch.zeros_like(state.value[0])
    carried = (*state, gains[0] * _ratio(state), shares)
    step = Captured(advance, start.device)
    for t in range(len(inner)):
        carried = step(*carried, inner[t], step_sizes[t], gains[t + 1])
        if tell is not None:
            tell()
    return Walk(State(*carried[:3]), carried[3], carried[4] / (len(inner) or math.nan))


def pilot(
    gradient: Gradient, start: Tensor, temperatures: int, path: str, leapfrogs: int, *, tell: Tell | None = None
) -> Tensor:
    """Step sizes for `anneal`, one for each temperature and example, from chains that are thrown away.

    The pilot anneals in fewer temperatures. At each, ``log step += 0.3 (accepted - 0.8)``, accepted being the mean over
    an example's chains, and the next temperature begins with that. The step sizes are then smoothed over the
    temperatures. A run with what was found here has fixed step sizes; adapted within it, they would depend on its own
    chains, and the mean of the weights would be another.

    Args:
        gradient: as in `anneal`.
        start: draws of N(0, I), other ones than the run's, ``(chains, *batch, dim)``.
        temperatures: of the run to come.
        path: of its betas, as in `schedule`.
        leapfrogs: of its steps.
        tell: called after each of the pilot's temperatures.

    Returns:
        ``(temperatures - 1, *batch)``.

    Example:
        >>> narrow = lambda e: (-0.5 * (e / 0.1).square().sum(-1), -e / 0.01)
        >>> sizes = pilot(narrow, torch.randn(4, 7, 3), 100, "sigmoidal", leapfrogs=3)
        >>> sizes.shape, bool((sizes[-1] < 0.3).all())
        (torch.Size([99, 7]), True)
    """
    betas = schedule(pilot_temperatures(temperatures), path).to(start)[1:]

    def advance(position: Tensor, value: Tensor, slope: Tensor, log_size: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        state = State(position, value, slope)
        state, share = vary(state, gradient, log_size.exp(), leapfrogs, beta)
        return *state, log_size + GAIN * (share.mean(0) - ACCEPTANCE)

    value, slope = gradient(start)
    log_size = torch.full_like(value[0], math.log(1.3) - 0.25 * math.log(start.shape[-1]))  # what suits N(0, I)
    carried, found, step = (start, value, slope, log_size), [], Captured(advance, start.device)
    for beta in betas:
        carried = step(*carried, beta)
        found.append(carried[3])
        if tell is not None:
            tell()
    return _stretched(torch.stack(found), temperatures - 1).exp()


def pilot_temperatures(temperatures: int) -> int:
    """How many of them a pilot has."""
    return max(PILOT_LEAST, temperatures // PILOT_SHARE)


def vary(
    state: State, gradient: Gradient, size: Tensor, leapfrogs: int, beta: Tensor | None = None
) -> tuple[State, Tensor]:
    """A `hamiltonian_step` of half to all of the size: at one size, all paths may run half a period, and end at -e."""
    size = size * (1 - 0.5 * torch.rand_like(state.value))
    return hamiltonian_step(state, gradient, size, leapfrogs, *draws(state), beta)


def _ratio(state: State) -> Tensor:
    """The log p(e) - log N(e; 0, I) of each chain, wide."""
    return state.value.to(wide_dtype(state.value)) - standard_normal_log_prob(state.position)


def _stretched(logs: Tensor, count: int) -> Tensor:
    """The mean of neighbours among ``(n, *batch)``, at `count` equal distances."""
    if not count or not logs.numel():  # between no two temperatures, or of no examples
        return logs.new_zeros(count, *logs.shape[1:])
    lines, reach = logs.reshape(len(logs), -1).mT.unsqueeze(0), max(1, len(logs) // 20)  # (1, N, n)
    means = F.avg_pool1d(F.pad(lines, (reach, reach), mode="replicate"), 2 * reach + 1, 1)
    return F.interpolate(means, size=count, mode="linear", align_corners=True)[0].mT.reshape(count, *logs.shape[1:])
