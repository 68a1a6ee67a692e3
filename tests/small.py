"""Every recipe at a size that costs a test nothing, its weights moved away from where they start."""

import torch

from flowpost import FlowPosterior
from flowpost.recipes import RECIPES

NETWORK = {"steps": 2, "hidden": (8, 8), "context_size": 4}
OPTIONS: dict[str, dict] = {
    "planar": {"steps": 3},
    "radial": {"steps": 2},
    "householder": {"steps": 3},
    "cc_lin_iaf": {"combinations": 2},
    "orthogonal_sylvester": {"steps": 2},
    "householder_sylvester": {"steps": 2, "reflections": 2},
    "triangular_sylvester": {"steps": 2},
    "iaf": NETWORK,
    "affine_iaf": NETWORK,
    "maf": NETWORK,
    "nice": NETWORK,
    "realnvp": NETWORK,
    "spline_autoregressive": {**NETWORK, "bins": 3},
    "spline_coupling": {**NETWORK, "bins": 3},
    "naf": {**NETWORK, "units": 2},
}
FEATURES = 4
DIM = 3


def small(
    name: str, features: int = FEATURES, dim: int = DIM, *, seed: int = 0, push: float = 0.3, **options: object
) -> FlowPosterior:
    """A float64 posterior of a recipe; the same seed gives the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        posterior = RECIPES[name](features, dim, **{**OPTIONS.get(name, {}), **options}).double()
        with torch.no_grad():
            for parameter in posterior.parameters():
                parameter.add_(push * torch.randn_like(parameter))
    return posterior
