"""Hard uses of numbers: extremes, poison, precision, and whether the log-det is the Jacobian's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.reliability.judge import Model, NotApplicable, Use, Wrong
from benchmarks.reliability.truth import PUSH, Subject, agree, inverts, jacobian

NATS = 0.05
"""What half precision may move a log-det by: more than that, and a comparison of posteriors is about rounding."""


def _right(subject: Subject, z: Tensor, context: Tensor | None, push: float = PUSH) -> None:
    """Both directions give the float64 answer at z."""
    module = subject.module(push=push)
    agree(subject.model.fast(module, z, context), *subject.exact(z, context, push))
    if subject.model.slow is not None:
        inverts(subject, module, z, context, push)


def at(model: Model, values: list[float]) -> None:
    """Points whose coordinates are all such a value, with equal and with mixed signs."""
    subject = Subject(model)
    z = torch.tensor(values).unsqueeze(-1).repeat(1, subject.dim)
    z = torch.cat([z, z * torch.tensor([1.0, -1.0]).repeat(subject.dim)[: subject.dim]])
    _right(subject, z, subject.context(len(z)))


def context_scale(model: Model, scale: float) -> None:
    """The features of an untrained encoder."""
    subject = Subject(model, conditional=True)
    _right(subject, subject.z(4), subject.context(4, scale=scale))


def pushed_far(model: Model) -> None:
    """Weights three times as far from their initialization."""
    subject = Subject(model)
    if not list(subject.module().parameters()):
        raise NotApplicable("has no weights")
    _right(subject, subject.z(4), subject.context(4), push=1.5)


def poisoned_row(model: Model, *, of_context: bool = False) -> None:
    """One bad number in one row: the other rows stay, and the bad row gets no finite answer."""
    subject = Subject(model, conditional=of_context)
    module, z, context = subject.module(), subject.z(5), subject.context(5)
    clean, others = model.fast(module, z, context), torch.tensor([0, 1, 3, 4])
    for poison in (torch.inf, torch.nan) if not of_context else (torch.nan,):
        bad_z, bad_context = z.clone(), None if context is None else context.clone()
        (bad_context if of_context and bad_context is not None else bad_z)[2, 0] = poison
        image, log_det = model.fast(module, bad_z, bad_context)
        hint = f" (another row holds {poison})"
        agree((image[others], log_det[others]), (clean[0][others], clean[1][others]), bound=1e-5, hint=hint)
        if image[2].isfinite().all() and log_det[2].isfinite() and not of_context:
            raise Wrong(f"a row with {poison} gets a finite answer")


def log_det_fast(model: Model) -> None:
    """The float32 log-det against the Jacobian of the same weights in float64."""
    subject = Subject(model)
    z, context = subject.z(16), subject.context(16)
    matrix = jacobian(model.fast, subject.module(dtype=torch.float64), z.double(), _double(context))
    image, log_det = model.fast(subject.module(), z, context)
    _against(log_det, matrix, 1e-3, single=True)


def log_det_slow(model: Model) -> None:
    """The slow direction's, against the fast map's Jacobian at its answer."""
    subject = Subject(model)
    y, context = subject.z(16), subject.context(16)
    preimage, log_det = subject.slow(subject.module(), y, context)
    exact = subject.module(dtype=torch.float64)
    matrix = jacobian(model.fast, exact, preimage.detach().double(), _double(context))
    _against(-log_det, matrix, 1e-3, single=True)


def round_trip(model: Model) -> None:
    """The slow direction undoes the fast one."""
    subject = Subject(model)
    z, context, module = subject.z(8), subject.context(8), subject.module()
    subject.slow  # noqa: B018 - not applicable where there is none
    image, _ = model.fast(module, z, context)
    inverts(subject, module, image.detach(), context)


def float64(model: Model) -> None:
    """A float64 model is exact and stays float64, both ways."""
    subject = Subject(model)
    module, z, context = subject.module(dtype=torch.float64), subject.z(16).double(), _double(subject.context(16))
    image, log_det = model.fast(module, z, context)
    precise(torch.float64, image, log_det)
    _against(log_det, jacobian(model.fast, module, z, context), bound=1e-10)
    if model.slow is not None:
        preimage, inverse = model.slow(module, z.clone(), context)
        precise(torch.float64, preimage, inverse)
        back, forward = model.fast(module, preimage.detach(), context)
        agree((back, -inverse), (z, forward), bound=1e-8, hint=" (round trip in float64)")


def half(model: Model, dtype: torch.dtype) -> None:
    """A half-precision module: near the truth, or refused."""
    subject = Subject(model)
    z, context = subject.z(8).to(dtype), subject.context(8)
    context = None if context is None else context.to(dtype)
    _, log_det = model.fast(subject.module(dtype=dtype), z, context)
    (_, truth), _ = subject.exact(z, context, via=dtype)
    _near(log_det, truth, NATS)


def autocast(model: Model) -> None:
    """Under bfloat16 autocast the log-det is that of the map in float64, or of the map as autocast computed it."""
    subject = Subject(model)
    module, z, context = subject.module(), subject.z(8), subject.context(8)
    (_, truth), _ = subject.exact(z, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, log_det = model.fast(module, z, context)
        matrix = jacobian(model.fast, module, z, context)
    as_computed = torch.linalg.slogdet(matrix.double())[1]
    closer = torch.where((log_det - truth).abs() < (log_det - as_computed).abs(), truth, as_computed)
    _near(log_det, closer, NATS)


def _double(context: Tensor | None) -> Tensor | None:
    return None if context is None else context.double()


def precise(wanted: torch.dtype, *values: Tensor) -> None:
    """Raise `Wrong` where a value has fewer digits than the dtype that was asked for; more are no fault."""
    if any(torch.finfo(value.dtype).eps > torch.finfo(wanted).eps for value in values):
        raise Wrong(f"dtypes {[str(value.dtype) for value in values]}, should be {wanted}")


def _near(log_det: Tensor, truth: Tensor, nats: float) -> None:
    if log_det.shape != truth.shape:
        raise Wrong(f"log-det has shape {tuple(log_det.shape)}, should be {tuple(truth.shape)}")
    if not log_det.isfinite().all():
        raise Wrong("log-det is not finite")
    error = float((log_det.detach().double() - truth.detach().double()).abs().max())
    if error > nats:
        raise Wrong(f"log-det off by {error:.2g} nats, more than {nats}")


def _against(log_det: Tensor, matrix: Tensor, bound: float, *, single: bool = False) -> None:
    """A log-det against a float64 Jacobian, in rows where the Jacobian decides it."""
    condition = torch.linalg.cond(matrix)
    fair = condition < 1e8
    if single and not log_det.isfinite().all():
        raise Wrong("log-det is not finite")
    truth, found = torch.linalg.slogdet(matrix)[1][fair], log_det.detach().double()[fair]
    eps = torch.finfo(torch.float32 if single else torch.float64).eps
    error = (found - truth).abs() - 8 * eps * condition[fair]
    if error.numel() and bool((~(error <= bound * (1 + truth.abs()))).any()):
        raise Wrong(f"log-det off by {float(error.nan_to_num(nan=torch.inf).max()):.2g} nats from the float64 Jacobian")


USES = [
    Use("x = ±1e3", partial(at, values=[1e3, -1e3])),
    Use("x = ±1e6", partial(at, values=[1e6, -1e6])),
    Use("x = 1e-30", partial(at, values=[1e-30, -1e-30])),
    Use("x = 0", partial(at, values=[0.0])),
    Use("x = ±3, ±5, the splines' bounds", partial(at, values=[3.0, -3.0, 5.0, -5.0])),
    Use("one row inf or nan", poisoned_row),
    Use("one context nan", partial(poisoned_row, of_context=True)),
    Use("context × 1e2", partial(context_scale, scale=1e2)),
    Use("context × 1e4", partial(context_scale, scale=1e4)),
    Use("weights pushed × 3", pushed_far),
    Use("log-det, fast, is the Jacobian's", log_det_fast),
    Use("log-det, slow, is the Jacobian's", log_det_slow),
    Use("round trip", round_trip),
    Use("float64 exact", float64),
    Use("bfloat16 module", partial(half, dtype=torch.bfloat16)),
    Use("float16 module", partial(half, dtype=torch.float16)),
    Use("bfloat16 autocast", autocast),
]
