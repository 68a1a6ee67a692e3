"""Two pictures that people expect of a VAE: the decoded grid of a two-dimensional z, and samples over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.canvas import blank, panels, title
from benchmarks.data import Data
from benchmarks.models import mean_images
from benchmarks.report import Report, by_posterior
from benchmarks.views import as_image, ink, limits
from benchmarks.watchers import album
from flowpost.vae import VAE

SIDE = 15  # decoded images along each axis of z


def is_flat(data: Data) -> bool:
    """Whether an x is an image of one colour, ``(H, W)``."""
    return data.test.ndim == 3 and as_image(data.test[0]) is not None


def _sheet(panel: Axes, sheet: Tensor, data: Data) -> None:
    """Draw many images as one."""
    low, high = limits(data)
    panel.imshow(sheet.numpy(), cmap=ink(data), vmin=low, vmax=high, aspect="auto")


def latent_grid(models: Mapping[str, VAE], data: Data, device: torch.device) -> Figure:
    """E[x|z] over the plane of z, at the quantiles of a standard normal along each axis (Kingma & Welling 2014)."""
    figure, (line,) = panels(len(models), 3.4, 3.8)
    for panel, (name, vae) in zip(line, models.items(), strict=True):
        sheet = tiled(mean_images(vae, quantiles(device), data.test.shape[1:]).cpu(), SIDE)
        _sheet(panel, sheet, data)
        panel.set(title=title(name), xticks=[], yticks=[], xlabel="$z_1$", ylabel="$z_2$")
    figure.suptitle("E[x|z] at the 3 % to 97 % quantiles of N(0, 1) along both axes of z")
    return figure


def quantiles(device: torch.device) -> Tensor:
    """Points of the plane ``(SIDE^2, 2)``, row by row of a picture: z_1 grows to the right, z_2 upwards."""
    shares = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE
    line = (math.sqrt(2) * torch.erfinv(2 * shares - 1)).float()
    second, first = torch.meshgrid(line.flip(0), line, indexing="ij")
    return torch.stack([first, second], -1).flatten(0, 1).to(device)


def tiled(images: Tensor, columns: int) -> Tensor:
    """One image ``(rows * H, columns * W)`` of many ``(rows * columns, H, W)``."""
    _, height, width = images.shape
    return images.view(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width)


def over_epochs(report: Report, data: Data) -> Figure | None:
    """What each posterior's first run generated after epochs 1, 2, 4, ..., from the same z; None without albums."""
    runs = {name: runs[0] for name, runs in by_posterior(report.finished).items()}
    albums = {name: album(report.run.folder, f"{name}-{run['seed']}") for name, run in runs.items()}
    albums = {name: pictures for name, pictures in albums.items() if pictures}
    if not albums or not is_flat(data):
        return None
    rows = max(map(len, albums.values()))
    height, width = data.test.shape[1:]
    figure = blank(1 + 7 * len(albums), 0.8 + 0.55 * rows * height / width)
    for panel, (name, pictures) in zip(figure.subplots(1, len(albums), squeeze=False)[0], albums.items(), strict=True):
        sheet = torch.cat([tiled(images, len(images)) for images in pictures.values()])
        _sheet(panel, sheet, data)
        middles = [height * (row + 0.5) for row in range(len(pictures))]
        panel.set(title=title(name), xticks=[], ylabel="after epoch")
        panel.set_yticks(middles, [str(epoch) for epoch in pictures])
    figure.suptitle("E[x|z] of the same draws from the prior, over the epochs")
    return figure
