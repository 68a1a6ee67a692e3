"""Every family and wrapper by name: adding a bijector to all contract tests is adding a line to `ENTRIES`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from flowpost import (
    ActNorm,
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Conditioned,
    ConvexCombination,
    Coupling,
    DeepSigmoid,
    Householder,
    Inverse,
    Learned,
    LULinear,
    Masked,
    Permute,
    Planar,
    Radial,
    Reverse,
    Scale,
    Scaling,
    Shared,
    Shift,
    Sigmoid,
    Softplus,
    Spline,
    Sylvester,
    Tanh,
    UnitLowerTriangular,
)
from flowpost.bijectors.base import LINE
from flowpost.bijectors.gate import Gate
from flowpost.functional import exp_scale, log_var_scale
from flowpost.recipes import householder
from flowpost.testing.cases import place, reseed

SCALES = (0.03, 1.0, 3.0)
"""Every parameter tensor is moved by a scale of its own: with one common scale some bugs cancel."""


class Entry(NamedTuple):
    """A named constructor."""

    name: str
    build: Callable[[int], Bijector]
    """From dim to a step."""
    identity: bool = False
    """Whether the step is the identity at its `initial_context`."""
    local: bool = False
    """Whether a number of the context may act on some points alone."""

    def make(self, dim: int, seed: int) -> Bijector:
        """A fresh step; the same seed gives the same step, and the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            reseed(seed)
            return self.build(dim)


def _order(dim: int) -> list[int]:
    return random.Random(torch.initial_seed()).sample(range(dim), dim)  # real also under `torch.device("meta")`


def _half(dim: int) -> int:
    """How many variables a coupling moves."""
    return dim - dim // 2


def _ar(dim: int, context_size: int = 0, hidden: Sequence[int] = (12,), **options: object) -> Autoregressive:
    return Autoregressive(dim, context_size, hidden, **options)  # pyright: ignore[reportArgumentType]


OPEN = 1 + math.exp(-2.0)
"""The gain with which a gate of forget bias 2 starts as the identity."""
ENTRIES = [
    Entry("affine", Affine, identity=True),
    Entry("affine_log_var", lambda dim: Affine(dim, log_var_scale), identity=True),
    Entry("shift", Shift, identity=True),
    Entry("scaling", Scaling, identity=True),
    Entry("scaling_log_var", lambda dim: Scaling(dim, log_var_scale), identity=True),
    Entry("scale", lambda dim: Scale(dim, 0.3)),
    Entry("unit_lower_triangular", UnitLowerTriangular, identity=True),
    Entry("unit_lower_triangular_rate", lambda dim: UnitLowerTriangular(dim, 0.4), identity=True),
    Entry("planar", Planar, identity=True),
    Entry("radial", Radial, identity=True),
    Entry("convex_combination", lambda dim: ConvexCombination(dim, 2), identity=True),
    Entry("convex_combination_rate", lambda dim: ConvexCombination(dim, 2, 0.4), identity=True),
    Entry("householder", Householder),
    Entry("lu_linear", LULinear, identity=True),
    Entry("lu_linear_order", lambda dim: LULinear(dim, _order(dim))),
    Entry("act_norm", ActNorm, identity=True),
    Entry("sigmoid", Sigmoid),
    Entry("softplus", Softplus),
    Entry("tanh", Tanh),
    Entry("deep_sigmoid", lambda dim: DeepSigmoid(dim, units=3), identity=True, local=True),
    Entry("spline", lambda dim: Spline(dim, bins=4), identity=True, local=True),
    Entry("gate", lambda dim: Gate(dim, 1.0)),
    Entry("gate_gain", lambda dim: Gate(dim, gain=OPEN), identity=True),
    Entry("sylvester_orthogonal", lambda dim: Sylvester(dim, (dim + 1) // 2), identity=True),
    Entry("sylvester_householder", lambda dim: Sylvester(dim, dim, 2), identity=True),
    Entry("sylvester_triangular", lambda dim: Sylvester(dim, dim, 0), identity=True),
    Entry("learned_sylvester", lambda dim: Learned(Sylvester(dim)), identity=True),
    Entry("autoregressive_linear", lambda dim: _ar(dim, 0, ())),
    Entry("autoregressive_linear_context", lambda dim: _ar(dim, 3, ())),
    Entry("autoregressive_1", lambda dim: _ar(dim)),
    Entry("autoregressive_2_context", lambda dim: _ar(dim, 5, (8, 12))),
    Entry("autoregressive_3_relu", lambda dim: _ar(dim, 0, (8, 8, 8), activation=F.relu)),
    Entry("autoregressive_relu_context", lambda dim: _ar(dim, 4, (16,), activation=F.relu, forget_bias=1.0)),
    Entry("autoregressive_order", lambda dim: _ar(dim, 2, (8,), order=_order(dim))),
    Entry("autoregressive_narrow", lambda dim: _ar(dim, 2, (2,))),
    Entry("autoregressive_gain", lambda dim: _ar(dim, 2, (8,), gain=OPEN), identity=True),
    # 300 units, 2 and more blocks in MaskedLinear.
    Entry("autoregressive_wide", lambda dim: _ar(dim, 3, (300, 260))),
    Entry("masked_affine", lambda dim: Masked(Affine(dim, exp_scale), 0, (8,)), identity=True),
    Entry("masked_affine_rate", lambda dim: Masked(Affine(dim, exp_scale), 2, (8,), rate=0.3), identity=True),
    Entry(
        "masked_affine_context",
        lambda dim: Masked(Affine(dim), 3, (8, 8), order=_order(dim), activation=torch.tanh),
        identity=True,
    ),
    Entry("masked_spline", lambda dim: Masked(Spline(dim, bins=3), 2, (8,)), identity=True),
    Entry("masked_deep_sigmoid", lambda dim: Masked(DeepSigmoid(dim, units=2), 2, (8,)), identity=True),
    Entry("masked_shift", lambda dim: Masked(Inverse(Shift(dim)), 2, ()), identity=True),
    Entry("coupling_shift", lambda dim: Coupling(dim, Shift(_half(dim)), 0, (8,)), identity=True),
    Entry(
        "coupling_affine_context",
        lambda dim: Coupling(dim, Affine(_half(dim), exp_scale), 3, (8, 8), order=_order(dim), activation=F.relu),
        identity=True,
    ),
    Entry(
        "coupling_any_step_and_network",
        lambda dim: Coupling(
            dim, Planar(_half(dim)), 2, network=lambda n, m: nn.Sequential(nn.Linear(n, 6), nn.Tanh(), nn.Linear(6, m))
        ),
        identity=True,
    ),
    Entry(
        "coupling_spline",
        lambda dim: Coupling(dim, Spline(dim - dim // 2, bins=3), 2, (8,), rate=0.3),
        identity=True,
    ),
    Entry("reverse", Reverse, identity=False),
    Entry("permute", lambda dim: Permute(_order(dim))),
    Entry("learned_affine", lambda dim: Learned(Affine(dim)), identity=True),
    Entry("learned_planar", lambda dim: Learned(Planar(dim)), identity=True),
    Entry("learned_radial", lambda dim: Learned(Radial(dim)), identity=True),
    Entry("learned_deep_sigmoid", lambda dim: Learned(DeepSigmoid(dim, units=2, layers=2)), identity=True),
    Entry("learned_spline", lambda dim: Learned(Spline(dim, bins=3, bound=5)), identity=True),
    Entry("learned_full_covariance", lambda dim: Learned(Chain(UnitLowerTriangular(dim), Affine(dim))), identity=True),
    Entry("learned_autoregressive", lambda dim: Learned(_ar(dim, 3, (8,)))),
    Entry("conditioned_planar", lambda dim: Conditioned(Planar(dim), 3)),
    Entry("conditioned_autoregressive", lambda dim: Conditioned(_ar(dim, 2, (8,)), 3)),
    Entry("inverse_affine", lambda dim: Inverse(Affine(dim)), identity=True),
    Entry("inverse_unit_lower_triangular", lambda dim: Inverse(UnitLowerTriangular(dim)), identity=True),
    Entry("inverse_planar", lambda dim: Inverse(Planar(dim)), identity=True),
    Entry("inverse_radial", lambda dim: Inverse(Radial(dim)), identity=True),
    Entry("inverse_convex_combination", lambda dim: Inverse(ConvexCombination(dim, 2)), identity=True),
    Entry("inverse_lu_linear", lambda dim: Inverse(LULinear(dim)), identity=True),
    Entry("inverse_act_norm", lambda dim: Inverse(ActNorm(dim)), identity=True),
    Entry("inverse_sigmoid", lambda dim: Inverse(Sigmoid(dim))),
    Entry("inverse_deep_sigmoid", lambda dim: Inverse(DeepSigmoid(dim, units=2)), identity=True),
    Entry("inverse_spline", lambda dim: Inverse(Spline(dim, bins=3)), identity=True, local=True),
    Entry("inverse_sylvester", lambda dim: Inverse(Sylvester(dim)), identity=True),
    Entry("inverse_autoregressive", lambda dim: Inverse(_ar(dim, 2, (8,)))),
    Entry("inverse_autoregressive_order", lambda dim: Inverse(_ar(dim, 0, (8,), order=_order(dim)))),
    Entry(
        "inverse_masked_affine", lambda dim: Inverse(Masked(Inverse(Affine(dim, exp_scale)), 2, (8,))), identity=True
    ),
    Entry("inverse_learned_planar", lambda dim: Inverse(Learned(Planar(dim))), identity=True),
    Entry("full_covariance", lambda dim: Chain(UnitLowerTriangular(dim), Affine(dim)), identity=True),
    Entry("planar_flow", lambda dim: Chain(Affine(dim), *(Planar(dim) for _ in range(4))), identity=True),
    Entry("radial_flow", lambda dim: Chain(Affine(dim), *(Radial(dim) for _ in range(3))), identity=True),
    Entry("cc_lin_iaf", lambda dim: Chain(Affine(dim), ConvexCombination(dim, 3)), identity=True),
    Entry("householder_flow", lambda dim: cast(Learned, householder(0, dim, steps=2).flow).step, identity=True),
    Entry("positive_flow", lambda dim: Chain(Affine(dim), Radial(dim), Softplus(dim))),
    Entry("sylvester_flow", lambda dim: Chain(Affine(dim), Sylvester(dim, 1), Reverse(dim), Sylvester(dim, dim, 0))),
    Entry("iaf", lambda dim: Chain(Affine(dim), Shared(_ar(dim, 3), Reverse(dim), _ar(dim, 3)))),
    Entry(
        "autoregressive_run",
        lambda dim: Shared(_ar(dim, 3, (8,)), _ar(dim, 3, (6, 6), order=range(dim)[::-1]), _ar(dim, 3, ())),
    ),
    Entry("maf", lambda dim: Chain(Inverse(_ar(dim, 2)), Permute(_order(dim)), Inverse(_ar(dim, 2)))),
    Entry("shared_planar", lambda dim: Shared(Planar(dim), Reverse(dim), Planar(dim))),
    Entry("shared_without_context", lambda dim: Shared(Reverse(dim), Scale(dim, 2.0), _ar(dim))),
    Entry(
        "shared_conditioned",
        lambda dim: Shared(Conditioned(Planar(dim), 3), _ar(dim, 3, (6,)), Conditioned(Affine(dim), 3)),
    ),
    Entry(
        "nested",
        lambda dim: Chain(
            Chain(Reverse(dim), Planar(dim)),
            Inverse(Chain(Learned(Planar(dim)), UnitLowerTriangular(dim), Affine(dim))),
            Chain(Permute(_order(dim))),
            Shared(_ar(dim, 2, (6,)), Chain(Reverse(dim), Conditioned(Affine(dim), 2))),
        ),
    ),
    Entry("inverse_nested", lambda dim: Inverse(Chain(Inverse(Planar(dim)), Shared(_ar(dim, 2), Reverse(dim))))),
]
CORE = {
    *("affine", "shift", "scale", "unit_lower_triangular", "planar", "radial", "convex_combination", "householder"),
    *("lu_linear_order", "act_norm", "sigmoid", "softplus", "tanh", "deep_sigmoid", "spline", "gate_gain"),
    *("sylvester_orthogonal", "autoregressive_2_context", "autoregressive_order", "masked_affine_context"),
    *("coupling_affine_context", "reverse", "permute", "learned_planar", "learned_full_covariance"),
    *("conditioned_planar", "inverse_autoregressive", "full_covariance", "iaf", "maf"),
}
"""One entry a family and a wrapper, by name: what is tried of them alone is slow, or the same for all of a kind."""
BY_NAME = {entry.name: entry for entry in ENTRIES}


def by_level(entries: Sequence[Entry], early: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """A parametrization by entries: those of `CORE` are marked as `early`, the others as `long`."""
    marks = [early if entry.name in CORE else pytest.mark.long for entry in entries]
    each = [pytest.param(entry, marks=mark, id=entry.name) for entry, mark in zip(entries, marks, strict=True)]
    return pytest.mark.parametrize("entry", each)


core_first = pytest.mark.parametrize(
    "entry", [pytest.param(each, marks=[] if each.name in CORE else pytest.mark.full, id=each.name) for each in ENTRIES]
)
"""Every entry: those of `CORE` in the quick run, the others in the full one."""


class Case(NamedTuple):
    """Where in the parameters' and inputs' space an entry is tested."""

    dim: int = 3
    seed: int = 0
    push: float = 0.3
    """How far the parameters are from their initialization."""
    spread: float = 1.0
    """Scale of the points."""
    context: float = 1.0
    """Scale of the context around its initial value."""


def cases(**fixed: float) -> st.SearchStrategy[Case]:
    """Cases for Hypothesis, with the fields in `fixed` held."""
    free = {
        "dim": st.integers(1, 6),
        "seed": st.integers(0, 2**20),
        "push": st.sampled_from([0.0, 0.3, 1.0]),
        "spread": st.sampled_from([0.1, 1.0, 3.0, 8.0]),
        "context": st.sampled_from([0.1, 1.0, 3.0]),
    }
    return st.builds(Case, **{name: st.just(fixed[name]) if name in fixed else free[name] for name in free})


def draw(
    entry: Entry, case: Case, *, dtype: torch.dtype = torch.float64, batch: Sequence[int] = (5,)
) -> tuple[Bijector, Tensor, Tensor | None]:
    """A pushed step, points and contexts for it, all of `dtype`, drawn in float64.

    The points lie in the step's domain, and where its codomain has an end, no image rounds to it.
    """
    step = push(entry.make(case.dim, case.seed).double(), case)
    generator = torch.Generator().manual_seed(case.seed + 1)
    z = place(case.spread * torch.randn(*batch, case.dim, dtype=torch.float64, generator=generator), step.domain)
    context = None
    if step.context_size:
        noise = torch.randn(*batch, step.context_size, dtype=torch.float64, generator=generator)
        context = (step.initial_context() + case.context * noise).to(dtype)
    if step.codomain != LINE:
        z = step.inverse(place(z, step.codomain), context)[0].detach()
    return step.to(dtype), z.to(dtype), context


def carry(step: Bijector, z: Tensor) -> Tensor:
    """Points of a step's domain carried, by order alone, to its codomain: those themselves where the two are one."""
    if step.codomain == step.domain:
        return z
    return place(z if step.domain == LINE else torch.logit(z), step.codomain)


def backward(step: Bijector) -> Callable[..., tuple[Tensor, Tensor]]:
    """The inverse, for points of the domain, which it carries to the codomain first."""
    if step.codomain == step.domain:
        return step.inverse
    return lambda z, context=None, **known: step.inverse(carry(step, z), context, **known)


def push(step: Bijector, case: Case) -> Bijector:
    """Move every parameter tensor by a random scale of its own."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    for parameter in step.parameters():
        index = int(torch.randint(len(SCALES), (), generator=generator))
        move = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data.add_(case.push * SCALES[index] * move)
    return step


def size(step: Bijector) -> int:
    """RELIABILITY 5a's N: dim times the number of steps, plus 16."""
    return step.dim * sum(1 for _ in step.leaves()) + 16


def jacobian(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Rows ``d outputs_i / d inputs`` for each of a batch of independent examples, by plain reverse mode."""
    rows = [torch.autograd.grad(outputs[..., i].sum(), inputs, retain_graph=True)[0] for i in range(outputs.shape[-1])]
    return torch.stack(rows, dim=-2)
