"""A flow posterior of any model, from its log joint alone: draws, an evidence bound, and an honest verdict."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping
from numbers import Real

import torch

from flowpost.numerics.alone import DrawsApart
from flowpost.numerics.arguments import FLOATS, check_device, check_int
from flowpost.numerics.watchers import full_precision
from flowpost.variational.calling import LogJoint
from flowpost.variational.families import GAUSSIANS, Flow, assemble, build_flow, is_mixable
from flowpost.variational.fitted import FittedPosterior as FittedPosterior
from flowpost.variational.parameters import Parameters, Spec
from flowpost.variational.precision import precision
from flowpost.variational.running import Running, left_out
from flowpost.variational.starts import MOST
from flowpost.variational.target import Target
from flowpost.variational.weighing import Progress as Progress


def fit(
    log_joint: LogJoint,
    dim_or_spec: Spec,
    flow: Flow = None,
    *,
    budget: int = 1_000_000,
    samples: int = 512,
    modes: int = MOST,
    temperature: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[Progress], object] | None = None,
    resume: FittedPosterior | None = None,
    **flow_options: object,
) -> FittedPosterior:
    """Fit q to the posterior ``p(theta|x)`` of a model, given ``log p(x, theta)``, by maximizing the ELBO.

    Nothing has to be tuned for it. Gaussians climb from several first guesses by their natural gradient, which has no
    units; those at different modes are kept. In the coordinates of each mode's Gaussian, where p is about standard, a
    flow that starts as the identity is trained by sticking the landing, its rate falling when the ELBO no longer rises.
    Several modes give a mixture of such flows, also one that a draw of q finds before the rate falls. The fit ends when
    log p/q is constant, or with the budget.

    Ctrl-C ends it early with the best q so far; in about the first twentieth of the budget there is none yet.

    Args:
        log_joint: from parameters to ``log p(x, theta)``, up to a constant that is then missing in the evidence. It
            takes S draws at once, ``(S, dim)`` or a mapping of ``(S, *shape)``, and returns ``(S,)``; or it takes one
            draw and returns a scalar, and is run by `torch.func.vmap`, or where that fails in a loop, with a warning.
            Draws at which it is nan or raises a numeric error are left out: `torch.linalg.LinAlgError`,
            ArithmeticError, AssertionError or ValueError.
        dim_or_spec: the number of real parameters, or a mapping of each name to a shape, a constraint of
            `torch.distributions.constraints` (or `ordered`), or a pair ``(shape, constraint)``. The prior is one over
            the constrained values: the log-det is added here.
        flow: a recipe's name, a `Bijector`, or a `FlowPosterior` without features, over the free coordinates; by
            default a spline of each variable and then ``"realnvp"``, of a single coordinate ``"spline_coupling"``. For
            more than one mode its density must be fast: one of these, ``"maf"`` or a Gaussian.
        budget: gradients of the log joint, one for each draw, at most; but the start takes some 10,000 in any case.
        samples: draws a step.
        modes: how many modes q may have; 1 for a single flow.
        temperature: at which the flow begins to be trained, at least 1: log p counts as ``log p / temperature`` there,
            and in full after a third of the steps. For densities with modes that a single flow is to hold.
        seed: of weights and draws; torch's global generator is left as it is.
        device: where to fit; the log joint's data must be there.
        dtype: by default float64 where the log joint takes it, on a GPU only where float32 is not enough.
        progress: is called with each `Progress`; ``progress=print`` prints them.
        resume: a fit of the same model to go on from with another `budget`, in its dtype; what it was given as `flow`
            and `modes` holds, and these are not read.
        **flow_options: the recipe's; without them 8 steps of ``hidden=(32, 32)``, above 16 variables 12 steps, above 32
            of ``hidden=(64, 64)``.

    Returns:
        `FittedPosterior`: ``sample``, ``log_prob``, ``log_evidence``, ``k_hat``, ``summary``, ``verdict`` and more.

    Raises:
        TypeError: for a log joint, spec or flow of another kind, or one that has no gradient.
        ValueError: for a log joint of a wrong shape or without a finite value, with the parameters where it is not.

    Reference:
        Agrawal, Sheldon & Domke (2020), Advances in Black-Box VI; Agrawal & Domke (2024), Disentangling Impact of
        Capacity, Objective, Batchsize, Estimators, and Step-size on Flow VI, for what to fit and by which gradient.

    Example:
        >>> from torch.distributions import Normal, constraints
        >>> x = torch.tensor([1.2, 0.3, 2.2, 1.9], dtype=torch.float64)
        >>> def log_joint(theta):
        ...     mu, tau = theta["mu"].unsqueeze(-1), theta["tau"].unsqueeze(-1)
        ...     return (Normal(0.0, 5.0).log_prob(mu) - tau).squeeze(-1) + Normal(mu, tau).log_prob(x).sum(-1)
        >>> fitted = flowpost.fit(log_joint, {"mu": (), "tau": constraints.positive}, budget=20_000)
        >>> fitted.sample(100)["tau"].shape, abs(fitted.log_evidence + 8.047) < 0.05
        (torch.Size([100]), True)
    """
    begun, device = time.perf_counter(), check_device(device)
    budget, samples = check_int("budget", budget, minimum=1), check_int("samples", samples, minimum=2)
    modes, seed = check_int("modes", modes, minimum=1), check_int("seed", seed, minimum=0)
    _check(log_joint, temperature, dtype, progress)
    parameters = Parameters(dim_or_spec)
    _check_arguments(log_joint, named=isinstance(dim_or_spec, Mapping))
    if resume is not None:
        _check_resume(resume, parameters, flow_options, dtype)
        dtype = resume.target.dtype
    # On the host: equal seeds are equal weights on all devices, and no generator of torch's own is touched.
    with DrawsApart(seed), torch.device("cpu"):
        built = build_flow(flow, parameters.dim, flow_options)
    # Whatever the caller has switched on or off: gradients are taken, and in full precision.
    with torch.inference_mode(mode=False), torch.enable_grad(), full_precision(device.type):
        target = Target(log_joint, parameters, device=device, dtype=dtype or precision(log_joint, parameters, device))
        running = Running(
            target, budget, samples, torch.Generator(device).manual_seed(seed), progress, begun, temperature
        )
        if resume is not None:
            return running.after(resume).ascend(copy.deepcopy(resume.posterior).to(device), [*resume.left_out])
        most, diagonal = modes if is_mixable(built) else 1, flow == "diagonal"
        running.flow, running.most = built, most
        start = running.start(most, diagonal=diagonal)
        lost = [left_out(start, most, target)] if len(start.gaussians) > most else []
        if len(start.gaussians) < most:
            start = running.imaged(start, diagonal=diagonal)
        gaussians = start.gaussians[:most]
        if flow in GAUSSIANS and len(gaussians) == 1:
            best, said = running.rise(gaussians[0], diagonal=diagonal)
            return running.finish(assemble(built, [best], start.elbos[:1]), lost, said)
        return running.ascend(assemble(built, gaussians, start.elbos[:most]), lost)


def _check(log_joint: object, temperature: object, dtype: object, progress: object) -> None:
    """Refuse what can be seen to be wrong before the log joint is called."""
    if not callable(log_joint):
        raise TypeError(f"log_joint: expected a function of the parameters, got {type(log_joint).__name__}")
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}")
    if not 1 <= float(temperature) < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 1, got {temperature}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype: expected torch.float32, torch.float64 or None, got {dtype!r}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function of a Progress, got {type(progress).__name__}; write print")


def _check_arguments(log_joint: LogJoint, *, named: bool) -> None:
    """Refuse a log joint that cannot be called with all parameters as its one argument."""
    try:
        signature = inspect.signature(log_joint, follow_wrapped=False)
    except (TypeError, ValueError):  # it has none to read
        return
    try:
        signature.bind(None)
    except TypeError:
        one = "a mapping of names to tensors" if named else "a tensor of all parameters"
        cure = "lambda p: log_joint(**p)" if named else "lambda theta: log_joint(*theta.unbind(-1))"
        hint = f"; write {cure} in its place" if signature.parameters else ""
        message = f"log_joint: expected a function of one argument, {one}, got one of {signature}{hint}"
        raise TypeError(message) from None


def _check_resume(
    resume: object, parameters: Parameters, options: Mapping[str, object], dtype: torch.dtype | None
) -> None:
    """Refuse to go on from what is no fit of these parameters."""
    if not isinstance(resume, FittedPosterior):
        raise TypeError(
            f"resume: expected a FittedPosterior, got {type(resume).__name__}; for a file write FittedPosterior.load"
        )
    if repr(resume.parameters) != repr(parameters):
        raise ValueError(f"resume: expected a fit of {parameters!r}, got one of {resume.parameters!r}")
    if options:
        raise TypeError(f"flow_options: expected none with resume, whose flow goes on, got {', '.join(options)}")
    if dtype not in (None, resume.target.dtype):
        raise ValueError(f"dtype: expected none with resume, or its {resume.target.dtype}, got {dtype}")
