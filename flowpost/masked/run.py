"""What an engine works on: a run of links, and their parameters in one flat list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from flowpost.masked.network import MADE
from flowpost.numerics.arrays import Array
from flowpost.numerics.constants import Order


class Column(NamedTuple):
    """An element-wise map for one variable, in closed form or by a search, by the name of it in `COLUMNS`."""

    name: str
    constants: tuple[float, ...] = ()


Solve = Callable[[Array, Array], Array]
"""From one variable ``(N,)`` and its numbers ``(numbers, N)``, which it must not change, to the mapped variable."""
COLUMNS: dict[str, Callable[[Array, Sequence[float]], Solve]] = {}
"""By name, from an array of the kind and dtype that will come, a tensor or numpy's, and the constants to the map."""


class ElementWise(Protocol):
    """An element-wise step, ``z'_i = f(z_i; c_i)``, of as many variables as it is given.

    The numbers of all variables are ``(*batch, numbers * dim)``, that is ``(numbers, dim)`` flattened.
    """

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def columns(self) -> tuple[Column | None, Column | None]:
        """The map and its inverse for one variable, where `COLUMNS` has them."""
        ...

    def has_pull(self) -> bool:
        """Whether it is a `Pulling` step."""
        ...


class Pulling(Protocol):
    """An element-wise step with a closed form of its gradient, so that autodiff need not record its operations."""

    def keep(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The image, the log-det, and two tensors that `pull` needs."""
        ...

    def pull(self, z: Tensor, kept: tuple[Tensor, Tensor], grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients at z and at the numbers, from those at the image and at the log-det."""
        ...


def by_step(step: ElementWise) -> Solve:
    """The step's own inverse, asked for one variable: of tensors, where there is no closed form."""
    return lambda image, numbers: step._inverse(image.unsqueeze(-1), numbers.t(), None)[0].squeeze(-1)


class Link(NamedTuple):
    """One step of a run: a network, the element-wise step whose numbers it gives, and the order of the variables."""

    net: MADE
    step: ElementWise
    order: Order | None


Run = Sequence[Link]
_Held = TypeVar("_Held")


class Parameters(NamedTuple):
    """A network's parameters by what they do; the projection's list is empty where there is no context."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    projection: Sequence[Tensor]


class Saved(NamedTuple):
    """What a node has kept for its way back."""

    run: Run
    tape: list[Tensor]
    """The tensors that an engine's pass or solve gave for it, in an order of the engine's own, for it to take out."""
    context: Tensor | None
    parameters: Sequence[Tensor]
    needs: Sequence[bool]
    """Whether a gradient is needed at z, at the context and at each parameter."""

    def links(self) -> Iterator[tuple[Link, Parameters, Parameters]]:
        """Each link with its parameters, and which of them need a gradient."""
        return zip(self.run, *self.groups(), strict=True)

    def groups(self) -> tuple[list[Parameters], list[Parameters]]:
        """Each link's parameters, and which of them need a gradient."""
        return grouped(self.run, self.parameters), grouped(self.run, self.needs[2:])


def flat(run: Run) -> list[Tensor]:
    """The parameters of a run's networks, one network after the other, each in the order of `Parameters`.

    Those that add to the outputs come times the network's rate: to whoever reads them the outputs are sums.
    """
    found: list[Tensor] = []
    for link in run:
        net, layers, project = link.net, link.net.stack, link.net.projection
        own = [layer.weight for layer in layers] + [layer.bias for layer in layers]
        own += [] if project is None else [project.weight]
        if net.rate != 1:
            # By their place: a hidden layer may have one of them too, tied to it, and reads it as it is.
            last = {len(layers) - 1, 2 * len(layers) - 1} | ({2 * len(layers)} if len(layers) == 1 else set())
            own = [net.rate * each if place in last else each for place, each in enumerate(own)]
        found += own
    return found


def grouped(run: Run, parameters: Sequence[Any]) -> list[Parameters]:
    """The inverse of `flat`: each network's parameters, or what else there is one of for each."""
    groups, first = [], 0
    for link in run:
        count = len(link.net.sizes) + 1
        last = first + 2 * count + (link.net.projection is not None)
        part = parameters[first:last]
        groups.append(Parameters(part[:count], part[count : 2 * count], part[2 * count :]))
        first = last
    return groups


def taken(links: list[_Held]) -> Iterator[_Held]:
    """One by one, so that what is held of a link is freed once the next one is asked for."""
    links.reverse()
    while links:
        yield links.pop()


def broadcast(context: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors with the leading axes that they and the context have together."""
    batch = tensors[0].shape[:-1]
    others = [each.shape[:-1] for each in (*tensors[1:], context) if each is not None]
    if all(shape == batch for shape in others):
        return list(tensors)
    batch = torch.broadcast_shapes(batch, *others)
    return [each.expand(*batch, -1) for each in tensors]


def rows(tensor: Tensor) -> Tensor:
    """``(*batch, size)`` as ``(N, size)``."""
    return tensor if tensor.ndim == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes longer to find that nothing is to be done."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def over(batch: Sequence[int], tensor: Tensor) -> Tensor:
    """The inverse of `rows`, and of a number for each row: ``(N, ...)`` as ``(*batch, ...)``; a constant as it is.

    To autograd it is no view: what a node gives as one nobody may change in place.
    """
    return tensor.view((*batch, *tensor.shape[1:])).detach() if len(batch) != 1 and tensor.ndim else tensor


def sum_to(grad: Tensor, batch: Sequence[int], smaller: Sequence[int]) -> Tensor:
    """A gradient ``(N, width)`` over leading axes summed to the fewer, or shorter, ones of a context."""
    if tuple(batch) == tuple(smaller):
        return grad
    width = grad.shape[-1]
    return rows(grad.reshape(*batch, width).sum_to_size(*smaller, width))
