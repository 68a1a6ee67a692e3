"""The two ways in which a network's tensors lie: as its layers have them, and variable by variable for a sweep."""

from __future__ import annotations

from torch import Tensor

from flowpost.masked.network import MADE
from flowpost.masked.run import Parameters
from flowpost.numerics.constants import Order


def ranked(net: MADE, parameters: Parameters, order: Order | None) -> Parameters:
    """The parameters as a sweep reads them: variables in their order, and the outputs of each together."""
    weights, biases, projection = (list(group) for group in parameters)
    if order is not None:
        weights[0] = order.take(weights[0], 1)
    for group in [weights, biases] if len(weights) > 1 else [weights, biases, projection]:
        group[-1:] = [by_variable(net, tensor, order) for tensor in group[-1:]]
    return Parameters(weights, biases, projection)


def by_variable(net: MADE, outputs: Tensor, order: Order | None) -> Tensor:
    """Rows ``(outputs, dim)`` as rows ``(dim, outputs)``, the variables in their order."""
    rows = outputs.unflatten(0, (net.outputs, net.dim)).transpose(0, 1)
    return (rows if order is None else order.take(rows, 0)).flatten(0, 1)


def by_output(net: MADE, rows: Tensor, order: Order | None) -> Tensor:
    """The inverse of `by_variable`."""
    rows = rows.unflatten(0, (net.dim, net.outputs))
    return (rows if order is None else order.put(rows, 0)).transpose(0, 1).flatten(0, 1)


def to_columns(z: Tensor, order: Order | None) -> Tensor:
    """From ``(*batch, dim)`` to ``(dim, N)``, the variables in their order."""
    columns = z.reshape(-1, z.shape[-1]).t()
    return columns.contiguous() if order is None else order.take(columns, 0)


def to_rows(columns: Tensor, order: Order | None) -> Tensor:
    """From ``(dim, N)``, the variables in their order, to ``(N, dim)``."""
    return (columns if order is None else order.put(columns, 0)).t().contiguous()
