"""Where autocast is to be off, on devices that have it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(value: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `value`; the meta device has none to turn off."""
    if value.device.type == "meta":
        return nullcontext()
    return torch.autocast(value.device.type, enabled=False)
