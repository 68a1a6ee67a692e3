"""What is right: a model at one size with its weights pushed, the same in float64, and how answers are compared."""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.reliability.judge import Direction, Model, NotApplicable, Pair, Wrong

Nudged = TypeVar("Nudged", Tensor, Tensor | None)
DIM, PUSH = 4, 0.5
_NUDGES = 16
SINGLE = 1e-3  # what float32 may err by, relative to 1 + |truth|: wide, so that no rounding is called a fault


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
        self,
        z: Tensor,
        context: Tensor | None,
        push: float = PUSH,
        via: torch.dtype = torch.float32,
        direction: Direction | None = None,
    ) -> tuple[Pair, Pair]:
        """The same weights in float64: z' and log-det, and how far roundings of float32 move them.

        The allowance, from moving input, context and weights at random by a few dozen roundings, keeps the verdict fair
        where the map itself is ill-conditioned. First derivatives would not do: a saturated tanh has none.
        """
        direction = direction or self.model.fast
        module = self.module(push=push, dtype=torch.float64, via=via)
        rows = z.double().reshape(-1, self.dim)
        flat = None if context is None else context.double().reshape(-1, self.width)
        batch, generator = z.shape[:-1], torch.Generator().manual_seed(3)
        with torch.no_grad():
            image, log_det = direction(module, rows, flat)
            weights = [p.clone() for p in module.parameters()]
            moves = [torch.zeros_like(image), torch.zeros_like(log_det)]
            for _ in range(_NUDGES):
                for parameter, weight in zip(module.parameters(), weights, strict=True):
                    parameter.copy_(_nudge(weight, generator))
                moved = direction(module, _nudge(rows, generator), _nudge(flat, generator))
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
    """Raise `Wrong` unless the slow direction's answer passes one of three tests: at a cliff of the map, few can.

    It maps back to y in float64, or by the module itself; or it is what a right float64 inverse gives.
    """
    preimage, log_det = (t.detach() for t in subject.slow(module, y.clone(), context))
    if preimage.shape != y.shape or log_det.shape != y.shape[:-1]:
        raise Wrong(f"slow: shapes {tuple(preimage.shape)} and {tuple(log_det.shape)} for {tuple(y.shape)}")
    if not (preimage.isfinite().all() and log_det.isfinite().all()):
        raise Wrong("slow: not finite")
    (image, exact), allowed = subject.exact(preimage, context, push)
    try:
        agree((image, -log_det), (y, exact), allowed, hint=" (mapping the slow direction's answer back in float64)")
    except Wrong:
        image, own = subject.model.fast(module, preimage.clone(), context)
        maps_back = _agrees((image, -log_det), (y, own), allowed)
        if not maps_back and not _is_inverse(subject, preimage, log_det, y, context, push):
            raise


def _is_inverse(
    subject: Subject, preimage: Tensor, log_det: Tensor, y: Tensor, context: Tensor | None, push: float
) -> bool:
    try:
        (right, right_log_det), allowed = subject.exact(y, context, push, direction=subject.slow)
    except Exception:  # its float64 inverse raises: that is another use's verdict
        return False
    back, exact = subject.exact(right, context, push)[0]
    is_right = _agrees((back, -right_log_det), (y, exact), bound=SINGLE)
    return is_right and _agrees((preimage, log_det), (right, right_log_det), allowed)


def _agrees(found: Pair, truth: Pair, allowed: Pair | None = None, bound: float = SINGLE) -> bool:
    try:
        agree(found, truth, allowed, bound)
    except Wrong:
        return False
    return True
