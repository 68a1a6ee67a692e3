"""Deep sigmoids: the logit of a mixture of sigmoids, which can have any number of steep places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.bijectors.base import Bijector
from flowpost.masked.run import COLUMNS, Column, Solve
from flowpost.numerics.arguments import check_int
from flowpost.numerics.arrays import Array
from flowpost.numerics.mixtures import mixture_root
from flowpost.numerics.roots import Residual, correct, increasing_root
from flowpost.numerics.scales import SPREAD, exp_scale

_REACH = 6
"""How far a shift moves from 0; whole, as `SPREAD`."""


def deep_sigmoid_parameters(scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bound raw numbers: ``a = exp(4 tanh(raw / 4))``, ``b = 6 tanh(k raw / 6)``, ``log w = log_softmax(raw)``.

    The bounds are soft and keep the slope of `deep_sigmoid` between 4.5e-5 and 54.6 for every weight. The rates k, from
    1/2 for the first unit to 2 for the last, set units apart that would otherwise get equal gradients for ever: where
    all raw numbers are 0, as at the identity, all units are the same.

    Args:
        scale: ``(*batch, units, dim)``.
        shift: ``(*batch, units, dim)``.
        weight: ``(*batch, units, dim)``.

    Returns:
        a, b and log w, of the same shapes.
    """
    shift = _REACH * torch.tanh(_rates(shift) * shift / _REACH)
    return exp_scale(scale), shift, torch.log_softmax(weight, dim=-2)


def _rates(shift: Tensor) -> Tensor:
    units = shift.shape[-2]
    place = torch.arange(units, dtype=shift.dtype, device=shift.device).unsqueeze(-1) / max(units - 1, 1)
    return torch.exp(math.log(4) * (place - 0.5))


def deep_sigmoid(z: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Deep sigmoid ``z' = logit(sum_j w_j sigmoid(u_j))``, ``u_j = a_j z + b_j``, element by element.

    As ``z' = log p - log(1 - p)``, either by logsumexp, it grows linearly where p rounds to 0 or 1. The slope is
    ``sum_j a_j (r_j sigmoid(-u_j) + s_j sigmoid(u_j))``, ``r_j = w_j sigmoid(u_j) / p`` and
    ``s_j = w_j sigmoid(-u_j) / (1 - p)``: positive terms, which never underflow together. It lies between
    ``min a sigmoid(-max |b|)`` and ``max a``.

    Args:
        z: ``(*batch, dim)``.
        scale: a, ``(*batch, units, dim)``, positive.
        shift: b, ``(*batch, units, dim)``.
        log_weight: log w, ``(*batch, units, dim)``, the weights adding up to 1.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``.
    """
    image, slope = _map(z, scale, shift, log_weight)
    return image, slope.log().sum(-1)


def _map(z: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Give z' and its slope, both ``(*batch, dim)``."""
    u = torch.addcmul(shift, scale, z.unsqueeze(-2))
    sides = torch.stack([u, -u], -3)
    most, terms = _terms(F.logsigmoid(sides), log_weight)
    shares = torch.softmax(terms, -2) * torch.sigmoid(-sides)
    return _logit(most, terms), (scale.unsqueeze(-3) * shares).sum((-3, -2))


def _image(z: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor) -> Tensor:
    """Z' alone, for a search: its derivative, as autodiff would take it, is not as exact as that of `_map`."""
    u = torch.addcmul(shift, scale, z.unsqueeze(-2))
    line = F.logsigmoid(u)
    return _logit(*_terms(torch.stack([line, line - u], -3), log_weight))


def _terms(lines: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``log sigmoid(u)`` and ``log sigmoid(-u)`` the largest, and the terms of ``log p``, ``log(1 - p)`` less that.

    Numbers of 1e6 that differ by 1 are subtracted before a weight is added to them: so they lose nothing.
    """
    most = lines.detach().amax(-2, keepdim=True)
    return most, (lines - most) + log_weight.unsqueeze(-3)


def _logit(most: Tensor, terms: Tensor) -> Tensor:
    log_p, log_q = (most + torch.logsumexp(terms, -2, keepdim=True)).squeeze(-2).unbind(-2)
    return log_p - log_q


def deep_sigmoid_inverse(
    z: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor, preimage: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Undo `deep_sigmoid`: one increasing scalar equation for each variable.

    p is a mean of ``sigmoid(u_j)``, so z' is between the least and the largest ``u_j``: the root is between the least
    and the largest ``(z' - b_j) / a_j``, and is searched for there.

    Args:
        z: the image z', ``(*batch, dim)``.
        scale: as in `deep_sigmoid`.
        shift: as in `deep_sigmoid`.
        log_weight: as in `deep_sigmoid`.
        preimage: where it is known, ``(*batch, dim)``: no search is run.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``, first and second derivatives exact.
    """
    root = _search(z, scale, shift, log_weight) if preimage is None else preimage.detach()
    preimage = correct(_residual(z, scale, shift, log_weight), root)
    return preimage, -_map(preimage, scale, shift, log_weight)[1].log().sum(-1)


def _residual(z: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor) -> Residual:
    """Whose root is the preimage of z."""

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        image, slope = _map(x, scale, shift, log_weight)
        return image - z, slope

    return residual


def _search(z: Tensor, scale: Tensor, shift: Tensor, log_weight: Tensor) -> Tensor:
    """The preimage, without a gradient."""

    def value(x: Tensor) -> Tensor:
        return _image(x, scale, shift, log_weight) - z

    with torch.no_grad():
        ends = (z.unsqueeze(-2) - shift) / scale
        return increasing_root(_residual(z, scale, shift, log_weight), ends.amin(-2), ends.amax(-2), value)


def _column(example: Array, constants: Sequence[float]) -> Solve:
    """`deep_sigmoid_inverse` of `deep_sigmoid_parameters`, layer by layer, for one variable."""
    units, layers = map(int, constants)

    def solve(image: Array, numbers: Array) -> Array:
        for raw in numbers.reshape(layers, 3, units, -1)[::-1]:
            image = _search_by_array(image, *raw)
        return image

    def solve_by_torch(image: Array, numbers: Array) -> Array:
        for raw in numbers.unflatten(0, (layers, 3, units)).flip(0).movedim(-1, 1).unsqueeze(-1):
            image = _search(image.unsqueeze(-1), *deep_sigmoid_parameters(*raw.unbind(1))).squeeze(-1)
        return image

    return solve_by_torch if isinstance(example, Tensor) else solve


COLUMNS["deep sigmoid"] = _column


def _search_by_array(image: Array, scale: Array, shift: Array, weight: Array) -> Array:
    """As `_search`, on numpy's arrays, of raw numbers ``(units, N)``."""
    scale = np.exp(SPREAD * np.tanh(scale / SPREAD))
    shift = _REACH * np.tanh(_rates(torch.from_numpy(shift)).numpy() * shift / _REACH)
    return mixture_root(image, scale, shift, weight)


class DeepSigmoid(Bijector):
    """Element-wise deep sigmoid flow, ``z' = logit(sum_j w_j sigmoid(a_j z + b_j))``, once or several times over.

    Use it inside `Masked` or `Coupling` where one variable has several modes given those before it, and mostly its
    forward is needed.

    The context gives a, b and w for each unit. They are made positive, bounded and a softmax, so that the map increases
    for every context, with a slope between 4.5e-5 and 54.6 a layer. Identity at the zero context alone, where all a are
    1 and all b are 0, since a mixture of different sigmoids is never one sigmoid. Forward and log-det cost O(layers *
    units * dim), the inverse some 50 times that: a search at several points at once and Newton's iteration, with exact
    first and second derivatives.

    Args:
        dim: size of z.
        units: sigmoids in a layer; 1 makes an affine map.
        layers: how many deep sigmoids in sequence.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, layers * 3 * units * dim)``: for each layer the raw a, b and w, each for
        all units, each for all variables, as ``(layers, 3, units, dim)`` flattened.

    Reference:
        Huang, Krueger, Lacoste & Courville (2018), Neural Autoregressive Flows, eq. 8, with a and b bounded.

    Example:
        >>> step = DeepSigmoid(2, units=4)
        >>> image, log_det = step(torch.randn(5, 2), torch.randn(5, step.context_size))
    """

    elementwise = True

    def __init__(self, dim: int, units: int = 8, layers: int = 1) -> None:
        numbers = 3 * check_int("units", units, minimum=1) * check_int("layers", layers, minimum=1)
        super().__init__(dim, numbers * check_int("dim", dim, minimum=1))
        self.units, self.layers = units, layers

    def extra_repr(self) -> str:
        """Sizes, for the module's repr."""
        return f"{super().extra_repr()}, units={self.units}, layers={self.layers}"

    def columns(self) -> tuple[Column | None, Column | None]:
        """The inverse's, unless a subclass may have a map of its own."""
        return None, Column("deep sigmoid", (self.units, self.layers)) if type(self) is DeepSigmoid else None

    def _numbers(self, context: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        layers = cast(Tensor, context).unflatten(-1, (self.layers, 3, self.units, -1)).unbind(-4)
        return [deep_sigmoid_parameters(*layer.unbind(-3)) for layer in layers]

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_dets = []
        for layer in self._numbers(context):
            z, log_det = deep_sigmoid(z, *layer)
            log_dets.append(log_det)
        return z, torch.stack(log_dets).sum(0)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        layers = self._numbers(context)
        knowns: list[Tensor | None] = [preimage]
        with torch.no_grad():
            for layer in layers[:-1]:
                knowns.append(None if knowns[-1] is None else deep_sigmoid(knowns[-1], *layer)[0])
        log_dets = []
        for layer, known in zip(reversed(layers), reversed(knowns), strict=True):
            z, log_det = deep_sigmoid_inverse(z, *layer, known)
            log_dets.append(log_det)
        return z, torch.stack(log_dets).sum(0)
