"""What the contract is tried on: a step, its size, dtype and seed, how far it is pushed, and the numbers it is fed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors.base import LINE, Bijector

Make = Callable[..., Bijector]
"""``make(dim, context_size, dtype, seed, push)``, called with keywords, builds a step."""
Pair = tuple[Tensor, Tensor]
Map = Callable[..., Pair]
Judge = Callable[[Map, Tensor, Tensor | None], Pair]
"""``judge(map, z, context)`` gives sign and log of ``|det|`` of the map's Jacobian in every row, without rounding."""

PUSHES = (0.0, 0.3, 1.0)
SCALES = (0.1, 1.0, 3.0, 8.0)


class ContractError(AssertionError):
    """A step breaks the contract; the message names the property, the case, and what was found."""


def push(step: Bijector, amount: float, seed: int) -> Bijector:
    """Move every parameter tensor by noise of a scale of its own, ``amount`` times 0.03, 1 or 3, and return the step.

    One common scale would hide faults: a wrong power of ``|w|`` is invisible where all scales agree.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in step.parameters():
            scale = amount * (0.03, 1.0, 3.0)[int(torch.randint(3, (), generator=generator, device="cpu"))]
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            # A matrix grows its outputs with the root of its width; the push is meant for the outputs.
            width = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.add_((scale * noise / max(width, 1) ** 0.5).to(parameter.device))
    return step


def place(z: Tensor, interval: tuple[float, float]) -> Tensor:
    """Numbers of the line carried into an open interval, 1e-5 of it from its ends; those not finite stay."""
    low, high = interval
    if interval == LINE:
        return z
    if high == math.inf:
        inside = low + F.softplus(z.clamp_min(-12))
    elif low == -math.inf:
        inside = high - F.softplus(z.clamp_min(-12))
    else:
        inside = low + (high - low) * torch.sigmoid(z.clamp(-12, 12))
    return torch.where(z.isfinite(), inside, z)


def reseed(seed: int) -> None:
    """As `torch.manual_seed`, which notes a stack trace for each device that is not there: milliseconds."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """One step under one condition; equal cases give equal steps and numbers."""

    make: Make
    dim: int
    context_size: int
    dtype: torch.dtype = torch.float64
    seed: int = 0
    push: float = 0.3
    context_scale: float = 1.0
    device: str = "cpu"
    judge: Judge | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"dim={self.dim}, {name}, seed={self.seed}, push={self.push}, context scale {self.context_scale}"

    def step(self, seed: int | None = None, *, device: str | None = None) -> Bijector:
        """A fresh step; from another seed, or built on another device, if one is given."""
        seed = self.seed if seed is None else seed
        options = {"dim": self.dim, "context_size": self.context_size, "dtype": self.dtype, "push": self.push}
        with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
            reseed(seed)
            step = self.make(seed=seed, **options)
        given = f"event_ndim={step.event_ndim}" if isinstance(step, Bijector) else type(step).__name__
        require(given == "event_ndim=1", self, f"make: expected a Bijector of vectors, got {given}")
        return step if device else step.to(self.device)

    def z(self, *batch: int, scale: float = 1.0) -> Tensor:
        """Points ``(*batch, dim)`` in the step's domain: normal with the given scale, if that is the line."""
        return place(self._normal(*batch, self.dim, scale=scale, salt=1), self._built.domain)

    def y(self, *batch: int, scale: float = 1.0) -> Tensor:
        """Points in the step's codomain, for its inverse; those of `z` where it is the domain."""
        return place(self._normal(*batch, self.dim, scale=scale, salt=1), self._built.codomain)

    def context(self, *batch: int, scale: float | None = None) -> Tensor | None:
        """Contexts ``(*batch, context_size)`` around the step's initial one; None where it reads none."""
        step = self._built
        if not step.context_size:
            return None
        noise = self._normal(*batch, step.context_size, scale=self.context_scale if scale is None else scale, salt=2)
        return noise + step.initial_context().to(noise)

    def points(self, count: int = 8) -> tuple[Bijector, Tensor, Tensor | None]:
        """The step, points at every scale, and a context for each point; no image rounds to an end of the codomain."""
        step, z = self.step(), torch.cat([self.z(count, scale=scale) for scale in SCALES])
        context = self.context(len(z))
        if step.codomain != LINE:
            y = torch.cat([self.y(count, scale=scale) for scale in SCALES])
            z = step.inverse(y, context)[0].detach()
        return step, z, context

    def images(self, count: int = 8) -> tuple[Bijector, Tensor, Tensor | None]:
        """As `points`, for the inverse: no preimage rounds to an end of the domain."""
        step, y = self.step(), torch.cat([self.y(count, scale=scale) for scale in SCALES])
        context = self.context(len(y))
        if step.domain != LINE:
            z = torch.cat([self.z(count, scale=scale) for scale in SCALES])
            y = step(z, context)[0].detach()
        return step, y, context

    @cached_property
    def _built(self) -> Bijector:
        """A step to ask for its sizes and its start, which nobody changes."""
        return self.step()

    def _normal(self, *shape: int, scale: float, salt: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(1_000_003 * salt + self.seed)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
            self.device, self.dtype
        )


def require(condition: object, case: Case, found: str) -> None:
    """Raise `ContractError` unless the condition holds."""
    if not condition:
        raise ContractError(f"{found} ({case})")


def within(name: str, error: Tensor, bound: Tensor | float, case: Case) -> float:
    """The largest error; raise if any exceeds its bound or is not finite."""
    if not error.numel():
        return 0.0
    excess = (
        (error / torch.as_tensor(bound, dtype=error.dtype, device=error.device)).nan_to_num(nan=torch.inf).flatten()
    )
    worst = int(excess.argmax())
    found, times = float(error.flatten()[worst]), float(excess[worst])
    require(times <= 1, case, f"{name}: {found:.3g}, {times:.3g} times what is allowed")
    return float(error.max())


def size(step: Bijector) -> int:
    """N of the tolerances: dim times the number of steps, and a constant."""
    return step.dim * sum(1 for _ in step.leaves()) + 16


def eps(case: Case) -> float:
    """Spacing of the floats at 1, in the case's dtype."""
    return torch.finfo(case.dtype).eps


def jacobian(direction: Map, z: Tensor, context: Tensor | None) -> Tensor:
    """``d z'_i / d z_j`` of every row by autograd, ``(B, dim, dim)``."""
    z = z.detach().requires_grad_()
    image, _ = direction(z, context)
    rows = [torch.autograd.grad(image[:, i].sum(), z, retain_graph=True)[0] for i in range(z.shape[-1])]
    return torch.stack(rows, dim=1)


def condition(matrix: Tensor) -> Tensor:
    """The condition number, infinite where the matrix is not finite."""
    return torch.linalg.cond(matrix).nan_to_num(nan=math.inf)


def in_float64(step: Bijector) -> Bijector:
    """The same weights in float64, the step itself untouched."""
    return copy.deepcopy(step).double()


def sides(case: Case, step: Bijector, *batch: int) -> Iterator[tuple[str, Map, Tensor]]:
    """Both directions, with points where they are defined."""
    yield "forward", step, case.z(*batch)
    yield "inverse", step.inverse, case.y(*batch)


class Direction(nn.Module):
    """A step whose call is one of its directions, without what `Inverse` adds."""

    def __init__(self, step: Bijector, name: str) -> None:
        super().__init__()
        self.step, self.name = step, name

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The direction."""
        return getattr(self.step, self.name)(z, context)


def leaves(step: Bijector, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The points and contexts as inputs of their own, and everything that a loss may be differentiated by."""
    z = z.detach().clone().requires_grad_()
    context = None if context is None else context.detach().clone().requires_grad_()
    return z, context, [z, *([] if context is None else [context]), *learned(step)]


def learned(step: Bijector) -> list[nn.Parameter]:
    """The parameters of a step but for those that are frozen."""
    return [parameter for parameter in step.parameters() if parameter.requires_grad]


def slopes(total: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients, zeros where there are none."""
    if not total.requires_grad:
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.autograd.grad(
        total, inputs, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def weighed(image: Tensor, log_det: Tensor) -> Tensor:
    """A loss that reads every number, and none like another."""
    weights = torch.linspace(0.5, 1.5, image.numel(), dtype=image.dtype, device=image.device).view_as(image)
    return (weights * image).sum() + (weights[..., 0] * log_det * log_det).sum()


def same(name: str, found: Sequence[Tensor], wanted: Sequence[Tensor], bound: float, case: Case) -> float:
    """The largest error relative to ``1 + |wanted|``, which `bound` may not be exceeded by."""
    errors = [
        within(name, (a - b).abs().detach().flatten(), bound * (1 + b.abs().detach().flatten()), case)
        for a, b in zip(found, wanted, strict=True)
    ]
    return max(errors, default=0.0)


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether all bits are."""
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
