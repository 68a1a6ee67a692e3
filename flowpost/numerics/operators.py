"""Operators of flowpost's own, which a compiler takes as they are and a planner knows the shapes of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("flowpost", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:  # noqa: ANN401
    """An operator without a gradient, for a node's own passes and for what is detached.

    By the low-level interface: a call costs a third of what it does through ``torch.library.custom_op``. That one would
    raise on a way back through the operator, where torch now warns.

    Args:
        schema: ``name(arguments) -> results``.
        run: what it does, on any device.
        fake: the same for tensors without numbers.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flowpost::{name}", fake, lib=_library)
    return getattr(torch.ops.flowpost, name).default
