"""Draws for ArviZ, of q(.|x) or of named parameters: a `DataTree` with the draws and their log densities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import check_int

if TYPE_CHECKING:
    from xarray import DataTree  # pyright: ignore[reportMissingImports]

try:
    from arviz_base import from_dict  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("flowpost.interop.arviz needs ArviZ 1: pip install 'flowpost[arviz]'") from error

_AXES = ("chain", "draw")
"""Names that ArviZ has for axes: draws of such a name would be taken for the axis's labels, and be no variable."""


def to_datatree(
    q: FlowDistribution,
    draws: int = 1000,
    *,
    chains: int = 1,
    examples: Iterable[object] | None = None,
    name: str = "z",
) -> DataTree:
    """Draw from q(z|x) of some examples, as ArviZ 1 reads posteriors.

    The group ``posterior`` has the draws, with the axes ``(chain, draw, example, latent)``; ``sample_stats`` has their
    ``log_q``, as the pass that drew them gives it. The draws are independent, also those of one chain: `chains` is for
    plots and tables that compare several. Costs ``chains * draws * examples`` samples, held at once.

    Args:
        q: of batch shape ``(examples,)``, such as ``posterior.at(h[chosen])``, or ``()``.
        draws: how many for each chain.
        chains: how many of them.
        examples: a label for each example, such as its place in the data, also as an array or a tensor; by default they
            are counted from 0.
        name: the variable's name, neither "log_q" nor an axis's.

    Returns:
        An `xarray.DataTree`, whose arrays are numpy's.

    Raises:
        TypeError: if `q` is no `FlowDistribution`, or a count no int.
        ValueError: for a count below 1, a q of more batch axes, another number of labels than of examples, or the name
            of the log density or of an axis.

    Example:
        >>> posterior, h = flowpost.planar(16, dim=2), torch.randn(100, 16)
        >>> chosen = [3, 17]
        >>> tree = to_datatree(posterior.at(h[chosen]), 500, examples=chosen)
        >>> tree["posterior"]["z"].sel(example=17).shape
        (1, 500, 2)
    """
    if not isinstance(q, FlowDistribution):
        raise TypeError(f"q: expected a FlowDistribution, as posterior.at(h) gives it, got {type(q).__name__}")
    if len(q.batch_shape) > 1:
        raise ValueError(f"q: expected batch shape (examples,) or (), got {tuple(q.batch_shape)}; flatten h first")
    shape = (check_int("chains", chains, minimum=1), check_int("draws", draws, minimum=1))
    axes, count = ["example"] if q.batch_shape else [], sum(q.batch_shape)
    given = range(count) if examples is None else examples
    labels: list[Any] = getattr(given, "tolist", lambda: [*given])()  # of an array or a tensor its numbers
    if len(labels) != count:
        raise ValueError(f"examples: expected {count} labels, one for each of q's batch, got {len(labels)}")
    if name in ("log_q", *_AXES, "example", "latent"):
        raise ValueError(f"name: expected another one than those of the axes and of the log density, got {name!r}")
    with torch.no_grad():
        z, log_q, _ = q.draw(shape)
    return from_dict(
        {"posterior": {name: z.cpu().numpy()}, "sample_stats": {"log_q": log_q.cpu().numpy()}},
        coords={"example": labels} if axes else {},
        dims={name: [*axes, "latent"], "log_q": axes},
        attrs={"/": {"inference_library": "flowpost"}},
    )


def draws_to_datatree(
    values: Mapping[str, Tensor],
    stats: Mapping[str, Tensor],
    *,
    chains: int = 1,
    attrs: Mapping[str, object] | None = None,
) -> DataTree:
    """Independent draws of named parameters, as ArviZ 1 reads posteriors; `FittedPosterior.to_arviz` calls it.

    Args:
        values: ``(chains * draws, *shape)`` of each parameter: the group ``posterior``.
        stats: ``(chains * draws,)`` of each: the group ``sample_stats``.
        chains: into how many the draws are split.
        attrs: of the tree.

    Returns:
        An `xarray.DataTree`, whose arrays are numpy's.

    Raises:
        ValueError: for a parameter of the name of an axis.

    Example:
        >>> tree = draws_to_datatree({"mu": torch.randn(100, 3)}, {"lp": torch.randn(100)}, chains=4)
        >>> tree["posterior"]["mu"].dims, tree["posterior"]["mu"].shape
        (('chain', 'draw', 'mu_dim_0'), (4, 25, 3))
    """
    for name in values.keys() & {*_AXES}:
        raise ValueError(f"values: expected names other than ArviZ's axes, {' and '.join(_AXES)}, got {name!r}")
    groups = {
        group: {name: part.unflatten(0, (chains, -1)).cpu().numpy() for name, part in parts.items()}
        for group, parts in (("posterior", values), ("sample_stats", stats))
    }
    return from_dict(groups, attrs={"/": {"inference_library": "flowpost", **(attrs or {})}})
