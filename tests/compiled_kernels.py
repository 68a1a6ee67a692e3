"""Compile every kernel for an H100, which need not be there, at the sizes of the benchmarks: run by `test_kernels`."""

# pyright: reportMissingImports=false
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowpost.masked.device import kernels, sweeps, tiles
from flowpost.masked.device.fused import MAPS, SOLVED
from flowpost.numerics import root_kernels

H100 = GPUTarget("cuda", 90, 32)
FLOATS, HALVES = "*fp32", "*bf16"
MAP = {"forget_bias": "fp32", "gain": "fp32", "count": "i32"}
ELEMENT = {"z_ptr": FLOATS, "numbers_ptr": FLOATS, "numbers_row": "i32", "image_ptr": FLOATS, "log_det_ptr": "*fp64"}
GRADIENT = {
    **{name: FLOATS for name in ("z_ptr", "numbers_ptr", "at_z_ptr", "at_numbers_ptr", "fixed_ptr")},
    **{name: "i32" for name in ("numbers_row", "grad_row", "grad_column", "of_log_det_row")},
    "of_log_det_ptr": "*fp64",
}
TILE = {"DIM": 32, "ROWS": 16, "COLUMNS": 32}
SIZES = [(128, 32, (320, 320)), (4096, 32, (320, 320)), (4096, 64, (1920, 1920)), (128, 256, (1024,)), (8, 4, ())]


def compiled(kernel: Any, types: dict[str, Any], **constants: Any) -> None:  # noqa: ANN401
    """Compile; what is None is a constant too."""
    options = {"num_warps": constants.pop("num_warps", 4)}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    binary = triton.compile(ASTSource(kernel, signature, fixed), target=H100, options=options)
    print("compiled", kernel.__name__, spills(binary.asm["cubin"]), {**constants, **options})


def spills(binary: bytes) -> str:
    """How many registers' worth of stack the code takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    return " ".join(re.findall(r"(?:REG|STACK|SHARED):\d+", found.stdout + found.stderr))


def main() -> None:
    """Every map, activation, tile and order."""
    for kind in range(len(MAPS)):
        for inverse in (False, True):
            total = {"total_ptr": "*fp64"} if inverse else {}
            none = {} if inverse else {"total_ptr": None}
            compiled(kernels.element_kernel, {**ELEMENT, **MAP, **total}, KIND=kind, INVERSE=inverse, **TILE, **none)
        compiled(kernels.gradient_kernel, {**GRADIENT, **MAP, "grad_ptr": FLOATS}, KIND=kind, **TILE)
        halves = {"numbers_ptr": HALVES, "at_numbers_ptr": HALVES, "grad_ptr": FLOATS}
        compiled(kernels.gradient_kernel, {**GRADIENT, **MAP, **halves}, KIND=kind, **TILE)
        compiled(kernels.gradient_kernel, {**GRADIENT, **MAP}, KIND=kind, grad_ptr=None, **TILE)
    numbers = {name: "i32" for name in ("grad_row", "value_row", "count", "width")}
    for activation in range(3):
        for kind in (FLOATS, HALVES):
            pointers = {"grad_ptr": kind, "value_ptr": kind, "found_ptr": kind, "bias_ptr": FLOATS}
            compiled(
                kernels.activation_kernel,
                {**pointers, **numbers},
                ACTIVATION=activation,
                SHARE=512,
                ROWS=64,
                COLUMNS=32,
            )
    roots = {"gain_ptr": FLOATS, "target_ptr": FLOATS, "found_ptr": FLOATS}
    compiled(root_kernels.root_kernel, {**roots, "count": "i32"}, BLOCK=256)
    for size in (1, 16, 128):
        options = {"SIZE": size, "BLOCK": size, "num_warps": 1}
        compiled(root_kernels.roots_kernel, {**roots, "gains": "i32"}, **options)
    for place, (count, dim, widths) in enumerate(SIZES):
        for order in ("*i64", None):
            inverse_and_transposed(count, dim, widths, order, place % 3)
        bins, units = (8, 50, 3, 8, 2)[place], (8, 16, 8, 8, 1)[place]
        inverse_and_transposed(count, dim, widths, None, 0, SOLVED.index("spline"), 3 * bins - 1, bins)
        inverse_and_transposed(count, dim, widths, None, 0, SOLVED.index("deep sigmoid"), 3 * units, units)
    inverse_and_transposed(128, 32, (320, 320), None, 0, SOLVED.index("deep sigmoid"), 3 * 8 * 2, 8)
    inverse_and_transposed(1024, 1, (4096, 4096), None, 0)  # all of a layer's units are of one degree
    for kind in (SOLVED.index("shift"), SOLVED.index("inverse shift")):
        inverse_and_transposed(128, 32, (320, 320), None, 0, kind, 1)


def inverse_and_transposed(
    count: int,
    dim: int,
    widths: tuple[int, ...],
    order: str | None,
    activation: int,
    kind: int = 0,
    outputs: int = 2,
    parts: int = 1,
) -> None:
    """The two sweeps, as they are launched for these sizes."""
    layers = len(widths)
    given: dict[str, Any] = {"order_ptr": order} if order else {}
    others: dict[str, Any] = {"WIDTHS": widths, "ACTIVATION": activation, "OUTPUTS": outputs}
    others |= {} if order else {"order_ptr": None}
    tuples = {"weights": (FLOATS,) * (layers + 1), "biases": (FLOATS,) * layers, "states": (FLOATS,) * layers}
    pointers = {name: FLOATS for name in ("image_ptr", "start_ptr", "found_ptr")}
    numbers = {"start_row": "i32", "count": "i32", "first_constant": "fp32", "second_constant": "fp32"}
    options = {**tiles.tile(count, dim, widths, outputs)[1], **others}
    compiled(sweeps.sweep_kernel, {**pointers, **tuples, **numbers, **given}, KIND=kind, PARTS=parts, **options)
    tuples = {"weights": (FLOATS,) * (layers + 1), "hidden": (FLOATS,) * layers, "sums": (FLOATS,) * layers}
    pointers = {name: FLOATS for name in ("grad_ptr", "fixed_ptr", "moved_ptr", "total_ptr", "out_ptr")}
    numbers = {"hidden_rows": ("i32",) * layers, "count": "i32"}
    options = {**tiles.tile(count, dim, widths)[1], **others, "NUMBERS": kernels.power(outputs)}
    compiled(sweeps.transposed_kernel, {**pointers, **tuples, **numbers, **given}, **options)


if __name__ == "__main__":
    main()
