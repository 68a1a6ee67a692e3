"""Which steps of a flow are slow in one direction: those that are searched, or swept over variable by variable."""

from __future__ import annotations

from torch import nn

from flowpost.bijectors.autoregressive import Masked
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.deep_sigmoid import DeepSigmoid
from flowpost.bijectors.planar import Planar
from flowpost.bijectors.sylvester import Sylvester
from flowpost.bijectors.wrappers import Inverse


def slow_steps(step: nn.Module, *, inverse: bool) -> list[nn.Module]:
    """The steps within that are searched or swept over, in the inverse or in the forward direction."""
    if isinstance(step, Inverse):
        return slow_steps(step.step, inverse=not inverse)
    if isinstance(step, (Masked, Planar, Sylvester, DeepSigmoid)):
        return [step] if inverse else []
    parts = [part for part in step.children() if isinstance(part, (Bijector, nn.ModuleList))]
    return [slow for part in parts for slow in slow_steps(part, inverse=inverse)]
