"""The same map in public implementations, with the same z' and log-det in float64: element-wise maps in networks.

How, and what of a library's numbers is converted, is in `peers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import HIDDEN, POINTS, Case, Peer, Twin, causal_twin, check, draw, grid, pushed

from flowpost import Affine, Bijector, Coupling, DeepSigmoid, Inverse, Masked, Shift, Spline
from flowpost.functional import exp_scale

CONTEXT = 3  # size of h
BINS = 5
UNITS = 4


def affine_iaf_twin(dim: int, scale: float) -> Twin:
    return causal_twin(Masked(Affine(dim, exp_scale), CONTEXT, HIDDEN, order=range(dim)[::-1]), scale)


def maf_twin(dim: int, scale: float) -> Twin:
    """nflows' direction is from z to noise, which is the inverse of flowpost's."""
    step = Masked(Inverse(Affine(dim, exp_scale)), 0, HIDDEN)
    return causal_twin(step, scale)


def autoregressive_spline_twin(dim: int, scale: float) -> Twin:
    twin = causal_twin(Masked(Spline(dim, BINS), 0, HIDDEN), scale)
    return twin._replace(arrays=twin.arrays | {"bins": torch.tensor(float(BINS))})


def naf_twin(dim: int, scale: float) -> Twin:
    """flowpost bounds a and b softly, by ``exp(4 tanh(raw / 4))`` and ``6 tanh(k raw / 6)``; the paper does not."""
    step = DeepSigmoid(dim, units=UNITS).double()
    context = draw(POINTS, step.context_size, scale=scale)
    a, b, weight = context.unflatten(-1, (3, UNITS, dim)).unbind(1)
    rates = 2 ** torch.linspace(-1, 1, UNITS, dtype=torch.float64).unsqueeze(-1)
    scales, shifts = torch.exp(4 * torch.tanh(a / 4)), 6 * torch.tanh(rates * b / 6)
    return Twin(step, context, {"scale": scales, "shift": shifts, "log_weight": weight.log_softmax(-2)})


def spline_twin(dim: int, scale: float) -> Twin:
    step = Spline(dim, BINS)
    context = draw(POINTS, step.context_size, scale=scale)
    widths, heights, slopes = context.unflatten(-1, (3 * BINS - 1, dim)).split([BINS, BINS, BINS - 1], -2)
    return Twin(step, context, {"widths": widths, "heights": heights, "slopes": slopes})


def coupling_twin(make: Callable[[int], Bijector], dim: int, scale: float) -> Twin:
    """The last variables pass, the first ones move, in reverse order among themselves."""
    moving = (dim + 1) // 2
    order = [*range(moving, dim), *range(moving)]
    step = pushed(Coupling(dim, make(moving), CONTEXT, HIDDEN, order=order), scale)
    state, context = step.net.state_dict(), draw(POINTS, CONTEXT)
    arrays = {f"{key}{i}": state[f"layers.{i}.{key}"] for i in range(len(HIDDEN) + 1) for key in ("weight", "bias")}
    passing = (torch.arange(dim) >= moving).double()
    return Twin(step, context, arrays | {"h": context, "passing": passing, "bins": torch.tensor(float(BINS))})


def realnvp_twin(dim: int, scale: float) -> Twin:
    return coupling_twin(lambda size: Affine(size, exp_scale), dim, scale)


def nice_twin(dim: int, scale: float) -> Twin:
    return coupling_twin(Shift, dim, scale)


def spline_coupling_twin(dim: int, scale: float) -> Twin:
    return coupling_twin(lambda size: Spline(size, BINS), dim, scale)


CASES = {
    "affine iaf in pyro, reversed": Case("pyro affine", affine_iaf_twin, invertible=True, least=2),
    "maf in nflows": Case("nflows maf", maf_twin, invertible=True, least=2),
    "deep sigmoid in pyro": Case("pyro naf", naf_twin, tolerance=1e-6),
    "spline in nflows": Case("nflows spline", spline_twin, invertible=True),
    "spline in zuko": Case("zuko spline", spline_twin, invertible=True),
    "autoregressive spline in zuko": Case(
        "zuko autoregressive spline", autoregressive_spline_twin, invertible=True, least=2
    ),
    "affine coupling in zuko": Case("zuko affine coupling", realnvp_twin, invertible=True, least=2),
    "spline coupling in zuko": Case("zuko spline coupling", spline_coupling_twin, invertible=True, least=2),
    "additive coupling in nflows": Case("nflows additive coupling", nice_twin, invertible=True, least=2),
}


@grid(CASES)
def test_a_public_implementation_makes_the_same_map(peer: Peer, case: Case, dim: int, scale: float) -> None:
    check(peer, case, dim, scale)
