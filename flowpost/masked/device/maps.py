# ruff: noqa: ANN001, ANN201, ANN202, RET505 (Triton reads annotations as types, and compiles branches by their else)
"""The element-wise maps within Triton's kernels, once more: a test holds each to the formula in its family's file.

All are ``z' = a z + b`` with numbers' a > 0 and b. Of two numbers p and q: the gate's raw logit and mean; the affine
maps' loc and raw scale.
"""

# Where Triton is installed, its annotations are of what a kernel sees, and not of what is handed to it.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from flowpost.numerics.scales import FLOOR, SHIFT

GATE = tl.constexpr(0)
AFFINE_EXP = tl.constexpr(1)
AFFINE_SOFTPLUS = tl.constexpr(2)
INVERSE_EXP = tl.constexpr(3)
INVERSE_SOFTPLUS = tl.constexpr(4)
_SHIFT, _FLOOR = tl.constexpr(SHIFT), tl.constexpr(FLOOR)


@triton.jit
def tanh(x):
    """Near 0 by its series: ``1 - 2 / (1 + e^2x)`` would lose its digits there."""
    far = 1 - 2 / (1 + tl.exp(2 * x))
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def tanh_slope(x):
    """Not as ``1 - tanh^2``, which loses its digits where tanh is near 1."""
    small = tl.exp(-2 * tl.abs(x))
    return 4 * small / ((1 + small) * (1 + small))


@triton.jit
def softplus(x):
    """``log(1 + e^x)``, by its series where e^-|x| is small against 1."""
    small = tl.exp(-tl.abs(x))
    series = small * (1 - small * (1 / 2 - small * (1 / 3 - small / 4)))
    return tl.maximum(x, 0.0) + tl.where(small < 0.02, series, tl.log(1 + small))


@triton.jit
def _scale(q, KIND: tl.constexpr):
    """The scale, its logarithm, and the logarithm's slope in q."""
    if KIND == AFFINE_EXP or KIND == INVERSE_EXP:
        log = 4 * tanh(q * 0.25)
        return tl.exp(log), log, tanh_slope(q * 0.25)
    else:
        scale = softplus(q + _SHIFT) + _FLOOR
        return scale, tl.log(scale), 1 / (1 + tl.exp(-q - _SHIFT)) / scale


@triton.jit
def image(z, p, q, forget_bias, gain, KIND: tl.constexpr):
    """The image z', and ``log a``."""
    if KIND == GATE:
        logit = forget_bias + 4 * tanh(p * 0.25)
        closed = 1 / (1 + tl.exp(logit))
        return gain * (z + closed * (1e3 * tanh(q * 1e-3) - z)), tl.log(gain) - softplus(-logit)
    elif KIND == AFFINE_EXP or KIND == AFFINE_SOFTPLUS:
        scale, log, _ = _scale(q, KIND)
        return p + scale * z, log
    else:
        scale, log, _ = _scale(q, KIND)
        return (z - p) / scale, -log


@triton.jit
def preimage(y, p, q, forget_bias, gain, KIND: tl.constexpr):
    """The preimage of y, and ``-log a``."""
    if KIND == GATE:
        logit = forget_bias + 4 * tanh(p * 0.25)
        y = y / gain
        return y + (y - 1e3 * tanh(q * 1e-3)) * tl.exp(-logit), softplus(-logit) - tl.log(gain)
    elif KIND == AFFINE_EXP or KIND == AFFINE_SOFTPLUS:
        scale, log, _ = _scale(q, KIND)
        return (y - p) / scale, -log
    else:
        scale, log, _ = _scale(q, KIND)
        return p + scale * y, log


@triton.jit
def slopes(z, p, q, forget_bias, gain, KIND: tl.constexpr):
    """At z: ``a``, ``dz'/dp``, ``dz'/dq``, ``dlog a/dp``, ``dlog a/dq``."""
    if KIND == GATE:
        closed = 1 / (1 + tl.exp(forget_bias + 4 * tanh(p * 0.25)))
        log, opened = closed * tanh_slope(p * 0.25), gain * (1 - closed)
        of_mean = gain * closed * tanh_slope(q * 1e-3)
        return opened, opened * log * (z - 1e3 * tanh(q * 1e-3)), of_mean, log, 0.0 * log
    elif KIND == AFFINE_EXP or KIND == AFFINE_SOFTPLUS:
        scale, _, slope = _scale(q, KIND)
        return scale, 1.0 + 0.0 * scale, scale * slope * z, 0.0 * scale, slope
    else:
        scale, _, slope = _scale(q, KIND)
        shrink = 1 / scale
        return shrink, -shrink, (p - z) * shrink * slope, 0.0 * scale, -slope
