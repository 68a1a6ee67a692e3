"""The contract of every bijector: checked once, at the outermost call."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowpost.checks import active, check_finite, check_inside, check_residual

LINE = (-math.inf, math.inf)
_FLOATS = (torch.float32, torch.float64)


class Bijector(nn.Module, ABC):
    """An invertible map of z, one for every context: ``(z, context) -> (z', log|det dz'/dz|)``.

    ``forward`` runs from noise to posterior and ``inverse`` back. Both are written here once: they check shapes and
    dtypes, cast the context to z's dtype, and call ``_forward`` and ``_inverse``, which a family writes. A chain calls
    its steps' underscored methods, so a check runs once, at the outermost call.

    A subclass gives ``_forward(z, context)`` and ``_inverse(z, context, preimage)``. Both may return a log-det of wider
    dtype than z (a chain sums in float64) or of fewer leading axes (a constant); z' must have the broadcast batch
    shape. It may override ``initial_context`` and ``head_scale``, and ``_push_gaussian`` where it is ``triangular``;
    a map of one variable at a time says that it is ``elementwise``. Nothing checks that ``_inverse`` inverts
    ``_forward``: ``flowpost.testing.check_bijector`` does.

    Args:
        dim: size of the last axis of z, at least 1.
        context_size: how many numbers per example the step reads; 0 for none.

    Raises:
        TypeError: if a size is not an int.
        ValueError: if a size is out of range.
    """

    event_ndim = 1
    """How many last axes of z make one event; the channel axis, ``dim`` wide, is the first of them."""
    triangular = False
    """Whether ``z' = loc + L z`` for every context, L lower-triangular with a positive diagonal."""
    domain = LINE
    """The open interval ``(low, high)`` in which every variable of z lies; outside, results are not finite."""
    codomain = LINE
    """The open interval onto which each is mapped, and the domain of the inverse."""
    elementwise = False
    """Whether ``z'_i = f(z_i; c_i)``, the context being ``(numbers, dim)`` flattened, at least one number a variable.

    Variable i reads column i alone, and ``_forward`` and ``_inverse`` read no ``dim``: they take any number of
    variables, with a context of as many columns. So a network may give the numbers of one variable after the other
    (`Masked`), or those of half of them (`Coupling`).
    """

    def __init__(self, dim: int, context_size: int = 0) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.context_size = check_int("context_size", context_size, minimum=0)

    @abstractmethod
    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map noise towards the posterior.

        Args:
            z: ``(*batch, dim)``, float32 or float64, of the parameters' dtype and device.
            context: ``(*batch, context_size)``; leading axes broadcast against z's. None where ``context_size`` is 0.

        Returns:
            ``z'`` and ``log|det dz'/dz|``, of the broadcast batch shape and z's dtype.

        Raises:
            TypeError: for a z or context that is no floating tensor, or a z of another dtype than the parameters.
            ValueError: for a wrong shape or device, a missing context, or one that is not read.
        """
        context = self._check(z, context)
        if active():
            check_inside("z", z, self.domain)
        return self._finish(z, *self._forward(z, context))

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *, preimage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Undo ``forward``; the log-det is that of the inverse map, so ``-log|det dz'/dz|`` at the preimage.

        Args:
            z: the image z', ``(*batch, dim)``.
            context: as in ``forward``.
            preimage: where it is known, ``(*batch, dim)``: no search is run, only the gradient is attached.

        Returns:
            The preimage and ``log|det dz/dz'|``, of the broadcast batch shape and z's dtype.

        Raises:
            TypeError: as ``forward``.
            ValueError: as ``forward``.
            DomainError: under ``flowpost.checking()``, if z' lies outside the codomain.
            InversionError: under ``flowpost.checking()``, if mapping back does not give z'.
        """
        context = self._check(z, context)
        if preimage is not None:
            check_tensor("preimage", preimage, self.dim, self.event_ndim)
            preimage = preimage.detach()
        if active():
            check_inside("z", z, self.codomain)
        found, log_det = self._finish(z, *self._inverse(z, context, preimage))
        if active():
            self._check_inverse(z, context, found, log_det)
        return found, log_det

    @property
    def fuses(self) -> bool:
        """Whether steps of this type in a row are one call of ``_forward_run``: they differ in their contexts alone."""
        return False

    def _forward_run(self, count: int, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `count` steps like this one in sequence, their contexts side by side."""
        raise NotImplementedError(f"{type(self).__name__} does not join")

    def initial_context(self) -> Tensor:
        """The context, ``(context_size,)``, where the step is the identity (zeros, unless a family says otherwise).

        Directions that the identity leaves free are drawn at random when the step is built.
        """
        return torch.zeros(self.context_size)

    def head_scale(self) -> Tensor:
        """How large a head's rows start, ``(context_size,)``, relative to a linear layer's usual initialization.

        Small where the context is the map's own parameters, so that a fresh posterior hardly depends on x; 1 where it
        is features that a network reads.
        """
        return torch.full((self.context_size,), 0.01)

    def causal_order(self) -> Tensor | None:
        """The variables in an order in which the Jacobian is lower-triangular for every context, where there is one."""
        return torch.arange(self.dim) if self.triangular or self.elementwise else None

    def _push_gaussian(self, loc: Tensor, tril: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Push N(loc, tril tril^T) through a ``triangular`` step; tril None is the identity."""
        raise NotImplementedError(f"{type(self).__name__} is not a triangular linear map")

    def _check(self, z: Tensor, context: Tensor | None) -> Tensor | None:
        check_tensor("z", z, self.dim, self.event_ndim)
        parameter = next(self.parameters(), None)
        if parameter is not None:
            check_like(z, parameter)
        context = check_context(self, z, context)
        if active():
            check_finite("z", z)
            check_finite("context", context)
        return context

    @torch.no_grad()
    def _check_inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor, log_det: Tensor) -> None:
        steps = sum(isinstance(module, Bijector) for module in self.modules())
        size = (1 + z.abs() + preimage.abs().amax(-1, keepdim=True)) * (self.dim * steps + 16)
        residual = (self._forward(preimage, context)[0] - z).abs()
        check_residual(residual, (64 * torch.finfo(z.dtype).eps * size).expand_as(residual), log_det)

    def _finish(self, z: Tensor, image: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        batch = image.shape[: image.ndim - self.event_ndim]
        return image, log_det.to(z.dtype).expand(batch)


def wide_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which log-densities of `value` are summed: float64, or float32 on a device that has no float64."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def wide(log_det: Tensor) -> Tensor:
    """Widen a log-det for a sum over steps."""
    return log_det.to(wide_dtype(log_det))


def by_rows(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix @ columns``, as rows: many matrices with a column each are several times slower in torch's libraries."""
    return (columns.mT @ matrix.mT).mT


def columns(multiply: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, z: Tensor) -> Tensor:
    """``multiply(matrix, z)`` with the leading axes of z that the matrix lacks as columns, so it is never expanded."""
    extra = z.ndim + 1 - matrix.ndim
    if extra <= 0:
        return multiply(matrix, z.unsqueeze(-1)).squeeze(-1)
    samples, event = z.shape[:extra], z.shape[extra:]
    columns = z.reshape(math.prod(samples), *event).movedim(0, -1)
    image = multiply(matrix, columns).movedim(-1, 0)
    return image.reshape(*samples, *image.shape[1:])


def check_int(name: str, value: int, minimum: int) -> int:
    """Return `value`, an int of at least `minimum`, or raise."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value}")
    return value


def check_order(order: Sequence[int], dim: int) -> list[int]:
    """Return `order` as a list, or raise unless it has every int from 0 to dim - 1 once."""
    order = [int(i) for i in order]
    if sorted(order) != list(range(dim)):
        raise ValueError(f"order: expected a permutation of 0..{dim - 1}, got {order}")
    return order


def check_tensor(name: str, value: Tensor, size: int, event_ndim: int = 1) -> None:
    """Raise unless `value` is a float32 or float64 tensor whose channel axis has `size` entries."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}; call .float()")
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: expected float32 or float64, got {value.dtype}; use torch.autocast around the encoder instead"
        )
    if value.ndim < event_ndim or value.shape[-event_ndim] != size:
        raise ValueError(f"{name}: expected shape {_shape(size, event_ndim)}, got {tuple(value.shape)}{_trap(value)}")


def check_like(z: Tensor, parameter: Tensor) -> None:
    """Raise unless z has the dtype and device of the parameters, which must be float32 or float64."""
    if parameter.dtype not in _FLOATS:
        raise TypeError(f"parameters: expected float32 or float64, got {parameter.dtype}; call .float() on the flow")
    if z.dtype != parameter.dtype:
        raise TypeError(
            f"z: expected {parameter.dtype} like the parameters, got {z.dtype}; "
            f"call .to({z.dtype}) on the flow or {'.float()' if parameter.dtype == torch.float32 else '.double()'} on z"
        )
    if z.device != parameter.device:
        raise ValueError(f"z: expected device {parameter.device} like the parameters, got {z.device}")


def check_context(step: Bijector, z: Tensor, context: Tensor | None) -> Tensor | None:
    """Return the context in z's dtype, or raise unless it is what `step` reads beside `z`."""
    size, ndim = step.context_size, step.event_ndim
    if context is None:
        if size:
            raise ValueError(f"context: this bijector needs shape {_shape(size, ndim)}, got None")
        return None
    if not isinstance(context, Tensor):
        raise TypeError(f"context: expected a torch.Tensor, got {type(context).__name__}")
    shape = tuple(context.shape)
    if not size:
        raise ValueError(f"context: this bijector takes none, got shape {shape}")
    if not context.is_floating_point():
        raise TypeError(f"context: expected a floating dtype, got {context.dtype}; call .float()")
    if context.ndim < ndim or shape[-ndim] != size:
        raise ValueError(f"context: expected shape {_shape(size, ndim)}, got {shape}")
    if context.device != z.device:
        raise ValueError(f"context: expected device {z.device} like z, got {context.device}")
    batch, z_batch = shape[:-ndim], tuple(z.shape[:-ndim])
    if not _broadcasts(batch, z_batch):
        raise ValueError(f"context: batch shape {batch} does not broadcast with z batch shape {z_batch}")
    return context.to(z.dtype)


def _shape(size: int, event_ndim: int) -> str:
    return f"(*, {', '.join([str(size)] + ['*'] * (event_ndim - 1))})"


def _trap(value: Tensor) -> str:
    wants_broadcast = value.ndim > 0 and value.shape[-1] == 1
    return "; flowpost never broadcasts the event dimension" if wants_broadcast else ""


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(m == n or m == 1 or n == 1 for m, n in zip(reversed(a), reversed(b), strict=False))
