"""What a VAE says of z: log-weights of draws from q(z|x) in a stream, and its log p(x, z) in a flow's noise space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowpost.annealing import Gradient, noise_target
from flowpost.bijectors.scale import Scale
from flowpost.conditions import Data, kept, prior_at, split
from flowpost.density import standard_normal_log_prob
from flowpost.distribution import FlowDistribution
from flowpost.numerics.arguments import check_int
from flowpost.refining import CHAINS, Proposal, drawn_from, fit_proposal, noise_like
from flowpost.vae import VAE

EXAMPLES = 100
"""Encoded at once."""


def log_weights(
    vae: VAE, x: Tensor, y: Tensor | None, samples: int, pairs: int, refine: int = 0
) -> Iterator[Iterator[Tensor]]:
    """For each part of x its log-weights in chunks ``(n, B)``, to be read before the next part.

    The draws are q(z|x)'s, or where `refine` is not 0 those of a proposal fitted for so many steps.
    """
    samples, pairs = check_int("samples", samples, minimum=1), check_int("pairs", pairs, minimum=1)
    refine = check_int("refine", refine, minimum=0)
    for data in split(x, y, min(EXAMPLES, max(1, pairs // CHAINS) if refine else pairs)):
        yield _chunks(vae, data, samples, max(1, pairs // max(1, len(data[0]))), refine)


def _chunks(vae: VAE, data: Data, samples: int, size: int, refine: int) -> Iterator[Tensor]:
    x, y = data
    with torch.no_grad():
        q = vae.encode(x, y)
    q = q._of_flow() if refine else q
    proposal = _proposal(vae, q, data, refine) if refine else None
    for start in range(0, samples, size):
        count = min(size, samples - start)
        with torch.no_grad():  # not around `yield`: the reader would run without gradient too
            noise = None if proposal is None else proposal.draw(count)
            out = vae.evaluate(x, q, (count,), y=y, noise=noise)
            log_w = out.log_likelihood.double() + out.log_prior.double() - out.log_q.double()
            if noise is not None and proposal is not None:
                log_w = log_w + standard_normal_log_prob(noise.double()) - proposal.log_prob(noise)
        yield log_w


def _proposal(vae: VAE, q: FlowDistribution, data: Data, steps: int) -> Proposal:
    """Fitted to chains that begin at q(z|x), and to others that begin at p(z), for modes of p(z|x) that q misses."""
    like, prior = noise_like(q), prior_rows(vae, q, data[1])
    with frozen(vae):
        start = drawn_from(joint_target(vae, prior, data), like, steps)
        with torch.no_grad():
            elsewhere, _ = q.flow.inverse(prior.rsample(start.shape[:1], start), q.context)
        return fit_proposal(joint_target(vae, q, data), like, steps, elsewhere)


def joint_target(vae: VAE, q: FlowDistribution, data: Data) -> Gradient:
    """The log p(x, f(e)) + log|det df/de| and its gradient, for noise e ``(chains, B, dim)`` of q(z|x).

    Raises:
        ValueError: if the model gives another log p(x, z) where more rows are read with it.
    """
    x, y = kept(data)

    def log_joint(z: Tensor) -> Tensor:
        log_likelihood, log_prior = vae.log_joint(x, z, y)
        return log_likelihood + log_prior

    gradient = noise_target(q, log_joint)
    _check_fixed(gradient, q)
    return gradient


def prior_rows(vae: VAE, q: FlowDistribution, y: Tensor | None) -> FlowDistribution:
    """The p(z), or p(z|y), as a map from noise, once for each row of q."""
    if vae.prior is not None:
        return prior_at(vae.prior, y)._of_flow().expand(q.batch_shape)
    like = noise_like(q)
    unit = Scale(q.flow.dim, 1.0).to_empty(device=like.device).to(like.dtype)  # whatever the default device is
    return FlowDistribution(unit, None, tuple(q.batch_shape))


def _check_fixed(gradient: Gradient, q: FlowDistribution) -> None:
    """Refuse a density that is drawn anew at each call, or that depends on the rows beside: neither has chains."""
    noise = torch.randn_like(noise_like(q)).unsqueeze(0)
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
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad = True
