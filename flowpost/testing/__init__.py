"""The contract as a test that anyone can run on a step of their own: `check_bijector`, `BijectorContract`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from flowpost.testing import claims, derivatives, inverses, maths, modules, tensors, transforms
from flowpost.testing.cases import PUSHES, Case, ContractError, Judge, Make, push

__all__ = ["PROPERTIES", "BijectorContract", "ContractError", "Judge", "Make", "check_bijector", "push"]

Property = Callable[[Case], float]

OFTEN: Mapping[str, Property] = {
    "log_det": maths.log_det,
    "orientation": maths.orientation,
    "structure": maths.structure,
    "claims": claims.claims,
    "sampling": maths.sampling,
    "mass": maths.mass,
    "composition": maths.composition,
    "round_trip": inverses.round_trip,
    "cancel": inverses.cancel,
    "preimage": inverses.preimage,
    "context_matters": derivatives.context_matters,
    "rows": tensors.rows,
}
"""Tried on every example."""

ONCE: Mapping[str, Property] = {
    "identity": maths.identity,
    "undone": inverses.undone,
    "preimage_derivatives": inverses.preimage_derivatives,
    "gradients": derivatives.gradients,
    "dependent": derivatives.dependent,
    "context_everywhere": derivatives.context_everywhere,
    "extremes": derivatives.extremes,
    "shapes": tensors.shapes,
    "strides": tensors.strides,
    "dtypes": tensors.dtypes,
    "autocast": tensors.autocast,
    "bad_input": tensors.bad_input,
    "purity": modules.purity,
    "state": modules.state,
    "rebuilt": modules.rebuilt,
    "averaged": modules.averaged,
    "unchanged": modules.unchanged,
    "layers": modules.layers,
    "transforms": transforms.transforms,
    "meta": transforms.meta,
    "passes": transforms.passes,
}
"""Slow, or the same for all parameters: tried once for each dim and dtype."""

COMPILED: Mapping[str, Property] = {"compiles": transforms.compiles, "batch_sizes": transforms.batch_sizes}
"""As slow as all others together: tried at the last dim."""

PROPERTIES: Mapping[str, Property] = {**OFTEN, **ONCE, **COMPILED}


def check_bijector(
    make: Make,
    *,
    context_size: int = 0,
    dims: Sequence[int] = (1, 2, 5),
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    examples: int = 9,
    skip: Sequence[str] = (),
    device: str = "cpu",
    judge: Judge | None = None,
) -> dict[str, float]:
    """Try a step against every property of the contract, at several sizes, dtypes, seeds and parameter scales.

    Args:
        make: ``make(dim, context_size, dtype, seed, push)`` builds the step, from `seed`, with its parameters moved by
            `push` (`flowpost.testing.push` does that).
        context_size: passed to `make`; a step may read another number of its own.
        dims: sizes to try.
        dtypes: float64 and float32, or one of them.
        examples: how many combinations of dim, push, seed and context scale for each dtype.
        skip: names of properties (keys of `PROPERTIES`) that do not apply.
        device: where to run.
        judge: ``judge(map, z, context)`` gives sign and log of ``|det|`` of a map's Jacobian in every row, without
            rounding. With one the log-det is held to its bound as it stands; without, what autodiff rounds is allowed.

    Returns:
        For every property the largest error seen, 0 where it has none to measure. For ``"meta"`` it is no error, but
        how many operations a call and its gradient dispatch.

    Raises:
        ContractError: at the first property that fails, naming it and the case.
        ValueError: for an unknown name in `skip`, or for no dim, dtype or example to try.

    Example:
        >>> make = lambda dim, context_size, dtype, seed, push: flowpost.testing.push(
        ...     Learned(Planar(dim)).to(dtype), push, seed
        ... )
        >>> worst = flowpost.testing.check_bijector(make, dims=(2,), examples=3, skip=["compiles"])
        >>> worst["log_det"] < 1e-3
        True
    """
    unknown = set(skip) - set(PROPERTIES)
    if unknown:
        raise ValueError(f"skip: expected names among {', '.join(PROPERTIES)}, got {', '.join(sorted(unknown))}")
    for argument, given in {"dims": dims, "dtypes": dtypes, "examples": range(examples)}.items():
        if not given:  # nothing would be tried, and nothing fail
            raise ValueError(f"{argument}: expected at least one, got none")
    worst = dict.fromkeys((name for name in PROPERTIES if name not in skip), 0.0)
    for name in worst:
        for dtype in dtypes:
            for case in cases(name, make, context_size, dims, dtype, examples, device, judge):
                worst[name] = max(worst[name], _try(name, case))
    return worst


def cases(
    name: str,
    make: Make,
    context_size: int,
    dims: Sequence[int],
    dtype: torch.dtype,
    examples: int,
    device: str = "cpu",
    judge: Judge | None = None,
) -> list[Case]:
    """The conditions under which a property is tried: every push and context scale meets every dim in turn."""
    if name not in OFTEN:
        some = dims[-1:] if name in COMPILED else dims
        return [Case(make, dim, context_size, dtype, seed, device=device, judge=judge) for seed, dim in enumerate(some)]
    scales = (0.3, 1.0, 3.0)
    return [
        Case(
            make,
            dims[i % len(dims)],
            context_size,
            dtype,
            seed=i,
            push=PUSHES[i // len(dims) % len(PUSHES)],
            context_scale=scales[(i + i // len(dims)) % len(scales)],
            device=device,
            judge=judge,
        )
        for i in range(examples)
    ]


def _try(name: str, case: Case) -> float:
    try:
        return PROPERTIES[name](case)
    except ContractError as error:
        raise ContractError(f"{name}: {error}") from None
    except Exception as error:
        raise ContractError(f"{name}: raised {type(error).__name__}: {error} ({case})") from error


class BijectorContract:
    """The contract as a pytest class, one test a property: subclass it, give `make`, and name the class ``Test...``.

    Example:
        >>> class TestPlanar(flowpost.testing.BijectorContract):
        ...     def make(self, dim, context_size, dtype, seed, push):
        ...         return flowpost.testing.push(Planar(dim).to(dtype), push, seed)
    """

    context_size = 0
    dims: Sequence[int] = (1, 2, 5)
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32)
    examples = 9
    skip: Sequence[str] = ()
    device = "cpu"
    judge: Judge | None = None

    def make(self, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float):  # noqa: ANN201, D102
        raise NotImplementedError("BijectorContract: give the class a `make` that builds the step")


def _add_test(name: str) -> None:
    def test(self: BijectorContract) -> None:
        sizes = (self.make, self.context_size, self.dims)
        for dtype in self.dtypes if name not in self.skip else ():
            for case in cases(name, *sizes, dtype, self.examples, self.device, type(self).judge):
                _try(name, case)

    test.__doc__ = PROPERTIES[name].__doc__
    setattr(BijectorContract, f"test_{name}", test)


for _name in PROPERTIES:
    _add_test(_name)
