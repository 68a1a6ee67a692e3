"""Properties of what goes in and comes out: shapes, strides, dtypes, rows, and input that is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.bijectors.wrappers import Conditioned
from flowpost.testing.cases import Case, Map, Pair, equal, require, same, sides

BATCHES = [(), (1,), (0,), (6,), (1, 1), (2, 3), (2, 0, 3), (4, 1, 2)]
BROADCASTS = [
    ((5, 4), (4,)),
    ((5, 4), (1,)),
    ((2, 5, 4), (5, 1)),
    ((3, 1), (4,)),
    ((4,), (2, 4)),
    ((), (4,)),
    ((4,), ()),
    ((5, 1), (1, 4)),
    ((0, 4), (4,)),
    ((5, 0), (0,)),
]
"""Leading axes of z and of the context."""


def _loose(case: Case) -> float:
    return 1e-10 if case.dtype == torch.float64 else 1e-5


def both(case: Case, step: Bijector, context: Tensor | None, *batch: int) -> Iterator[tuple[str, Pair]]:
    """What each direction gives."""
    for name, direction, z in sides(case, step, *batch):
        yield name, direction(z, context)


def shapes(case: Case) -> float:
    """B5: any leading axes, also none and empty ones, equal to the flat batch; of z, of the context, or of both."""
    step, worst = case.step(), 0.0
    for batch in BATCHES:
        context = case.context(*batch)
        for name, direction, z in sides(case, step, *batch):
            worst = max(worst, _like_the_flat(case, name, direction, z, context))
    for z_batch, context_batch in BROADCASTS if step.context_size else []:
        context = case.context(*context_batch)
        for name, direction, z in sides(case, step, *z_batch):
            worst = max(worst, _like_the_flat(case, name, direction, z, context))
    return worst


def _like_the_flat(case: Case, name: str, direction: Map, z: Tensor, context: Tensor | None) -> float:
    batch = z.shape[:-1] if context is None else torch.broadcast_shapes(z.shape[:-1], context.shape[:-1])
    image, log_det = direction(z, context)
    wanted = (*batch, case.dim)
    require(image.shape == wanted, case, f"{name}: {tuple(z.shape)} became {tuple(image.shape)}, not {wanted}")
    require(log_det.shape == batch, case, f"{name}: batch {batch} has log-det {tuple(log_det.shape)}")
    rows = z.expand(*batch, -1).reshape(-1, case.dim)
    contexts = None if context is None else context.expand(*batch, -1).reshape(len(rows), context.shape[-1])
    flat = direction(rows, contexts)
    found = (image.reshape(rows.shape), log_det.reshape(-1))
    return same(f"{name} of batch {tuple(batch)}", found, flat, _loose(case), case)


def strides(case: Case) -> float:
    """B5: transposed, expanded, flipped and sliced inputs give what contiguous ones do."""
    step, context, worst = case.step(), case.context(4, 2), 0.0
    for name, direction, z in sides(case, step, 4, 2):
        odd = [z.permute(2, 1, 0).contiguous().permute(2, 1, 0), z[:1, :1].expand(4, 2, -1)]
        odd += [z.mT.contiguous().mT, torch.cat([z, z], -1)[..., : case.dim]]
        for points in odd:
            wanted = direction(points.clone(memory_format=torch.contiguous_format), context)
            worst = max(worst, same(f"{name}: strides", direction(points, context), wanted, _loose(case), case))
    return worst


def dtypes(case: Case) -> float:
    """B6 and B20: outputs have z's dtype and device, whatever the default dtype and the context's dtype are."""
    step, z, context = case.step(), case.z(3), case.context(3)
    wanted = [result for _, result in both(case, step, context, 3)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if case.dtype == torch.float64 else torch.float64)
    try:
        found = [result for _, result in both(case, step, context, 3)]
    finally:
        torch.set_default_dtype(default)
    for one, other in zip(found, wanted, strict=True):
        require(equal(one, other), case, "default dtype: changes the result")
        require({t.dtype for t in one} == {case.dtype}, case, f"dtype: {[t.dtype for t in one]}")
        require({t.device for t in one} == {z.device}, case, f"device: {[t.device for t in one]}")
    _moves(case, step, z, context)
    for dtype in () if context is None else (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        cast = case.context(3).to(dtype)  # pyright: ignore[reportOptionalMemberAccess]
        for one, other in zip(both(case, step, cast, 3), both(case, step, cast.to(case.dtype), 3), strict=True):
            require(equal(one[1], other[1]), case, f"context: as {dtype} it is not the same numbers in {case.dtype}")
    return 0.0


def _moves(case: Case, step: Bijector, z: Tensor, context: Tensor | None) -> None:
    other = torch.float32 if case.dtype == torch.float64 else torch.float64
    moved = copy.deepcopy(step).to(other)
    held = [name for name, t in moved.state_dict().items() if torch.is_floating_point(t) and t.dtype != other]
    require(not held, case, f"dtypes: .to({other}) leaves {held} behind")
    require({t.dtype for t in moved(z.to(other), context)} == {other}, case, f"dtypes: wrong after .to({other})")


def autocast(case: Case) -> float:
    """B19: under bfloat16 autocast outputs keep z's dtype; a step without a network keeps every bit.

    The number returned is how far a network's rounding moves the log-det in the mean, which is reported and not judged.
    """
    step, context = case.step(), case.context(64, scale=min(case.context_scale, 1.0))
    heads = {module.head for module in step.modules() if isinstance(module, Conditioned)}
    parts = [m for m in step.modules() if m not in heads and not isinstance(m, Bijector | torch.nn.ModuleList)]
    worst = 0.0
    for name, direction, z in sides(case, step, 64):
        wanted = direction(z, context)
        with torch.autocast(z.device.type, dtype=torch.bfloat16):
            found = direction(z, context)
        require({t.dtype for t in found} == {case.dtype}, case, f"autocast: {name} gives {[t.dtype for t in found]}")
        require(parts or equal(found, wanted), case, f"autocast: {name} is changed, and runs no network")
        worst = max(worst, float((found[1] - wanted[1]).detach().abs().mean()))
    return worst


def rows(case: Case) -> float:
    """B7: a poisoned row leaves the others bit-equal and has no finite value with a finite log-det; splits agree."""
    step, context, worst = case.step(), case.context(6), 0.0
    for name, direction, z in sides(case, step, 6):
        wanted = direction(z, context)
        for poison in (torch.nan, torch.inf, -torch.inf, 1e6):
            _poisoned(case, f"{name}, z", direction, _with(z, poison), context, wanted, spoils=abs(poison) != 1e6)
            if context is not None:
                spoils = poison != poison  # an infinite context has a finite limit in a soft bound
                _poisoned(case, f"{name}, context", direction, z, _with(context, poison), wanted, spoils=spoils)
        worst = max(worst, _split(case, name, direction, z, context, wanted))
    return worst


def _with(tensor: Tensor, poison: float) -> Tensor:
    bad = tensor.clone()
    bad[2] = poison
    return bad


def _poisoned(
    case: Case, name: str, direction: Map, z: Tensor, context: Tensor | None, wanted: Pair, *, spoils: bool
) -> None:
    found, others = direction(z, context), torch.tensor([0, 1, 3, 4, 5], device=z.device)
    clean = equal([t[others] for t in found], [t[others] for t in wanted])
    require(clean, case, f"rows: a poisoned row 2 changes other rows ({name})")
    finite = bool(found[0][2].isfinite().all() and found[1][2].isfinite())
    require(not (finite and spoils), case, f"rows: a poison is swallowed ({name})")


def _split(case: Case, name: str, direction: Map, z: Tensor, context: Tensor | None, wanted: Pair) -> float:
    """Rows in another order, alone, and in two parts."""
    places = [torch.tensor(some, device=z.device) for some in ([3, 0, 5, 1, 4, 2], [0], [4], [1, 2], [3, 5])]
    worst = 0.0
    for place in places:
        found = direction(z[place], None if context is None else context[place])
        bound = max(_loose(case), 1e-8)
        worst = max(worst, same(f"{name}: batch split", found, [t[place] for t in wanted], bound, case))
    return worst


def bad_input(case: Case) -> float:
    """B23: what cannot be right is refused by the listed type, with a message that names the argument."""
    step, z, context = case.step(), case.z(6), case.context(6)
    width, reader = step.context_size, f"context: {step.layout()} of dim {case.dim} reads"
    faults: list[tuple[object, object, type[Exception], str]] = [
        (torch.cat([z, z], -1), context, ValueError, f"z: expected shape (*, {case.dim})"),
        (z[0, 0], context, ValueError, f"z: expected shape (*, {case.dim}), got ()"),
        (z.tolist(), context, TypeError, "z: expected a torch.Tensor, got list"),
        (z.long(), context, TypeError, "z: expected a floating dtype, got torch.int64; call .float()"),
        (z.bfloat16(), context, TypeError, "z: expected float32 or float64, got torch.bfloat16"),
    ]
    if width:
        short = "context: batch shape (4,) does not broadcast with z batch shape (6,)"
        faults += [
            (z, None, ValueError, f"{reader} {width} numbers, got None"),
            (z, z.new_zeros(6, width + 1), ValueError, f"{reader} {width} numbers, got shape (6, {width + 1})"),
            (z, z.new_zeros(4, width), ValueError, short),
        ]
    else:
        faults.append((z, z.new_zeros(6, 3), ValueError, f"{reader} none, got shape (6, 3)"))
    for bad, condition, kind, message in faults:
        for direction in (step, step.inverse):
            found = _raised(direction, bad, condition)
            right = isinstance(found, kind) and str(found).startswith(message)
            require(right, case, f"bad input: expected {kind.__name__} '{message}', got {found!r}")
    return 0.0


def _raised(direction: Callable[..., object], z: object, context: object) -> Exception | None:
    try:
        direction(z, context)
    except Exception as error:  # whatever it is, it is compared with what it should be
        return error
    return None
