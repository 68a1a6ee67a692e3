"""Sylvester flows: the paper's formula, pyro's map where it is the paper's, and that it is not elsewhere.

How, and what of a library's numbers is converted, is in `peers`.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch
from peers import HERE, POINTS, Case, Pair, Peer, Twin, agree, check, close, draw, grid, images
from torch import Tensor

from flowpost import Sylvester
from flowpost.bijectors.sylvester import Triangle


def sylvester_twin(dim: int, scale: float) -> Twin:
    """The triangular form, Q = I.

    pyro takes rows, ``x S Q^T`` and ``. Q R``, without the transposes: with Q = I, of two equal reflections, it is the
    paper's map with lower triangles in place of upper ones, so the paper's map of the variables in reverse.
    """
    step = Sylvester(dim, dim, 0).double()
    context = draw(step.context_size, scale=scale / dim)
    _, r1, r2, b, *_ = step._numbers(context, context)
    mirror = torch.arange(dim).flip(0)
    r, s = (triangle.whole()[mirror][:, mirror].mT for triangle in (r1, r2))
    v = torch.ones(2, dim, dtype=torch.float64)
    return Twin(step, context, {"v": v, "R": r, "S": s, "b": b[mirror]})


CASES = {
    "triangular sylvester in pyro": Case("pyro sylvester", sylvester_twin, tolerance=1e-6, mirrored=True, least=2),
}


@grid(CASES)
def test_a_public_implementation_makes_the_same_map(peer: Peer, case: Case, dim: int, scale: float) -> None:
    check(peer, case, dim, scale)


def paper_sylvester(z: Tensor, q: Tensor, r1: Tensor, r2: Tensor, b: Tensor) -> Pair:
    """Eq. 10 of van den Berg et al. (2018), point by point with dense matrices; the log-det of the whole Jacobian."""
    found = []
    for i, point in enumerate(z):
        inner = r2[i] @ q[i].mT @ point + b[i]
        jacobian = torch.eye(len(point)) + q[i] @ r1[i] @ torch.diag(1 - inner.tanh() ** 2) @ r2[i] @ q[i].mT
        found.append((point + q[i] @ r1[i] @ inner.tanh(), torch.linalg.slogdet(jacobian).logabsdet))
    return torch.stack([image for image, _ in found]), torch.stack([log_det for _, log_det in found])


@pytest.mark.parametrize(("dim", "rank", "reflections"), [(2, 1, None), (5, 3, None), (5, 5, 2), (4, 4, 0)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_sylvester_is_the_paper_s(dim: int, rank: int, reflections: int | None, scale: float) -> None:
    """In the place of pyro's, which takes ``x S Q^T`` for ``x Q S^T`` and ``Q R`` for ``R^T Q^T``.

    Where Q is not I its log-det is that of another map: `test_pyro_s_sylvester_is_still_wrong`.
    """
    step = Sylvester(dim, rank, reflections).double()
    context, z = draw(POINTS, step.context_size, scale=scale), draw(POINTS, dim, scale=2.0)
    q, *triangles, b, _, _ = step._numbers(z.unsqueeze(0), context)  # several points an example: Q itself
    r1, r2 = (cast(Triangle, triangle).whole() for triangle in triangles)
    q = torch.eye(dim, dtype=torch.float64).expand(POINTS, dim, dim) if q is None else cast(Tensor, q)
    ours = images(step, z, context)
    close(paper_sylvester(z, q, r1, r2, b), ours, 1e-9)
    for name, moved in {"q": (1.01 * q, r1, r2, b), "r1": (q, 1.01 * r1, r2, b), "r2": (q, r1, 1.01 * r2, b)}.items():
        assert not agree(paper_sylvester(z, *moved), ours, 1e-6), name


@pytest.mark.skipif("pyro" not in HERE, reason="pyro is not installed")
def test_pyro_s_sylvester_is_still_wrong(peer: Peer) -> None:
    """Its log-det is not that of its own map, by differences: why the test before this one states the paper's."""
    r, s = ((draw(4, 4).triu(1) + torch.diag(draw(4).tanh())) for _ in "RS")
    arrays = {"v": draw(2, 4), "R": r, "S": s, "b": draw(4)}
    z, step = draw(4), 1e-6 * torch.eye(4, dtype=torch.float64)
    image, log_det = peer("pyro sylvester", arrays | {"z": torch.cat([z + step, z - step])})
    jacobian = (image[:4] - image[4:]) / 2e-6
    assert abs(float(torch.linalg.slogdet(jacobian).logabsdet - log_det.mean())) > 0.1
