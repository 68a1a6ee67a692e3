"""Gradients of gradients where the inputs of a step depend on one another: a shared h, tied steps, z a function of h.

A gradient penalty, a meta-learner or a Hessian asks for ``create_graph=True``. It must not change the first gradient.
"""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from registry import ENTRIES, Case, Entry, by_level, carry, draw
from small import DIM, FEATURES, small
from torch import Tensor

import flowpost
from flowpost import Affine, Autoregressive, Bijector, Chain, FlowPosterior, Inverse, Masked, Shared
from flowpost.recipes import RECIPES

Loss = Callable[[], Tensor]


def gradients(loss: Loss, leaves: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(loss(), leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return list(found)


def assert_first_agree(loss: Loss, leaves: Sequence[Tensor]) -> None:
    found, expected = gradients(loss, leaves, create_graph=True), gradients(loss, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def assert_second_agree(loss: Loss, leaves: Sequence[Tensor], step: float = 1e-6) -> None:
    """A Hessian times a random direction against central differences of the plain gradient along it.

    The steps are short because elu's second derivative jumps at 0.
    """
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]

    def moved(size: float) -> list[Tensor]:
        before = [leaf.detach().clone() for leaf in leaves]
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(size * direction)
        found = gradients(loss, leaves)
        with torch.no_grad():
            for leaf, old in zip(leaves, before, strict=True):
                leaf.copy_(old)
        return found

    first = gradients(loss, leaves, create_graph=True)
    slope = sum((grad * direction).sum() for grad, direction in zip(first, directions, strict=True))
    assert isinstance(slope, Tensor)
    found = [torch.zeros_like(leaf) for leaf in leaves]
    if slope.requires_grad:  # a loss that is linear has no second derivative
        found = list(torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True))
    pairs = zip(moved(step), moved(-step), strict=True)
    expected = torch.cat([((up - down) / (2 * step)).flatten() for up, down in pairs])
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(torch.cat([each.flatten() for each in found]), expected, rtol=1e-5, atol=1e-6 * scale)


def assert_agree(loss: Loss, leaves: Sequence[Tensor]) -> None:
    assert_first_agree(loss, leaves)
    assert_second_agree(loss, leaves)


def weighed(value: Tensor, log_prob: Tensor) -> Tensor:
    """A loss that reads every number, and none like another."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    return (weights * value.sin()).sum() + (weights[..., 0] * log_prob).sum()


def sampled(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Loss:
    return lambda: weighed(*posterior(h, noise=z)[:2])


def sampled_often(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Loss:
    return lambda: weighed(*posterior(h, sample_shape=(3,), noise=torch.stack([z, z + 0.4, 0.2 - z]))[:2])


def scored(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Loss:
    return lambda: weighed(z, posterior.log_prob(z, h))


def scored_often(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Loss:
    return lambda: weighed(torch.stack([z, -z]), posterior.log_prob(torch.stack([z, 0.3 - z]), h))


def scored_at_function_of_h(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Loss:
    """The z that is scored is the encoder's too."""
    return lambda: weighed(z, posterior.log_prob(z + h[..., :DIM].tanh(), h))


def scored_own_sample(posterior: FlowPosterior, h: Tensor, z: Tensor) -> Loss:
    """The z that is scored depends on every parameter that scores it."""
    return lambda: weighed(z, posterior.log_prob(1.1 * posterior(h, noise=z).z, h))


USES = [sampled, sampled_often, scored, scored_often, scored_at_function_of_h, scored_own_sample]


def inputs(posterior: FlowPosterior) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(2, FEATURES, dtype=torch.float64, generator=generator).requires_grad_()
    z = (0.7 * torch.randn(2, DIM, dtype=torch.float64, generator=generator)).requires_grad_()
    return h, z, [h, z, *posterior.parameters()]


def _by_level() -> list:
    """One sample is tried of the first families early, several and a z that depends on h of all."""
    early = {"full_covariance", "planar", "iaf", "maf", "realnvp"}
    marks = {True: pytest.mark.full, False: pytest.mark.long}
    pairs = [(name, use) for use in USES for name in RECIPES]
    return [
        pytest.param(name, use, marks=marks[name in early or use not in (sampled, scored)], id=f"{use.__name__}-{name}")
        for name, use in pairs
    ]


@pytest.mark.parametrize(("name", "use"), _by_level())
def test_every_recipe(name: str, use: Callable[[FlowPosterior, Tensor, Tensor], Loss]) -> None:
    posterior = small(name, push=0.2)
    h, z, leaves = inputs(posterior)
    assert_agree(use(posterior, h, z), leaves)


@pytest.mark.parametrize("name", RECIPES)
def test_the_path_gradient(name: str) -> None:
    """A Hessian times a direction against that of a copy whose parameters, and whose h, are held fixed."""
    posterior = small(name, push=0.2)
    h, noise, leaves = inputs(posterior)
    frozen, held = copy.deepcopy(posterior).requires_grad_(requires_grad=False), h.detach()

    def loss() -> Tensor:
        sample = posterior(h, noise=noise)
        return weighed(sample.z, posterior.path_log_prob(sample, h))

    def plain() -> Tensor:
        z = posterior(h, noise=noise).z
        return weighed(z, frozen.log_prob(z, held))

    assert_first_agree(loss, leaves)
    found, expected = along_a_direction(loss, leaves), along_a_direction(plain, leaves)
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8 * scale)


def along_a_direction(loss: Loss, leaves: Sequence[Tensor]) -> Tensor:
    """A Hessian times a direction, by differentiating twice."""
    generator = torch.Generator().manual_seed(7)
    first = gradients(loss, leaves, create_graph=True)
    parts = [(grad * torch.randn(grad.shape, generator=generator, dtype=grad.dtype)).sum() for grad in first]
    found = torch.autograd.grad(torch.stack(parts).sum(), leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


def test_the_path_gradient_says_where_it_ends() -> None:
    """Of a third derivative, of a second one under `torch.func`, and where a parameter has changed in between."""
    posterior = small("iaf", push=0.2)
    h, noise, _ = inputs(posterior)
    match = "^path gradient: expected first or second derivatives"

    def loss(noise: Tensor) -> Tensor:
        sample = posterior(h, noise=noise)
        return (posterior.path_log_prob(sample, h) ** 2).sum()

    (first,) = torch.autograd.grad(loss(noise), noise, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), noise, create_graph=True)
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.grad(second.square().sum(), noise)
    torch.testing.assert_close(torch.func.grad(loss)(noise), first)
    with pytest.raises(RuntimeError, match=match):
        torch.func.grad(lambda e: torch.func.grad(loss)(e).square().sum())(noise)
    (first,) = torch.autograd.grad(loss(noise), noise, create_graph=True)
    with torch.no_grad():
        next(posterior.flow.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.square().sum(), noise)


def test_the_path_gradient_under_forward_mode() -> None:
    """A derivative along a direction, and its own gradient, against those of a frozen copy."""
    posterior = small("iaf", push=0.2)
    h, noise, _ = inputs(posterior)
    frozen, held = copy.deepcopy(posterior).requires_grad_(requires_grad=False), h.detach()
    sample = posterior(held, noise=noise.detach())
    z, direction = sample.z.detach().requires_grad_(), torch.linspace(-1, 1, noise.numel(), dtype=noise.dtype)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, direction.view_as(z))
        value = posterior.path_log_prob(sample._replace(z=dual), held).sum()
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
    (slope,) = torch.autograd.grad(frozen.log_prob(z, held).sum(), z, create_graph=True)
    torch.testing.assert_close(tangent, (slope * direction.view_as(z)).sum())


@pytest.mark.full
@pytest.mark.parametrize("name", ["iaf", "affine_iaf", "maf", "realnvp", "naf", "spline_autoregressive"])
@pytest.mark.parametrize("frozen", ["half", "other half", "all but the head", "head and z"])
def test_frozen_subsets(name: str, frozen: str) -> None:
    posterior = small(name, push=0.2)
    h, z, leaves = inputs(posterior)
    head = [*posterior.head.parameters()]  # pyright: ignore[reportOptionalMemberAccess]
    held = {
        "half": leaves[2::2],
        "other half": leaves[3::2],
        "all but the head": [*posterior.flow.parameters()],
        "head and z": [z, *head],
    }[frozen]
    for leaf in held:
        leaf.requires_grad = False
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    for use in (sampled, scored_at_function_of_h):
        assert_agree(use(posterior, h, z), wanted)


def test_the_mean_log_q_of_a_flow_of_two_steps() -> None:
    """What was found: the head's gradient was 2.891812 with ``create_graph`` and 1.732995 without."""
    torch.manual_seed(0)
    posterior = flowpost.maf(8, dim=4, steps=2, hidden=(16,)).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    h, noise = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    weight = posterior.head.weight  # pyright: ignore[reportOptionalMemberAccess]
    assert isinstance(weight, Tensor)
    for loss in (lambda: posterior(h, noise=noise).log_prob.mean(), lambda: posterior.log_prob(noise, h).mean()):
        (plain,), (kept,) = gradients(loss, [weight]), gradients(loss, [weight], create_graph=True)
        torch.testing.assert_close(kept, plain, rtol=1e-9, atol=1e-9)
        direction, size = plain.detach() / plain.norm(), 1e-6
        with torch.no_grad():
            weight.add_(size * direction)
            up = loss()
            weight.sub_(2 * size * direction)
            down = loss()
            weight.add_(size * direction)
        torch.testing.assert_close(plain.norm(), (up - down) / (2 * size), rtol=1e-6, atol=1e-7)


def tied(step: Bijector) -> Bijector:
    """The same module before and after another of its kind, all reading one context."""
    return Shared(step, step) if step.codomain == step.domain else step


@by_level(ENTRIES, pytest.mark.full)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_every_entry_tied_at_a_function_of_the_context(entry: Entry, direction: str) -> None:
    step, z, context = draw(entry, Case(dim=DIM, seed=3, push=0.15, spread=0.7, context=0.3), batch=(2,))
    step = tied(step)
    if direction == "inverse":
        z = carry(step, z)
    leaves = [leaf.detach().requires_grad_() for leaf in (z, context) if leaf is not None]

    def loss() -> Tensor:
        points, *others = leaves
        if others:  # a little nearer to zero stays in every domain of the entries
            points = points * (0.9 + 0.1 * others[0].mean(-1, keepdim=True).tanh())
        return weighed(*getattr(step, direction)(points, *others))

    assert_agree(loss, [*leaves, *step.parameters()])


def gated() -> Bijector:
    return Autoregressive(DIM, 2, (8, 6))


def affine() -> Bijector:
    return Masked(Affine(DIM), 2, (8,), order=[2, 0, 1])


def around(chain: type[Chain] | type[Shared], step: Bijector, middle: Bijector) -> Bijector:
    """The same module on both sides of another."""
    return chain(step, middle, step)


CHAINS: dict[str, Callable[[], Bijector]] = {
    "a context for each": lambda: Chain(gated(), affine(), gated()),
    "one context": lambda: Shared(gated(), affine(), Inverse(gated())),
    "tied, one context": lambda: around(Shared, Inverse(affine()), affine()),
    "tied, a context for each": lambda: around(Chain, gated(), affine()),
    "a chain in a chain, tied": lambda: around(Shared, Shared(gated(), affine()), Inverse(gated())),
}


@pytest.mark.full
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("direction", ["forward", "inverse", "known"])
@pytest.mark.parametrize("samples", [(), (3,)], ids=str)
def test_chains(name: str, direction: str, samples: tuple[int, ...]) -> None:
    chain = CHAINS[name]().double()
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    z = (0.7 * torch.randn(*samples, 2, DIM, dtype=torch.float64)).requires_grad_()
    context = torch.randn(2, chain.context_size, dtype=torch.float64).requires_grad_()

    def loss() -> Tensor:
        points = z + context[..., :1].tanh() * 0.5
        if direction != "known":
            return weighed(*getattr(chain, direction)(points, context))
        image = chain(points, context)[0]
        return weighed(*chain.inverse(image, context, preimage=points.detach()))

    if direction == "known":  # a preimage that is given has no derivatives but the first
        assert_first_agree(loss, [z, context, *chain.parameters()])
    else:
        assert_agree(loss, [z, context, *chain.parameters()])


def test_a_gradient_penalty_trains_like_finite_differences_say() -> None:
    """The use that meets the fault: the norm of log q's gradient in z, differentiated by the weights."""
    posterior = small("iaf", push=0.2, steps=3)
    h, z, _ = inputs(posterior)

    def loss() -> Tensor:
        score = torch.autograd.grad(posterior.log_prob(z, h).sum(), z, create_graph=True)[0]
        return score.square().sum()

    head = posterior.head.weight  # pyright: ignore[reportOptionalMemberAccess]
    assert isinstance(head, Tensor)
    (found,) = torch.autograd.grad(loss(), head)
    direction, size = found / found.norm(), 1e-5
    values = []
    for move in (size, -2 * size):
        with torch.no_grad():
            head.add_(move * direction)
        values.append(loss())
    torch.testing.assert_close(found.norm(), (values[0] - values[1]) / (2 * size), rtol=1e-6, atol=1e-7)
