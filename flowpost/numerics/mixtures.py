"""The logit of a mixture of sigmoids, undone on numpy's arrays: a search that ends when it is done."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flowpost.numerics.arrays import Array
from flowpost.numerics.roots import increasing_root_by_array


def mixture_root(image: Array, scale: Array, shift: Array, weight: Array) -> Array:
    """The x with ``logit(sum_j w_j sigmoid(a_j x + b_j)) = z'``, ``w = softmax(weight)``.

    Args:
        image: z', ``(N,)``.
        scale: a, ``(units, N)``, positive.
        shift: b, ``(units, N)``.
        weight: raw, ``(units, N)``.

    Returns:
        The roots ``(N,)``, to the rounding of the map.
    """
    log_weight = weight - weight.max(0)
    weight = np.exp(log_weight)
    log_weight, share = log_weight - np.log(weight.sum(0)), scale * weight
    ends = (image - shift) / scale

    def residual(x: Array, rows: Any) -> tuple[Array, Array]:  # noqa: ANN401
        a, log_w = scale[:, rows], log_weight[:, rows]
        u = a * x + shift[:, rows]
        e = np.exp(-np.abs(u))
        line = log_w - np.log1p(e)
        lines = np.stack([line + np.minimum(u, 0), line - np.maximum(u, 0)])
        most = lines.max(1)
        terms = np.exp(lines - most[:, None])
        sums = terms.sum(1)
        log_p, log_q = most + np.log(sums)
        near, far = a / (1 + e), a * e / (1 + e)
        up = u > 0
        r, s = terms / sums[:, None]
        slope = (r * np.where(up, far, near) + s * np.where(up, near, far)).sum(0)
        return log_p - log_q - image[rows], slope

    eps = np.finfo(image.dtype).eps
    near, noise = 1e-3 * math.sqrt(eps) / scale.max(0), 2 * eps * (1 + np.abs(image))
    start = (share * ends).sum(0) / share.sum(0)
    return increasing_root_by_array(residual, start, ends.min(0), ends.max(0), near, noise)
