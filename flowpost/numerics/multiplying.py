"""Products of two matrices on a CPU, by the faster of torch's libraries.

torch multiplies by MKL, which leaves half of an AMD processor's AVX-512 unused. oneDNN, which torch has for other
operations, uses it, and is twice as fast where the matrices are large.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.operators import define
from flowpost.numerics.watchers import unless_compiled

_FEW = 16
_LITTLE = 2**12  # numbers on the left, up to which two transposes cost more than that saves
_LARGE = 3 * 2**19  # multiplications a thread, from which oneDNN's longer way there pays
_NARROW = 32  # entries on a side, below which it does not
_WIDE = 128  # entries on one side, for which copying the other one pays
_linear: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def _is_amd() -> bool:
    """Whether this is one of AMD's processors with AVX-512; an older torch cannot say."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_f")) and known.get("cpu_name", "").startswith("AMD")


HELPS = _linear is not None and _is_amd()


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix ``left @ right``.

    Where the result has few columns, its transpose is found: MKL multiplies by few rows up to several times faster.
    That is where the left one is itself a transpose, and on AMD's processors wherever.
    """
    if HELPS and pays(left, right):
        return _multiply(left, right, None)
    if 1 < right.shape[1] < _FEW and (HELPS or not left.is_contiguous()) and _is_much(left):
        return torch.mm(right.t(), left.t()).t()
    return torch.mm(left, right)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer ``b + x W^T``."""
    if HELPS and pays(x, weight.t()):
        return _multiply(x, weight.t(), bias)
    return F.linear(x, weight, bias)


def plus_product(so_far: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum ``so_far + left @ right``."""
    if HELPS and pays(left, right):
        return so_far + _multiply(left, right, None)
    return torch.addmm(so_far, left, right)


def write_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left @ right`` to the result."""
    if HELPS and pays(left, right):
        result.copy_(_multiply(left, right, None))
    else:
        result.addmm_(left, right, beta=0)


def add_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to the result."""
    if HELPS and pays(left, right):
        result.add_(_multiply(left, right, None))
    else:
        result.addmm_(left, right)


def pays(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN gives ``left @ right`` sooner, where it has not been switched off."""
    if not HELPS:
        return False
    if torch.compiler.is_compiling():  # for a batch on another side of a threshold a compiler would start anew
        return right.shape[1] >= _WIDE and _fits(left, right)
    rows, inner = left.shape
    columns = right.shape[1]
    work = rows * inner * columns
    if work < _LARGE or work < _LARGE * torch.get_num_threads() or min(rows, inner, columns) < _NARROW:
        return False
    # Who watches the operations, to count them say, knows no products but torch's own.
    free = torch.backends.mkldnn.enabled and not torch._C._len_torch_dispatch_stack()
    return free and _fits(left, right) and (left.is_contiguous() or max(rows, columns) >= _WIDE)


def _is_much(left: Tensor) -> bool:
    # For a batch on the other side a compiler would start anew.
    return torch.compiler.is_compiling() or left.numel() > _LITTLE


def _fits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype == torch.float32 and left.device.type == "cpu"


def _by_onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    # It copies the first where that is a transpose; the second may be one, but has to be dense.
    if bias is None and not left.is_contiguous() and left.shape[0] > right.shape[1]:
        return _linear(right.t(), _dense(left), None, "none", [], "").t().contiguous()
    return _linear(left, _dense(right.t()), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _by_either(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return product(left, right).contiguous() if bias is None else linear(left, right.t(), bias)


_operator = define(
    "multiply(Tensor left, Tensor right, Tensor? bias) -> Tensor",
    _by_either,
    lambda left, right, _: left.new_empty(left.shape[0], right.shape[1]),
)
# A compiler can follow neither: it sees an operator, which chooses when it runs.
_multiply = unless_compiled(_by_onednn, _operator)
