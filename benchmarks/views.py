"""How several x are shown side by side: images as such, anything else as lines."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.data import Data

LONGEST = 4  # times the other side: an x with a longer one is no image


def as_image(x: Tensor) -> Tensor | None:
    """Rows, columns and colours of an x ``(H, W)`` or of one or three channels, first or last; None for any other."""
    if x.ndim == 3 and x.shape[0] in (1, 3):
        x = x.movedim(0, -1)
    if x.ndim == 3 and x.shape[-1] == 1:
        x = x.squeeze(-1)
    if x.ndim != 2 and (x.ndim != 3 or x.shape[-1] != 3):
        return None
    height, width = x.shape[:2]
    return x if max(height, width) <= LONGEST * min(height, width) else None


def aspect(data: Data) -> float:
    """Height of what shows one x, over its width."""
    image = as_image(data.test[0])
    return 1.0 if image is None else image.shape[0] / image.shape[1]


def show(panel: Axes, x: Tensor, data: Data, room: int) -> None:
    """Draw x ``(N, *event)`` side by side, with room for so many, on the scale that all of the data set share."""
    low, high = limits(data)
    images = [image for image in map(as_image, x.cpu()) if image is not None]
    if not images:
        panel.plot(_lines(x.cpu(), room), linewidth=0.8)
        panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    elif images[0].ndim == 3:
        panel.imshow(_strip((torch.stack(images) - low).div(high - low).clamp(0, 1), room, blank=1.0))
    else:
        panel.imshow(_strip(torch.stack(images), room, blank=np.nan), cmap=ink(data), vmin=low, vmax=high)


def limits(data: Data) -> tuple[float, float]:
    """The smallest and the largest value."""
    if data.likelihood == "gaussian":
        return data.train.min().item(), data.train.max().item()
    return 0, data.levels


def _strip(images: Tensor, room: int, blank: float) -> np.ndarray:
    """Images ``(N, H, W)`` or ``(N, H, W, 3)`` as one: a panel for each would take seconds to draw."""
    count, _, width = images.shape[:3]
    edges = [(0, room - count), (0, 0), (0, max(1, width // 12))] + [(0, 0)] * (images.ndim - 3)
    return np.hstack(list(np.pad(images.double().numpy(), edges, constant_values=blank)))


def _lines(x: Tensor, room: int) -> np.ndarray:
    """Points of each line ``(points, lines)``, a gap after each x: the longer axis of a sequence is its time."""
    if x.ndim != 3:
        x = x.flatten(1).unsqueeze(-1)
    x = x if x.shape[1] >= x.shape[2] else x.mT
    edges = ((0, room - len(x)), (0, max(1, x.shape[1] // 12)), (0, 0))
    return np.concatenate(list(np.pad(x.double().numpy(), edges, constant_values=np.nan)))


def ink(data: Data) -> str:
    """Strokes are dark on white; photographs' levels are light."""
    return "gray_r" if data.likelihood in ("bernoulli", "binomial") else "gray"
