"""Who else looks at a tensor's operations: compilers, transforms, dispatch modes, autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

_AS_IT_IS = nullcontext()
_Result = TypeVar("_Result")
_PLAIN = (nn.Parameter, Tensor)


def unwatched(z: Tensor) -> bool:
    """Whether a function with a backward of its own may stand in for the plain operations on z.

    ``torch.func`` and forward-mode differentiation need to see operations that they know; so does whoever loads an
    exported program. A compiler traces such a function. Autocast is the function's own affair.
    """
    return not (_recording() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def unless_compiled(function: Callable[..., _Result], traced: Callable[..., _Result]) -> Callable[..., _Result]:
    """A function, and what a compiler traces in its place: the same in a form that it can follow, or an operator."""

    def run(*inputs: object) -> _Result:
        return (traced if torch.compiler.is_compiling() else function)(*inputs)

    return run


def exporting() -> bool:
    """Whether ``torch.export`` sees what is computed; before torch 2.7 not known where a compiler traces it for it.

    The flag itself is read: some compilers take ``torch.compiler.is_exporting`` for always true.
    """
    return _recording() or getattr(torch.compiler, "_is_exporting_flag", False)


def _recording() -> bool:
    """Whether an export runs the operations to record them, without a compiler."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def on_host(tensor: Tensor) -> bool:
    """Whether its numbers can be read at once: on the CPU, where nobody watches the operations."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return tensor.device.type == "cpu" and not traced


def batched(*tensors: Tensor) -> bool:
    """Whether autograd runs one backward for many gradients: ``is_grads_batched``, or a vectorized Jacobian.

    It maps by rules of its own, not by those of ``torch.func``: the operations' own backwards have them.
    """
    if torch.compiler.is_compiling():
        return False
    return any(is_legacy_batchedtensor(each) for each in tensors)


def watched() -> bool:
    """Whether a compiler, a transform of ``torch.func`` or a dispatch mode sees what is computed."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def changes(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, where anybody counts that."""
    return None if watched() or tensor.is_inference() else tensor._version


def check_left(name: str, given: Tensor, before: int | None) -> None:
    """Refuse a part that has changed its input in place, where that was counted: others read it too."""
    if before is not None and given._version != before:
        raise ValueError(
            f"{name}: expected its input left as it is, got it changed in place, whereas it is read again; write "
            f"z * 2, not z.mul_(2), and no inplace=True in the first layer"
        )


def recordable(tensor: Tensor) -> Tensor:
    """A tensor that autograd can keep: of one that ``torch.inference_mode`` made, outside of that mode, a copy."""
    return tensor.clone() if tensor.is_inference() else tensor


def first_parameter(module: nn.Module) -> Tensor | None:
    """A module's first parameter, if it has any: the first that ``parameters`` gives, whose search takes longer."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else first_parameter(child)
        if found is not None:
            return found
    return None


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its ``forward`` does: hooks, or a ``forward`` put on the instance.

    Hooks on all modules at once are for measurements, says torch: what they are to see is what runs without them.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or "forward" in module.__dict__)


def remake(module: nn.Module) -> None:
    """Make the parameters anew that a hook of torch's makes before each call, as of pruning: an inverse is no call."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(module, ())


def all_hooked() -> bool:
    """Whether somebody has hooked the calls of all modules."""
    hooks = modules._global_forward_hooks or modules._global_forward_pre_hooks
    return bool(hooks or modules._global_backward_hooks or modules._global_backward_pre_hooks)


def untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is exactly of a kind and its parameters say all that it does, so that they may be read instead.

    Not so with a parametrization, a hook, a ``forward`` on the instance, or a parameter that is a tensor of another
    kind, as a quantized or a distributed one.
    """
    if type(layer) is not kind or hooked(layer):
        return False
    for each in layer._parameters.values():  # a loop: this is asked of every layer on every call
        if type(each) not in _PLAIN and each is not None:
            return False
    return True


def autocast(device_type: str) -> bool:
    """Whether autocast is on; never on the meta device, which has none, where torch raises if it is asked.

    ``torch.amp.is_autocast_available`` would know, but compilers before torch 2.6 cannot follow it.
    """
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(z: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs products on z's device; None where it is off, or leaves z's dtype alone."""
    on = z.dtype == torch.float32 and autocast(z.device.type)
    return torch.get_autocast_dtype(z.device.type) if on else None


def full_precision(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off. It costs nothing where autocast is off already, but in a graph it is kept."""
    needed = torch.compiler.is_compiling() or autocast(device_type)
    off = needed and device_type != "meta"
    return torch.autocast(device_type, enabled=False) if off else _AS_IT_IS
