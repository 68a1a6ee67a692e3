"""Whether a module that is asked again is the function that it was before."""

from __future__ import annotations

from torch import nn


def refuse_random(name: str, module: nn.Module, cure: str) -> None:
    """Raise where a part in train mode draws anew at each call, as dropout does: asked again it is another function."""
    part = _drawing(module)
    if part is not None:
        raise ValueError(
            f"{name}: expected the same function again for the path gradient, got {type(part).__name__} in train mode, "
            f"which draws anew; {cure}"
        )


def _drawing(module: nn.Module) -> nn.Module | None:
    if module.training and _draws(module):
        return module
    for child in module._modules.values():
        found = None if child is None else _drawing(child)
        if found is not None:
            return found
    return None


def _draws(part: nn.Module) -> bool:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    if isinstance(part, nn.RReLU):
        return part.lower < part.upper
    own = part.__dict__
    shares = [own[share] for share in ("dropout", "drop_prob") if share in own]  # as of nn.LSTM
    return any(isinstance(share, float) and share > 0 for share in shares)
