"""Hard uses of state: copies, files, caches, global settings."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.reliability.judge import Direction, Model, NotApplicable, Use, Wrong
from benchmarks.reliability.truth import Subject, agree


def _directions(model: Model) -> list[Direction]:
    return [model.fast, *([] if model.slow is None else [model.slow])]


def _backward(direction: Direction, module: nn.Module, z: Tensor, context: Tensor | None) -> None:
    image, log_det = direction(module, z, context)
    total = (image**2).sum() + log_det.sum()
    if total.requires_grad:
        total.backward()


def unmutated(model: Model) -> None:
    """The input is as it was."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(5)
    kept = z.clone(), None if context is None else context.clone()
    for direction in _directions(model):
        direction(module, z, context)
        pairs = zip((z, context), kept, strict=True)
        if not all(torch.equal(now, before) for now, before in pairs if now is not None and before is not None):
            raise Wrong("the input was changed in place")


def copies(model: Model, copier: Callable[[nn.Module], nn.Module]) -> None:
    """A copy of a module that was used gives the same answer."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(5)
    for direction in _directions(model):
        _backward(direction, module, z, context)
    agree(model.fast(copier(module), z, context), model.fast(module, z.clone(), context), bound=1e-6)


def restores(model: Model, *, train: bool) -> None:
    """Weights from a file, in a fresh module of another seed."""
    subject = Subject(model)
    module, fresh, (z, context) = subject.module().train(train), subject.module(seed=9), subject.inputs(5)
    model.fast(module, z, context)
    with tempfile.TemporaryDirectory() as folder:
        _reload(module, fresh, Path(folder) / "weights")
    agree(model.fast(fresh.train(train), z, context), model.fast(module, z.clone(), context), bound=1e-6)


def nan_weights(model: Model) -> None:
    """A file with a NaN weight is noticed on the way, by the library's own loader where it has one."""
    subject = Subject(model)
    module, fresh = subject.module(), subject.module(seed=9)
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise NotApplicable("has no weights")
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with tempfile.TemporaryDirectory() as folder:
        (model.reload or _reload)(module, fresh, Path(folder) / "weights")
    raise Wrong("a NaN weight was loaded without a word")


def _reload(module: nn.Module, fresh: nn.Module, path: Path) -> None:
    torch.save(module.state_dict(), path)
    fresh.load_state_dict(torch.load(path, weights_only=True))


def twice(model: Model) -> None:
    """The same tensor twice, and a backward for each."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(5)
    z.requires_grad_()
    slopes = []
    for _ in range(2):
        image, log_det = model.fast(module, z, context)
        slopes.append(torch.autograd.grad(image.sum() + log_det.sum(), z)[0])
    agree((slopes[0], slopes[0]), (slopes[1], slopes[1]), bound=1e-6, hint=" (gradient of the second call)")


def refilled(model: Model) -> None:
    """A buffer that is refilled in place gets the new answer."""
    subject = Subject(model)
    for direction in _directions(model):
        module, (z, context), new = subject.module(), subject.inputs(5), subject.z(5, seed=5)
        direction(module, z, context)
        z.copy_(new)
        agree(direction(module, z, context), direction(subject.module(), new, context), bound=1e-5, hint=" (stale)")


def stepped(model: Model) -> None:
    """After an optimizer's step the same tensor gets the new weights' answer."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(5)
    if not list(module.parameters()):
        raise NotApplicable("has no weights")
    model.fast(module, z, context)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    fresh = subject.module(seed=9)
    fresh.load_state_dict(module.state_dict())
    agree(model.fast(module, z, context), model.fast(fresh, z.clone(), context), bound=1e-5, hint=" (stale)")


def after_inference(model: Model) -> None:
    """Used under inference mode for validation, then trained on the same tensor."""
    subject = Subject(model)
    (z, context), grads = subject.inputs(5), []
    for validate in (True, False):
        module = subject.module()
        if validate:
            with torch.inference_mode():
                model.fast(module, z, context)
        _backward(model.fast, module, z, context)
        grads.append([p.grad for p in module.parameters()])
    for found, truth in zip(*grads, strict=True):
        if (found is None) != (truth is None):
            raise Wrong("a weight gets no gradient after a call under inference mode")
        if found is not None and truth is not None:
            agree((found, found), (truth, truth), bound=1e-5, hint=" (gradient)")


def repeatable(model: Model) -> None:
    """Two calls, equal bits; the global random state is not used."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(5)
    state = torch.random.get_rng_state()
    first, second = (model.fast(module, z.clone(), context) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise Wrong("the same call twice gives other bits")
    if not torch.equal(state, torch.random.get_rng_state()):
        raise Wrong("the global random state was used")


def splits(model: Model) -> None:
    """Two parts of a batch give what the batch gives."""
    subject = Subject(model)
    module, (z, context) = subject.module(), subject.inputs(6)
    parts = [model.fast(module, z[i], None if context is None else context[i]) for i in (slice(0, 2), slice(2, 6))]
    joined = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    agree(joined, model.fast(module, z, context), bound=1e-5)


def default_dtype(model: Model) -> None:
    """The default dtype is another one than the module's."""
    subject = Subject(model)
    truth = [direction(subject.module(), *subject.inputs(5)) for direction in _directions(model)]
    module, inputs = subject.module(), subject.inputs(5)
    torch.set_default_dtype(torch.float64)
    try:
        for direction, wanted in zip(_directions(model), truth, strict=True):
            found = direction(module, *inputs)
            agree(found, wanted, bound=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def import_changes(model: Model) -> None:
    """Importing the library leaves torch's global settings alone."""
    if model.changed is None:
        raise NotApplicable("asked once a library")
    if model.changed:
        raise Wrong(f"importing it changes {', '.join(model.changed)}")


USES = [
    Use("input not mutated", unmutated),
    Use("deepcopy after use", partial(copies, copier=copy.deepcopy), refusable=False),
    Use("pickle after use", partial(copies, copier=lambda m: pickle.loads(pickle.dumps(m))), refusable=False),
    Use("state_dict, weights_only, another seed", partial(restores, train=False), refusable=False),
    Use("resume in train() mode", partial(restores, train=True), refusable=False),
    Use("NaN weights noticed on load", nan_weights),
    Use("same tensor twice, backward twice", twice, refusable=False),
    Use("input refilled in place", refilled, refusable=False),
    Use("weights stepped", stepped, refusable=False),
    Use("inference mode, then training", after_inference, refusable=False),
    Use("repeatable, no global randomness", repeatable, refusable=False),
    Use("result independent of batch split", splits, refusable=False),
    Use("default dtype changed", default_dtype, refusable=False),
    Use("import leaves torch as it was", import_changes, refusable=False),
]
