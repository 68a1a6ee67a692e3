"""A diagnostic, not a gate: the importance-sampled mass of every density at dim 8, with its Pareto k-hat.

`python -m tests.mass` prints, for each entry of the registry, ``E_q[pi / q]`` for a normal pi of the samples' own mean
and 0.7 of their standard deviations. It is 1 for a normalized q that reaches wherever pi does. Above k-hat 0.7 the
number is not to be trusted: mass that was never sampled is invisible to it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from registry import ENTRIES, Case, Entry, draw

from flowpost import FlowPosterior
from flowpost.bijectors.base import LINE

SAMPLES = 100_000


def k_hat(log_weights: np.ndarray) -> float:
    """Shape of a generalized Pareto fitted to the largest weights, ``3 sqrt(S)`` of them."""
    count = int(3 * len(log_weights) ** 0.5)
    tail = np.sort(np.exp(log_weights - log_weights.max()))[-count - 1 :]
    return stats.genpareto.fit(tail[1:] - tail[0], floc=0)[0]


def mass(entry: Entry) -> tuple[float, float, float]:
    """Mass, its standard error, and k-hat, at parameters pushed by 0.3."""
    step, _, context = draw(entry, Case(dim=8, context=0.3), batch=())
    posterior = FlowPosterior(step.context_size, step, head=nn.Identity()).double()
    with torch.no_grad():
        noise = torch.randn(SAMPLES, 8, dtype=torch.float64)
        sample = posterior(context, sample_shape=(SAMPLES,), noise=noise)
        target = torch.distributions.Normal(sample.z.mean(0), 0.7 * sample.z.std(0))
        log_weights = (target.log_prob(sample.z).sum(-1) - sample.log_prob).numpy()
    weights = np.exp(log_weights)
    return float(weights.mean()), float(weights.std() / SAMPLES**0.5), k_hat(log_weights)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{'entry':32} {'mass':>8} {'se':>8} {'k-hat':>6}")
    for entry in (entry for entry in ENTRIES if entry.make(8, 0).domain == LINE):
        total, error, shape = mass(entry)
        print(f"{entry.name:32} {total:8.3f} {error:8.3f} {shape:6.2f}")
