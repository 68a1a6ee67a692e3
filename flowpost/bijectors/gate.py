"""The inverse autoregressive flow's gate: LSTM-style, softly bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.masked.run import COLUMNS, Column, Solve
from flowpost.numerics.arguments import check_int
from flowpost.numerics.arrays import Array, module_of, numbers_for
from flowpost.numerics.constants import Constant
from flowpost.numerics.products import wide_dtype
from flowpost.numerics.scales import SPREAD
from flowpost.numerics.states import Numbered

_tanh_backward = torch.ops.aten.tanh_backward.default
_REACH = 1000
"""How far the mean moves from 0; whole, as `SPREAD`."""


def gate_parameters(raw: Tensor, mean: Tensor, forget_bias: float = 2.0) -> tuple[Tensor, Tensor]:
    """Bound a network's raw outputs: ``logit = bias + 4 tanh(raw / 4)`` and ``m = 1e3 tanh(mean / 1e3)``.

    The bounds are soft, with slope 1 at 0, and keep the inverse well-conditioned: at bias 2 the gate stays within
    0.119 and 0.998.

    Args:
        raw: any shape.
        mean: any shape.
        forget_bias: the gate's logit at ``raw = 0``.

    Returns:
        logit and m, of the shapes of `raw` and `mean`.
    """
    return forget_bias + SPREAD * torch.tanh(raw / SPREAD), _REACH * torch.tanh(mean / _REACH)


def gate(z: Tensor, logit: Tensor, mean: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """LSTM-style update ``z' = gain (s z + (1 - s) m)`` with ``s = sigmoid(logit)``.

    The log-det is ``sum(log s) + dim log gain``.

    Args:
        z: ``(*batch, dim)``.
        logit: ``(*batch, dim)``.
        mean: ``(*batch, dim)``.
        gain: a positive constant; 1 in the paper.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``, summed in float64.
    """
    image, log_det, _ = _gate(z, logit, mean, gain)
    return image, log_det


def _gate(z: Tensor, logit: Tensor, mean: Tensor, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    """`gate`, with ``1 - s``."""
    closed = torch.sigmoid(-logit)
    # As z + (1 - s) (m - z): where the gate is nearly open, 1 - s as a difference would cost a large m its digits.
    image = torch.lerp(z, mean, closed)
    log_det = F.logsigmoid(logit).sum(-1, dtype=wide_dtype(z))
    if gain != 1:
        image, log_det = gain * image, log_det + z.shape[-1] * math.log(gain)
    return image, log_det, closed


def gate_inverse(z: Tensor, logit: Tensor, mean: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Undo `gate` for given logit and mean: ``z = y + (y - m) (1 - s) / s``, ``y = z' / gain``.

    Args:
        z: the image z', ``(*batch, dim)``.
        logit: ``(*batch, dim)``.
        mean: ``(*batch, dim)``.
        gain: as in `gate`.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``, summed in float64.
    """
    image = z if gain == 1 else z / gain
    log_det = -F.logsigmoid(logit).sum(-1, dtype=wide_dtype(z))
    preimage = image + (image - mean) * torch.exp(-logit)
    return preimage, log_det if gain == 1 else log_det - z.shape[-1] * math.log(gain)


def _gate_column(example: Array, constants: Sequence[float]) -> Solve:
    """`gate_inverse` of `gate_parameters`, for one variable."""
    xp, fresh = module_of(example), constants[1] == 1
    forget_bias, gain = numbers_for(example, *constants)
    raw_unit, raw_reach, mean_unit, mean_reach = numbers_for(example, 1 / SPREAD, -SPREAD, 1 / _REACH, _REACH)

    def solve(image: Array, numbers: Array) -> Array:
        raw, mean = numbers
        image = image if fresh else image / gain
        closing = xp.tanh(raw * raw_unit) * raw_reach - forget_bias
        return image + (image - xp.tanh(mean * mean_unit) * mean_reach) * xp.exp(closing)

    return solve


COLUMNS["gate"] = _gate_column


class Gate(Numbered, Bijector):
    """Element-wise LSTM-style gate ``z' = gain (s z + (1 - s) m)``: a convex step from z towards m, times a constant.

    The context is the raw numbers of s and m, which `gate_parameters` bounds, so that the map is invertible for every
    context. It has no context that is exactly the identity unless ``gain = 1 / sigmoid(forget_bias)``: then the zero
    context is. A masked network gives its numbers in `Autoregressive`. Forward, inverse and log-det cost O(dim).

    Args:
        dim: size of z.
        forget_bias: the gate's logit at the zero context.
        gain: a positive constant; 1 is the paper's gate.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, 2 * dim)``: the raw numbers of s, then those of m.

    Raises:
        ValueError: if the gain is not positive and finite.

    Reference:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow, eq. 13, 14.

    Example:
        >>> z, log_det = Gate(2)(torch.ones(3, 2), torch.zeros(3, 4))
        >>> z[0]
        tensor([0.8808, 0.8808])
    """

    elementwise = True
    _number = ("gain", "constant_gain")
    gain: float
    _dropped: float | None = None
    """The gain before `drop_gain`."""

    def __init__(self, dim: int, forget_bias: float = 2.0, gain: float = 1.0) -> None:
        super().__init__(dim, 2 * check_int("dim", dim, minimum=1))
        self.forget_bias = forget_bias
        self._set_number(gain)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Another `forget_bias` takes the constants along that are made of it: not all that is computed reads them."""
        if name == "forget_bias":
            if not isinstance(value, Real):
                raise TypeError(f"forget_bias: expected a number, got {type(value).__name__}")
            value = float(value)
            rows = [[1 / SPREAD, 1 / _REACH], [SPREAD, _REACH], [value, 0.0]]
            constants = torch.tensor(rows, dtype=torch.float64, device="cpu").repeat_interleave(self.dim, -1)
            self._inner, self._outer, self._offset = map(Constant, constants)
        super().__setattr__(name, value)

    def drop_gain(self) -> None:
        """Become the gate that was before gates had a gain."""
        self.gain, self._dropped = 1.0, self.gain
        del self.constant_gain

    def take_gain_back(self) -> None:
        """Undo `drop_gain`, where there was one."""
        if self._dropped is not None:
            self.gain, self._dropped = self._dropped, None
            self.register_buffer("constant_gain", self._like.new_full((), self.gain))

    def columns(self) -> tuple[Column | None, Column | None]:
        """The inverse's, unless a subclass may have a map of its own."""
        return None, Column("gate", (self.forget_bias, self.gain)) if type(self) is Gate else None

    def extra_repr(self) -> str:
        """Sizes and constants, for the module's repr."""
        return f"{super().extra_repr()}, forget_bias={self.forget_bias}, gain={self.gain:.4g}"

    def _parameters_of(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `gate_parameters`, both at once: a step is bound by the number of calls; and the two tanh side by side."""
        numbers = cast(Tensor, context)
        inner, outer, offset = (each.on(numbers) for each in (self._inner, self._outer, self._offset))
        half = numbers.shape[-1] // 2
        if half != self.dim:  # some of the variables: all have the same bounds
            inner, outer, offset = (
                each.unflatten(-1, (2, -1))[:, :1].expand(-1, half).flatten() for each in (inner, outer, offset)
            )
        bounded = torch.tanh(numbers * inner)
        both = torch.addcmul(offset, bounded, outer)
        return both[..., :half], both[..., half:], bounded

    def has_pull(self) -> bool:
        """True, unless a subclass may have a map of its own."""
        return type(self) is Gate

    def keep(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """``_forward``, with what `pull` needs."""
        logit, mean, bounded = self._parameters_of(numbers)
        image, log_det, closed = _gate(z, logit, mean, self.gain)
        return image, log_det, (bounded, closed)

    def pull(self, z: Tensor, kept: tuple[Tensor, Tensor], grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients at z and at the numbers: ``d log s = (1 - s) dlogit``, ``ds = s (1 - s) dlogit``."""
        bounded, closed = kept
        grad = grad if self.gain == 1 else self.gain * grad
        of_mean = grad * closed
        z_grad = grad - of_mean
        apart = torch.sub(z, bounded[..., self.dim :], alpha=_REACH)
        of_logit = torch.addcmul(grad_log_det.to(z.dtype).unsqueeze(-1), z_grad, apart) * closed
        return z_grad, _tanh_backward(torch.cat([of_logit, of_mean], -1), bounded)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        logit, mean, _ = self._parameters_of(context)
        return gate(z, logit, mean, self.gain)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        logit, mean, _ = self._parameters_of(context)
        return gate_inverse(z, logit, mean, self.gain)
