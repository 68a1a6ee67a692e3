"""Everything is where its module is: shown without a GPU, by the meta device and by a default device that is another.

Moved to the meta device, or built there, a module that makes a constant elsewhere mixes devices, and one that reads a
number back raises. Where it is the default device, what a module on the CPU makes on the default device does the same.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import pytest
import torch
from registry import BY_NAME, ENTRIES, Case, Entry, draw
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from versions import adam_elsewhere

import flowpost
from flowpost import Bijector, FlowPosterior
from flowpost.calibration import rank_ecdf
from flowpost.evaluation import active_units, decompose_elbo, log_marginal, refine, sandwich
from flowpost.gaps import inference_gaps
from flowpost.objectives import elbo, elbo_terms, free_bits, gaussian_kl, iwae, latent_kl
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical, Gaussian, VAEOutput

every = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
recipes = pytest.mark.parametrize("name", RECIPES)
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten.is_nonzero.default"}
PIXELS, GRADIENTS = 6, ("standard", "stl", "dreg")


class OnMeta(TorchDispatchMode):
    """Refuses an operation that leaves the meta device, but for a copy to it, or reads a number back."""

    def __init__(self, *, copies: bool = False) -> None:
        super().__init__()
        self.allowed = {"aten._to_copy.default"} if copies else set()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        name, found = str(func), func(*args, **(kwargs or {}))
        assert name not in READS
        elsewhere = [t.device for t in tensors((*args, found)) if not t.is_meta]
        assert not elsewhere or name in self.allowed, f"{name} on {elsewhere}"
        return found


def tensors(values: Sequence[object]) -> list[Tensor]:
    """As `tree_leaves`, ten times faster, of what an operation takes and gives: tensors, and lists of them."""
    lists = [each for each in values if isinstance(each, (list, tuple))]
    return [each for each in chain(values, *lists) if isinstance(each, Tensor)]


def results(step: Bijector, z: Tensor, context: Tensor | None) -> list[Tensor]:
    """Both directions, all their gradients, and what a step says of its context and its order."""
    z = z.detach().requires_grad_()
    context = None if context is None else context.detach().requires_grad_()
    inputs = [z, *([] if context is None else [context]), *step.parameters()]
    found = [*step(z, context), *step.inverse(z if step.codomain == step.domain else step(z, context)[0], context)]
    total = sum((each.sum() for each in found), z.new_zeros(()))
    grads = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    order = step.causal_order()
    told = [step.initial_context(), step.head_scale(), *([] if order is None else [order])]
    return [*found, *grads, *told]


def points(step: Bijector) -> tuple[Tensor, Tensor | None]:
    z = torch.zeros(5, step.dim, device="meta")
    return z, z.new_zeros(5, step.context_size) if step.context_size else None


@every
def test_a_step_that_is_moved_works_where_it_is(entry: Entry) -> None:
    """Without a call before: the move brings every constant along."""
    step = entry.make(3, 0).to("meta")
    with OnMeta():
        found = results(step, *points(step))
    assert all(each.is_meta for each in found)


@every
def test_a_step_that_is_built_there_works_there(entry: Entry) -> None:
    with torch.device("meta"):
        step = entry.make(3, 0)
    assert all(each.is_meta for each in chain(step.parameters(), step.buffers()))
    z, context = points(step)
    with OnMeta(copies=True):
        found = [*step(z, context), step.initial_context(), step.head_scale()]
    assert all(each.is_meta for each in found)


@every
def test_a_step_builds_nothing_on_the_default_device(entry: Entry) -> None:
    step, z, context = draw(entry, Case(3, seed=1, push=0.1), dtype=torch.float32)
    expected = results(step, z, context)
    with torch.device("meta"):
        found = results(step, z, context)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["unit_lower_triangular", "lu_linear_order", "autoregressive_order", "spline"])
def test_second_derivatives_build_nothing_on_the_default_device(name: str) -> None:
    step, z, context = draw(BY_NAME[name], Case(3, seed=1, push=0.1))
    assert context is not None

    def second() -> Tensor:
        given = context.detach().requires_grad_()
        (slope,) = torch.autograd.grad(step(z, given)[0].square().sum(), given, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), given)[0]

    expected = second()
    with torch.device("meta"):
        assert torch.equal(second(), expected)


def everything(posterior: FlowPosterior, h: Tensor) -> list[Tensor]:
    """All that a posterior's q(.|x) gives, and the gradients of its log-densities."""
    q = posterior.at(h)
    sample = q.draw((2,))
    log_q = [sample.log_prob, q.log_prob(sample.z.detach()), q.path_log_prob(sample)]
    told = [posterior.flow.initial_context(), posterior.flow.head_scale()]
    if q.is_gaussian:
        told += [*q.gaussian(), q.mean, q.variance, q.entropy()]
    grads = torch.autograd.grad(sum(log_q[1:], log_q[0]).sum(), [h, *posterior.parameters()])
    return [*sample, *log_q, *told, *grads]


def model(posterior: FlowPosterior, likelihood: Bernoulli | Binomial | Categorical | Gaussian) -> VAE:
    numbers = likelihood.numbers
    return VAE(nn.Linear(PIXELS, FEATURES), posterior, nn.Linear(DIM, numbers * PIXELS), likelihood)


def losses(out: VAEOutput, gradient: str) -> Tensor:
    """Of all objectives that a gradient is right for."""
    terms = out.log_likelihood, out.log_prior, out.log_q
    bound = iwae(*terms, kl_weight=0.5).mean()
    if gradient != "standard":
        return -bound
    kl = free_bits(out.kl_groups(DIM if out.latent_kl is not None else 1), 0.1)
    return kl - bound - elbo(*terms, out.kl).mean() - elbo_terms(*terms).reconstruction.mean()


def training(vae: VAE, x: Tensor, gradient: str) -> list[Tensor]:
    """A loss and its gradients, which stay with the parameters."""
    vae.zero_grad(set_to_none=True)
    loss = losses(vae(x, (2,), gradient), gradient)
    loss.backward()
    return [loss.detach(), *(p.grad for p in vae.parameters() if p.grad is not None)]


def float32(name: str) -> FlowPosterior:
    """With one step, where each searches an inverse."""
    return small(name, **({"steps": 1} if name == "naf" else {})).float()


@recipes
def test_a_posterior_that_is_moved_works_where_it_is(name: str) -> None:
    posterior = float32(name).to("meta")
    h = torch.zeros(5, FEATURES, device="meta", requires_grad=True)
    with OnMeta():
        found = everything(posterior, h)
    assert all(each.is_meta for each in found)


@recipes
def test_a_posterior_builds_nothing_on_the_default_device(name: str) -> None:
    posterior, h = float32(name), torch.randn(5, FEATURES, requires_grad=True)
    torch.manual_seed(1)
    expected = everything(posterior, h)
    torch.manual_seed(1)
    with torch.device("meta"):
        found = everything(posterior, h)
    assert all(map(torch.equal, found, expected))


@recipes
def test_a_vae_s_step_runs_on_meta_alone(name: str) -> None:
    """Forward, objective, backward and Adam; Adam alone counts its steps on the host, where nothing captures it."""
    vae = model(float32(name), Bernoulli()).to("meta")
    optimizer, x = torch.optim.Adam(vae.parameters()), torch.zeros(5, PIXELS, device="meta")
    for gradient in GRADIENTS if name == "planar" else GRADIENTS[:1]:
        with OnMeta():
            found = training(vae, x, gradient)
        assert all(each.is_meta for each in found)
        optimizer.step()
    moments = [each for state in optimizer.state.values() for key, each in state.items() if key != "step"]
    assert moments
    assert all(each.is_meta for each in moments)


LIKELIHOODS = [Bernoulli(), Binomial(3), Categorical(3), Gaussian()]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
@pytest.mark.parametrize("name", ["diagonal", "full_covariance", "planar"])
def test_a_vae_and_its_objectives_build_nothing_on_the_default_device(
    name: str, likelihood: Bernoulli | Binomial | Categorical | Gaussian
) -> None:
    vae, x = model(float32(name), likelihood), torch.rand(5, PIXELS).round()
    for gradient in GRADIENTS:
        torch.manual_seed(1)
        expected = training(vae, x, gradient)
        torch.manual_seed(1)
        with torch.device("meta"):
            found = training(vae, x, gradient)
            mean = likelihood.mean(vae.decode(torch.zeros(2, 5, DIM, device="cpu"), PIXELS))
        assert all(map(torch.equal, found, expected))
        assert mean.device.type == "cpu"


def test_closed_forms_of_the_kl_are_where_their_arguments_are() -> None:
    loc, scale = torch.zeros(2, 3, device="meta"), torch.ones(2, 3, device="meta")
    with OnMeta():
        assert gaussian_kl(loc, torch.diag_embed(scale)).is_meta
        assert latent_kl(loc, scale).is_meta


@pytest.mark.filterwarnings("ignore::flowpost.importance.UnreliableEstimateWarning")
def test_chains_build_nothing_on_the_default_device() -> None:
    """Their temperatures and the prior's map from noise were built there: a NotImplementedError of torch."""
    vae = model(float32("diagonal"), Bernoulli()).eval()

    def reports() -> list[Tensor]:
        torch.manual_seed(1)
        bounds = sandwich(vae, 1, (PIXELS,), chains=1, temperatures=2, leapfrogs=1, samples=30)
        q = vae.encode(torch.zeros(1, PIXELS, device="cpu"))
        return [bounds.gap, refine(q, lambda z: -z.square().sum(-1), 2, 1, 1)]

    expected = reports()
    with torch.device("meta"):
        found = reports()
    assert all(map(torch.equal, found, expected))


@adam_elsewhere
@pytest.mark.filterwarnings("ignore::flowpost.importance.UnreliableEstimateWarning")
@pytest.mark.parametrize("name", ["diagonal", "planar"])
def test_reports_build_nothing_on_the_default_device(name: str) -> None:
    vae, x = model(float32(name), Bernoulli()), torch.rand(5, PIXELS).round()
    richer = flowpost.Planar(DIM)
    with torch.device("meta"):
        found = [log_marginal(vae, x, 30), active_units(vae, x, 4), decompose_elbo(vae, x, 2)]
        found += [inference_gaps(vae, x, richer=richer, steps=1, samples=30)]
        found += [rank_ecdf(torch.arange(64, device="cpu").unsqueeze(-1), samples=63, rounds=20)]
    assert all(each.device.type == "cpu" for each in tree_leaves(found) if isinstance(each, Tensor))
