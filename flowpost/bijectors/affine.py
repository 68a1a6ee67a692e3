"""Element-wise affine maps by numbers of the context."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector, Line
from flowpost.masked.run import COLUMNS, Column, Solve
from flowpost.numerics.arguments import check_int
from flowpost.numerics.arrays import Array
from flowpost.numerics.scales import CLOSED, scale_and_log, softplus_scale


def affine(z: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Element-wise affine map ``z' = loc + scale * z``, ``log_det = sum(log scale)``.

    Args:
        z: ``(*batch, dim)``.
        loc: ``(*batch, dim)``.
        scale: ``(*batch, dim)``, positive.

    Returns:
        z' ``(*batch, dim)`` and log_det, of scale's batch shape.
    """
    return torch.addcmul(loc, scale, z), scale.log().sum(-1)


def _affine_column(example: Array, constants: Sequence[float], scale: Callable[..., Any], *, inverse: bool) -> Solve:
    """`affine` or its inverse, for one variable."""
    scale = scale(example)

    def forward(z: Array, numbers: Array) -> Array:
        return numbers[0] + scale(numbers[1]) * z

    def backward(z: Array, numbers: Array) -> Array:
        return (z - numbers[0]) / scale(numbers[1])

    return backward if inverse else forward


for _name, _scale, _ in CLOSED.values():
    COLUMNS[f"affine by {_name}"] = functools.partial(_affine_column, scale=_scale, inverse=False)
    COLUMNS[f"inverse affine by {_name}"] = functools.partial(_affine_column, scale=_scale, inverse=True)
COLUMNS["shift"] = lambda example, constants: lambda z, numbers: z + numbers[0]
COLUMNS["inverse shift"] = lambda example, constants: lambda z, numbers: z - numbers[0]


class Affine(Bijector):
    """Element-wise affine map ``z' = loc + scale * z``: a diagonal Gaussian, when z is N(0, I).

    Use it as the first step of an amortized posterior: it puts a Gaussian where x says, and the other steps bend it.
    Use it also inside `Masked` and `Coupling`.

    The context is ``(loc, raw)``, and ``scale`` makes raw positive, so that the map is invertible for every context.
    Identity at the zero context. Forward, inverse and log-det cost O(dim).

    Args:
        dim: size of z.
        scale: element-wise function from raw numbers to positive ones, 1 at 0: `softplus_scale`, `exp_scale`, or
            `log_var_scale` where the context is a VAE's ``(loc, log_var)``.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, 2 * dim)``.

    Reference:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, eq. 9;
        Kingma & Welling (2019), An Introduction to Variational Autoencoders, section 2.5, eq. 2.38 to 2.44.

    Example:
        >>> z, log_det = Affine(2)(torch.ones(3, 2), torch.zeros(3, 4))
        >>> log_det.shape
        torch.Size([3])
    """

    triangular = True
    elementwise = True

    def __init__(self, dim: int, scale: Callable[[Tensor], Tensor] = softplus_scale) -> None:
        super().__init__(dim, 2 * check_int("dim", dim, minimum=1))
        self.scale = scale

    def extra_repr(self) -> str:
        """Sizes and the scale's function, for the module's repr."""
        return f"{super().extra_repr()}, scale={getattr(self.scale, '__name__', repr(self.scale))}"

    def columns(self) -> tuple[Column | None, Column | None]:
        """Both, for the scales that come with flowpost."""
        if not self.has_pull():
            return None, None
        name = CLOSED[self.scale].name
        return Column(f"affine by {name}"), Column(f"inverse affine by {name}")

    def has_pull(self) -> bool:
        """For the scales that come with flowpost, unless a subclass may have a map of its own."""
        return type(self) is Affine and self.scale in CLOSED

    def keep(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """``_forward``, with what `pull` needs: the raw numbers of the scale, and the scale."""
        loc, raw = numbers.chunk(2, dim=-1)
        scale, log = scale_and_log(self.scale, raw)
        return torch.addcmul(loc, scale, z), log.sum(-1), (raw, scale)

    def pull(self, z: Tensor, kept: tuple[Tensor, Tensor], grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients at z and at the numbers: ``dlog_det/dscale = 1 / scale``."""
        raw, scale = kept
        of_scale = torch.addcmul(grad_log_det.to(z.dtype).unsqueeze(-1) / scale, grad, z)
        return grad * scale, torch.cat([grad, of_scale * CLOSED[self.scale].slope(raw, scale)], dim=-1)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.keep(z, cast(Tensor, context))[:2]

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, raw = cast(Tensor, context).chunk(2, dim=-1)
        scale, log = scale_and_log(self.scale, raw)
        return (z - loc) / scale, -log.sum(-1)

    def _line(self, context: Tensor | None) -> Line:
        loc, raw = cast(Tensor, context).chunk(2, dim=-1)
        return loc, self.scale(raw)


class Shift(Bijector):
    """Element-wise shift ``z' = z + loc``, ``log_det = 0``: what an additive coupling does.

    Use it inside `Coupling` or `Masked` where the step must keep volumes.

    Invertible for every context, and the identity at zeros. Forward and inverse cost O(dim), the log-det nothing.

    Args:
        dim: size of z.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, dim)``.

    Reference:
        Dinh et al. (2015), NICE: Non-linear Independent Components Estimation, section 3.2.

    Example:
        >>> Shift(2)(torch.zeros(2), torch.tensor([1.0, -1.0]))[0]
        tensor([ 1., -1.])
    """

    triangular = True
    elementwise = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim, check_int("dim", dim, minimum=1))

    def columns(self) -> tuple[Column | None, Column | None]:
        """Both, unless a subclass may have a map of its own."""
        return (Column("shift"), Column("inverse shift")) if type(self) is Shift else (None, None)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z + cast(Tensor, context), z.new_zeros(())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z - cast(Tensor, context), z.new_zeros(())

    def _line(self, context: Tensor | None) -> Line:
        return cast(Tensor, context), 1.0
