"""Whether Triton's kernels run for a tensor, and how they are launched."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

# The kernels of a sweep take tuples, as Triton 3.3 and later do: torch 2.7 is the first that comes with it.
_TRITON = find_spec("triton") is not None and torch.__version__ >= "2.7"


def available(z: Tensor) -> bool:
    """Whether the kernels run there: in float32 on a GPU with Triton, for which the meta device stands."""
    return z.dtype == torch.float32 and on_device(z)


def on_device(z: Tensor) -> bool:
    """The same, for a kernel that knows other dtypes too."""
    if z.device.type != "cuda":
        return z.is_meta
    # A compiler for GPUs needs Triton itself.
    return _TRITON and (torch.compiler.is_compiling() or _is_new(z.device.index))


@functools.cache
def _is_new(index: int) -> bool:
    """Whether Triton knows the GPU; of one that is not there, as a planner's tensors have it, it is assumed."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= (7, 0)
