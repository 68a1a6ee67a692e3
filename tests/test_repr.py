"""What a module prints tells two different steps apart."""

from collections.abc import Callable

import pytest
import torch
from registry import ENTRIES

from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    ConvexCombination,
    Coupling,
    DeepSigmoid,
    LULinear,
    Masked,
    Permute,
    Scale,
    Spline,
    Sylvester,
)
from flowpost.numerics.scales import exp_scale

PAIRS: dict[str, tuple[Callable[[], Bijector], Callable[[], Bijector]]] = {
    "affine": (lambda: Affine(3), lambda: Affine(3, exp_scale)),
    "scale": (lambda: Scale(3, 2.0), lambda: Scale(3, 2.001)),
    "spline": (lambda: Spline(3), lambda: Spline(3, bound=4.0)),
    "spline bins": (lambda: Spline(2, bins=7), lambda: Spline(2, bins=8)),
    "deep sigmoid": (lambda: DeepSigmoid(3, 4, 2), lambda: DeepSigmoid(3, 8, 1)),
    "convex": (lambda: ConvexCombination(3, 1), lambda: ConvexCombination(3, 2)),
    "sylvester": (lambda: Sylvester(3, 1), lambda: Sylvester(3, 1, 2)),
    "permute": (lambda: Permute([0, 1, 2]), lambda: Permute([0, 2, 1])),
    "lu": (lambda: LULinear(3), lambda: LULinear(3, [0, 1, 2])),
    "coupling": (lambda: Coupling(3, Affine(1)), lambda: Coupling(3, Affine(1), order=[0, 2, 1])),
    "coupling activation": (lambda: Coupling(3, Affine(1)), lambda: Coupling(3, Affine(1), activation=torch.tanh)),
    "autoregressive": (lambda: Autoregressive(3), lambda: Autoregressive(3, order=[2, 1, 0])),
    "gate": (lambda: Autoregressive(3), lambda: Autoregressive(3, gain=1.1)),
    "gate activation": (lambda: Autoregressive(3), lambda: Autoregressive(3, activation=torch.tanh)),
    "masked rate": (lambda: Masked(Affine(3)), lambda: Masked(Affine(3), rate=0.5)),
    "coupling rate": (lambda: Coupling(3, Affine(1)), lambda: Coupling(3, Affine(1), rate=0.5)),
    "masked": (lambda: Masked(Affine(3)), lambda: Masked(Affine(3, exp_scale))),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_two_steps_never_print_alike(pair: tuple[Callable[[], Bijector], Callable[[], Bijector]]) -> None:
    one, other = (make() for make in pair)
    assert repr(one) != repr(other)
    assert repr(one) == repr(pair[0]())


def test_every_entry_prints_its_own() -> None:
    printed = [repr(entry.make(4, 0)) for entry in ENTRIES]
    assert len({*printed}) == len(printed)


def test_what_is_elementwise_moves_every_variable_by_itself() -> None:
    """Also where a step reads no context."""
    found = [step for step in (entry.make(3, 0) for entry in ENTRIES) if step.elementwise]
    assert {type(step).__name__ for step in found} >= {"Sigmoid", "Softplus", "Tanh", "Scale", "ActNorm", "Inverse"}
    for step in found:
        assert step.causal_order() is not None
        context = step.initial_context() + 0.3 if step.context_size else None
        matrix = torch.autograd.functional.jacobian(lambda z: step(z, context)[0], torch.full((3,), 0.4))  # noqa: B023
        assert torch.equal(matrix, matrix.diagonal().diag())
