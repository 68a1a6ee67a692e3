"""What the contract is tried on: a step, its size, dtype and seed, how far it is pushed, and the numbers it is fed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.base import LINE, Bijector

Make = Callable[..., Bijector]
"""``make(dim, context_size, dtype, seed, push)``, called with keywords, builds a step."""
Pair = tuple[Tensor, Tensor]

PUSHES = (0.0, 0.3, 1.0)
SCALES = (0.1, 1.0, 3.0, 8.0)


class ContractError(AssertionError):
    """A step breaks the contract; the message names the property, the case, and what was found."""


def push(step: Bijector, amount: float, seed: int) -> Bijector:
    """Move every parameter tensor by noise of a scale of its own, ``amount`` times 0.03, 1 or 3, and return the step.

    One common scale would hide faults: a wrong power of ``|w|`` is invisible where all scales agree.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in step.parameters():
            scale = amount * (0.03, 1.0, 3.0)[int(torch.randint(3, (), generator=generator))]
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            # A matrix grows its outputs with the root of its width; the push is meant for the outputs.
            width = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.add_(scale * noise / max(width, 1) ** 0.5)
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

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"dim={self.dim}, {name}, seed={self.seed}, push={self.push}, context scale {self.context_scale}"

    def step(self, seed: int | None = None) -> Bijector:
        """A fresh step; from another seed if one is given."""
        seed = self.seed if seed is None else seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            step = self.make(dim=self.dim, context_size=self.context_size, dtype=self.dtype, seed=seed, push=self.push)
        return step.to(self.device)

    def z(self, *batch: int, scale: float = 1.0) -> Tensor:
        """Points ``(*batch, dim)`` in the step's domain: normal with the given scale, if that is the line."""
        return place(self._normal(*batch, self.dim, scale=scale, salt=1), self._ends[0])

    def y(self, *batch: int, scale: float = 1.0) -> Tensor:
        """Points in the step's codomain, for its inverse; those of `z` where it is the domain."""
        return place(self._normal(*batch, self.dim, scale=scale, salt=1), self._ends[1])

    def context(self, *batch: int, scale: float | None = None) -> Tensor | None:
        """Contexts ``(*batch, context_size)`` around the step's initial one; None where it reads none."""
        step = self.step()
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
    def _ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        step = self.step()
        return step.domain, step.codomain

    def _normal(self, *shape: int, scale: float, salt: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * salt + self.seed)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)


def require(condition: object, case: Case, found: str) -> None:
    """Raise `ContractError` unless the condition holds."""
    if not condition:
        raise ContractError(f"{found} ({case})")


def within(name: str, error: Tensor, bound: Tensor | float, case: Case) -> float:
    """The largest error; raise if any exceeds its bound or is not finite."""
    if not error.numel():
        return 0.0
    excess = (error / torch.as_tensor(bound).to(error)).nan_to_num(nan=torch.inf)
    worst = int(excess.flatten().argmax())
    found = f"{name}: {error.flatten()[worst]:.3g}, {excess.flatten()[worst]:.3g} times what is allowed"
    require(excess.flatten()[worst] <= 1, case, found)
    return float(error.max())


def size(step: Bijector, dim: int) -> int:
    """N of the tolerances: dim times the number of steps, and a constant."""
    leaves = [m for m in step.modules() if isinstance(m, Bijector)]
    return dim * max(len(leaves), 1) + 16


def eps(case: Case) -> float:
    """Spacing of the floats at 1, in the case's dtype."""
    return torch.finfo(case.dtype).eps


def jacobian(step: Bijector, z: Tensor, context: Tensor | None) -> Tensor:
    """``d z'_i / d z_j`` of every row by autograd, ``(B, dim, dim)``."""
    z = z.detach().requires_grad_()
    image, _ = step(z, context)
    rows = [torch.autograd.grad(image[:, i].sum(), z, retain_graph=True)[0] for i in range(z.shape[-1])]
    return torch.stack(rows, dim=1)


def in_float64(step: Bijector) -> Bijector:
    """The same weights in float64, the step itself untouched."""
    return copy.deepcopy(step).double()
