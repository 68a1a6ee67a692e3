"""Inference gaps: how much of log p(x) - ELBO is the posterior's family, and how much is the encoder's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import functional_call

from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain
from flowpost.conditions import Data, kept, split
from flowpost.density import standard_normal_log_prob
from flowpost.importance import ImportanceEstimate, summarize, warn_unreliable
from flowpost.numerics.arguments import check_int
from flowpost.numerics.states import left, named_once
from flowpost.vae import VAE


class InferenceGaps(NamedTuple):
    """The ELBO of the amortized and of the best local posterior, and log p(x), each ``(B,)``, float64."""

    elbo: Tensor
    """Of q(z|x) as the encoder gives it."""
    local_elbo: Tensor
    """Of the best member of the same family, for each x its own."""
    richer_elbo: Tensor | None
    """Of the best member of the richer family, where there is one."""
    estimate: ImportanceEstimate
    """Of log p(x), by the one of these posteriors that has the highest ELBO."""

    @property
    def amortization(self) -> Tensor:
        """What the encoder loses, ``local_elbo - elbo``."""
        return self.local_elbo - self.elbo

    @property
    def approximation(self) -> Tensor:
        """What the family loses, ``log_p - local_elbo``."""
        return self.estimate.log_p - self.local_elbo

    @property
    def richer_approximation(self) -> Tensor:
        """What the richer family loses, ``log_p - richer_elbo``.

        Raises:
            ValueError: if there is no richer family.
        """
        if self.richer_elbo is None:
            raise ValueError("richer: expected steps of a richer family in inference_gaps, got None")
        return self.estimate.log_p - self.richer_elbo


def inference_gaps(
    vae: VAE,
    x: Tensor,
    *,
    richer: Bijector | None = None,
    steps: int = 500,
    step_samples: int = 16,
    lr: float = 1e-2,
    weights_lr: float = 1e-3,
    samples: int = 1000,
    examples: int = 50,
    pairs: int = 1000,
    y: Tensor | None = None,
) -> InferenceGaps:
    """Split ``log p(x) - ELBO`` of each x into approximation and amortization gap, by fitting a posterior to x alone.

    A local posterior has a context and flow weights of its own for each x, started at the amortized ones and moved by
    Adam, its rate falling linearly to 0, up the ELBO of that x; all examples at once, by `vmap`. The decoder stays. The
    richer family puts `richer`'s steps, started at their initial context, after the posterior's own. The ELBOs and
    log p(x) are then estimated anew, from the same noise for all. A local fit that is not finished makes the
    amortization gap too small and the approximation gap too large: see that more `steps` change nothing.

    The model is used in the mode it is in, and nothing in it changes: call ``vae.eval()`` first.

    Args:
        vae: the model.
        x: ``(B, *event)``.
        richer: steps to follow the posterior's flow, of its dtype and device, such as
            ``Chain(UnitLowerTriangular(dim), Affine(dim))`` for a diagonal Gaussian; None for the same family alone.
        steps: Adam steps of each fit; 0 leaves every posterior at its start.
        step_samples: samples of z for each example and step.
        lr: Adam's rate for the contexts, at the first step.
        weights_lr: Adam's rate for the flow's weights, each of which moves all of a network's outputs: at the contexts'
            rate some fits diverge.
        samples: samples of z for each example behind the ELBOs and log p(x).
        examples: how many examples are fitted at once; memory grows with it and with the flow's weights.
        pairs: how many (sample, example) pairs are decoded at once in the evaluation.
        y: the condition, a row for each x, where the model has one: then all is of log p(x|y).

    Returns:
        `InferenceGaps`, with properties ``amortization`` and ``approximation``.

    Raises:
        TypeError: if q(z|x) is not what its flow makes of noise, but a subclass with a log_prob of its own.
        ValueError: if a number is out of range, or `richer` is of another dim.

    Reference:
        Cremer, Li & Duvenaud (2018), Inference Suboptimality in Variational Autoencoders.

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> steps = Chain(UnitLowerTriangular(2), Affine(2))
        >>> gaps = inference_gaps(vae, torch.ones(5, 9), richer=steps, steps=20, samples=100)
        >>> gaps.approximation.shape
        torch.Size([5])
    """
    steps = check_int("steps", steps, minimum=0)
    numbers = {"step_samples": step_samples, "samples": samples, "examples": examples, "pairs": pairs}
    step_samples, samples, examples, pairs = (check_int(name, number, 1) for name, number in numbers.items())
    for name, rate in {"lr": lr, "weights_lr": weights_lr}.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {rate}")
    size = max(1, pairs // min(examples, max(1, len(x))))
    parts = [
        _gaps(vae, part, richer, (steps, step_samples, (lr, weights_lr)), (samples, size))
        for part in split(x, y, examples)
    ]
    elbos, found = (torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True))
    estimate = ImportanceEstimate(*found)
    warn_unreliable(estimate, samples)
    return InferenceGaps(elbos[0], elbos[1], elbos[2] if len(elbos) > 2 else None, estimate)


def _gaps(
    vae: VAE,
    data: Data,
    richer: Bijector | None,
    fitting: tuple[int, int, tuple[float, float]],
    reading: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The posteriors' ELBOs ``(posteriors, B)``, and the rows of the best one's `ImportanceEstimate`, ``(4, B)``."""
    with torch.no_grad():
        q = vae.encode(*data)
        q._require_of_flow(q.flow)
        flows = [q.flow, *([] if richer is None else [Chain(q.flow, richer)])]
        context = cast(Tensor, q.context).expand(*q.batch_shape, -1)  # a head may give one row for all
        if not len(context):  # of which `vmap` makes nothing
            return context.new_zeros(1 + len(flows), 0).double(), context.new_zeros(4, 0).double()
        starts = [_Local(flow, _start(flow, context)) for flow in flows]
    with left(flows[-1]):
        locals_ = [_fit(vae, data, start, *fitting) for start in starts]
        seed = int(torch.randint(2**62, (), device="cpu"))
        read = [_evaluate(vae, data, local, *reading, seed) for local in [starts[0], *locals_]]
    elbos, found = torch.stack([elbo for elbo, _ in read]), torch.stack([torch.stack(rows) for _, rows in read])
    best = elbos.argmax(0).expand(1, found.shape[1], -1)
    return elbos, found.gather(0, best).squeeze(0)


class _Local:
    """A posterior for each of B examples: contexts ``(B, context_size)`` and weights ``(B, *shape)`` of one flow."""

    def __init__(self, flow: Bijector, context: Tensor, weights: dict[str, Tensor] | None = None) -> None:
        self.flow, self.context = flow, context
        own = dict(flow.named_parameters())
        names = {id(w): name for name, w in own.items()}
        self.names = {place: names[id(w)] for place, w in named_once(flow).items()}
        """For each place in the flow the name of its weight: a weight may have several, and a step come twice."""
        own = {name: w.expand(len(context), *w.shape) for name, w in own.items()}
        self.weights = own if weights is None else weights

    def copy(self) -> _Local:
        """One whose numbers can be learned."""
        weights = {name: w.detach().clone().requires_grad_() for name, w in self.weights.items()}
        return _Local(self.flow, self.context.detach().clone().requires_grad_(), weights)

    def __call__(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The z and log q of noise ``(S, B, dim)``."""

        def one(context: Tensor, weights: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
            stand_in = {place: weights[name] for place, name in self.names.items()}
            return functional_call(self.flow, stand_in, (noise, context), tie_weights=False)

        z, log_det = torch.vmap(one, in_dims=(0, 0, 1), out_dims=1)(self.context, self.weights, noise)
        return z, standard_normal_log_prob(noise) - log_det


def _start(flow: Bijector, context: Tensor) -> Tensor:
    """The amortized context; in front of the initial one of steps that the posterior does not have."""
    if flow.context_size == context.shape[-1]:
        return context
    added = flow.initial_context()[context.shape[-1] :].to(context)
    return torch.cat([context, added.expand(len(context), -1)], dim=-1)


@torch.inference_mode(mode=False)
@torch.enable_grad()
def _fit(vae: VAE, data: Data, start: _Local, steps: int, samples: int, rates: tuple[float, float]) -> _Local:
    local, data = start.copy(), kept(data)
    leaves = [local.context, *local.weights.values()]
    groups = zip((leaves[:1], leaves[1:]), rates, strict=True)
    optimizer = torch.optim.Adam([{"params": params, "rate": rate} for params, rate in groups])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / steps)
        # Examples have no number in common, so the sum's gradient is each one's own; the decoder's is not computed.
        elbo = _log_weights(vae, data, local, _noise(vae, local.context, samples)).mean(0)
        for leaf, gradient in zip(leaves, torch.autograd.grad(-elbo.sum(), leaves), strict=True):
            leaf.grad = gradient
        optimizer.step()
    return local


def _noise(vae: VAE, context: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
    shape = (samples, len(context), vae.posterior.dim)
    return torch.randn(shape, generator=generator, dtype=context.dtype, device=context.device)


def _log_weights(vae: VAE, data: Data, local: _Local, noise: Tensor) -> Tensor:
    z, log_q = local(noise)
    x, y = data
    log_likelihood, log_prior = vae.log_joint(x, z, y)
    return log_likelihood + log_prior - log_q


@torch.no_grad()
def _evaluate(
    vae: VAE, data: Data, local: _Local, samples: int, size: int, seed: int
) -> tuple[Tensor, ImportanceEstimate]:
    """The ELBO and the estimate of log p(x), from noise that the seed decides, `size` samples at once."""
    generator = torch.Generator(local.context.device).manual_seed(seed)
    sums = []

    def chunks() -> Iterator[Tensor]:
        for start in range(0, samples, size):
            noise = _noise(vae, local.context, min(size, samples - start), generator)
            log_w = _log_weights(vae, data, local, noise).double()
            sums.append(log_w.sum(0))
            yield log_w

    estimate = summarize(chunks(), samples)
    return torch.stack(sums).sum(0) / samples, estimate
