"""Random chains of the families: whatever is put together is a density too."""

import exact
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import BY_NAME, size

from flowpost import Bijector, Chain, Inverse, Planar
from flowpost.numerics.products import plus, summed
from flowpost.testing import PROPERTIES, push
from flowpost.testing.cases import Case, ContractError

PARTS = [
    "affine",
    "affine_log_var",
    "scale",
    "unit_lower_triangular",
    "planar",
    "act_norm",
    "lu_linear_order",
    "householder",
    "convex_combination",
    "radial",
    "spline",
    "autoregressive_2_context",
    "autoregressive_order",
    "masked_affine_context",
    "coupling_affine_context",
    "permute",
    "reverse",
    "learned_planar",
    "conditioned_autoregressive",
    "inverse_planar",
    "inverse_radial",
    "inverse_autoregressive",
    "shared_planar",
]


class Recipe:
    """A `make` for a chain of named parts."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"Chain({', '.join(self.names)})"

    def __call__(self, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        parts = [BY_NAME[name].make(dim, seed + i) for i, name in enumerate(self.names)]
        return _push(Chain(*parts).to(dtype), push, seed)


_push = push
CHAINS = st.lists(st.sampled_from(PARTS), min_size=2, max_size=5).map(Recipe)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "log_det",
        "cancel",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("orientation", "sampling", "mass")),
    ],
)
@given(chain=CHAINS, dim=st.integers(1, 6), seed=st.integers(0, 2**20), amount=st.sampled_from([0.0, 0.3, 1.0]))
def test_random_chains(name: str, chain: Recipe, dim: int, seed: int, amount: float) -> None:
    """Quadrature up to dim 2; above, a right log-det, one orientation and an inverse imply the same."""
    if name == "mass":
        dim, amount = 1 + dim % 2, min(amount, 0.3)
    PROPERTIES[name](Case(chain, dim, 0, torch.float64, seed, amount, context_scale=0.3 if dim == 2 else 1.0))


@given(chain=CHAINS, dim=st.integers(1, 6), seed=st.integers(0, 2**20), amount=st.sampled_from([0.0, 0.3, 1.0]))
def test_log_dets_of_random_chains(chain: Recipe, dim: int, seed: int, amount: float) -> None:
    """B1 and B2 as they stand, with no allowance for what rounding the inputs does."""
    step, z, context = Case(chain, dim, 0, torch.float64, seed, amount, context_scale=0.3 if dim == 2 else 1.0).points(
        2
    )
    for function in (step, step.inverse):
        z = exact.judge(function, z, context, size(step))


def test_a_wrong_part_is_noticed() -> None:
    class Wrong(Planar):
        def _inverse(
            self, z: torch.Tensor, context: torch.Tensor | None, preimage: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            preimage, log_det = super()._inverse(z, context, preimage)
            return preimage, 0.9 * log_det

    def make(*, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        return _push(Chain(Planar(dim), Inverse(Wrong(dim)), Planar(dim)).to(dtype), push, seed)

    with pytest.raises(ContractError, match="error"):
        PROPERTIES["log_det"](Case(make, 2, 0, context_scale=3.0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", ["alike", "some wide", "numbers first", "numbers", "wide numbers", "samples"])
def test_log_dets_are_summed_in_float64(kind: str, count: int) -> None:
    """Of any axes and both dtypes, in any order: of equal large terms nothing is left."""
    half = [1e8 * torch.randn(5) for _ in range(count)]
    if kind == "some wide":
        half = [each.double() if i % 2 else each for i, each in enumerate(half)]
    if kind == "numbers first":
        half = [half[0][0], *half[1:]]
    if kind in ("numbers", "wide numbers"):
        half = [each[i % 5] for i, each in enumerate(half)]
    if kind == "wide numbers":
        half = [half[0].double(), torch.ones(5), *half[1:]]
    if kind == "samples":
        half = [each.expand(3, 5) if i % 2 else each for i, each in enumerate(half)]
    small = torch.full((5,), 1.5)
    terms = [*half, small, *(-each for each in half)]
    expected = sum((each.double() for each in terms), torch.zeros((), dtype=torch.float64))
    found = summed(terms)
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    running = None
    for term in terms:
        running = plus(running, term)
    torch.testing.assert_close(running, expected, rtol=0, atol=1e-6)
