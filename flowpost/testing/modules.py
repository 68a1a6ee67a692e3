"""Properties of the module: its calls leave no trace, and whatever is done to a torch module, it stays the same map."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowpost.bijectors.base import Bijector
from flowpost.numerics.states import named_once
from flowpost.testing.cases import Case, Map, Pair, equal, leaves, require, reseed, same, sides, weighed
from flowpost.testing.tensors import both


def purity(case: Case) -> float:
    """B8 and B22: inputs unchanged; equal calls, equal bits; a refilled input or a moved weight, a fresh answer.

    Without gradients the answer is the same.
    """
    state, wide = torch.random.get_rng_state(), case.dtype == torch.float64
    for name in ("forward", "inverse"):
        step, context, other = case.step(), case.context(4), case.context(4, scale=2.0)
        points = case.z if name == "forward" else case.y
        direction, z = getattr(step, name), points(4)
        first = direction(z, context)
        require(equal(direction(z, context), first), case, f"purity: a second call differs ({name})")
        with torch.no_grad():  # where a step may take a shorter way, which gives the same but for rounding
            quiet = direction(z, context)
        same(f"purity: under no_grad another answer ({name})", quiet, first, 1e-10 if wide else 1e-4, case)
        untouched = torch.equal(z, points(4)) and (context is None or torch.equal(context, case.context(4)))  # pyright: ignore
        require(untouched, case, f"purity: an input was changed ({name})")
        z.copy_(points(4, scale=2.0))
        if context is not None and other is not None:
            context.copy_(other)
        clones = (z.clone(), None if context is None else context.clone())
        require(equal(direction(z, context), direction(*clones)), case, f"purity: a stale answer ({name})")
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.add_(0.1)
        fresh = getattr(copy.deepcopy(step), name)
        require(equal(direction(z, context), fresh(*clones)), case, f"purity: stale weights ({name})")
        grads = [_gradient(direction, points(4), context) for _ in range(2)]
        require(torch.equal(*grads), case, f"purity: a second backward differs ({name})")
    require(torch.equal(state, torch.random.get_rng_state()), case, "purity: the global random state was used")
    _start_is_safe(case)
    return 0.0


def _gradient(direction: Map, z: Tensor, context: Tensor | None) -> Tensor:
    z.requires_grad_()
    return torch.autograd.grad(weighed(*direction(z, context)), z)[0]


def _start_is_safe(case: Case) -> None:
    step = case.step()
    start = step.initial_context().clone()
    step.initial_context().add_(1)
    require(torch.equal(step.initial_context(), start), case, "purity: initial_context is changed by who receives it")


def state(case: Case) -> float:
    """B13: state_dict into a fresh step of another seed, deepcopy and pickle, after a backward, give equal bits."""
    step = case.step()
    for _, direction, z in sides(case, step, 3):
        z, context, inputs = leaves(step, z, case.context(3))
        weighed(*direction(z, context)).backward(inputs=inputs)
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    file.seek(0)
    other = case.step(case.seed + 1000)
    other.load_state_dict(torch.load(file, weights_only=True, map_location=case.device))
    copied = {"deepcopy": copy.deepcopy(step), "pickle": pickle.loads(pickle.dumps(step))}
    for name, module in {"state_dict": other, **copied}.items():
        _same_map(case, f"state: {name}", module.train(), step.train())
        _same_map(case, f"state: {name} in eval", module.eval(), step.eval())
    for name, module in copied.items():
        kept = torch.equal(module.initial_context(), step.initial_context())
        require(kept, case, f"state: {name} starts elsewhere")
    return 0.0


def _same_map(case: Case, name: str, found: Bijector, wanted: Bijector) -> None:
    pairs = [_seeded(case, step) for step in (found, wanted)]
    for (side, one), (_, other) in zip(*pairs, strict=True):
        require(equal(one, other), case, f"{name}: another answer ({side})")


def _seeded(case: Case, step: Bijector) -> list[tuple[str, Pair]]:
    """What each direction gives, where it draws, as dropout in training does, from one seed."""
    with torch.random.fork_rng(devices=[]):
        reseed(case.seed)
        return [*both(case, step, case.context(3), 3)]


def rebuilt(case: Case) -> float:
    """B28: what is not saved is rebuilt: built on the meta device, emptied, loaded, a step is the same map to the bit.

    Also where it is loaded by assignment, which empties nothing. A start is not saved: it is drawn anew, and finite.
    """
    step, other = case.step(), case.seed + 1000
    saved = copy.deepcopy(step.state_dict())
    with _filled():
        fresh = {
            "emptied": case.step(other).to_empty(device=case.device),
            "built on meta, emptied": case.step(other, device="meta").to_empty(device=case.device),
            "moved to meta, emptied": case.step(other).to("meta").to_empty(device=case.device),
        }
    for name, module in fresh.items():
        module.load_state_dict(saved)
        _same_map(case, f"rebuilt: {name}", module, step)
        require(module.initial_context().isfinite().all(), case, f"rebuilt: {name}, its start is not finite")
    assigned = case.step(other, device="meta")
    assigned.load_state_dict(saved, assign=True)
    _same_map(case, "rebuilt: built on meta, loaded by assignment", assigned, step)
    return 0.0


@contextmanager
def _filled() -> Iterator[None]:
    """What is not initialized is nan, and not by chance what it was before."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # noqa: FBT003
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def averaged(case: Case) -> float:
    """B29: an average of weights that takes the buffers along, or a cast, is the step with those weights."""
    step, moved = case.step(), case.step()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(0.9)
    worst, beside = 0.0, nn.Linear(1, 1)  # torch averages no module without parameters
    for mean in (None, get_ema_multi_avg_fn(0.9)):
        average = AveragedModel(nn.ModuleList([step, beside]), use_buffers=True, multi_avg_fn=mean)
        for module in (step, moved, moved):
            average.update_parameters(nn.ModuleList([module, beside]))
        found = cast(Bijector, cast(nn.ModuleList, average.module)[0])
        wanted = copy.deepcopy(step)
        wanted.load_state_dict({**wanted.state_dict(), **dict(found.named_parameters())})
        context = case.context(3)
        pairs = zip(both(case, found, context, 3), both(case, wanted, context, 3), strict=True)
        for (name, one), (_, other) in pairs:
            worst = max(worst, same(f"averaged: {name}", one, other, 1e-12, case))
    narrow = copy.deepcopy(step).half().to(case.dtype)
    with torch.no_grad():
        for parameter, exact in zip(narrow.parameters(), step.parameters(), strict=True):
            parameter.copy_(exact)
        exact, rounded = step.state_dict(), narrow.state_dict()
        for key, buffer in narrow.named_buffers():
            # One that the state says was rounded is data, as a parameter is; a constant says what it was made with.
            if key in exact and not torch.equal(exact[key], rounded[key]):
                buffer.copy_(exact[key])
    _same_map(case, "averaged: cast to half and back", narrow, step)
    return worst


def unchanged(case: Case) -> float:
    """B26: an evaluation changes no state_dict, bit for bit, its layers' weights reparametrized or as they are."""
    for name, step in (("", case.step()), (", layers reparametrized", reparametrized(case.step()))):
        before = copy.deepcopy(step.state_dict())
        for kind, evaluate in _evaluations(case, step).items():
            evaluate()
            after = step.state_dict()
            kept = before.keys() == after.keys() and all(_alike(before[key], after[key]) for key in before)
            require(kept, case, f"unchanged: {kind} changes the state_dict{name}")
    return 0.0


def _evaluations(case: Case, step: Bijector) -> dict[str, Callable[[], None]]:
    context = case.context(3)
    axes = (0, None if context is None else 0)

    def each(run: Callable[[Map, Tensor], object]) -> Callable[[], None]:
        def evaluate() -> None:
            for _, direction, z in sides(case, step, 3):
                run(direction, z)

        return evaluate

    @torch.no_grad()
    def quietly(direction: Map, z: Tensor) -> None:
        direction(z, context)

    @torch.autocast(case.device, dtype=torch.bfloat16)
    @torch.no_grad()
    def narrowly(direction: Map, z: Tensor) -> None:
        direction(z, context)

    # By names of which each place has one: where a step comes twice, torch puts back what stood in for its weights.
    twofold = {name: 2 * each for name, each in named_once(step).items()}
    return {
        "a call": each(lambda f, z: f(z, context)),
        "a call under no_grad": each(quietly),
        "autocast": each(narrowly),
        "vmap": each(lambda f, z: torch.func.vmap(f, in_dims=axes)(z, context)),
        "jacrev": each(lambda f, z: torch.func.vmap(torch.func.jacrev(lambda *a: f(*a)[0]), in_dims=axes)(z, context)),
        "functional_call": lambda: (
            torch.func.functional_call(step, twofold, (case.z(3), context), tie_weights=False) and None
        ),
    }


def _alike(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def layers(case: Case) -> float:
    """B27: a layer that somebody changed is called in both directions: reparametrized, or with a hook.

    Half the length of a reparametrized weight is half the weight.
    """
    step, plain = reparametrized(case.step()), case.step()
    with torch.no_grad():
        for name, parameter in step.named_parameters():
            if name.endswith("parametrizations.weight.original0"):
                parameter.mul_(0.5)
        for module in layered(plain):
            module.get_parameter("weight").mul_(0.5)
    worst, bound = 0.0, 1e-10 if case.dtype == torch.float64 else 1e-5
    context = case.context(3)
    for (name, found), (_, wanted) in zip(both(case, step, context, 3), both(case, plain, context, 3), strict=True):
        worst = max(worst, same(f"layers: {name}", found, wanted, bound, case))
    _hooked(case)
    return worst


def _hooked(case: Case) -> None:
    step, called = case.step(), set[nn.Module]()
    for module in layered(step):
        module.register_forward_hook(lambda module, *_: called.add(module))
    for name, _ in both(case, step, case.context(3), 3):
        missed = [type(module).__name__ for module in layered(step) if module not in called]
        require(not missed, case, f"layers: with a hook, {missed} are not called ({name})")
        called.clear()


def layered(step: Bijector) -> list[nn.Module]:
    """The layers within a step that have a matrix of weights."""
    parts = [module for module in step.modules() if not isinstance(module, Bijector)]
    weights = [(module, dict(module.named_parameters(recurse=False)).get("weight")) for module in parts]
    return [module for module, weight in weights if weight is not None and weight.ndim == 2 and weight.numel()]


def reparametrized(step: Bijector) -> Bijector:
    """Each layer's weight a direction and a length of its own (weight norm)."""
    for module in layered(step):
        parametrizations.weight_norm(module)
    return step
