"""Two toys in two dimensions: posteriors that tile the prior, and an autoencoder's codes beside a VAE's.

The first is the figure of Kingma et al. (2016): four data points, a VAE with two latents. Each q(z|x) is one colour;
together they should look like the prior. Factorized Gaussians leave gaps and overlap where flows fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks.canvas import panels, title
from benchmarks.data import Data
from benchmarks.models import build, codes
from benchmarks.train import seeded
from flowpost.recipes import RECIPES
from flowpost.training import step_if_finite
from flowpost.vae import VAE, Bernoulli

DPI = 130
POINTS = 4  # of the toy's data, one-hot
TOY: dict[str, dict] = {"diagonal": {}, "iaf": {"steps": 4, "hidden": (64, 64), "context_size": 16}}
COPIES = 64  # of each data point in a step
DRAWS = 1500  # of each posterior, in the picture
EDGE = 4.0  # of the picture
LR = 3e-3
BATCH = 128


def tiling(line: Sequence[Axes], steps: int, seed: int = 0) -> dict[str, float]:
    """Draw the prior and both posteriors, each on a panel, and return the ELBO of each."""
    _scatter(line[0], [torch.randn(POINTS * DRAWS, 2, generator=torch.Generator().manual_seed(seed))], "prior N(0, I)")
    elbos = {}
    for panel, name in zip(line[1:], TOY, strict=True):
        vae, elbos[name] = toy(name, steps, seed)
        with torch.no_grad(), seeded(seed, torch.device("cpu")):
            draws = codes(vae, torch.eye(POINTS), DRAWS).unbind(1)
        _scatter(panel, list(draws), f"{title(name)}: ELBO {elbos[name]:.2f}")
    for panel in line:
        panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE))
    return elbos


def toy(name: str, steps: int, seed: int) -> tuple[VAE, float]:
    """A VAE of the four points, trained, and its mean ELBO."""
    x = torch.eye(POINTS).repeat(COPIES, 1)
    with seeded(seed, torch.device("cpu")):
        posterior = RECIPES[name](32, 2, **TOY[name])
        encoder = nn.Sequential(nn.Linear(POINTS, 32), nn.ELU())
        decoder = nn.Sequential(nn.Linear(2, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, POINTS))
        vae = VAE(encoder, posterior, decoder, Bernoulli())
        _train(vae, lambda _: x, steps)
        with torch.no_grad():
            terms = vae.elbo_terms(torch.eye(POINTS), (4096,))
    return vae, (terms.reconstruction - terms.kl).mean().item()


def beside(line: Sequence[Axes], data: Data, steps: int, seed: int = 0) -> None:
    """Draw the codes of test images by an autoencoder and by a VAE of equal networks, two latents each."""
    with seeded(seed, torch.device("cpu")):
        for panel, name in zip(line, ("autoencoder", "VAE"), strict=True):
            torch.manual_seed(seed)
            vae = build(data, "diagonal", dim=2, width=128, dropout=0.0, options={})
            plain = name == "autoencoder"
            _train(vae, lambda size: data.train[torch.randint(len(data.train), (size,))], steps, plain=plain)
            _codes(panel, vae, data, name, plain=plain)


def _codes(panel: Axes, vae: VAE, data: Data, name: str, *, plain: bool) -> None:
    """The scatter of codes, coloured by class where there are classes."""
    with torch.no_grad():
        q = vae.eval().encode(data.test)
        z = q.mean if plain else q.rsample()
    groups = [z] if data.labels is None else [z[data.labels == label] for label in data.labels.unique()]
    _scatter(panel, groups, name)


def _train(vae: VAE, batch: Callable[[int], Tensor], steps: int, *, plain: bool = False) -> None:
    """Adam on the negative ELBO; of an autoencoder on the reconstruction from the mean code alone."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=LR)
    for _ in range(steps):
        x = batch(BATCH)
        optimizer.zero_grad()
        terms = vae.elbo_terms(x, noise=torch.zeros(len(x), 2) if plain else None)
        loss = ((0.0 if plain else 1.0) * terms.kl - terms.reconstruction).mean()
        loss.backward()
        step_if_finite(optimizer, loss, max_norm=100.0)


def _scatter(panel: Axes, groups: list[Tensor], name: str) -> None:
    for points in groups:
        panel.scatter(*points.T.numpy(), s=3, alpha=0.4, linewidths=0)
    for radius in (1, 2, 3):
        angle = torch.linspace(0, 2 * torch.pi, 100)
        panel.plot(radius * angle.cos(), radius * angle.sin(), color="0.4", linewidth=0.7, linestyle=":")
    panel.set(title=name, xlabel="$z_1$", aspect="equal")


def draw(data: Data, folder: Path, steps: int) -> dict[str, float]:
    """Both pictures, as tiling.png and autoencoder.png; the toy's ELBOs."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, (line,) = panels(1 + len(TOY), 3.2, 3.6)
    elbos = tiling(line, steps)
    figure.suptitle(f"{POINTS} data points: each colour is one q(z|x)")
    figure.savefig(folder / "tiling.png", dpi=DPI)
    figure, (line,) = panels(2, 3.6, 4.0)
    beside(line, data, steps)
    figure.suptitle("Codes of test images: only a VAE's fill the prior, whose radii 1, 2 and 3 are drawn")
    figure.savefig(folder / "autoencoder.png", dpi=DPI)
    return elbos
