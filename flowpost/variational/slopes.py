"""Whether a log joint's gradient is that of its values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowpost.variational.draws import described
from flowpost.variational.parameters import Parameters

APART, ENOUGH = {1e-4: 1e-6, 1e-7: 1e-13, 0.1: 1e-3}, 4
"""How far apart values are whose difference is compared with a slope, and what part of a value may be undecided: as a
solver of differential equations leaves it, and rounding. At how many draws it must be another."""


@torch.no_grad()
def astray(
    density: Callable[[Tensor], Tensor], parameters: Parameters, free: Tensor, value: Tensor, slope: Tensor
) -> str:
    """Along which parameter slopes differ from differences of values at every draw, as where a part is detached.

    They differ by over a tenth at three distances: at the larger ones also where values swing between, at the smallest
    one where they are rough, and at all but the largest where float32 data round the parameters, as years do a mean
    near 0 to which 2000 is added. In float32 no difference says as much.

    Args:
        density: of coordinates ``(S, dim)``, in float64.
        parameters: whose coordinates these are.
        free: draws.
        value: theirs, ``(S,)``.
        slope: its gradient, ``(S, dim)``.

    Returns:
        Where, with both numbers; empty where none differs.
    """
    columns = parameters.columns
    steps = torch.zeros(len(columns), free.shape[-1], dtype=free.dtype, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    for step, own in zip(steps, columns.values(), strict=True):
        step[own] = torch.randn(step[own].shape, generator=generator, dtype=step.dtype, device="cpu")
    steps = (steps / steps.norm(dim=-1, keepdim=True).clamp_min(1e-300)).to(free.device)
    found = steps @ slope.mT  # (parameters, S)
    known, off, dues = found.isfinite(), torch.ones_like(found, dtype=torch.bool), []
    for apart, undecided in APART.items():
        moved = apart * torch.stack([steps, -steps]).unsqueeze(2)  # (2, parameters, 1, dim)
        ahead, behind = density((free + moved).flatten(0, 2)).unflatten(0, (2, len(columns), -1))
        due = (ahead - behind) / (2 * apart)
        dues.append(due)
        known = known & due.isfinite()
        size = torch.maximum(due.abs(), found.abs())
        off = off & ((due - found).abs() > 0.1 * size + 0.01 + undecided / apart * value.abs())
        differ = (off | ~known).all(-1) & (known.sum(-1) >= ENOUGH)
        if not differ.any():
            return ""
    which = int(differ.int().argmax())
    row = int(known[which].int().argmax())
    found, due = (each[which, row].item() for each in (found, dues[1]))
    return (
        f"along {[*columns][which]} it is {found:.4g}, and a difference of values {due:.4g}, at "
        f"{described(parameters.constrain(free[row])[0])}, and another at every draw"
    )
