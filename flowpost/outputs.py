"""What encoders return, as the features of a posterior: a tensor, the pair (loc, log_var), or a diagonal Gaussian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from flowpost.checks import active
from flowpost.numerics.arguments import FLOATS

Read = Callable[[Any], object]
"""From what an encoder returns to features, to a pair or to a Gaussian."""
_OF_STATES = "pass read=lambda out: {} for one z a sequence, or read=lambda out: out[0] for one z a step"
_MANY = 16
"""Numbers that are all positive by chance once in 65,536 times, if each is by half a chance."""


class Reading(NamedTuple):
    """From what an encoder returns to the features of a posterior, as `wrap` has found it."""

    read: Read | None
    pair: bool
    dim: int

    def __call__(self, out: object) -> Tensor:
        """The features; a pair ``(loc, log_var)`` side by side."""
        out = out if self.read is None else self.read(out)
        parts = as_features(out)
        if active():
            check_diagonal(out)
        if not self.pair:
            if not isinstance(parts, Tensor):
                raise TypeError(f"encoder: expected a tensor, got {kind(out)}; pass wrap an example= of its input")
            return parts
        if not isinstance(parts, tuple):
            raise TypeError(f"encoder: expected the pair (loc, log_var), as for the example, got {kind(out)}")
        return joined(parts, self.dim)


def as_features(out: object) -> Tensor | tuple[Tensor, Tensor] | None:
    """A tensor as it is, ``(loc, log_var)`` of a pair or a Gaussian; None for anything else.

    Raises:
        TypeError: for a Gaussian whose variables are correlated by what it is, or no vector.
    """
    if isinstance(out, Tensor):
        return out if out.ndim else None
    if isinstance(out, Distribution):
        return _of_gaussian(out)
    return (out[0], out[1]) if _is_pair(out) else None


def _of_gaussian(out: Distribution) -> tuple[Tensor, Tensor]:
    """The pair of a diagonal Gaussian, whose scale leaves no doubt."""
    # In half precision a logarithm of -8 is off by up to 0.03.
    if isinstance(out, MultivariateNormal):
        return out.loc, _wide(out.variance).log()
    inner = out.base_dist if isinstance(out, Independent) else out
    if isinstance(inner, Normal):
        return inner.loc, 2 * _wide(inner.scale).log()
    raise TypeError(
        f"encoder: expected a tensor, the pair (loc, log_var) or a diagonal Gaussian, got {kind(out)}; pass wrap "
        f"read= a function from it to one of these"
    )


def _wide(scale: Tensor) -> Tensor:
    return scale if scale.dtype in FLOATS else scale.float()


def joined(pair: tuple[Tensor, Tensor], dim: int) -> Tensor:
    """A pair side by side, ``(*batch, 2 * dim)``.

    Raises:
        TypeError: for whole numbers, such as indices or a mask, which would be promoted.
        ValueError: for another width than `dim`, or shapes that do not broadcast.
    """
    for name, part in zip(("loc", "log_var"), pair, strict=True):
        if not part.is_floating_point():
            raise TypeError(
                f"encoder: expected loc and log_var of floating dtypes, got a {name} of {part.dtype}, as indices or a "
                f"mask have; pass read= a function that takes the features out, as lambda out: out[0]"
            )
    if any(part.ndim == 0 or part.shape[-1] != dim for part in pair):
        raise ValueError(f"encoder: expected loc and log_var of shape (*, {dim}), got {kind(pair)}")
    if pair[0].shape == pair[1].shape:
        return torch.cat(pair, dim=-1)
    try:
        return torch.cat(torch.broadcast_tensors(*pair), dim=-1)
    except RuntimeError:
        raise ValueError(f"encoder: expected loc and log_var that broadcast, got {kind(pair)}") from None


def check_example(out: object, parts: Tensor | tuple[Tensor, Tensor], dim: int, *, told: bool) -> None:
    """Refuse what an example shows that cannot be meant, and warn of what is hardly meant; nobody has said `read=`.

    Args:
        out: what the encoder returned.
        parts: the same by `as_features`.
        dim: of z.
        told: whether the width was given too.
    """
    tensors = parts if isinstance(parts, tuple) else (parts,)
    most = max(tensors, key=lambda part: part.ndim)
    if most.ndim > 3:
        raise ValueError(
            f"encoder: expected (batch, features), with one axis between them at most, got shape {tuple(most.shape)}: "
            f"pass read={_by_parts(parts, 'flatten(1)')} for one z an example, "
            f"or read={_by_parts(parts, 'movedim(1, -1)')} for one z a pixel"
        )
    if isinstance(parts, tuple):
        _check_states(parts)
    if isinstance(parts, Tensor):
        if parts.shape[-1] == 2 * dim and not told:
            _warn(
                f"its output is {2 * dim} wide, twice dim, and is taken for features; if it is loc and log_var side by "
                f"side, pass read=lambda out: out.chunk(2, -1); features={2 * dim} says that it is not"
            )
    elif cure := _misnamed(out):
        _warn(
            f"expected the pair (loc, log_var), got one named {', '.join(cast(Any, out)._fields)}; pass "
            f"read=lambda out: {cure}, or, if it is right, read=lambda out: out"
        )
    elif not isinstance(out, Distribution) and parts[1].numel() >= _MANY and bool((parts[1] > 0).all()):
        _warn(
            "the second of the pair looks like a standard deviation, for it is positive throughout; expected the "
            "logarithm of the variance; pass read=lambda out: torch.distributions.Normal(*out), or, if it is right, "
            "read=lambda out: out"
        )


def _warn(message: str) -> None:
    """A warning at the line that called `wrap`."""
    warnings.warn(f"encoder: {message}", UserWarning, stacklevel=5)


def _misnamed(out: object) -> str:
    """What makes ``(loc, log_var)`` of a named tuple whose names say that it is something else; else empty."""
    first, second = (str(name).lower() for name in getattr(out, "_fields", ("", "")))
    deviates = any(word in second for word in ("std", "scale", "sigma", "dev"))
    varies = any(word in second for word in (("var", "cov", "2", "sq") if deviates else ("var", "cov")))
    if any(word in first for word in ("var", "std", "scale", "sigma")):
        return "(out[1], out[0])"
    if "prec" in second:
        return "(out[0], -out[1])" if "log" in second else "(out[0], -out[1].log())"
    if "log" in second:
        return "(out[0], 2 * out[1])" if deviates and not varies else ""
    return "(out[0], out[1].log())" if varies else "torch.distributions.Normal(*out)" if deviates else ""


def _check_states(pair: tuple[Tensor, Tensor]) -> None:
    """Refuse what a recurrent network returns, also where it broadcasts: a batch of one, and a state as wide as z."""
    if pair[0].ndim == pair[1].ndim == 3 and pair[0].shape != pair[1].shape:
        raise ValueError(
            f"encoder: expected loc and log_var, got {kind(pair)}, as a recurrent network returns its outputs and its "
            f"last state; {_OF_STATES.format('out[1][-1]')}; if it is the pair, read=lambda out: out"
        )


def check_pair(pair: tuple[Tensor, Tensor], dim: int) -> None:
    """Refuse the pair of an example that does not fit, and say what to write instead."""
    try:
        joined(pair, dim)
    except ValueError as error:
        vectors = pair[0].ndim <= 3 and pair[0].shape[-1:] == pair[1].shape[-1:]  # else the axes may be meant otherwise
        same = f"dim={pair[0].shape[-1]}, or " if vectors and pair[0].shape[-1] != dim else ""
        raise ValueError(f"{error}; pass {same}a read= that gives the pair, or features") from None


def cure_of(out: object) -> str:
    """What to write for an output that is not taken as it is."""
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Tensor) and _is_pair(out[1]):
        return f"; {_OF_STATES.format('out[1][0][-1]')}"
    return "; pass read= a function from it to one of these"


def check_diagonal(out: object) -> None:
    """Refuse a Gaussian with correlations: its values are read, so only where an example is, or under `checking`."""
    if isinstance(out, MultivariateNormal):
        tril = out.scale_tril
        if bool((tril != torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1))).any()):
            raise ValueError(
                "encoder: expected a Gaussian of independent variables, got a MultivariateNormal with correlations; "
                "the flow acts on the noise before a diagonal Gaussian: pass read=lambda out: (out.mean, "
                "out.variance.log()), and flow='full_covariance' learns correlations again"
            )


def _by_parts(parts: Tensor | tuple[Tensor, Tensor], call: str) -> str:
    if isinstance(parts, Tensor):
        return f"lambda out: out.{call}"
    return f"lambda out: [part.{call} for part in out]"


def kind(out: object) -> str:
    """What it is, in the words of an error."""
    if isinstance(out, Tensor):
        return f"a tensor of shape {tuple(out.shape)}"
    if isinstance(out, (tuple, list)):
        return f"a {type(out).__name__} of {', '.join(kind(part) for part in out)}"
    names = _names(out)
    return f"{type(out).__name__} of {', '.join(names)}" if names else type(out).__name__


def _names(out: object) -> list[str]:
    """What an output with names calls its parts."""
    if isinstance(out, Mapping):
        return [str(key) for key in out]
    return [field.name for field in fields(out)] if is_dataclass(out) else []


def _is_pair(out: object) -> TypeGuard[tuple[Tensor, Tensor] | list[Tensor]]:
    return isinstance(out, (tuple, list)) and len(out) == 2 and all(isinstance(part, Tensor) for part in out)
