"""Checks of arguments: each raises a TypeError or a ValueError that names the argument, what was due and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor, nn

from flowpost.numerics.watchers import hooked

FLOATS = (torch.float32, torch.float64)


def check_int(name: str, value: object, minimum: int) -> int:
    """Return `value`, an int of at least `minimum` (numpy's too), or raise."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if number < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {number}")
    return number


def check_widths(name: str, widths: object) -> list[int]:
    """Return the widths of a network's hidden layers, any number of them, as ints of at least 1, or raise."""
    if not isinstance(widths, Iterable) or isinstance(widths, str):
        raise TypeError(f"{name}: expected a tuple of ints, got {widths!r}; write ({widths!r},) for one layer")
    return [check_int(name, width, minimum=1) for width in widths]


def check_positive(name: str, value: object) -> float:
    """Return `value`, a positive finite number, or raise."""
    if not isinstance(value, Real):
        hint = "; it is a constant, which is not trained: write .item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}{hint}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return float(value)


def check_device(device: torch.device | str) -> torch.device:
    """Return the device, or raise."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a torch.device or the name of one, got {device!r}") from error


def check_module(name: str, value: object) -> None:
    """Raise unless `value` is a module: of a function no parameter would be found, nor trained."""
    if isinstance(value, nn.Module):
        return
    owner = getattr(value, "__self__", None)
    if isinstance(owner, nn.Module):
        called = getattr(value, "__name__", "it")
        cure = f"; pass the {type(owner).__name__} itself, or a module of your own whose forward calls {called}"
    elif isinstance(value, type):
        cure = f"; write {value.__name__}(...), an instance"
    else:
        cure = "; write a torch.nn.Module whose forward calls it, so that its parameters are found"
    raise TypeError(f"{name}: expected a torch.nn.Module, got {type(value).__name__}{cure}")


def check_alpha(alpha: float) -> float:
    """Return the order of a Renyi bound, a Python number in [0, 1), or raise."""
    if isinstance(alpha, Tensor):
        raise TypeError("alpha: expected a Python number in [0, 1), got a tensor; call .item() on it once, before")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha: expected a number in [0, 1), got {alpha}; for alpha = 1 use the elbo, for 0 the iwae")
    return alpha


def check_order(order: Sequence[int], dim: int) -> list[int]:
    """Return `order` as a list, or raise unless it has every int from 0 to dim - 1 once."""
    order = list(order)
    if sorted(order) != list(range(dim)):
        raise ValueError(f"order: expected a permutation of 0..{dim - 1}, got {order}")
    return [int(i) for i in order]


def check_tensor(name: str, value: Tensor, size: int, event_ndim: int = 1) -> None:
    """Raise unless `value` is a float32 or float64 tensor whose channel axis has `size` entries."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}; call .float()")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float32 or float64, got {value.dtype}; use torch.autocast around the encoder instead"
        )
    if value.ndim < event_ndim or value.shape[-event_ndim] != size:
        raise ValueError(f"{name}: expected shape {shape(size, event_ndim)}, got {tuple(value.shape)}{_trap(value)}")


def check_wide(parameter: Tensor) -> None:
    """Raise unless the parameters are float32 or float64."""
    if parameter.dtype not in FLOATS:
        raise TypeError(f"parameters: expected float32 or float64, got {parameter.dtype}; call .float() on the module")


def check_like(z: Tensor, parameter: Tensor) -> None:
    """Raise unless z has the dtype and device of the parameters, which must be float32 or float64."""
    check_wide(parameter)
    if z.dtype != parameter.dtype:
        raise TypeError(
            f"z: expected {parameter.dtype} like the parameters, got {z.dtype}; "
            f"call .to({z.dtype}) on the flow or {'.float()' if parameter.dtype == torch.float32 else '.double()'} on z"
        )
    if z.device != parameter.device:
        raise ValueError(f"z: expected device {parameter.device} like the parameters, got {z.device}")


def check_context(
    context: Tensor | None, z: Tensor, size: int, event_ndim: int, reader: Callable[[], str]
) -> Tensor | None:
    """Return the context in z's dtype, or raise unless it is `size` numbers an example that broadcast with z.

    Args:
        context: what was given.
        z: a checked z.
        size: how many numbers are read; 0 for none.
        event_ndim: as the bijector's.
        reader: says who reads them, and how they are laid out.
    """
    if context is None:
        if size:
            raise ValueError(f"context: {reader()} reads {size} numbers, got None")
        return None
    if not isinstance(context, Tensor):
        raise TypeError(f"context: expected a torch.Tensor, got {type(context).__name__}")
    found = tuple(context.shape)
    if not size:
        raise ValueError(f"context: {reader()} reads none, got shape {found}")
    if not context.is_floating_point():
        raise TypeError(f"context: expected a floating dtype, got {context.dtype}; call .float()")
    if context.ndim < event_ndim or found[-event_ndim] != size:
        raise ValueError(f"context: {reader()} reads {size} numbers, got shape {found}")
    if context.device != z.device:
        raise ValueError(f"context: expected device {z.device} like z, got {context.device}")
    batch, z_batch = found[:-event_ndim], tuple(z.shape[:-event_ndim])
    if not _broadcasts(batch, z_batch):
        raise ValueError(f"context: batch shape {batch} does not broadcast with z batch shape {z_batch}")
    return context.to(z.dtype)


def shape(size: int, event_ndim: int = 1) -> str:
    """How a message writes the shape of events of `size` channels."""
    return f"(*, {', '.join([str(size)] + ['*'] * (event_ndim - 1))})"


def _trap(value: Tensor) -> str:
    wants_broadcast = value.ndim > 0 and value.shape[-1] == 1
    return "; flowpost never broadcasts the event dimension" if wants_broadcast else ""


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    common = min(len(a), len(b))  # cut to it, for compilers before torch 2.6 cannot follow a zip of unequal lengths
    pairs = zip(a[len(a) - common :], b[len(b) - common :], strict=True)
    return all(m == n or m == 1 or n == 1 for m, n in pairs)


def expands(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether a batch shape expands to another."""
    # Not `m in (1, n)`: a compiler answers no where one of two equal sizes is a symbol to it and the other a number.
    return len(a) <= len(b) and all(m == n or m == 1 for m, n in zip(a, b[len(b) - len(a) :], strict=True))


def check_sample_shape(sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of samples as ints (numpy's too), or raise."""
    if not isinstance(sample_shape, tuple) or not all(_is_int(size) for size in sample_shape):
        raise TypeError(f"sample_shape: expected a tuple of ints, got {sample_shape!r}")
    if any(size < 0 for size in sample_shape):
        raise ValueError(f"sample_shape: expected non-negative ints, got {tuple(sample_shape)}")
    return tuple(sample_shape)


def from_list(sample_shape: Sequence[int]) -> tuple[int, ...]:
    """A list as a tuple, for torch's distributions take one; what is neither is left to `check_sample_shape`."""
    return tuple(sample_shape) if isinstance(sample_shape, list) else cast("tuple[int, ...]", sample_shape)


def check_noise(noise: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless a draw that is to be mapped has the shape, and the dtype and device of the posterior."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise: expected a torch.Tensor, got {type(noise).__name__}")
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
    if noise.dtype != like.dtype:
        raise TypeError(f"noise: expected {like.dtype} like the parameters, got {noise.dtype}; call .to({like.dtype})")
    if noise.device != like.device:
        raise ValueError(f"noise: expected device {like.device} like the parameters, got {noise.device}")


def check_untraced() -> None:
    """Raise under `torch.jit.trace`, which cannot follow the fast nodes and freezes shapes that it should not."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise RuntimeError("torch.jit.trace: flowpost's passes cannot be traced; use torch.export or torch.compile")


def refuse_shards(module: nn.Module) -> None:
    """Raise if a parameter that a method is to read is a shard: `torch.distributed.fsdp` gathers them for ``forward``.

    Modules within that are hooked themselves are passed over: their own calls gather theirs.
    """
    if torch.compiler.is_compiling() or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if any(hasattr(parameter, "placements") for parameter in module.parameters(recurse=False)):
        raise RuntimeError(
            "parameters: expected whole tensors, got the shards of a DTensor; call "
            "torch.distributed.fsdp.register_fsdp_forward_method(module, name) for each method but forward that is "
            "called: inverse, log_prob, path_log_prob"
        )
    for child in module.children():
        if not hooked(child):
            refuse_shards(child)


def _is_int(size: object) -> bool:
    # Of torch's own kinds of int none is turned into a number here: that would fix an export's dynamic size.
    return isinstance(size, (int, torch.SymInt, Integral)) and not isinstance(size, bool)
