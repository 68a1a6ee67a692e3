"""What a VAE says of z: log-weights of draws from q(z|x) in a stream, and its log p(x, z) in a flow's noise space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowpost.annealing import Gradient, noise_target
from flowpost.conditions import Data, split
from flowpost.density import like_of
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import check_int
from flowpost.vae import VAE

EXAMPLES = 100


def log_weights(vae: VAE, x: Tensor, y: Tensor | None, samples: int, pairs: int) -> Iterator[Iterator[Tensor]]:
    """For each part of x its log-weights in chunks ``(n, B)``, to be read before the next part."""
    samples, pairs = check_int("samples", samples, minimum=1), check_int("pairs", pairs, minimum=1)
    for part in split(x, y, min(EXAMPLES, pairs)):
        yield _chunks(vae, *part, samples, max(1, pairs // max(1, len(part[0]))))


def _chunks(vae: VAE, x: Tensor, y: Tensor | None, samples: int, size: int) -> Iterator[Tensor]:
    with torch.no_grad():
        q = vae.encode(x, y)
    for start in range(0, samples, size):
        with torch.no_grad():  # not around `yield`: the reader would run without gradient too
            out = vae.evaluate(x, q, (min(size, samples - start),), y=y)
            log_w = out.log_likelihood.double() + out.log_prior.double() - out.log_q.double()
        yield log_w


def joint_target(vae: VAE, q: FlowDistribution, data: Data) -> Gradient:
    """The log p(x, f(e)) + log|det df/de| and its gradient, for noise e ``(chains, B, dim)`` of q(z|x).

    Raises:
        ValueError: if the model gives another log p(x, z) where more rows are read with it.
    """
    x, y = data

    def log_joint(z: Tensor) -> Tensor:
        log_likelihood, log_prior = vae.log_joint(x, z, y)
        return log_likelihood + log_prior

    gradient = noise_target(q, log_joint)
    _check_fixed(gradient, q)
    return gradient


def _check_fixed(gradient: Gradient, q: FlowDistribution) -> None:
    """Refuse a density that is drawn anew at each call, or that depends on the rows beside: neither has chains."""
    like = like_of(q.flow, q.context)
    noise = torch.randn(1, *q.batch_shape, *q.event_shape, dtype=like.dtype, device=like.device)
    value, _ = gradient(noise)
    again, _ = gradient(torch.cat([noise, -noise]))
    if not torch.allclose(value[0], again[0], rtol=1e-3, atol=1e-2, equal_nan=True):
        raise ValueError(
            "vae: expected a log p(x, z) that is the same at every call, got another one for the same z; call "
            "vae.eval() first, for dropout and batch norm"
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient inside: a pass then keeps nothing for them."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_()
