"""log p(x) between two bounds: annealed importance sampling of any x, and back from the z of simulated ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flowpost.chains import PRIOR_SHARE, AnnealedEstimate, Chains, Part, Watch, mixed
from flowpost.conditions import Data, row_for_each, split
from flowpost.distribution import FlowDistribution
from flowpost.importance import LIMIT, ImportanceEstimate, summarize
from flowpost.numerics.arguments import check_int
from flowpost.refining import noise_like
from flowpost.vae import VAE
from flowpost.weights import frozen, joint_target, log_weights, prior_rows

Row = TypeVar("Row", AnnealedEstimate, ImportanceEstimate)


class Sandwich(NamedTuple):
    """What brackets log p(x) of simulated x, and what importance sampling says of it; ``print`` shows a summary."""

    lower: AnnealedEstimate
    """From noise to p(z|x)."""
    upper: AnnealedEstimate
    """Back from the z that x was simulated from."""
    importance: ImportanceEstimate
    residual: Tensor
    """``max_i |f(f^-1(z))_i - z_i| / max(1, max_i |z_i|)`` of the inverse that the way back starts with, ``(n,)``."""
    samples: int
    """Of the importance sampling."""

    @property
    def gap(self) -> Tensor:
        """``upper.log_p - lower.log_p``, ``(n,)``: its mean bounds the mean error of both, but for its own error."""
        return self.upper.log_p - self.lower.log_p

    def __str__(self) -> str:
        count = len(self.gap)
        heavy = int((~(self.importance.k_hat <= LIMIT)).sum())
        rows = {
            "annealed, lower bound": (self.lower.log_p, ""),
            "annealed, upper bound": (self.upper.log_p, ""),
            "upper less lower": (self.gap, f", largest {self.gap.max():.2f}"),
            f"{self.samples:,} importance samples": (self.importance.log_p, f", k-hat above {LIMIT} for {heavy}"),
        }
        return "\n".join(
            [
                f"log p(x) of {count} x simulated from the model, mean ± standard error, in nats",
                *(f"  {name:<25}{_mean_error(values, 11)}{more}" for name, (values, more) in rows.items()),
                f"  accepted {self.lower.acceptance.mean():.2f}, back {self.upper.acceptance.mean():.2f}; "
                f"residual of the inverse at most {self.residual.max():.1e}",
                f"So with these settings the lower bound misses {_mean_error(self.gap)} nats at most, on average over "
                "x of the model's own.",
                "For real x there is no upper bound: the lower one misses about as much where q(z|x) is about as good, "
                "and more where it is worse.",
            ]
        )


def annealed_estimate(
    vae: VAE,
    x: Tensor,
    chains: int = 16,
    temperatures: int = 1000,
    leapfrogs: int = 5,
    *,
    prior_chains: int | None = None,
    path: str = "sigmoidal",
    pairs: int = 5000,
    y: Tensor | None = None,
    progress: Watch | None = None,
) -> AnnealedEstimate:
    """Annealed importance sampling of log p(x): where importance sampling's k-hat is too large, this is the number.

    Each chain starts in the noise e of q(z|x), at a draw of N(0, I), and moves by Hamiltonian steps through ``N(e; 0,
    I)^(1 - beta) (p(x, f(e)) |det df/de|)^beta``, x's features held fixed. The mean of its weights is p(x), so that
    log_p is a lower bound in expectation, for any settings; more temperatures and chains make it tighter. Step sizes,
    for each x and temperature its own, come from a pilot run whose chains are thrown away. `sandwich` says how tight
    the bound is.

    p(z|x) may have a mode that q does not reach; then the weights are too small by many nats. So half as many chains
    more start in the noise of p(z). The mean of their weights is p(x) too, and an eighth of the estimate is theirs:
    where they are of no use they cost 0.13 nats, and where they alone find the mode it is 2.1 too low.

    The model is used in the mode it is in, and has to give the same log p(x, z) at every call: call ``vae.eval()``
    first. Weights are summed in float64. Nothing is read on the host within a chain, and on a CUDA device a
    temperature is one launch. A mode that no chain finds is missing from this estimate too, and its standard error is
    then too small.

    Cost: ``1.5 chains temperatures leapfrogs`` gradients of log p(x|z) for each x, and pilots of a twelfth of that for
    the defaults. A gradient is one pass through flow and decoder and one back to e; where a flow draws by a sweep over
    the variables, as `maf` does, it pays that sweep each time.

    Args:
        vae: the model.
        x: ``(B, *event)``.
        chains: for each x, from q(z|x).
        temperatures: steps of beta from 0 to 1; 1 is importance sampling.
        leapfrogs: gradients of each Hamiltonian step.
        prior_chains: for each x, from p(z); half of `chains` by default, at least two.
        path: how the betas lie, "sigmoidal" or "linear", as `flowpost.annealed.schedule`.
        pairs: how many (chain, example) pairs move at once; memory grows with it, and dispatch costs fall.
        y: the condition, a row for each x, where the model has one: then it is log p(x|y).
        progress: called with (temperatures done, temperatures in all), of all parts of x and their pilots.

    Returns:
        ``AnnealedEstimate(log_p, standard_error, ess, acceptance)``.

    Raises:
        ValueError: if a number is out of range, there is no such path, or log p(x, z) changes from call to call.

    Reference:
        Neal (2001), Annealed Importance Sampling; Wu, Burda, Salakhutdinov & Grosse (2017), On the Quantitative
        Analysis of Decoder-Based Generative Models, who start at the prior; Hoffman et al. (2019), NeuTra-lizing Bad
        Geometry in Hamiltonian Monte Carlo Using Neural Transport.

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> log_p, standard_error, ess, acceptance = annealed_estimate(vae, torch.ones(5, 9), temperatures=20)
        >>> log_p.shape
        torch.Size([5])
    """
    runs = Chains(chains, prior_chains, temperatures, leapfrogs, path, pairs, progress)
    parts = split(x, y, runs.examples)
    runs.expect(len(parts))
    with frozen(vae):
        return _together(_lower(vae, data, runs) for data in parts)


def sandwich(
    vae: VAE,
    count: int,
    shape: tuple[int, ...],
    chains: int = 16,
    temperatures: int = 1000,
    leapfrogs: int = 5,
    *,
    prior_chains: int | None = None,
    path: str = "sigmoidal",
    samples: int = 1000,
    pairs: int = 5000,
    y: Tensor | None = None,
    progress: Watch | None = None,
) -> Sandwich:
    """Bidirectional Monte Carlo: log p(x) of x drawn from the model, between a lower and an upper bound.

    For x ~ p(x|z), z ~ p(z), that z is an exact draw of p(z|x). So chains can also go back from it to the noise, by the
    same steps in the other order; the mean of their weights is 1 / p(x), and minus its log an upper bound in
    expectation. The gap between the bounds tells how well the same settings do on other x, as far as these resemble
    what the model draws. The way back starts with one inverse of the flow an example, whose residual is given.

    Args:
        vae: the model, whose likelihood has a ``sample``.
        count: how many x.
        shape: of one x.
        chains: as in `annealed_estimate`, for each x and either way.
        temperatures: as in `annealed_estimate`.
        leapfrogs: as in `annealed_estimate`.
        prior_chains: as in `annealed_estimate`.
        path: as in `annealed_estimate`.
        samples: of the importance sampling beside it.
        pairs: as in `annealed_estimate`.
        y: the condition, `count` rows or one for all, where the model has one.
        progress: as in `annealed_estimate`.

    Returns:
        `Sandwich`, whose ``str`` is a summary.

    Raises:
        ValueError: as `annealed_estimate`.
        NotImplementedError: if the likelihood has no ``sample``.

    Reference:
        Grosse, Ghahramani & Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo; Wu et
        al. (2017).

    Example:
        >>> vae = VAE(nn.Linear(9, 16), flowpost.diagonal(16, dim=2), nn.Linear(2, 9), Bernoulli())
        >>> found = sandwich(vae, 20, (9,), chains=4, temperatures=20)
        >>> print(found)
        log p(x) of 20 x simulated from the model, mean ± standard error, in nats
          annealed, lower bound ...
    """
    runs = Chains(chains, prior_chains, temperatures, leapfrogs, path, pairs, progress)
    samples = check_int("samples", samples, minimum=1)
    z, x, y = _simulate(vae, check_int("count", count, minimum=1), shape, y)
    parts = list(zip(split(x, y, runs.examples), z.split(runs.examples), strict=True))
    runs.expect(len(parts), ways=2)
    with frozen(vae):
        lower, upper, residual = zip(*(_both(vae, data, start, runs) for data, start in parts), strict=True)
    weighed = _together(summarize(chunks, samples) for chunks in log_weights(vae, x, y, samples, pairs))
    return Sandwich(_together(lower), _together(upper), weighed, torch.cat(residual), samples)


def _lower(vae: VAE, data: Data, runs: Chains) -> AnnealedEstimate:
    parts = [part for part, _ in _parts(vae, data, runs)]
    return mixed([runs.lower(part, runs.step_sizes(part)) for part in parts], parts)


def _both(vae: VAE, data: Data, z: Tensor, runs: Chains) -> tuple[AnnealedEstimate, AnnealedEstimate, Tensor]:
    """The bounds of some examples, and the residual of the inverses that the way back starts with."""
    there, back, away, parts = [], [], [], _parts(vae, data, runs)
    for part, density in parts:
        with torch.no_grad():
            noise, _ = density.flow.inverse(z, density.context)
            away.append((density.rsample(noise=noise) - z).abs().amax(-1) / z.abs().amax(-1).clamp_min(1))
        sizes = runs.step_sizes(part)  # of x alone: the z behind it must not have a say
        there.append(runs.lower(part, sizes))
        back.append(runs.back(part, sizes, noise))
    only = [part for part, _ in parts]
    upper = mixed(back, only)
    return mixed(there, only), upper._replace(log_p=-upper.log_p), torch.stack(away).amax(0)


def _parts(vae: VAE, data: Data, runs: Chains) -> list[tuple[Part, FlowDistribution]]:
    """The noise spaces that chains walk in, each with what its flow makes of noise: q(z|x), and p(z)."""
    with torch.no_grad():
        q = vae.encode(*data)._of_flow()
        shares = [(q, runs.chains, 1.0)]
        if runs.prior_chains:
            shares = [(q, runs.chains, 1 - PRIOR_SHARE), (prior_rows(vae, q, data[1]), runs.prior_chains, PRIOR_SHARE)]
    return [(Part(joint_target(vae, p, data), noise_like(q), chains, share), p) for p, chains, share in shares]


@torch.no_grad()
def _simulate(vae: VAE, count: int, shape: tuple[int, ...], y: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draws of z ~ p(z), x ~ p(x|z), and a row of y for each."""
    y = row_for_each(y, count)
    z = vae.sample_prior(count, y)
    x = vae.likelihood.sample(vae._numbers(z, shape, y)).view(count, *shape)
    return z, x, y


def _together(parts: Iterable[Row]) -> Row:
    """The rows of all parts, field by field."""
    found = list(parts)
    return type(found[0])(*(torch.cat(column) for column in zip(*found, strict=True)))


def _mean_error(values: Tensor, width: int = 0) -> str:
    """The mean ± its standard error over examples; nan for one."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():{width}.3f} ± {error:.3f}"
