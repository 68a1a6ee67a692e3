"""zuko: autoregressive flows, whose direction of one pass is from z to noise there and from noise to z here."""

# ruff: noqa: ANN401 - the library is imported by name where it is installed, so it has no types here.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Family, Pair, Sizes, module


def call(flow: Any, z: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Pair:
    """The call that returns image and log-det at once; `flow` may be lazy, which is built at its context first."""
    lazy = getattr(flow, "transform", flow)
    step = lazy(context) if isinstance(lazy, nn.Module) else lazy
    return (step.inv if inverse else step).call_and_ladj(z)


def families() -> list[Family]:
    """MAF, NSF, LU; the order of the variables is reversed from one step to the next."""
    return [
        Family("MAF", lambda sizes: _autoregressive("MAF", sizes), call, activations=activations),
        Family("NSF", lambda sizes: _autoregressive("NSF", sizes), call, activations=activations),
        # `UnconditionalTransform` is documented to ignore a context, so handing it one is no misuse.
        Family("LU", lu, call, amortized=False, optional_context=False),
    ]


def _autoregressive(name: str, sizes: Sizes) -> nn.Module:
    hidden = (sizes.hidden, sizes.hidden)
    kind = getattr(module("zuko.flows"), name)
    return kind(sizes.dim, sizes.context, transforms=sizes.steps, hidden_features=hidden, activation=nn.ReLU)


def lu(sizes: Sizes) -> nn.Module:
    """Linear maps alone."""
    lazy, linear = module("zuko.lazy"), module("zuko.transforms").LULinearTransform
    parts = [lazy.UnconditionalTransform(linear, torch.eye(sizes.dim)) for _ in range(sizes.steps)]
    return lazy.LazyComposedTransform(*parts)


def activations(flow: Any) -> list[object]:
    """The modules between the masked layers."""
    return [part for step in flow.transform.transforms for part in list(step.hyper)[1::2]]
