"""Whether a module that is asked again is the function that it was before."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def refuse_random(name: str, module: nn.Module, cure: str, *, of_rows: bool = False) -> None:
    """Raise where a part in train mode is another function at each call, as dropout is.

    Spectral norm is one too, but so nearly the same, once its vectors have turned, that nothing is lost by it.

    Args:
        name: of the module.
        module: what is asked again.
        cure: what to do instead.
        of_rows: whether it has to be a function of each row by itself, which batch norm is not.
    """
    found = _found(module, _why_of_rows if of_rows else _why)
    if found is not None:
        part, why = found
        raise ValueError(
            f"{name}: expected the same function again for the path gradient, got {type(part).__name__} in train mode, "
            f"which {why}; {cure}"
        )


def _found(module: nn.Module, why: Callable[[nn.Module], str]) -> tuple[nn.Module, str] | None:
    if reason := why(module):
        return module, reason
    for child in module._modules.values():
        found = None if child is None else _found(child, why)
        if found is not None:
            return found
    return None


def _why_of_rows(part: nn.Module) -> str:
    if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
        return "mixes the rows"
    return _why(part)


def _why(part: nn.Module) -> str:
    return "draws anew" if part.training and _draws(part) else ""


def _draws(part: nn.Module) -> bool:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    if isinstance(part, nn.RReLU):
        return part.lower < part.upper
    own = part.__dict__
    shares = [own[share] for share in ("dropout", "drop_prob") if share in own]  # as of nn.LSTM
    return any(isinstance(share, float) and share > 0 for share in shares)
