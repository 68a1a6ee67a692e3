"""In which dtype a log joint is best called."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpost.variational.calling import LogJoint, find, trial
from flowpost.variational.parameters import Parameters


def precision(log_joint: LogJoint, parameters: Parameters, device: torch.device | str) -> torch.dtype:
    """The dtype in which a log joint is best called: float64 where it can be, and on a GPU where it has to be.

    On a CPU float64, unless the log joint refuses it or answers in float32, as one with float32 data in a matrix
    product does. On a GPU, where float64 is slow, float32, unless a value at some random draws is off by over 1e-3
    nats, or not finite though it is in float64.

    Args:
        log_joint: as `Target` has it.
        parameters: what it is a function of.
        device: where it will be called.

    Returns:
        ``torch.float64`` or ``torch.float32``.

    Example:
        >>> data = torch.ones(5, 2)
        >>> precision(lambda theta: -(data @ theta).square().sum(), Parameters(2), "cpu")
        torch.float32
    """
    wide = _values(log_joint, parameters, device, torch.float64)
    if wide is None:
        return torch.float32
    if not _slow_in_float64(device):
        return torch.float64
    narrow = _values(log_joint, parameters, device, torch.float32)
    if narrow is None:
        return torch.float64
    near = (narrow.double() - wide).abs() <= 1e-3
    return torch.float32 if (near | ~wide.isfinite()).all() else torch.float64


def _slow_in_float64(device: torch.device | str) -> bool:
    return torch.device(device).type != "cpu"


def _values(
    log_joint: LogJoint, parameters: Parameters, device: torch.device | str, dtype: torch.dtype
) -> Tensor | None:
    """The log joint of a trial's draws; None where it does not take the dtype, or answers in a narrower one."""
    try:
        free = trial(parameters, device, dtype)
        values = find(log_joint, parameters, free).values
    except (RuntimeError, TypeError, ValueError):
        return None
    return values if values.dtype == dtype else None
