"""A fitted posterior: draws of the parameters, their density, the evidence, and an honest verdict."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowpost.files import File
from flowpost.importance import LIMIT, UnreliableEstimateWarning
from flowpost.numerics.arguments import check_device, check_int
from flowpost.numerics.products import wide_dtype
from flowpost.variational.bound import Fitted
from flowpost.variational.calling import LogJoint
from flowpost.variational.draws import named
from flowpost.variational.families import Flow
from flowpost.variational.far import where_far
from flowpost.variational.mirrored import where_mirrored
from flowpost.variational.mixture import Mixture
from flowpost.variational.parameters import Spec, Values
from flowpost.variational.refining import refined
from flowpost.variational.stored import Course, Stored, read_fitted, write_fitted
from flowpost.variational.summary import Summary, misses, summary
from flowpost.variational.target import Target
from flowpost.variational.verdict import reasons, verdict
from flowpost.variational.weighing import (
    Progress,
    Weighed,
    device_of,
    doubts,
    estimate,
    mean_and_error,
    resampled,
    smooth,
    unseen_of,
    weigh,
    where_apart,
    where_lost,
)

if TYPE_CHECKING:
    from flowpost.interop.arviz import DataTree  # pyright: ignore[reportAttributeAccessIssue]

DRAWS = 10_000
"""Behind the evidence and the verdict."""


class FittedPosterior:
    """A posterior that `flowpost.fit` made; q is over free coordinates, and all that is read from it over parameters.

    What calls the log joint again raises a ValueError where its data have changed since.

    Attributes:
        posterior: q on the free coordinates: a `FlowPosterior`, or where several modes were found a `Mixture`.
        parameters: the map from coordinates to parameters.
        evaluations: gradients of the log joint that the fit took, one for each draw.
        seconds: that it took.
        history: a `Progress` for each reading.
        notes: what the last run of the fit had to say.
        left_out: what is said of modes that q does not hold.
        estimate: of the log evidence, from 10,000 draws.
    """

    def __init__(
        self,
        posterior: Fitted,
        target: Target,
        *,
        evaluations: int,
        seconds: float,
        history: Sequence[Progress] = (),
        notes: Sequence[str] = (),
        left_out: Sequence[str] = (),
        weighed: Weighed | None = None,
    ) -> None:
        self.posterior, self.target, self.parameters = posterior, target, target.parameters
        self.evaluations, self.seconds, self.history = evaluations, seconds, list(history)
        self.notes, self.left_out = list(notes), list(left_out)
        if weighed is None:
            weighed = weigh(posterior, target, DRAWS, torch.Generator(device_of(posterior)).manual_seed(0))
        self._weighed, self.estimate, self._unseen = weighed, estimate(weighed), unseen_of(weighed)
        self._elbo, self._smooth = mean_and_error(weighed), smooth(weighed, self.k_hat)
        images = [] if self.left_out else where_mirrored(posterior, target, weighed)
        self._said = reasons(
            self.estimate,
            self._elbo[0],
            lost=where_lost(weighed, target),
            apart=where_apart(weighed, target),
            missed=misses(self.parameters, self._smooth),
            far=where_far(posterior, target, weighed),
            notes=[*self.left_out, *images, *self.notes, *doubts(weighed, target)],
            unseen=self._unseen,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.parameters!r}; {self.verdict})"

    def sample(self, n: int = 1000) -> Values:
        """Independent draws of the parameters: a mapping of ``(n, *shape)``, or ``(n, dim)`` of a bare dim."""
        return self.parameters.constrain(self._drawn(n)[0])[0]

    @torch.no_grad()
    def log_prob(self, values: Values) -> Tensor:
        """The log density of parameters, with respect to their own volume: ``log q(u) - log|det dtheta/du|``."""
        like = self._weighed.z
        free = self.parameters.free(values, wide_dtype(like)).to(like)
        return self.posterior.log_prob(free) - self.parameters.constrain(free)[1]

    def elbo(self, samples: int = DRAWS) -> tuple[float, float]:
        """The ELBO in nats from fresh draws, and its standard error."""
        self.target.check_same()
        return mean_and_error(weigh(self.posterior, self.target, check_int("samples", samples, 2), self._generator()))

    @property
    def log_evidence(self) -> float:
        """The log of the joint's integral, in nats, by smoothed weights; ``estimate.standard_error`` is its error."""
        return self.estimate.log_p.item()

    @property
    def k_hat(self) -> float:
        """Pareto k of the importance weights: above 0.7 they are not to be trusted, -inf where none stands out."""
        return self.estimate.k_hat.item()

    @property
    def ess(self) -> float:
        """Effective number of the 10,000 weighted draws."""
        return self.estimate.ess.item()

    @property
    def is_trusted(self) -> bool:
        """Whether nothing speaks against the fit."""
        return not self._said

    @property
    def verdict(self) -> str:
        """In plain words, whether the fit is to be trusted, and if not, why and what helps."""
        return verdict(self._said, self.estimate, self._elbo[0], self._unseen)

    def summary(self) -> Summary:
        """Mean, sd, quantiles and Monte Carlo error of every parameter; it prints as a table.

        Draws are weighted by p/q where k-hat allows it, and else plain draws of q.
        """
        return summary(self.parameters, self._smooth, weighted=self.k_hat <= LIMIT)

    @torch.no_grad()
    def importance_resample(self, n: int = 1000, *, pool: int | None = None) -> Values:
        """Draws of q taken again with probabilities in proportion to p/q: nearer to p, and some of them equal.

        Args:
            n: how many.
            pool: how many draws of q they are taken from; ten times n by default.

        Warns:
            UnreliableEstimateWarning: where k-hat of the pool is above 0.7; it says how often one draw is taken.
        """
        z, k_hat = self._resampled(n, pool)
        if not k_hat <= LIMIT:
            most = int(z.unique(dim=0, return_counts=True)[1].max())
            found = f"Pareto k-hat is {k_hat:.2f}, above {LIMIT}, and one draw is {most} of these {n}"
            message = f"importance_resample: {found}; if that is many, refine() moves them apart"
            warnings.warn(message, UnreliableEstimateWarning, stacklevel=3)
        return self.parameters.constrain(z)[0]

    def refine(self, n: int = 1000, *, steps: int = 20, leapfrogs: int = 5) -> Values:
        """Draws that Hamiltonian Monte Carlo has moved from q towards p, in the noise space of the flow.

        They begin as `importance_resample` gives them. There p is nearly N(0, I), so that one step size fits all
        directions. Use it where the verdict is not good. A chain stays in its mode, whose share is that of the
        resampling. Costs ``(steps + 100) leapfrogs n`` gradients.

        Args:
            n: how many draws, each a chain of its own.
            steps: of every chain.
            leapfrogs: gradients a step.

        Reference:
            Hoffman et al. (2019), NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport.
        """
        moved = refined(self.posterior, self.target, self._resampled(n, None)[0], steps, leapfrogs)
        with torch.no_grad():
            return self.parameters.constrain(moved)[0]

    def to_arviz(self, draws: int = 1000, *, chains: int = 1) -> DataTree:
        """Draws of q as an `xarray.DataTree`, for ArviZ 1: ``pip install 'flowpost[arviz]'``.

        The group ``posterior`` has the parameters by their names and shapes, ``sample_stats`` their log densities:
        ``log_q`` of q, and ``lp`` of the log joint. The draws are independent, also those of one chain. The evidence,
        the ELBO, k-hat and the verdict are attributes of the tree.
        """
        self.target.check_same()
        from flowpost.interop.arviz import draws_to_datatree

        count = check_int("chains", chains, minimum=1) * check_int("draws", draws, minimum=1)
        z, log_q = self._drawn(count)
        with torch.no_grad():
            values, log_det = self.parameters.constrain(z)
            stats = {"log_q": log_q - log_det, "lp": self.target(z) - log_det}
        figures = {"elbo": self._elbo[0], "log_evidence": self.log_evidence, "k_hat": self.k_hat}
        attrs = {**figures, "evaluations": self.evaluations, "seconds": self.seconds, "verdict": self.verdict}
        return draws_to_datatree(named(values), stats, chains=chains, attrs=attrs)

    def save(self, path: File) -> None:
        """Write q, its draws and how the fit went to one file, whole or not at all, as `flowpost.save` does.

        The log joint is not in it, for no code is: `load` is given it again.

        Raises:
            ImportError: if safetensors is missing: ``pip install 'flowpost[files]'``.
            OSError: if the file cannot be written.
        """
        course = Course(self.evaluations, self.seconds, self.history, self.notes, self.left_out)
        write_fitted(path, Stored(self.posterior, self.target, self._weighed, course))

    @classmethod
    def load(
        cls,
        path: File,
        log_joint: LogJoint,
        dim_or_spec: Spec,
        flow: Flow = None,
        *,
        device: torch.device | str = "cpu",
        **flow_options: object,
    ) -> FittedPosterior:
        """Read a file of `save`: with the log joint, spec, flow and options that `flowpost.fit` was called with.

        Raises:
            CorruptFileError: for a file that is damaged or of another kind; a ValueError.
            ValueError: for another spec, flow or log joint than the file's, with what differs.
            OSError: if the file cannot be opened.
        """
        read = read_fitted(path, log_joint, dim_or_spec, flow, flow_options, check_device(device))
        return cls(read.posterior, read.target, weighed=read.weighed, **read.course._asdict())

    @torch.no_grad()
    def _drawn(self, n: int) -> tuple[Tensor, Tensor]:
        """Free coordinates and their log q."""
        n = check_int("n", n, minimum=1)
        if isinstance(self.posterior, Mixture):
            z = self.posterior.sample(n)
            return z, self.posterior.log_prob(z)
        sample = self.posterior(sample_shape=(n,))
        return sample.z, sample.log_prob

    def _resampled(self, n: int, pool: int | None) -> tuple[Tensor, float]:
        """Free coordinates, and k-hat of the weights by which they were taken."""
        n = check_int("n", n, minimum=1)
        self.target.check_same()
        size, generator = check_int("pool", 10 * n if pool is None else pool, minimum=n), self._generator()
        return resampled(weigh(self.posterior, self.target, size, generator), n, generator)

    def _generator(self) -> torch.Generator:
        """One on q's device, of a seed that torch's own generator draws."""
        return torch.Generator(device_of(self.posterior)).manual_seed(int(torch.randint(2**62, (), device="cpu")))
