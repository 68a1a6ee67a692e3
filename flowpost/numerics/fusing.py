"""Whether Triton's kernels run for a tensor."""

from __future__ import annotations

import functools
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

# The kernels of a sweep read tuples of constants, as Triton 3.4 and later do; torch 2.8 is the first that brings it.
_TRITON = find_spec("triton") is not None and torch.__version__ >= "2.8"


def available(z: Tensor) -> bool:
    """Whether the kernels run there: in float32 on a GPU with Triton, for which the meta device stands."""
    return z.dtype == torch.float32 and on_device(z)


def on_device(z: Tensor) -> bool:
    """The same, for a kernel that knows other dtypes too."""
    if z.device.type != "cuda":
        return z.is_meta
    # A compiler for GPUs needs Triton itself.
    return _TRITON and (torch.compiler.is_compiling() or _fits(z.device.index))


@functools.cache
def _fits(index: int) -> bool:
    """Whether Triton runs on the GPU; of one that is not there, as a planner's tensors have it, it is assumed."""
    return not torch.cuda.is_available() or (torch.cuda.get_device_capability(index) >= (7, 0) and _starts())


@functools.cache
def _starts() -> bool:
    """Whether Triton can launch anything: it builds its launcher here, with a C compiler that need not be there."""
    try:
        from triton.runtime import driver  # pyright: ignore[reportMissingImports]

        driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001  one of many: no compiler, no header of Python's, no library of CUDA's
        why = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"Triton: expected that it can launch kernels, got: {why}; slower operations of PyTorch's run in their "
            "place until a C compiler and Python's headers are installed",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True
