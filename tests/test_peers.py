"""The same map in public implementations, with the same z' and log-det in float64: the first families.

How, and what of a library's numbers is converted, is in `peers`.
"""

from __future__ import annotations

import math

import pytest
import torch
from peers import HIDDEN, POINTS, Case, Peer, Twin, causal_twin, check, draw, grid, inverse_softplus, pushed
from torch.distributions import MultivariateNormal, Normal

from flowpost import Autoregressive, Householder, Planar, Radial, diagonal, full_covariance

K = -math.expm1(-(1 - 1e-3))  # of the gain m(a) = log1p(K expm1(a)) that stands in the place of softplus(a) - 1
CONTEXT = 3  # size of h


def planar_twin(dim: int, scale: float, batch: tuple[int, ...] = (POINTS,)) -> Twin:
    """The libraries have ``w.u_hat = softplus(w.u) - 1``, flowpost ``m(w.u)``: u is moved along w until they agree."""
    context = draw(*batch, 2 * dim + 1, scale=scale)
    u, w, b = context.split([dim, dim, 1], -1)
    a, square = (w * u).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    gain = torch.log1p(K * torch.expm1(a))
    theirs = u + (inverse_softplus(1 + gain) - a) * w / square
    return Twin(Planar(dim), context, {"u": theirs, "w": w, "b": b})


def radial_twin(dim: int, scale: float, batch: tuple[int, ...] = (POINTS,)) -> Twin:
    """flowpost's ``a = softplus(alpha + c) + 1e-3`` and ``b = a m(beta)`` as the libraries' unconstrained numbers."""
    context = draw(*batch, dim + 2, scale=scale)
    center, alpha, beta = context.split([dim, 1, 1], -1)
    a = torch.log1p(math.expm1(1 - 1e-3) * alpha.exp()) + 1e-3
    room = 1 + torch.log1p(K * torch.expm1(beta))  # b = -a + a room
    theirs = a if batch == () else inverse_softplus(a)  # normflows takes |alpha|
    return Twin(Radial(dim), context, {"center": center, "alpha": theirs, "beta": inverse_softplus(a * room)})


def householder_twin(dim: int, scale: float) -> Twin:
    v = draw(POINTS, dim, scale=scale)
    return Twin(Householder(dim), v, {"v": v.unsqueeze(-2)})


def gate_twin(dim: int, scale: float) -> Twin:
    return causal_twin(Autoregressive(dim, 0, HIDDEN), scale)


def conditional_gate(dim: int, scale: float) -> Twin:
    return causal_twin(Autoregressive(dim, CONTEXT, HIDDEN), scale)


def reversed_gate(dim: int, scale: float) -> Twin:
    return causal_twin(Autoregressive(dim, CONTEXT, HIDDEN, order=range(dim)[::-1]), scale)


CASES = {
    "planar in pyro": Case("pyro planar", planar_twin),
    "planar in normflows": Case("normflows planar", lambda dim, scale: planar_twin(dim, scale, ())),
    "radial in pyro": Case("pyro radial", radial_twin),
    "radial in normflows": Case("normflows radial", lambda dim, scale: radial_twin(dim, scale, ())),
    "householder in pyro": Case("pyro householder", householder_twin, invertible=True, least=2),
    "gate in pyro": Case("pyro gate, pyro network", conditional_gate, invertible=True, least=2),
    "gate in pyro, reversed": Case("pyro gate, pyro network", reversed_gate, invertible=True, least=2),
    "gate in pyro, network in nflows": Case("pyro gate, nflows network", gate_twin, invertible=True, least=2),
}


@grid(CASES)
def test_a_public_implementation_makes_the_same_map(peer: Peer, case: Case, dim: int, scale: float) -> None:
    check(peer, case, dim, scale)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_gaussian_posteriors_are_torch_s(dim: int) -> None:
    h = draw(POINTS, 7)
    for recipe in (diagonal, full_covariance):
        posterior = pushed(recipe(7, dim), 1.0)
        z, log_q, noise = posterior(h, (3,))
        loc, scale_tril = posterior.gaussian(h)
        torch.testing.assert_close(z, loc + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1))
        torch.testing.assert_close(log_q, MultivariateNormal(loc, scale_tril=scale_tril).log_prob(z))
        if recipe is diagonal:
            scale = scale_tril.diagonal(dim1=-2, dim2=-1)
            torch.testing.assert_close(log_q, Normal(loc, scale).log_prob(z).sum(-1))
