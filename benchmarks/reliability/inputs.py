"""Hard uses of inputs: dtypes, shapes, and contexts that are not what the model expects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.reliability.judge import Model, NotApplicable, Use, Wrong
from benchmarks.reliability.truth import Subject, agree


def other_dtype(model: Model, dtype: torch.dtype) -> None:
    """Points of another dtype than the float32 weights."""
    subject = Subject(model)
    z = (3 * subject.z(5)).round().to(dtype) if not dtype.is_floating_point else subject.z(5).to(dtype)
    context = subject.context(5)
    found = model.fast(subject.module(), z, context)
    agree(found, *subject.exact(z, context))


def half_context(model: Model) -> None:
    """Bfloat16 features, from an encoder under autocast, for a float32 flow."""
    subject = Subject(model, conditional=True)
    z, context = subject.z(5), subject.context(5)
    context = None if context is None else context.bfloat16()
    found = model.fast(subject.module(), z, context)
    agree(found, *subject.exact(z, context))


def batch(model: Model, *shape: int, dim: int | None = None) -> None:
    """Any leading axes: z' has z's shape, the log-det that of the batch."""
    subject = Subject(model) if dim is None else Subject(model, dim)
    z, context = subject.z(*shape), subject.context(*shape)
    found = model.fast(subject.module(), z, context)
    agree(found, *subject.exact(z, context))


def strided(model: Model) -> None:
    """Transposed and expanded points."""
    subject = Subject(model)
    module, context = subject.module(), subject.context(5)
    for z in (subject.z(5).mT.contiguous().mT, subject.z(1).expand(5, -1)):
        agree(model.fast(module, z, context), *subject.exact(z, context))


def fewer_axes(model: Model) -> None:
    """Samples ``(S, B, dim)`` against features ``(B, width)``."""
    subject = Subject(model, conditional=True)
    z, context = subject.z(3, 4), subject.context(4)
    full = None if context is None else context.expand(3, -1, -1)
    agree(model.fast(subject.module(), z, context), *subject.exact(z, full))


def bad_width(model: Model, extra: int | None) -> None:
    """A last axis of z that is too long, or of size one."""
    subject = Subject(model)
    z = subject.z(5)
    z = z[:, :1] if extra is None else torch.cat([z, z[:, :extra]], -1)
    _refuses(model, subject, z, subject.context(5))


def bad_context(model: Model, make: Callable[[Tensor], Tensor | None]) -> None:
    """No context, or one of the wrong width or batch, for a model that reads one."""
    subject = Subject(model, conditional=True)
    context = subject.context(6)
    if context is None:
        raise NotApplicable("takes no context")
    _refuses(model, subject, subject.z(6), make(context))


def unwanted_context(model: Model) -> None:
    """A context for a model that was built to read none."""
    subject = Subject(model)
    if subject.width or not model.optional_context:
        raise NotApplicable("has no place for one" if not subject.width else "reads one")
    _refuses(model, subject, subject.z(5), torch.randn(5, 3))


def _refuses(model: Model, subject: Subject, z: Tensor, context: Tensor | None) -> None:
    image, log_det = model.fast(subject.module(), z, context)
    given = "no context" if context is None else f"context {tuple(context.shape)}"
    shapes = f"{tuple(image.shape)} and {tuple(log_det.shape)}"
    raise Wrong(f"accepted z {tuple(z.shape)} with {given}: returned z' and log-det of shapes {shapes}")


USES = [
    Use("integer input", partial(other_dtype, dtype=torch.int64)),
    Use("float64 input, float32 module", partial(other_dtype, dtype=torch.float64)),
    Use("bfloat16 context, float32 module", half_context),
    Use("empty batch", lambda model: batch(model, 0)),
    Use("B = 1", lambda model: batch(model, 1)),
    Use("D = 1", lambda model: batch(model, 5, dim=1)),
    Use("batch (2, 3, D)", lambda model: batch(model, 2, 3)),
    Use("unbatched (D,)", lambda model: batch(model)),
    Use("transposed or expanded input", strided),
    Use("context with fewer axes than z", fewer_axes),
    Use("last dim D + 1", partial(bad_width, extra=1)),
    Use("last dim 1", partial(bad_width, extra=None)),
    Use("context missing", partial(bad_context, make=lambda context: None)),
    Use("context of wrong width", partial(bad_context, make=lambda context: torch.cat([context, context[:, :1]], -1))),
    Use("context batch does not match", partial(bad_context, make=lambda context: context[:4])),
    Use("context given, none expected", unwanted_context),
]
