"""Value checks, off by default because they wait for the device: ``with flowpost.checking(): ...``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ACTIVE: ContextVar[bool] = ContextVar("flowpost_checking", default=False)


class NonFiniteError(ValueError):
    """A value that must be finite is not, under `checking`."""


class DomainError(ValueError):
    """A value lies where a bijector or its inverse is not defined, under `checking`."""


class InversionError(ArithmeticError):
    """An inverse does not map back to what it inverted, under `checking`."""


class IllConditionedWarning(UserWarning):
    """A log-density moves visibly when its point moves by a few roundings, under `checking`."""


@contextmanager
def checking() -> Iterator[None]:
    """Turn value checks on within a ``with`` block, in this thread or task.

    Code under `torch.compile` and under ``torch.func``, whose values nobody can read, ignores it.

    Inputs are checked for nan and inf, and that they lie where the map is defined; each inverse by mapping back; each
    ``log_prob`` by moving z a few roundings; the sample of a ``path_log_prob`` by drawing it again.

    Raises:
        NonFiniteError: inside the block, for rows of z, context or h that are not finite.
        ValueError: inside the block, for a ``path_log_prob`` of a sample that is not this posterior's at this h.
        DomainError: inside the block, for rows of z outside the domain of a bijector, or of an inverse.
        InversionError: inside the block, for an inverse that is not accurate.

    Example:
        >>> with flowpost.checking():
        ...     z, log_q, _ = flowpost.diagonal(3, dim=2)(torch.randn(5, 3))
    """
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> bool:
    """Whether value checks are on here; never while compiling, where a host read would break the graph, or in vmap."""
    return not torch.compiler.is_compiling() and _ACTIVE.get() and not torch._C._are_functorch_transforms_active()


def check_finite(name: str, value: Tensor | None, hint: str = "") -> None:
    """Raise `NonFiniteError` naming the rows and the first feature that is not finite."""
    if value is None or bool((finite := value.isfinite()).all()):
        return
    raise NonFiniteError(f"{name}: {_counted(value, ~finite, 'are not finite')}{hint}")


def check_inside(name: str, value: Tensor, interval: tuple[float, float]) -> None:
    """Raise `DomainError` naming the rows and the first feature that lie outside an open interval."""
    low, high = interval
    _refuse(name, value, (value <= low) | (value >= high), f"numbers between {low} and {high}")


def check_values(name: str, value: Tensor, low: int, high: int, *, whole: bool) -> None:
    """Raise `DomainError` naming the rows and the first feature that are not from `low` to `high`, or not whole."""
    bad = ~((value >= low) & (value <= high))
    if whole and value.is_floating_point():
        bad = bad | (value != value.round())
    _refuse(name, value, bad, f"{'whole ' if whole else ''}numbers from {low} to {high}")


def _refuse(name: str, value: Tensor, bad: Tensor, expected: str) -> None:
    if bool(bad.any()):
        raise DomainError(f"{name}: expected {expected}, got {_counted(value, bad, 'outside')}")


def _counted(value: Tensor, bad: Tensor, what: str) -> str:
    """How many rows have a bad feature, and the first such feature."""
    rows, bad = value.detach().reshape(-1, value.shape[-1]), bad.reshape(-1, value.shape[-1])
    row, feature = (int(i) for i in bad.nonzero()[0])
    first = f"(first: row {row}, feature {feature} = {rows[row, feature].item()})"
    return f"{int(bad.any(-1).sum())} of {len(rows)} rows {what} {first}"


def check_residual(residual: Tensor, bound: Tensor, log_det: Tensor) -> None:
    """Raise `InversionError` where the residual of an inverse, ``(*batch, dim)``, exceeds its bound."""
    bad = ~(residual <= bound).all(-1)
    if not bool(bad.any()):
        return
    worst = residual[bad].nan_to_num(nan=torch.inf)
    place = int((worst / bound[bad]).nan_to_num(nan=torch.inf).flatten().argmax())
    dtype = str(residual.dtype).removeprefix("torch.")
    raise InversionError(
        f"inverse: residual {worst.flatten()[place].item():.2g} > {bound[bad].flatten()[place].item():.2g} in "
        f"{int(bad.sum())} of {bad.numel()} rows; the flow is too ill-conditioned for {dtype} here "
        f"(worst scale product {torch.exp(-log_det.double().abs().max()).item():.0e})"
    )


def check_own(z: Tensor, again: Tensor) -> None:
    """Raise where a flow does not make a sample's z, ``(*batch, dim)``, of its noise."""
    off = (again - z).abs() / (1 + z.abs())
    bad = (off > torch.finfo(z.dtype).eps ** 0.5).any(-1)
    if bool(bad.any()):
        raise ValueError(
            f"sample: expected one that this posterior drew for this h, got {int(bad.sum())} of {bad.numel()} rows "
            f"whose noise it maps elsewhere; give the features, parameters and mode that it was drawn with"
        )


def warn_moved(log_prob: Tensor, moved: list[Tensor]) -> None:
    """Warn `IllConditionedWarning` where log q moves by over 1 % (of itself, or of a nat) under a few roundings."""
    change = torch.stack([(other - log_prob).abs() for other in moved]).amax(0).nan_to_num(nan=torch.inf)
    bad = change > 0.01 * (1 + log_prob.abs())
    if bool(bad.any()):
        warnings.warn(
            f"log_prob: moves by {change.max().item():.2g} nats when z moves by 4 ulp in {int(bad.sum())} of "
            f"{bad.numel()} rows; use the log q returned by sample()",
            IllConditionedWarning,
            stacklevel=3,
        )
