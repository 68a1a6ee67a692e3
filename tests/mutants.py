"""Faults of public code, put back one at a time: `python -m tests.mutants` prints which property kills each.

A mutant replaces one function or class of flowpost, or is a step of its own written as its public counterpart is. The
score is the honest measure of the contract suite: a property that no mutant needs may be worth nothing. Faults that the
contract cannot see are in `faults.py`, and run after these.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions.transforms import SigmoidTransform

from flowpost import (
    ActNorm,
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    ConvexCombination,
    Coupling,
    DeepSigmoid,
    Householder,
    Inverse,
    Learned,
    LULinear,
    Masked,
    Planar,
    Radial,
    Softplus,
    Spline,
    Sylvester,
    Tanh,
    UnitLowerTriangular,
)
from flowpost.bijectors import (
    _by_hand,
    _from_transform,
    _spline_pass,
    _sylvester_pass,
    actnorm,
    affine,
    base,
    convex,
    deep_sigmoid,
    gate,
    householder,
    lu,
    planar,
    radial,
    spline,
    squash,
    sylvester,
    triangular,
)
from flowpost.functional import exp_scale
from flowpost.masked import engine, host, nodes, plain, run, staircase
from flowpost.masked import network as made
from flowpost.numerics import products, ridge, roots, watchers
from flowpost.numerics import triangles as lower
from flowpost.numerics.constants import Constant
from flowpost.numerics.knots import find_bin
from flowpost.numerics.rational import slope_of
from flowpost.numerics.reflections import Reflected, pivoted
from flowpost.testing import COMPILED, PROPERTIES, ContractError, check_bijector, push

Build = Callable[[int], Bijector]


@dataclass(frozen=True)
class Mutant:
    """A fault: which public code has it, how it is put back, and on which step it shows."""

    name: str
    seen_in: str
    build: Build
    patches: tuple[tuple[object, str, object], ...] = ()
    killer: str = "log_det"
    """The property that must find it."""
    equivalent: str = ""
    dims: tuple[int, ...] = field(default=(1, 2, 5))

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, replacement in self.patches:
                stack.enter_context(mock.patch.object(owner, name, replacement))
            yield

    def make(self, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        del context_size
        return _push(self.build(dim).to(dtype), push, seed)


_push = push


def killers(mutant: Mutant, names: Sequence[str] = ()) -> list[str]:
    """Which properties, of those named or of all that need no compiler, fail on the mutant."""
    tried = list(names or (name for name in PROPERTIES if name not in COMPILED))
    if "identity" in tried and mutant.build in (_step, _gained, HiddenOrder, BufferedOrder, Tanh, Softplus):
        tried.remove("identity")  # a gate, a permutation and a map onto an interval have none
    found = []
    with mutant.planted():
        for name in tried:
            try:
                check_bijector(mutant.make, dims=mutant.dims, skip=[other for other in PROPERTIES if other != name])
            except ContractError as error:
                if isinstance(error.__cause__, TypeError):
                    raise  # the mutant's arguments are not those of what it replaces
                found.append(name)
    return found


Planar3 = tuple[Tensor, Tensor, Tensor]


def _planar_unconstrained(u: Tensor, w: Tensor) -> Planar3:
    wu = (w * u).sum(-1, keepdim=True)
    return u, wu, 1 + wu


def _planar_norm(u: Tensor, w: Tensor) -> Planar3:
    u_hat, wu, room = _INVERTIBLE(u, w)
    return u + (u_hat - u) * w.norm(dim=-1, keepdim=True), wu, room


def _planar_single_where(u: Tensor, w: Tensor) -> Planar3:
    a = (w * u).sum(-1, keepdim=True)
    above = torch.log1p((1 - ridge.K) * torch.expm1(-a))
    below = torch.log1p(ridge.K * torch.expm1(a)) - a
    gain = torch.where(a > 0, above, below)
    return u + gain * w / (w * w).sum(-1, keepdim=True).clamp_min(1e-38), a + gain, 1 + a + gain


def _planar_no_guard(u: Tensor, w: Tensor) -> Planar3:
    a = (w * u).sum(-1, keepdim=True)
    m = F.softplus(a) - 1
    return u + (m - a) * w / (w * w).sum(-1, keepdim=True), m, 1 + m


def _planar_plus_constant(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u_hat, wu, _ = _INVERTIBLE(u, w)
    value, slope = ridge.ridge((w * z).sum(-1, keepdim=True) + b)
    return z + u_hat * value, torch.log((1 + wu * slope).abs() + 1e-4).squeeze(-1)


def _radial_all_tangents(numbers: radial._Numbers, radii: list[Tensor], dim: int) -> Tensor:
    return _RADIAL_LOG_DET(numbers, radii, dim + 1)


def _radial_unconstrained(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(raw), raw, 1 + raw


def _combination_not_convex(z: Tensor, entries: Tensor, logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    weights = logits.sigmoid()
    image = lower.multiply(z, (weights.unsqueeze(-1) * entries).sum(-2))
    return image + (weights.sum(-1, keepdim=True) - 1) * z, z.new_zeros(())


def _reflect_by_length(z: Tensor, v: Tensor) -> Tensor:
    for each in v.unbind(-2):
        z = z - 2 * (each * z).sum(-1, keepdim=True) / each.norm(dim=-1, keepdim=True) * each
    return z


def _reflect_no_guard(z: Tensor, v: Tensor) -> Tensor:
    for each in v.unbind(-2):
        z = z - 2 * (each * z).sum(-1, keepdim=True) / (each * each).sum(-1, keepdim=True) * each
    return z


def _solve_transposed(matrix: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(matrix.mT, columns, upper=False)


def _act_norm_mean(z: Tensor, center: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    image, log_det = _ACT_NORM(z, center, log_scale)
    return image, log_det / len(center)


def _tanh_plus_constant(z: Tensor) -> tuple[Tensor, Tensor]:
    image = torch.tanh(z)
    return image, torch.log(1 - image * image + 1e-6).sum(-1)


def _length_no_guard(offset: Tensor) -> Tensor:
    return (offset * offset).sum(-1, keepdim=True).sqrt()


def _ridge_one_regime(x: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _RIDGE(x)
    return value, torch.where(x < -1, 0.9 * slope, slope)


Gated = tuple[Tensor, Tensor, Tensor]


def _gate_float32_log_det(z: Tensor, logit: Tensor, mean: Tensor, gain: float) -> Gated:
    image, log_det, closed = _GATE(z, logit, mean, gain)
    return image, log_det.float().to(z.dtype), closed


def _gate_squeezed(z: Tensor, logit: Tensor, mean: Tensor, gain: float) -> Gated:
    image, log_det, closed = _GATE(z, logit, mean, gain)
    return image, log_det.squeeze(), closed


def _gate_log_of_sigmoid(z: Tensor, logit: Tensor, mean: Tensor, gain: float) -> Gated:
    image, _, closed = _GATE(z, logit, mean, gain)
    return image, torch.log(torch.sigmoid(logit)).sum(-1), closed


def _gate_disagrees(z: Tensor, logit: Tensor, mean: Tensor, gain: float) -> Gated:
    image, _, closed = _GATE(z, logit, mean, gain)
    return image, F.logsigmoid(logit + 1e-3).sum(-1), closed


def _pull_without_the_mean(
    self: gate.Gate, z: Tensor, kept: tuple[Tensor, Tensor], grad: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, Tensor]:
    z_grad, of_numbers = _GATE_PULL(self, z, kept, grad, grad_log_det)
    return z_grad, torch.cat([of_numbers[..., : self.dim]] * 2, -1)


def _gate_unbounded(self: gate.Gate, context: Tensor) -> Gated:
    raw, mean = context.chunk(2, dim=-1)
    return raw + self.forget_bias, mean, torch.zeros_like(context)


def _gate_gain_once(z: Tensor, logit: Tensor, mean: Tensor, gain: float) -> Gated:
    image, log_det, closed = _GATE(z, logit, mean, gain)
    return image, log_det + (1 - z.shape[-1]) * math.log(gain), closed


def _mask_not_strict(self: staircase.Staircase) -> Constant:
    return Constant(torch.tensor(self.inputs) <= torch.tensor(self.units).unsqueeze(-1) + 1)


def _unmasked(self: made.MaskedLinear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def _numbers_the_other_way(self: made.MADE, z: Tensor, context: Tensor | None = None) -> Tensor:
    return _MADE(self, z, context).flatten(-2).unflatten(-1, (self.dim, self.outputs)).mT


def _rows_in_the_order_they_come(columns: Tensor, order: object) -> Tensor:
    return columns.t().contiguous()


def _all_of_z(self: Coupling, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reads a variable that moves."""
    moving = self._split(z)[1][..., :1]
    image, log_det = _COUPLING(self, z, context)
    return image + 0.1 * moving.sin() * moving.new_tensor([1.0] + [0.0] * (self.dim - 1)), log_det


def _merged_in_the_order_they_come(self: Coupling, passed: Tensor, moved: Tensor) -> Tensor:
    return torch.cat([passed.expand(*moved.shape[:-1], -1), moved], dim=-1)


def _context_ignored(self: made.MADE, z: Tensor, context: Tensor | None = None) -> Tensor:
    return _MADE(self, z, None if context is None else torch.zeros_like(context))


def _gradients_without_activation(saved: run.Saved, *grads: Tensor) -> list[Tensor | None]:
    flat = {name: known._replace(gradient_=lambda grad, value: grad) for name, known in host.KNOWN.items()}
    with mock.patch.object(host, "KNOWN", flat):
        return _GRADIENTS(saved, *grads)


def _context_gradient_dropped(saved: run.Saved, *grads: Tensor) -> list[Tensor | None]:
    of_z, of_context, *others = _GRADIENTS(saved, *grads)
    return [of_z, None if of_context is None else torch.zeros_like(of_context), *others]


def _solve_gradients_without_network(saved: run.Saved, *grads: Tensor) -> list[Tensor | None]:
    return _SOLVE_GRADIENTS(saved._replace(parameters=[torch.zeros_like(each) for each in saved.parameters]), *grads)


def _pull_without_the_slope(
    self: Affine, z: Tensor, kept: tuple[Tensor, Tensor], grad: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, Tensor]:
    flat = {scale: closed._replace(slope=lambda raw, scale: scale) for scale, closed in affine.CLOSED.items()}
    with mock.patch.object(affine, "CLOSED", flat):
        return _AFFINE_PULL(self, z, kept, grad, grad_log_det)


def _replay_of_what_came(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of the inputs themselves: what reaches one through another is counted at both."""
    with mock.patch.object(Tensor, "view_as", lambda self, other: self):
        return _REPLAY(function, inputs, needs, grads)


def _mask_in_a_buffer(self: made.MaskedLinear, inputs: Sequence[int], units: Sequence[int], groups: int = 1) -> None:
    _LAY_OUT(self, inputs, units, groups)
    self.register_buffer("mask", self.staircase.mask.value.to(self.weight.dtype), persistent=False)


def _by_the_buffer(self: made.MaskedLinear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * self.get_buffer("mask"), self.bias)


def _shapes_in_a_set(context: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Hashes sizes, so that a compiler makes every one of them a number."""
    shapes = {tuple(int(size) for size in each.shape[:-1]) for each in (*tensors, context) if each is not None}
    batch = torch.broadcast_shapes(*shapes)
    return [each.expand(*batch, -1) for each in tensors]


def _affine_reads(self: Affine, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    image, log_det = _AFFINE(self, z, context)
    return image * (1.0 if float(image.detach().amin()) > -math.inf else -1.0), log_det


def _affine_with_a_detached_log_det(self: Affine, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    image, log_det = _AFFINE(self, z, context)
    return image, log_det.detach()


def _affine_otherwise_under_no_grad(self: Affine, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    image, log_det = _AFFINE(self, z, context)
    return image, log_det if torch.is_grad_enabled() else log_det + 1e-6


def _anywhere(interval: tuple[float, float], z: Tensor, log_det: Tensor) -> Tensor:
    return log_det


def _affine_inverse_with_a_detached_log_det(
    self: Affine, z: Tensor, context: Tensor | None, preimage: Tensor | None
) -> tuple[Tensor, Tensor]:
    found, log_det = _AFFINE_INVERSE(self, z, context, preimage)
    return found, log_det.detach()


def _affine_on_the_default_device(self: Affine, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    image, log_det = _AFFINE(self, z, context)
    return image + torch.zeros((), dtype=z.dtype), log_det


def _affine_without_log_det(self: Affine, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    image, log_det = _AFFINE(self, z, context)
    return image, torch.zeros_like(log_det)


def _default_dtype_inverse(
    self: Autoregressive, z: Tensor, context: Tensor | None, preimage: Tensor | None
) -> tuple[Tensor, Tensor]:
    preimage, log_det = _AUTOREGRESSIVE_INVERSE(self, z, context, preimage)
    return preimage + torch.zeros(self.dim), log_det


def _inverse_wrong_sign(
    self: Affine, z: Tensor, context: Tensor | None, preimage: Tensor | None
) -> tuple[Tensor, Tensor]:
    preimage, log_det = _AFFINE_INVERSE(self, z, context, preimage)
    return preimage, -log_det


def _transposed_tril(entries: Tensor, dim: int) -> Tensor:
    return _STRICT_TRIL(entries, dim).mT + torch.eye(dim, dtype=entries.dtype)


def _one_newton(residual: roots.Residual, root: Tensor) -> Tensor:
    return root


def _spline_slope(squares: Tensor, product: Tensor, s: Tensor, d: Tensor, share: Tensor) -> Tensor:
    return slope_of(squares, product, s, d, share / s.sqrt())


def _bin_by_widths(point: Tensor, knots: Tensor, sides: Tensor, *, by: int) -> tuple[Tensor, ...]:
    return find_bin(point, knots, sides, by=0)


def _of_numbers_elsewhere(
    form: _spline_pass.Form, kept: _spline_pass._Kept, sums: _spline_pass._Sums, at_u: Tensor, *others: Tensor
) -> Tensor:
    return _OF_NUMBERS(form, kept, sums, torch.zeros_like(at_u), *others)


_OF_NUMBERS = _spline_pass._of_numbers


def _enter_as_it_is(z: Tensor, knots: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    return z.to(knots.dtype), z.abs() < bound


def _deep_sigmoid_naive(z: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    part = torch.sigmoid(scale * z.unsqueeze(-2) + shift)
    p = (log_weight.exp() * part).sum(-2)
    slope = (log_weight.exp() * scale * part * (1 - part)).sum(-2) / (p * (1 - p))
    return torch.log(p / (1 - p)), slope


class CachedPlanar(Planar):
    """Keyed by the identity of its input, as a cache of torch.distributions is."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if getattr(self, "_key", None) is not z:
            self._key, self._value = z, super()._forward(z, context)
        return self._value


class HiddenOrder(Bijector):
    """A random permutation that is no buffer, so it is not in the state_dict."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.order = torch.randperm(dim)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z[..., self.order], z.new_zeros(())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z[..., self.order.argsort()], z.new_zeros(())


class BufferedOrder(HiddenOrder):
    """A permutation in a buffer, which is averaged as numbers are, and truncated."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        order = self.order
        del self.order
        self.register_buffer("order", order)


class Restless(Affine):
    """Counts its calls in a buffer."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("calls", torch.zeros(()))

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not torch._C._are_functorch_transforms_active():
            self.get_buffer("calls").add_(1)
        return super()._forward(z, context)


class ClaimedGaussian(Affine):
    """Bent after the line, and still said to be what its parent is."""

    triangular = True

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = super()._forward(z, context)
        return image.asinh(), log_det - (1 + image * image).log().sum(-1) / 2

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        found, log_det = super()._inverse(z.sinh(), context, preimage)
        return found, log_det + z.cosh().log().sum(-1)


class ClaimedElementwise(Affine):
    """Each variable after the first has the first one added."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = super()._forward(z, context)
        return torch.cat([image[..., :1], image[..., 1:] + image[..., :1]], -1), log_det

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._inverse(torch.cat([z[..., :1], z[..., 1:] - z[..., :1]], -1), context, preimage)


class ClaimedInterval(Softplus):
    """As far as the line goes, and said to end at 0."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z - 1, z.new_zeros(())

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return z + 1, z.new_zeros(())


class TransposedSylvester(Bijector):
    """``z + Q R1 tanh(R2 Q^T z + b)`` with a log-det that is right for the transposed factors only."""

    def __init__(self, dim: int, reach: float = 0.3) -> None:
        super().__init__(dim)
        self.reach = reach  # below 0.5 the fixed point of `_inverse` converges
        self.r1, self.r2 = nn.Parameter(torch.zeros(dim, dim)), nn.Parameter(torch.zeros(dim, dim))
        self.v, self.b = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        r1, r2 = self.reach * self.r1.tanh().triu(), self.reach * self.r2.tanh().triu()
        q = torch.eye(self.dim, dtype=z.dtype) - 2 * torch.outer(self.v, self.v) / (self.v @ self.v)
        value = torch.tanh(z @ r2 @ q.mT + self.b)
        return z + value @ q @ r1, torch.log1p((1 - value**2) * r1.diagonal() * r2.diagonal()).sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        x = z
        for _ in range(200):
            x = z - (self._forward(x, context)[0] - x)
        return x, -self._forward(x, context)[1]


def _sylvester_inner_transposed(z: Tensor, q: Reflected, r2: sylvester.Triangle, b: Tensor) -> Tensor:
    return _outer(q, _whole(r2).mT, z) + b


def _sylvester_outer_transposed(q: Reflected, r1: sylvester.Triangle, value: Tensor) -> Tensor:
    eye = torch.eye(value.shape[-1]).to(value)
    return products.by_columns(products.by_rows, _whole(r1).mT, _inner(value, q, eye, value.new_zeros(())))


_whole = sylvester._whole
_inner, _outer = sylvester._inner, sylvester._outer  # as they are before a mutant takes their place


def _reflected_back(q: Reflected, y: Tensor) -> Tensor:
    return Reflected(q.runs, q.runs[0][0].shape[-1]).along(F.pad(y, (0, q.runs[0][0].shape[-1] - q.rank)))


def _gain_unbounded(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(a), a, (1 + a).abs()


def _log_slope_pull_of_nothing(gain: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(gain), torch.zeros_like(gain)


def _pull_of_one_run(q: Reflected, along: Sequence[Any], out_of: Sequence[Any]) -> Tensor:
    return _PULL(q, [along[0], along[0]], out_of)


_PULL = Reflected.pull


def _columns_not_orthogonal(step: Sylvester, z: Tensor, vectors: Tensor) -> Tensor:
    v = pivoted(vectors.unflatten(-1, (step.reflections, step.dim - 1)))
    return F.normalize(v, dim=-1).mT[..., : step.rank]


class ElementwiseRadial(Bijector):
    """The radius is taken coordinate by coordinate, and the radial formula then applied."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.x0, self.raw = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(1))

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        r, beta = (z - self.x0).abs(), F.softplus(self.raw + 0.5) - 0.5
        h = 1 / (1 + r)
        log_det = (self.dim - 1) * torch.log1p(beta * h) + torch.log1p(beta * h - beta * h**2 * r)
        return z + beta * h * (z - self.x0), log_det.mean(-1)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        x = z
        for _ in range(200):
            x = z - (self._forward(x, context)[0] - x)
        return x, -self._forward(x, context)[1]


_INVERTIBLE, _RIDGE = planar._invertible, ridge.ridge
_ACT_NORM, _RADIAL_LOG_DET = actnorm.act_norm, radial._log_det
_COUPLING = Coupling._forward
_GATE, _GATE_PULL = gate._gate, gate.Gate.pull
_MADE, _STRICT_TRIL = made.MADE.forward, lower.strict_tril
_GRADIENTS, _SOLVE_GRADIENTS, _AFFINE_PULL = host.gradients, host.solve_gradients, Affine.pull
_REPLAY, _LAY_OUT, _AFFINE = nodes.replay, made.MaskedLinear.lay_out, Affine._forward
_AUTOREGRESSIVE_INVERSE, _AFFINE_INVERSE = Autoregressive._inverse, Affine._inverse


def _step(dim: int) -> Bijector:
    return Autoregressive(dim, 6, (16, 16))


def _gate_alone(dim: int) -> Bijector:
    return gate.Gate(dim, gain=1 + math.exp(-2))  # the identity at its initial context


def _gained(dim: int) -> Bijector:
    return Autoregressive(dim, 6, (16, 16), gain=1.1)


def _reflections(dim: int) -> Bijector:
    first = Householder(dim)
    return Chain(first, copy.deepcopy(first))


def _masked(dim: int) -> Bijector:
    return Masked(Affine(dim, exp_scale), 3, (8,), order=range(dim)[::-1])


def _coupling(dim: int) -> Bijector:
    return Coupling(dim, Affine(dim - dim // 2, exp_scale), 6, (16,), order=range(dim)[::-1])


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _yes(*args: object) -> bool:
    return True


def _no(*args: object) -> bool:
    return False


def _as_it_came(context: Tensor | None, *_: object) -> Tensor | None:
    return context


PLAIN = (engine, "choose", lambda run, z: None)
"""A fault in the plain operations is not seen where an engine stands in for them."""
PLAIN_PASS = (_by_hand, "fits", lambda z, context: False)
"""Nor where a step's pass is one node."""
MUTANTS = (
    Mutant("Sylvester with transposed factors", "pyro", TransposedSylvester),
    Mutant("planar without u-hat", "pythae, torchflows", Planar, ((planar, "_invertible", _planar_unconstrained),)),
    Mutant("planar |w| for |w|^2", "pyro before 2019", Planar, ((planar, "_invertible", _planar_norm),)),
    Mutant("planar log(|.| + 1e-4)", "pythae", Planar, ((planar, "planar", _planar_plus_constant),)),
    Mutant(
        "planar u-hat not the identity, no guard",
        "pyro",
        Planar,
        ((planar, "_invertible", _planar_no_guard),),
        killer="identity",
    ),
    Mutant(
        "planar single where",
        "flowjax kind",
        Planar,
        ((planar, "_invertible", _planar_single_where),),
        killer="extremes",
    ),
    Mutant("slope wrong in one regime", "flowjax kind", Planar, ((planar, "ridge", _ridge_one_regime),)),
    Mutant("root without corrections", "-", Planar, ((planar, "correct", _one_newton),)),
    Mutant("radial with dim tangents", "-", Radial, ((radial, "_log_det", _radial_all_tangents),)),
    Mutant("radial without its constraint", "-", Radial, ((radial, "bounded_gain", _radial_unconstrained),)),
    Mutant("norm without a gradient at 0", "-", Radial, ((radial, "_length", _length_no_guard),), killer="extremes"),
    Mutant(
        "weights that do not add up to 1",
        "-",
        lambda dim: ConvexCombination(dim, 2),
        ((convex, "convex_combination", _combination_not_convex),),
        dims=(2, 5),
    ),
    Mutant(
        "reflection |v| for |v|^2", "-", _reflections, ((householder, "reflect_all", _reflect_by_length),), dims=(2, 5)
    ),
    Mutant(
        "reflection in no direction",
        "-",
        _reflections,
        ((householder, "reflect_all", _reflect_no_guard),),
        dims=(2, 5),
        killer="extremes",
    ),
    Mutant("U solved as L", "-", LULinear, ((lu, "_solve_upper", _solve_transposed),), killer="round_trip"),
    Mutant("mean for sum in a log-det", "-", ActNorm, ((actnorm, "act_norm", _act_norm_mean),), dims=(2, 5)),
    Mutant("tanh log(1 - t^2 + 1e-6)", "many", Tanh, ((squash, "tanh", _tanh_plus_constant),)),
    Mutant("softplus linear from 20 on", "torch", Softplus, ((squash, "_softplus", F.softplus),), killer="round_trip"),
    Mutant(
        "Sylvester's factors transposed, its log-det not",
        "pyro",
        Sylvester,
        (
            PLAIN_PASS,
            (sylvester, "_inner", _sylvester_inner_transposed),
            (sylvester, "_outer", _sylvester_outer_transposed),
        ),
    ),
    Mutant(
        "Sylvester's diagonals unbounded",
        "-",
        Sylvester,
        (PLAIN_PASS, (sylvester, "bounded_gain", _gain_unbounded)),
    ),
    Mutant(
        "Sylvester's Q of unit length, not orthogonal",
        "-",
        Sylvester,
        (PLAIN_PASS, (Sylvester, "_basis", _columns_not_orthogonal)),
    ),
    Mutant(
        "Sylvester's log-det left out on the way back",
        "-",
        Sylvester,
        ((_sylvester_pass, "log_slope_pull", _log_slope_pull_of_nothing),),
        killer="gradients",
    ),
    Mutant(
        "the way back through Q takes z for its gradient",
        "-",
        Sylvester,
        ((Reflected, "pull", _pull_of_one_run),),
        dims=(3, 5),
        killer="gradients",
    ),
    Mutant(
        "reflections in the order of the inverse",
        "-",
        Sylvester,
        (PLAIN_PASS, (Reflected, "out_of", _reflected_back)),
        dims=(3, 5),
    ),
    Mutant("squeeze at batch 1", "pythae", _gate_alone, ((gate, "_gate", _gate_squeezed),), killer="shapes"),
    Mutant("element-wise radius", "torchflows", ElementwiseRadial),
    Mutant("float32 log-det in float64", "pythae", _step, ((gate, "_gate", _gate_float32_log_det),)),
    Mutant("gate and log-det disagree", "flow-VAEs", _step, ((gate, "_gate", _gate_disagrees),)),
    Mutant(
        "default dtype in the inverse",
        "pyro",
        _step,
        ((Autoregressive, "_inverse", _default_dtype_inverse),),
        killer="dtypes",
    ),
    Mutant("mask not strict", "-", _step, ((staircase.Staircase, "_mask", _mask_not_strict),), killer="structure"),
    Mutant("a bent map that says it is Gaussian", "-", lambda dim: Learned(ClaimedGaussian(dim)), killer="claims"),
    Mutant("a mixing map that says it is element-wise", "-", ClaimedElementwise, dims=(2, 5), killer="claims"),
    Mutant("a map of the line that says it ends", "-", ClaimedInterval, killer="claims"),
    Mutant(
        "a line that leaves out the scale",
        "-",
        Affine,
        ((Affine, "_line", lambda self, c: (c.chunk(2, -1)[0], 1.0)),),
        killer="claims",
    ),
    Mutant("no mask", "-", _step, (PLAIN, (made.MaskedLinear, "forward", _unmasked)), killer="structure"),
    Mutant(
        "numbers of one variable go to another",
        "-",
        _masked,
        (PLAIN, (made.MADE, "forward", _numbers_the_other_way)),
        dims=(2, 5),
        killer="structure",
    ),
    Mutant(
        "inverse in another order",
        "-",
        _masked,
        ((host, "to_rows", _rows_in_the_order_they_come),),
        dims=(2, 5),
        killer="round_trip",
    ),
    Mutant("coupling reads what moves", "-", _coupling, ((Coupling, "_forward", _all_of_z),)),
    Mutant(
        "coupling forgets its order",
        "-",
        _coupling,
        ((Coupling, "_merge", _merged_in_the_order_they_come),),
        dims=(2, 5),
        killer="structure",
    ),
    Mutant(
        "no bound on the exponential scale", "-", lambda dim: Masked(Affine(dim, torch.exp), 3, (8,)), killer="extremes"
    ),
    Mutant("spline with the slope of its bin once", "-", Spline, (PLAIN_PASS, (spline, "slope_of", _spline_slope))),
    Mutant(
        "a point's place in its bin held fixed on a spline's way back",
        "-",
        Spline,
        ((_spline_pass, "_of_numbers", _of_numbers_elsewhere),),
        killer="gradients",
    ),
    Mutant(
        "spline's bins in the inverse by their widths",
        "-",
        Spline,
        (PLAIN_PASS, (spline, "find_bin", _bin_by_widths)),
    ),
    Mutant(
        "spline knots in float32",
        "all",
        Spline,
        tuple((each, "wide_dtype", lambda z: z.dtype) for each in (spline, _spline_pass)),
        equivalent="two digits lost, within B1's bound; tests/test_spline.py holds them",
    ),
    Mutant("spline goes on outside", "-", Spline, (PLAIN_PASS, (spline, "_enter", _enter_as_it_is))),
    Mutant(
        "deep sigmoid by log(p / (1 - p))",
        "pyro, and the paper's code but for an epsilon",
        lambda dim: DeepSigmoid(dim, units=3),
        ((deep_sigmoid, "_map", _deep_sigmoid_naive),),
        killer="extremes",
    ),
    Mutant(
        "deep sigmoid's search without corrections",
        "-",
        lambda dim: DeepSigmoid(dim, units=3),
        ((deep_sigmoid, "correct", _one_newton),),
        killer="preimage",
    ),
    Mutant("state outside state_dict", "torchflows", HiddenOrder, killer="state"),
    Mutant(
        "context ignored",
        "nflows, normflows",
        _step,
        (PLAIN, (made.MADE, "forward", _context_ignored)),
        killer="context_matters",
    ),
    Mutant(
        "the way back skips an activation",
        "-",
        _step,
        ((host, "gradients", _gradients_without_activation),),
        killer="gradients",
    ),
    Mutant(
        "the way back drops the context",
        "-",
        _step,
        ((host, "gradients", _context_gradient_dropped),),
        killer="gradients",
    ),
    Mutant(
        "implicit gradient drops the network",
        "-",
        _step,
        ((host, "solve_gradients", _solve_gradients_without_network),),
        killer="gradients",
    ),
    Mutant(
        "create_graph counts twice",
        "flowpost 8666d94",
        _step,
        ((nodes, "replay", _replay_of_what_came),),
        killer="dependent",
    ),
    Mutant(
        "a mask that a load does not rebuild",
        "flowpost 8666d94",
        _step,
        (PLAIN, (made.MaskedLinear, "lay_out", _mask_in_a_buffer), (made.MaskedLinear, "forward", _by_the_buffer)),
        killer="rebuilt",
    ),
    Mutant(
        "a changed layer is passed by",
        "flowpost 8666d94",
        _step,
        tuple((room, "untouched", _yes) for room in (engine, plain)),
        killer="layers",
    ),
    Mutant("a hooked layer is passed by", "flowpost 8666d94", _step, ((watchers, "hooked", _no),), killer="layers"),
    Mutant("an order that is averaged", "flowpost 8666d94", BufferedOrder, dims=(5,), killer="averaged"),
    Mutant("an evaluation that changes the state", "flowpost 8666d94", Restless, killer="unchanged"),
    Mutant(
        "each batch size compiled",
        "flowpost 8666d94",
        _step,
        ((nodes, "broadcast", _shapes_in_a_set),),
        dims=(2,),
        killer="batch_sizes",
    ),
    Mutant("a value read on the host", "many", Affine, ((Affine, "_forward", _affine_reads),), killer="meta"),
    Mutant(
        "a constant on the default device",
        "many",
        Affine,
        ((Affine, "_forward", _affine_on_the_default_device),),
        killer="meta",
    ),
    Mutant(
        "another log-det under no_grad",
        "-",
        Affine,
        ((Affine, "_forward", _affine_otherwise_under_no_grad),),
        killer="purity",
    ),
    Mutant(
        "a transform's density outside of its interval",
        "torch",
        lambda dim: Bijector.from_transform(SigmoidTransform(), dim),
        ((_from_transform, "only_in", _anywhere),),
        killer="rows",
    ),
    Mutant(
        "a log-det without a gradient",
        "-",
        Affine,
        ((Affine, "_forward", _affine_with_a_detached_log_det),),
        killer="gradients",
    ),
    Mutant(
        "the inverse's log-det without a gradient",
        "-",
        Affine,
        ((Affine, "_inverse", _affine_inverse_with_a_detached_log_det),),
        killer="gradients",
    ),
    Mutant(
        "the gate's gradient without the mean's",
        "-",
        _step,
        ((gate.Gate, "pull", _pull_without_the_mean),),
        killer="gradients",
    ),
    Mutant(
        "the affine map's gradient with another scale's slope",
        "-",
        lambda dim: Masked(Affine(dim), 0, (8,)),
        ((Affine, "pull", _pull_without_the_slope),),
        killer="gradients",
    ),
    Mutant("the gain's log for one variable", "-", _gained, ((gate, "_gate", _gate_gain_once),), dims=(2, 5)),
    Mutant("cache by identity", "pyro", lambda dim: Learned(CachedPlanar(dim)), killer="purity"),
    Mutant("no check of z", "all", Planar, ((base, "check_tensor", _nothing),), killer="bad_input"),
    Mutant("no check of the context", "all", Planar, ((base, "check_context", _as_it_came),), killer="bad_input"),
    Mutant("no floor on the scale", "torch", lambda dim: Affine(dim, torch.exp), killer="extremes"),
    Mutant(
        "no bound on the gate",
        "-",
        _step,
        ((gate.Gate, "_parameters_of", _gate_unbounded),),
        killer="extremes",
    ),
    Mutant(
        "log-det of the inverse has the wrong sign", "flowjax", Affine, ((Affine, "_inverse", _inverse_wrong_sign),)
    ),
    Mutant(
        "triangular factor transposed in the inverse only",
        "-",
        lambda dim: Inverse(UnitLowerTriangular(dim)),
        (
            (
                triangular,
                "unit_lower_triangular",
                lambda z, e, *_: (
                    products.by_columns(torch.matmul, _transposed_tril(e, z.shape[-1]), z),
                    z.new_zeros(()),
                ),
            ),
        ),
        killer="round_trip",
    ),
    Mutant(
        "a chain drops a log-det",
        "-",
        lambda dim: Chain(Affine(dim), Planar(dim)),
        ((Affine, "_forward", _affine_without_log_det),),
    ),
    Mutant(
        "log(sigmoid) for logsigmoid",
        "many",
        _step,
        ((gate, "_gate", _gate_log_of_sigmoid),),
        equivalent="the logit is bounded, so both are exact",
    ),
)


def main() -> int:
    """Print who kills what, and the score; 1 if a mutant that is not equivalent lives."""
    alive = 0
    for mutant in MUTANTS:
        names = [mutant.killer] if mutant.killer in COMPILED else []
        innocent = killers(replace(mutant, patches=()), names) if mutant.patches else []
        found = [name for name in killers(mutant, names) if name not in innocent]
        verdict = (
            ", ".join(found) if found else f"ALIVE {mutant.equivalent and '(equivalent: ' + mutant.equivalent + ')'}"
        )
        alive += not found and not mutant.equivalent
        print(f"{mutant.name} [{mutant.seen_in}]: {verdict}", flush=True)
    real = [mutant for mutant in MUTANTS if not mutant.equivalent]
    print(f"mutation score: {len(real) - alive} of {len(real)} killed, {len(MUTANTS) - len(real)} equivalent")
    return int(alive > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))  # where tests find each other
    import faults

    sys.exit(main() | faults.main())
