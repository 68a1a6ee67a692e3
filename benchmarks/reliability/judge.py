"""The scoreboard's judge: a model under test, the float64 truth about it, and what an outcome is called."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
Nudged = TypeVar("Nudged", Tensor, Tensor | None)
Direction = Callable[[nn.Module, Tensor, Tensor | None], Pair]

SURVIVED, RAW, SILENT, NOT_APPLICABLE = "survived", "raw", "silent", "n.a."
DIM, CONTEXT, PUSH = 4, 5, 0.5
_NUDGES = 16
SINGLE = 1e-3  # what float32 may err by, relative to 1 + |truth|: wide, so that no rounding is called a fault

# A clear error names an argument of the API and says what was wanted; the same words are asked of every library.
_ARGUMENT = r"(z|x|y|c|h|inputs?|context|features|values?|parameters?|checkpoint|noise|dim)"
_NAMED = re.compile(rf"(?<![\w.(]){_ARGUMENT}\b(?!\.)")
_WANTED = re.compile(
    r"expect|must|should|need|requir|takes|missing|unexpected|at least|only support|"
    r"does not (match|broadcast)|non-finite",
    re.IGNORECASE,
)
_FROM_TORCH = re.compile(r"mat1 and mat2|size of tensor a|invalid for input of size|expected (scalar|m1|self)|\w\(\): ")


class Wrong(Exception):
    """A wrong answer that came without an error; the message is the reason on the scoreboard."""


class NotApplicable(Exception):
    """The use has no meaning for this model: no inverse, no context, no weights."""


@dataclass(frozen=True)
class Model:
    """One model of one library, behind the same few functions as all others.

    Attributes:
        name: as the table calls it.
        build: ``build(dim, context width)``, a fresh module; width 0 is the model without context.
        fast: ``fast(module, z, context)``, the one-pass direction, gives z' and log|det dz'/dz|.
        slow: the other direction, with the log-det of its own map; None where the library has none.
        plain: context width by dim in uses that are not about the context.
        conditional: context width by dim in uses that are; None where the model takes no context.
        optional_context: whether a call has a place for a context that the model does not read.
        changed: what importing the library changed in torch; given to its first model only.
        reload: ``reload(saved, fresh, path)``, the library's own file format; by default torch's.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    fast: Direction
    slow: Direction | None = None
    plain: Callable[[int], int] = lambda dim: 0
    conditional: Callable[[int], int | None] = lambda dim: CONTEXT
    optional_context: bool = True
    changed: tuple[str, ...] | None = None
    reload: Callable[[nn.Module, nn.Module, Path], None] | None = None


def forward(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    """A module that is called with (z, context)."""
    return module(z, context)


def inverse(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    """Its `inverse` method."""
    return cast("Any", module).inverse(z, context)


class Use(NamedTuple):
    """A hard use: it raises `Wrong` for a wrong answer, and lets the library's own errors through."""

    name: str
    check: Callable[[Model], None]
    refusable: bool = True
    """Whether a clear error is as good as an answer: for input, not for what torch's own transforms ask of a module."""


class Verdict(NamedTuple):
    """What became of one use of one model, and why."""

    outcome: str
    reason: str


def judge(use: Use, model: Model) -> Verdict:
    """Try one use on one model."""
    try:
        with torch.random.fork_rng(devices=[]):
            use.check(model)
    except NotApplicable as why:
        return Verdict(NOT_APPLICABLE, str(why))
    except Wrong as fault:
        return Verdict(SILENT, str(fault))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Verdict(SURVIVED if use.refusable and is_clear(error) else RAW, text)
    return Verdict(SURVIVED, "")


def is_clear(error: Exception) -> bool:
    """Whether the message names an argument and what was expected of it, and is not torch's own about its operands."""
    text = str(error)
    return bool(_NAMED.search(text) and _WANTED.search(text) and not _FROM_TORCH.search(text))


class Subject:
    """A model at one size, with its weights pushed, and numbers to feed it; equal subjects give equal bits."""

    def __init__(self, model: Model, dim: int = DIM, *, conditional: bool = False) -> None:
        width = (model.conditional if conditional else model.plain)(dim)
        if width is None:
            raise NotApplicable("takes no context")
        self.model, self.dim, self.width = model, dim, width

    def module(
        self, seed: int = 0, push: float = PUSH, dtype: torch.dtype = torch.float32, via: torch.dtype = torch.float32
    ) -> nn.Module:
        """A fresh module, its weights pushed from initialization, then rounded to `via` and held as `dtype`."""
        torch.manual_seed(seed)
        module = self.model.build(self.dim, self.width)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                # A matrix grows its outputs with the root of its width; the push is meant for the outputs.
                width = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.add_(push / max(width, 1) ** 0.5 * torch.randn(parameter.shape, generator=generator))
        return module.to(via).to(dtype)

    def z(self, *batch: int, scale: float = 1.0, seed: int = 1) -> Tensor:
        """Standard normal points ``(*batch, dim)``, scaled."""
        return scale * torch.randn(*batch, self.dim, generator=torch.Generator().manual_seed(seed))

    def context(self, *batch: int, scale: float = 1.0) -> Tensor | None:
        """Standard normal contexts ``(*batch, width)``, scaled; None for a model that reads none."""
        if not self.width:
            return None
        return scale * torch.randn(*batch, self.width, generator=torch.Generator().manual_seed(2))

    def inputs(self, *batch: int) -> tuple[Tensor, Tensor | None]:
        """Points and contexts."""
        return self.z(*batch), self.context(*batch)

    @cached_property
    def slow(self) -> Direction:
        """The other direction, where there is one."""
        if self.model.slow is None:
            raise NotApplicable("has no inverse")
        return self.model.slow

    def exact(
        self, z: Tensor, context: Tensor | None, push: float = PUSH, via: torch.dtype = torch.float32
    ) -> tuple[Pair, Pair]:
        """The same weights in float64: z' and log-det, and how far roundings of float32 move them.

        The allowance, from moving input, context and weights at random by a few dozen roundings, keeps the verdict fair
        where the map itself is ill-conditioned. First derivatives would not do: a saturated tanh has none.
        """
        module = self.module(push=push, dtype=torch.float64, via=via)
        rows = z.double().reshape(-1, self.dim)
        flat = None if context is None else context.double().reshape(-1, self.width)
        batch, generator = z.shape[:-1], torch.Generator().manual_seed(3)
        with torch.no_grad():
            image, log_det = self.model.fast(module, rows, flat)
            weights = [p.clone() for p in module.parameters()]
            moves = [torch.zeros_like(image), torch.zeros_like(log_det)]
            for _ in range(_NUDGES):
                for parameter, weight in zip(module.parameters(), weights, strict=True):
                    parameter.copy_(_nudge(weight, generator))
                moved = self.model.fast(module, _nudge(rows, generator), _nudge(flat, generator))
                moves = [_larger(old, a - b) for old, a, b in zip(moves, moved, (image, log_det), strict=True)]
        truth, allowed = (image, log_det), (8 * moves[0], 8 * moves[1])
        return _shaped(truth, z.shape, batch), _shaped(allowed, z.shape, batch)


def _nudge(value: Nudged, generator: torch.Generator) -> Nudged:
    if value is None:
        return value
    signs = 2 * torch.randint(0, 2, value.shape, generator=generator) - 1
    return value * (1 + 64 * torch.finfo(torch.float32).eps * signs)


def _larger(old: Tensor, move: Tensor) -> Tensor:
    return torch.maximum(old, move.abs().nan_to_num(nan=0.0, posinf=0.0))


def _shaped(pair: Pair, event: tuple[int, ...], batch: tuple[int, ...]) -> Pair:
    return pair[0].reshape(event), pair[1].reshape(batch)


def jacobian(direction: Direction, module: nn.Module, z: Tensor, context: Tensor | None) -> Tensor:
    """``d z'_i / d z_j`` of every row by plain reverse mode, ``(B, dim, dim)``."""
    z = z.detach().clone().requires_grad_()
    image, _ = direction(module, z, context)
    rows = [torch.autograd.grad(image[:, i].sum(), z, retain_graph=True)[0] for i in range(z.shape[-1])]
    return torch.stack(rows, dim=1)


def agree(found: Pair, truth: Pair, allowed: Pair | None = None, bound: float = SINGLE, hint: str = "") -> None:
    """Raise `Wrong` unless z' and log-det have the truth's shape, are finite, and err by no more than the bound."""
    for name, value, right, slack in zip(("z'", "log-det"), found, truth, allowed or (0.0, 0.0), strict=True):
        if value.shape != right.shape:
            raise Wrong(f"{name} has shape {tuple(value.shape)}, should be {tuple(right.shape)}{hint}")
        value, right = value.detach().double(), right.detach().double()
        if not value.isfinite().all():
            raise Wrong(f"{name} is not finite{_beside(right)}{hint}")
        error = (value - right).abs()
        excess = (error - slack) / (1 + right.abs())
        excess = torch.where(right.isfinite(), excess, 0.0)  # no truth, no verdict
        if excess.numel() and bool(excess.max() > bound):
            place = int(excess.flatten().argmax())
            raise Wrong(f"{name} is {value.flatten()[place]:.6g}, should be {right.flatten()[place]:.6g}{hint}")


def _beside(right: Tensor) -> str:
    return ", in float64 it is" if right.isfinite().all() else ", nor is it in float64"


def inverts(subject: Subject, module: nn.Module, y: Tensor, context: Tensor | None, push: float = PUSH) -> None:
    """Raise `Wrong` unless the slow direction's answer maps back to y, in float64 or by the module itself."""
    preimage, log_det = subject.slow(module, y.clone(), context)
    preimage, log_det = preimage.detach(), log_det.detach()
    if preimage.shape != y.shape or log_det.shape != y.shape[:-1]:
        raise Wrong(f"slow: shapes {tuple(preimage.shape)} and {tuple(log_det.shape)} for {tuple(y.shape)}")
    if not (preimage.isfinite().all() and log_det.isfinite().all()):
        raise Wrong("slow: not finite")
    (image, exact), allowed = subject.exact(preimage, context, push)
    try:
        agree((image, -log_det), (y, exact), allowed, hint=" (mapping the slow direction's answer back in float64)")
    except Wrong:
        own_image, own = subject.model.fast(module, preimage.clone(), context)
        try:
            agree((own_image, -log_det), (y, own), allowed)
        except Wrong:
            pass
        else:
            return
        raise
