"""The seam between what the masked networks compute and how a device computes it: the operations, and who is chosen.

A *run* is what an engine works on: steps in sequence that read one context, each an element-wise step whose numbers a
masked network gives. An engine has four operations on a run, a pass and an inverse with their gradients; the autograd
nodes in `nodes` are made of them. Where something must see the operations themselves, or a network is not exactly ours
any more, there is no engine, and the plain operations of `plain` run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from flowpost.masked import device, host
from flowpost.masked.activations import KNOWN
from flowpost.masked.network import MADE, MaskedLinear
from flowpost.masked.run import Link, Run, Saved
from flowpost.numerics.products import whole_is_faster
from flowpost.numerics.watchers import autocast, first_parameter, full_precision, hooked, unwatched
from flowpost.numerics.watchers import untouched as is_ours


class Engine(Protocol):
    """What an engine gives. A run's parameters come as `run.flat` gives them; z has the broadcast leading axes."""

    @staticmethod
    def values(
        run: Run, z: Tensor, context: Tensor | None, parameters: Sequence[Tensor], *, recording: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The image, the log-det in the wide dtype, ``(*batch)`` or a constant, and a tape, if there is a way back."""
        ...

    @staticmethod
    def gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
        """The gradients at z, at the context and at the parameters; but for z's, None where not needed."""
        ...

    @staticmethod
    def solve(
        run: Run,
        z: Tensor,
        context: Tensor | None,
        parameters: Sequence[Tensor],
        preimage: Tensor | None,
        *,
        recording: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The preimage, the log-det of the inverse, and a tape; nothing is searched where the preimage is known."""
        ...

    @staticmethod
    def solve_gradients(saved: Saved, grad: Tensor, grad_log_det: Tensor) -> list[Tensor | None]:
        """As `gradients`, for `solve`: by the implicit function, one transposed solve a link."""
        ...


def choose(run: Run, z: Tensor) -> Engine | None:
    """The engine for a run on z's device; None where the plain operations must run.

    The links of a run of several have been found to fit when they were put together.
    """
    engine = engine_on(z)
    # The host's has no products in half precision.
    alone = unwatched(z) and (engine is device or not autocast(z.device.type))
    return engine if alone and (len(run) > 1 or fits(run[0])) else None


def choose_inverse(run: Run, z: Tensor) -> Engine | None:
    """As `choose`, for the inverse: a compiler would unroll a search that `COLUMNS` does not have."""
    if torch.compiler.is_compiling() and any(link.step.columns()[1] is None for link in run):
        return None
    return choose(run, z)


def engine_on(z: Tensor) -> Engine:
    """The engine for a device: the host's, which runs on all, but for those that run whole matrices best."""
    return cast(Engine, device if whole_is_faster(z) else host)


def precisely(like: Tensor) -> AbstractContextManager:
    """The context of a way back: whoever asks for gradients within autocast loses no digits of a pass without it."""
    return full_precision(like.device.type)


def fits(link: Link) -> bool:
    """Whether an engine may stand in for a link's own operations: nobody has changed the network, or needs the step's.

    A step with parameters of its own is differentiated by autograd alone.
    """
    step = cast(nn.Module, link.step)
    return link.net.activation in KNOWN and untouched(link.net) and not hooked(step) and first_parameter(step) is None


def untouched(net: MADE) -> bool:
    """Whether the network's weights say all that it does.

    Its layers are exactly ours, as many as it was made with, and hold plain tensors, without hooks, parametrizations or
    a ``forward`` of their own.
    """
    if type(net) is not MADE or hooked(net):
        return False
    layers = net.stack
    if len(layers) != len(net.sizes) + 1:
        return False
    for layer in layers:
        if not is_ours(layer, MaskedLinear):
            return False
    project = net.projection
    return project is None or is_ours(project, nn.Linear)
