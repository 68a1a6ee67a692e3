"""Writes the golden files: every recipe's numbers, and the file it was saved to, by the commit that is checked out.

`PYTHONPATH=. python tests/golden/make.py` ran at 8666d94 and is kept for the next redesign. The files here are of that
commit, from before gated steps had a gain, and are not to be written anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import flowpost
from flowpost.recipes import RECIPES
from flowpost.wrap import WrappedPosterior

HERE = Path(__file__).parent

FEATURES, DIM = 3, 3
OPTIONS: dict[str, dict[str, object]] = {
    **{
        name: {"steps": 3, "hidden": (6, 5), "context_size": 3}
        for name in ("iaf", "affine_iaf", "maf", "nice", "realnvp", "spline_autoregressive", "spline_coupling", "naf")
    },
    "planar": {"steps": 3},
    "radial": {"steps": 3},
}


def posterior(name: str) -> flowpost.FlowPosterior:
    """A recipe's posterior in float64, its weights drawn anew: no number depends on how they start."""
    built = RECIPES[name](FEATURES, DIM, **OPTIONS.get(name, {})).double()
    redraw(built)
    return built


class Halves(nn.Module):
    """An encoder without weights that returns the pair (loc, log_var)."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, dim=-1)


def wrapped(**options: object) -> WrappedPosterior:
    """An iaf on a pair, weights drawn anew: its file has tensors, and no recipe."""
    x = torch.zeros(1, 2 * DIM)
    sizes: dict[str, Any] = {**OPTIONS["iaf"], **options}
    built = flowpost.wrap(Halves(), DIM, example=x, flow="iaf", **sizes).double()
    redraw(built)
    return built


def redraw(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))


def wrapped_numbers(built: WrappedPosterior) -> dict[str, Tensor]:
    """A sample, its log q, and the log q of a given z."""
    generator = torch.Generator().manual_seed(8)
    x, noise, z = (torch.randn(4, size, dtype=torch.float64, generator=generator) for size in (2 * DIM, DIM, DIM))
    with torch.no_grad():
        sample, log_q = built(x, noise=noise), built.log_prob(z, x)
    return {"x": x, "noise": noise, "z": z, "sample": sample.z, "sample_log_q": sample.log_prob, "log_q": log_q}


def numbers(built: flowpost.FlowPosterior) -> dict[str, Tensor]:
    """A sample and its log q, the log q of a given z, and the gradients of both at h and all parameters."""
    generator = torch.Generator().manual_seed(8)
    h, noise, z = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((4, 3), (2, 4, 3), (4, 3))
    )
    h.requires_grad_()
    sample = built(h, sample_shape=(2,), noise=noise)
    log_q = built.log_prob(z, h)
    found = {"h": h, "noise": noise, "z": z, "sample": sample.z, "sample_log_q": sample.log_prob, "log_q": log_q}
    inputs = {"h": h, **dict(built.named_parameters())}
    for direction, loss in (("sample", sample.z.sin().sum() + sample.log_prob.sum()), ("log_q", log_q.sum())):
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        found |= {f"{direction}.{key}": grad for key, grad in zip(inputs, grads, strict=True)}
    return {key: value.detach().contiguous() for key, value in found.items()}


if __name__ == "__main__":
    for name in RECIPES:
        built = posterior(name)
        flowpost.save(built, HERE / f"{name}.posterior.safetensors")
        save_file(numbers(built), HERE / f"{name}.numbers.safetensors")
    built = wrapped()
    flowpost.save(built, HERE / "wrapped.safetensors")
    save_file(wrapped_numbers(built), HERE / "wrapped_numbers.safetensors")
