"""Masked networks of full-size products: all weights of a run are masked at once, and all contexts projected at once.

A GPU multiplies a whole weight in less time than two halves of it; what costs there is the number of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flowpost.masked.activations import KNOWN, Known
from flowpost.masked.device import fused
from flowpost.masked.network import MADE
from flowpost.masked.run import Parameters, Run, Saved, as_dtype, rows, sum_to

_ALIGN = 64
_SMALL = 1 << 20
"""Numbers of several tensors, at most, if one call for all of them is worth a copy."""
Sums = tuple[Tensor, Tensor | None]
"""The gradient ``(N, width)`` at a layer's sums, and its sum over the rows where that came with it."""


class Pulled(NamedTuple):
    """A link's gradients: at the first layer's sums, and at its parameters; None where it is not needed.

    The weights' are not masked yet; the first bias's is left out where that of the contexts gives it.
    """

    first: Tensor
    weights: list[Tensor | None]
    biases: list[Tensor | None]


def masked(run: Run, groups: Sequence[Parameters], dtype: torch.dtype | None = None) -> list[Parameters]:
    """The parameters, all weights times their masks by one call, and where a dtype is given all cast by another.

    Nobody keeps the products: the way back makes them again, so that they are not held between the two passes.
    """
    weights = [weight for group in groups for weight in group.weights]
    found = iter(torch._foreach_mul(weights, _factors(run, weights)))  # pyright: ignore[reportPrivateImportUsage]
    products = [group._replace(weights=[next(found) for _ in group.weights]) for group in groups]
    if dtype is None:
        return products
    found = iter(_cast([each for group in products for part in group for each in part], dtype))
    return [Parameters(*([next(found) for _ in part] for part in group)) for group in products]


def starts(context: Tensor | None, groups: Sequence[Parameters]) -> list[Tensor]:
    """What each link's first layer adds to its product: the bias and the projected context, ``(*contexts, width)``.

    The projections of all links are one product, computed once however many samples share a context.
    """
    if context is None:
        return [group.biases[0] for group in groups]
    widths = [len(group.biases[0]) for group in groups]
    bias = _together([group.biases[0] for group in groups])
    projection = _together([group.projection[0] for group in groups])
    start = torch.addmm(bias, as_dtype(rows(context), bias.dtype), projection.t()).view(
        *context.shape[:-1], sum(widths)
    )
    return list(start.split(widths, -1))


def evaluate(net: MADE, z: Tensor, start: Tensor, group: Parameters) -> tuple[Tensor, list[Tensor]]:
    """The numbers ``(*batch, outputs * dim)``, and the hidden layers' values ``(N, width)``; `start` may be reused."""
    known, deep = KNOWN[net.activation], len(group.weights) > 1
    # To autograd, all links' starts change together, while the numbers must stay as the step has seen them.
    y = _first(z, start, group.weights[0], over=deep)
    hidden = [known.run(y)] if deep else []
    for weight, bias in zip(group.weights[1:-1], group.biases[1:-1], strict=True):
        hidden.append(_layer(known, hidden[-1], weight, bias))
    if hidden:
        y = torch.addmm(group.biases[-1], hidden[-1], group.weights[-1].t())
    return y.view(*z.shape[:-1], y.shape[-1]), hidden


def sums(net: MADE, grad: Tensor, hidden: Sequence[Tensor], weights: Sequence[Tensor]) -> Iterator[Sums]:
    """The gradients at the layers' sums, the last layer's first, from that at the outputs ``(N, outputs * dim)``."""
    known, bias, grad = KNOWN[net.activation], None, as_dtype(grad, weights[0].dtype)
    yield grad, bias
    for weight, value in zip(weights[:0:-1], hidden[::-1], strict=True):
        grad, bias = fused.activation_pull(known, torch.mm(grad, weight), value)
        yield grad, bias


def pull(point: Tensor, hidden: Sequence[Tensor], found: Iterable[Sums], need: Parameters) -> Pulled:
    """A link's gradients; each layer's is used while it is near."""
    weights, biases, at_sums = [], [], point
    inputs = [*hidden[::-1], rows(point)]
    layers = zip(found, inputs, need.weights[::-1], need.biases[::-1], strict=True)
    for place, ((at_sums, bias), x, of_weight, of_bias) in enumerate(layers):
        weights.append(torch.mm(at_sums.t(), as_dtype(x, at_sums.dtype)) if of_weight else None)
        by_contexts = bool(need.projection) and place == len(hidden)
        if of_bias and bias is None and not by_contexts:
            bias = at_sums.sum(0, dtype=point.dtype)
        biases.append(bias if of_bias else None)
    return Pulled(at_sums, weights[::-1], biases[::-1])


def parameter_gradients(
    saved: Saved,
    links: Sequence[Pulled],
    groups: Sequence[Parameters],
    needs: Sequence[Parameters],
    batch: Sequence[int],
) -> list[Tensor | None]:
    """The gradients at the context and at all parameters, in the order of `flat`; z is ``(*batch, dim)``."""
    context, dtype = saved.context, saved.parameters[0].dtype
    _mask(saved.run, links, dtype)
    if context is None:
        return [None, *(each for link in links for each in (*link.weights, *link.biases))]
    at_starts = sum_to(_together([link.first for link in links], -1), batch, context.shape[:-1])
    widths = [link.first.shape[-1] for link in links]
    missing = [need.biases[0] and link.biases[0] is None for link, need in zip(links, needs, strict=True)]
    biases = _parts(lambda: at_starts.sum(0, dtype=dtype), widths, missing)
    contexts = as_dtype(rows(context), at_starts.dtype)
    wanted = [need.projection[0] for need in needs]
    projections = _parts(lambda: as_dtype(torch.mm(at_starts.t(), contexts), dtype), widths, wanted)
    found = as_dtype(_at_contexts(at_starts, groups, widths), dtype).view(context.shape) if saved.needs[1] else None
    for link, bias in zip(links, biases, strict=True):
        link.biases[0] = link.biases[0] if bias is None else bias
    pairs = zip(links, projections, strict=True)
    return [found, *(each for link, part in pairs for each in (*link.weights, *link.biases, part))]


def _at_contexts(at_starts: Tensor, groups: Sequence[Parameters], widths: Sequence[int]) -> Tensor:
    """The gradient at the contexts ``(N, context_size)`` from those at all links' starts."""
    projections = [group.projection[0] for group in groups]
    if are_small(projections):
        return torch.mm(at_starts, as_dtype(_together(projections), at_starts.dtype))
    first, *others = zip(at_starts.split(widths, -1), projections, strict=True)
    found = torch.mm(first[0], as_dtype(first[1], at_starts.dtype))
    for each, projection in others:
        found.addmm_(each, as_dtype(projection, each.dtype))
    return found


def are_small(tensors: Iterable[Tensor]) -> bool:
    """Whether one call for all of them is worth a copy."""
    return sum(tensor.numel() for tensor in tensors) <= _SMALL


def add_product(grad: Tensor, first: Tensor, weight: Tensor) -> Tensor:
    """The gradient ``(*batch, dim)`` and what comes through the first layer."""
    if first.dtype == grad.dtype:
        return torch.addmm(rows(grad), first, weight).view(grad.shape)
    return grad + (first @ weight).view(grad.shape)


def _factors(run: Run, weights: Sequence[Tensor]) -> list[Tensor]:
    layers = [layer for link in run for layer in link.net.stack]
    return [layer.staircase.factor(weight) for layer, weight in zip(layers, weights, strict=True)]


def _mask(run: Run, links: Sequence[Pulled], dtype: torch.dtype) -> None:
    """Mask the weights' gradients that are needed, by one call, in the dtype of the weights."""
    layers = [layer for link in run for layer in link.net.stack]
    places = [(link.weights, i) for link in links for i in range(len(link.weights))]
    needed = [(layer, *place) for layer, place in zip(layers, places, strict=True) if place[0][place[1]] is not None]
    found = [cast(Tensor, weights[i]) for _, weights, i in needed]
    if found:
        found = found if found[0].dtype == dtype else _cast(found, dtype)
        factors = [layer.staircase.factor(each) for (layer, _, _), each in zip(needed, found, strict=True)]
        torch._foreach_mul_(found, factors)  # pyright: ignore[reportPrivateImportUsage]
    for (_, weights, i), each in zip(needed, found, strict=True):
        weights[i] = each


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another dtype by one call, each from where tensor cores read well on."""
    sizes = [-(-each.numel() // _ALIGN) * _ALIGN for each in tensors]
    parts = tensors[0].new_empty(sum(sizes), dtype=dtype).split(sizes)
    found = [part[: each.numel()].view(each.shape) for part, each in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(found, tensors)  # pyright: ignore[reportPrivateImportUsage]
    return found


def _first(z: Tensor, start: Tensor, weight: Tensor, *, over: bool) -> Tensor:
    """The first layer's sums ``(N, width)``; `over` the start, where it can be."""
    x, batch = as_dtype(rows(z), weight.dtype), z.shape[:-1]
    if start.ndim == 1:
        return torch.addmm(start, x, weight.t())
    if start.shape[:-1] == batch:
        first = start.flatten(0, -2)
        return first.addmm_(x, weight.t()) if over else torch.addmm(first, x, weight.t())
    y = x @ weight.t()
    y.view(*batch, y.shape[-1]).add_(start)
    return y


def _layer(known: Known, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A hidden layer's values.

    Not by `torch._addmm_activation`, in one call: on a GPU its relu gives 0 for nan, and a row without a value a log q.
    """
    return known.run(torch.addmm(bias, x, weight.t()))


def _together(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _parts(whole: Callable[[], Tensor], sizes: Sequence[int], needed: Sequence[object]) -> list[Tensor | None]:
    """The parts that are needed of what serves all links, computed if any is."""
    if not any(needed):
        return [None] * len(sizes)
    return [part if need else None for part, need in zip(whole().split(sizes), needed, strict=True)]
