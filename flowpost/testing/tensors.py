"""Properties of the code: shapes, dtypes, rows, purity, state, transforms of torch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from flowpost.bijectors.base import Bijector
from flowpost.bijectors.wrappers import Inverse
from flowpost.testing.cases import Case, Pair, place, require, within

Inputs = tuple[Bijector, Tensor, Tensor | None]


def _loose(case: Case) -> float:
    return 1e-10 if case.dtype == torch.float64 else 1e-5


def _sides(case: Case, step: Bijector, *batch: int) -> Iterator[tuple[str, Callable[..., Pair], Tensor]]:
    """Both directions, with points where they are defined."""
    yield "forward", step, case.z(*batch)
    yield "inverse", step.inverse, case.y(*batch)


def _both(case: Case, step: Bijector, context: Tensor | None, *batch: int) -> Iterator[tuple[str, Pair]]:
    for name, direction, z in _sides(case, step, *batch):
        yield name, direction(z, context)


def _same(name: str, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], bound: float, case: Case) -> float:
    errors = [
        within(name, (a - b).abs().detach().flatten(), bound * (1 + b.abs().detach().flatten()), case)
        for a, b in zip(found, wanted, strict=True)
    ]
    return max(errors)


def _equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def shapes(case: Case) -> float:
    """B5: any leading axes, also none and empty ones, expanded and transposed inputs, equal to the flat batch."""
    step, worst = case.step(), 0.0
    for batch in [(), (1,), (0,), (3,), (2, 3), (2, 0, 3), (1, 1), (3, 1)]:
        for name, (image, log_det) in _both(case, step, case.context(*batch), *batch):
            shape = (*batch, case.dim)
            require(image.shape == shape, case, f"{name}: {shape} became {tuple(image.shape)}")
            require(log_det.shape == batch, case, f"{name}: batch {batch} has log-det {tuple(log_det.shape)}")
    context = case.context(3)
    full = None if context is None else context.expand(4, -1, -1)
    flat = None if full is None else full.reshape(12, -1)
    for _, direction, z in _sides(case, step, 4, 3):
        wanted = direction(z.reshape(12, -1), flat)
        wanted = (wanted[0].view(4, 3, -1), wanted[1].view(4, 3))
        worst = max(worst, _same("context with fewer axes", direction(z, context), wanted, _loose(case), case))
        strided = z.mT.contiguous().mT
        worst = max(worst, _same("transposed z", direction(strided, full), wanted, _loose(case), case))
    return worst


def dtypes(case: Case) -> float:
    """B6 and B20: outputs have z's dtype and device, whatever the default dtype and autocast say."""
    step, z, context = case.step(), case.z(3), case.context(3)
    wanted = [result for _, result in _both(case, step, context, 3)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if case.dtype == torch.float64 else torch.float64)
    try:
        found = [result for _, result in _both(case, step, context, 3)]
    finally:
        torch.set_default_dtype(default)
    for one, other in zip(found, wanted, strict=True):
        require(_equal(one, other), case, "default dtype: changes the result")
        require({t.dtype for t in one} == {case.dtype}, case, f"dtype: {[t.dtype for t in one]}")
        require({t.device for t in one} == {z.device}, case, f"device: {[t.device for t in one]}")
    other = torch.float32 if case.dtype == torch.float64 else torch.float64
    moved = copy.deepcopy(step).to(other)
    held = [name for name, t in moved.state_dict().items() if t.is_floating_point() and t.dtype != other]
    require(not held, case, f"dtypes: .to({other}) leaves {held} behind")
    require({t.dtype for t in moved(z.to(other), context)} == {other}, case, f"dtypes: wrong after .to({other})")
    return 0.0


def autocast(case: Case) -> float:
    """B19: under bfloat16 autocast outputs keep z's dtype, and stay near the full-precision ones."""
    step, z, context = case.step(), case.z(64), case.context(64, scale=min(case.context_scale, 1.0))
    wanted = step(z, context)
    with torch.autocast(z.device.type, dtype=torch.bfloat16):
        found = step(z, context)
    require({t.dtype for t in found} == {case.dtype}, case, f"autocast: dtypes {[t.dtype for t in found]}")
    return float((found[1] - wanted[1]).detach().abs().mean())


def rows(case: Case) -> float:
    """B7: a poisoned row leaves the others bit-equal and has no finite value with a finite log-det; splits agree."""
    step, z, context = case.step(), case.z(6), case.context(6)
    others = torch.tensor([0, 1, 3, 4, 5], device=z.device)
    for poison in (torch.nan, torch.inf, 1e6):
        for name, direction, good in _sides(case, step, 6):
            bad = good.clone()
            bad[2] = poison
            found, wanted = direction(bad, context), direction(good, context)
            clean = _equal(tuple(t[others] for t in found), tuple(t[others] for t in wanted))
            require(clean, case, f"rows: {poison} in row 2 changes other rows ({name})")
            finite = bool(found[0][2].isfinite().all() and found[1][2].isfinite())
            require(not (finite and poison != 1e6), case, f"rows: {poison} is swallowed ({name})")
    halves = [step(z[part], None if context is None else context[part]) for part in (slice(0, 2), slice(2, 6))]
    joined = (torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves]))
    return _same("batch split", joined, step(z, context), max(_loose(case), 1e-8), case)


def purity(case: Case) -> float:
    """B8 and B22: inputs unchanged; equal calls, equal bits; a refilled input or a moved weight, a fresh answer."""
    step, z, context = case.step(), case.z(4), case.context(4)
    before, state = z.clone(), torch.random.get_rng_state()
    first = [result for _, result in _both(case, step, context, 4)]
    again = [result for _, result in _both(case, step, context, 4)]
    require(all(_equal(a, b) for a, b in zip(first, again, strict=True)), case, "purity: a second call differs")
    require(torch.equal(z, before), case, "purity: the input was changed")
    require(torch.equal(state, torch.random.get_rng_state()), case, "purity: the global random state was used")
    z.copy_(case.z(4, scale=2.0))
    require(_equal(step(z, context), step(z.clone(), context)), case, "purity: a stale answer for a refilled input")
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(0.1)
    require(_equal(step(z, context), copy.deepcopy(step)(z.clone(), context)), case, "purity: stale weights")
    return 0.0


def context_matters(case: Case) -> float:
    """B9: the outputs' gradient reaches every number of the context."""
    step, z, context = case.step(), case.z(16), case.context(16)
    if context is None or case.push == 0:
        return 0.0
    image, log_det = step(z, context.requires_grad_())
    weights = torch.linspace(1, 2, image.numel(), dtype=z.dtype, device=z.device).view_as(image)
    (gradient,) = torch.autograd.grad((weights * image).sum() + log_det.sum(), context)
    unread = (gradient == 0).all(0).nonzero().flatten().tolist()
    require(not unread, case, f"context: numbers {unread} are never read")
    return 0.0


def extremes(case: Case) -> float:
    """B11: finite values and gradients, both ways: z from 1e-30 to 1e6, zero and large contexts, far-pushed weights."""
    values = torch.tensor([0.0, 1e-30, 1.0, -1.0, 1e3, -1e3, 1e6, -1e6], dtype=case.dtype, device=case.device)
    z = values.unsqueeze(-1).repeat(1, case.dim)
    for amount in (0.0, 1.0, 20.0, 100.0):
        step = Case(case.make, case.dim, case.context_size, case.dtype, case.seed, amount).step()
        for scale in (0.0, 1.0, 1e2, 1e4):
            context = case.context(len(values), scale=scale)
            if context is not None and scale == 0:
                context = torch.zeros_like(context)
            for direction, interval in ((step.forward, step.domain), (step.inverse, step.codomain)):
                results = _with_gradients(direction, step, place(z, interval), context)
                finite = all(bool(t.isfinite().all()) for t in results)
                name = direction.__name__
                require(finite, case, f"extremes: {name} not finite at push {amount}, context scale {scale}")
    return 0.0


def state(case: Case) -> float:
    """B13: state_dict into a fresh step of another seed, deepcopy and pickle, after a backward, give equal bits."""
    step, z, context = case.step(), case.z(3), case.context(3)
    sum(t.sum() for t in step(z.clone().requires_grad_(), context)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    file.seek(0)
    other = case.step(case.seed + 1000)
    other.load_state_dict(torch.load(file, weights_only=True, map_location=case.device))
    for name, copied in (
        ("state_dict", other.train()),
        ("deepcopy", copy.deepcopy(step)),
        ("pickle", pickle.loads(pickle.dumps(step))),
    ):
        results = zip(_both(case, copied, context, 3), _both(case, step, context, 3), strict=True)
        for (_, found), (_, wanted) in results:
            require(_equal(found, wanted), case, f"state: {name} gives another answer")
    return 0.0


def transforms(case: Case) -> float:
    """B17: vmap over points, vmap of jacrev, and functional_call equal the plain call."""
    step, z, context = case.step(), case.z(3), case.context(3)
    axes = (0, None if context is None else 0)
    bound = 1e-8 if case.dtype == torch.float64 else 1e-4
    worst = 0.0
    for _, direction, points in _sides(case, step, 3):
        mapped = torch.func.vmap(lambda a, c, f=direction: f(a, c), in_dims=axes)(points, context)
        worst = max(worst, _same("vmap", mapped, direction(points, context), bound, case))
    slopes = torch.func.vmap(torch.func.jacrev(lambda a, c: step(a, c)[0]), in_dims=axes)(z, context)
    sign, log_det = torch.linalg.slogdet(slopes)
    require(bool((sign != 0).all()), case, "jacrev: singular")
    parameters: dict[str, Tensor] = dict(step.named_parameters())
    called = torch.func.functional_call(step, parameters, (z, context))
    require(_equal(called, step(z, context)), case, "functional_call: another answer")
    return worst


def compiles(case: Case) -> float:
    """B18: fullgraph compile of both directions: values and all gradients equal eager."""
    step, worst = case.step(), 0.0
    context, bound = case.context(3), 1e-10 if case.dtype == torch.float64 else 1e-4
    for direction, z in ((step.forward, case.z(3)), (step.inverse, case.y(3))):
        torch._dynamo.reset()
        compiled = torch.compile(direction, backend="aot_eager", fullgraph=True)
        results = [_with_gradients(f, step, z, context) for f in (compiled, direction)]
        for found, wanted in zip(*results, strict=True):
            scale = 1 + wanted.abs().max() if wanted.numel() else 1.0
            worst = max(worst, within("compile", (found - wanted).abs().flatten(), bound * scale, case))
    return worst


def _with_gradients(
    direction: Callable[..., tuple[Tensor, Tensor]], step: Bijector, z: Tensor, context: Tensor | None
) -> list[Tensor]:
    inputs = [z.clone().requires_grad_()] + ([] if context is None else [context.clone().requires_grad_()])
    image, log_det = direction(*inputs)
    wanted = [*inputs, *step.parameters()]
    grads = torch.autograd.grad(image.sum() + log_det.sum(), wanted, allow_unused=True)
    return [image.detach(), log_det.detach(), *(g for g in grads if g is not None)]


def bad_input(case: Case) -> float:
    """B23: what cannot be right is refused by the listed type, with a message that names the argument."""
    step, z, context = case.step(), case.z(6), case.context(6)
    width, reader = step.context_size, f"context: {step.layout()} of dim {case.dim} reads"
    rows: list[tuple[object, object, type[Exception], str]] = [
        (torch.cat([z, z], -1), context, ValueError, f"z: expected shape (*, {case.dim})"),
        (z[0, 0], context, ValueError, f"z: expected shape (*, {case.dim}), got ()"),
        (z.tolist(), context, TypeError, "z: expected a torch.Tensor, got list"),
        (z.long(), context, TypeError, "z: expected a floating dtype, got torch.int64; call .float()"),
        (z.bfloat16(), context, TypeError, "z: expected float32 or float64, got torch.bfloat16"),
    ]
    if width:
        rows += [
            (z, None, ValueError, f"{reader} {width} numbers, got None"),
            (z, z.new_zeros(6, width + 1), ValueError, f"{reader} {width} numbers, got shape (6, {width + 1})"),
            (
                z,
                z.new_zeros(4, width),
                ValueError,
                "context: batch shape (4,) does not broadcast with z batch shape (6,)",
            ),
        ]
    else:
        rows.append((z, z.new_zeros(6, 3), ValueError, f"{reader} none, got shape (6, 3)"))
    for bad, condition, kind, message in rows:
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


def passes(case: Case) -> float:
    """B24: forward calls no inner network more than once; an `Inverse` at most dim times."""
    step, z, context = case.step(), case.z(3), case.context(3)
    counts: dict[nn.Module, int] = {}
    networks = [m for m in step.modules() if not isinstance(m, Bijector)]
    hooks = [m.register_forward_hook(lambda m, *_: counts.update({m: counts.get(m, 0) + 1})) for m in networks]
    step(z, context)
    for hook in hooks:
        hook.remove()
    most = max(counts.values(), default=0)
    require(
        most <= (case.dim if isinstance(step, Inverse) else 1), case, f"passes: forward runs one network {most} times"
    )
    return float(most)
