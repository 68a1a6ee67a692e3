"""A layer that somebody changed is called: norms, pruning, LoRA, hooks and buffers of others count both ways.

Each change has a reference: an untouched copy whose weights are set to what the changed layer multiplies by.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence, Set

import pytest
import torch
import torch.nn.functional as F
from registry import Case, push
from small import DIM, FEATURES, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import flowpost
from flowpost import (
    ActNorm,
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Conditioned,
    Coupling,
    FlowPosterior,
    Learned,
    Planar,
    Reverse,
    Shared,
)

Effective = Callable[[], tuple[Tensor, Tensor | None]]
Change = Callable[[nn.Module, str], Effective]
FAMILIES = ["iaf", "affine_iaf", "maf", "realnvp", "nice"]
LATER = {"affine_iaf", "maf", "nice"}
"""Whose steps are as another's: the slow tests of these are for the long run."""


def layers(posterior: FlowPosterior) -> list[str]:
    """Names of the linear layers of the flow's networks."""
    flow = posterior.flow
    return [f"flow.{name}" for name, part in flow.named_modules() if getattr(part, "weight", torch.empty(0)).ndim == 2]


def product(layer: nn.Module) -> Tensor:
    """The matrix that a layer multiplies by, masks and all."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    ones = torch.eye(weight.shape[1], dtype=weight.dtype)
    return (layer(ones) - layer(torch.zeros_like(ones))).mT.detach()


class LowRank(nn.Module):
    """W + B A, as a parametrization."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(0.4 * torch.randn(2, weight.shape[1], dtype=weight.dtype))
        self.up = nn.Parameter(0.4 * torch.randn(weight.shape[0], 2, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class Lora(nn.Module):
    """A layer and a low-rank correction beside it, which reads what the layer reads."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("reads", (product(base) != 0).double())
        self.delta = LowRank(product(base))

    def matrix(self) -> Tensor:
        return self.reads * self.delta(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.matrix().to(x.dtype))


class Shifted(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value + 0.3


def read(layer: nn.Module) -> Effective:
    return lambda: (layer.weight, layer.bias)  # pyright: ignore[reportReturnType]


def scaled(layer: nn.Module, factor: float, *, bias: float) -> Effective:
    weight, old = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    found = weight * factor, old * bias if isinstance(old, Tensor) else None
    return lambda: found


def weight_norm(root: nn.Module, name: str) -> Effective:
    layer = parametrizations.weight_norm(root.get_submodule(name))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.3)  # pyright: ignore
    return read(layer)


def spectral_norm(root: nn.Module, name: str) -> Effective:
    """With so many iterations that the norm does not move in training."""
    return read(parametrizations.spectral_norm(root.get_submodule(name), n_power_iterations=100))


def lora_parametrization(root: nn.Module, name: str) -> Effective:
    layer = root.get_submodule(name)
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))  # pyright: ignore[reportArgumentType]
    return read(layer)


def bias_parametrization(root: nn.Module, name: str) -> Effective:
    layer = root.get_submodule(name)
    if layer.bias is not None:
        parametrize.register_parametrization(layer, "bias", Shifted())
    return read(layer)


def hooked_weight_norm(root: nn.Module, name: str) -> Effective:
    """The old one, whose hook sets the weight when the layer is called; then a step of an optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(root.get_submodule(name))
    with torch.no_grad():
        layer.weight_g.mul_(1.3)  # pyright: ignore
    return lambda: (torch._weight_norm(layer.weight_v, layer.weight_g, 0), layer.bias)  # pyright: ignore


def pruned(root: nn.Module, name: str) -> Effective:
    """As before, with a mask of somebody else's among the layer's buffers."""
    layer = prune.l1_unstructured(root.get_submodule(name), "weight", amount=0.4)
    with torch.no_grad():
        layer.weight_orig.mul_(1.3)
    return lambda: (layer.weight_orig * layer.weight_mask, layer.bias)


def lora(root: nn.Module, name: str) -> Effective:
    layer = root.get_submodule(name)
    wrapper = Lora(layer)
    root.set_submodule(name, wrapper)
    return lambda: (layer.weight + wrapper.matrix(), layer.bias)  # pyright: ignore


def forward_hook(root: nn.Module, name: str) -> Effective:
    layer = root.get_submodule(name)
    layer.register_forward_hook(lambda _, args, result: 1.3 * result)  # pyright: ignore[reportOperatorIssue]
    return scaled(layer, 1.3, bias=1.3)


def forward_pre_hook(root: nn.Module, name: str) -> Effective:
    layer = root.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: (0.7 * args[0],))
    return scaled(layer, 0.7, bias=1.0)


def replaced_forward(root: nn.Module, name: str) -> Effective:
    """As the libraries do that move weights between devices around a call."""
    layer = root.get_submodule(name)
    old = layer.forward
    layer.forward = lambda x: 1.3 * old(x)
    return scaled(layer, 1.3, bias=1.3)


def foreign_buffer(root: nn.Module, name: str) -> Effective:
    layer = root.get_submodule(name)
    layer.register_buffer("calls", torch.zeros(3, dtype=torch.float64))
    return read(layer)


CHANGES: list[Change] = [
    weight_norm,
    spectral_norm,
    lora_parametrization,
    bias_parametrization,
    hooked_weight_norm,
    pruned,
    lora,
    forward_hook,
    forward_pre_hook,
    replaced_forward,
    foreign_buffer,
]
every = pytest.mark.parametrize("family", FAMILIES)
most = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.long if name in LATER else ()) for name in FAMILIES]
)
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def make(family: str) -> FlowPosterior:
    return small(family, push=0.4, hidden=(6,))


def inputs() -> tuple[Tensor, Tensor]:
    """Features and points."""
    generator = torch.Generator().manual_seed(2)
    sizes = (FEATURES, DIM)
    h, z = (torch.randn(3, size, dtype=torch.float64, generator=generator) for size in sizes)
    return h, z


def results(posterior: FlowPosterior) -> list[Tensor]:
    """Samples and densities, and what their gradients say of the inputs and of what nobody changed."""
    h, z = (each.requires_grad_() for each in inputs())
    sample = posterior(h, noise=z)
    density = posterior.log_prob(0.9 * z, h)
    path = posterior.path_log_prob(sample, h)
    head = [*posterior.head.parameters()]  # pyright: ignore[reportOptionalMemberAccess]
    gradients = [
        gradient
        for loss in (sample.z.sin().sum() + sample.log_prob.sum(), density.sum(), path.sum())
        for gradient in torch.autograd.grad(loss, [h, z, *head], retain_graph=True, materialize_grads=True)
    ]
    return [sample.z, sample.log_prob, density, path, *gradients]


def subsets(posterior: FlowPosterior) -> Iterator[list[str]]:
    """All layers, and each of the first step's alone."""
    names = layers(posterior)
    yield names
    yield from ([name] for name in names[: len(names) // 2])


def changed(posterior: FlowPosterior, change: Change, names: list[str]) -> tuple[FlowPosterior, FlowPosterior]:
    """A posterior with changed layers, and an untouched one with the weights that these have."""
    other, reference = copy.deepcopy(posterior), copy.deepcopy(posterior)
    torch.manual_seed(4)
    with torch.no_grad():
        for name in names:
            weight, bias = change(other, name)()
            layer = reference.get_submodule(name)
            layer.weight.copy_(weight)  # pyright: ignore
            if bias is not None:
                layer.bias.copy_(bias)  # pyright: ignore
    return other, reference


@pytest.mark.full
@most
@changes
def test_a_changed_layer_counts_both_ways(family: str, change: Change) -> None:
    for names in subsets(make(family)):
        other, reference = changed(make(family), change, names)
        torch.testing.assert_close(results(other.eval()), results(reference.eval()), rtol=1e-10, atol=1e-10)
    other, reference = changed(make(family), change, layers(make(family)))
    torch.testing.assert_close(results(other.train()), results(reference.train()), rtol=1e-8, atol=1e-8)


@pytest.mark.full
@every
@changes
def test_its_parameters_have_their_gradients(family: str, change: Change) -> None:
    """Along the gradient, the loss rises by its norm."""
    other, _ = changed(make(family), change, layers(make(family)))
    h, z = inputs()
    other.eval()
    for loss in (lambda: posterior_loss(other, h, z), lambda: other.log_prob(0.9 * z, h).sum()):
        parameters = [*other.parameters()]
        gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True, allow_unused=True)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        values, size = [], 1e-6
        for move in (size, -2 * size):
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.add_(move * gradient / norm)
            values.append(loss())
        torch.testing.assert_close((values[0] - values[1]) / (2 * size), norm, rtol=1e-6, atol=1e-7)


def posterior_loss(posterior: FlowPosterior, h: Tensor, noise: Tensor) -> Tensor:
    z, log_prob, _ = posterior(h, noise=noise)
    return z.sin().sum() + log_prob.sum()


def plain(posterior: FlowPosterior, h: Tensor, z: Tensor) -> None:
    sample = posterior(h, noise=z)
    posterior.log_prob(z, h)
    posterior.path_log_prob(sample, h)


def half(posterior: FlowPosterior, h: Tensor, z: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain(posterior, h, z)


def mapped(posterior: FlowPosterior, h: Tensor, z: Tensor) -> None:
    torch.func.vmap(lambda h, z: posterior(h, noise=z)[:2])(h, z)
    torch.func.vmap(lambda h, z: posterior.log_prob(z, h))(h, z)


def differentiated(posterior: FlowPosterior, h: Tensor, z: Tensor) -> None:
    torch.func.jacrev(lambda z: posterior(h, noise=z).z)(z)
    torch.func.jacrev(lambda z: posterior.log_prob(z, h))(z)


def called(posterior: FlowPosterior, h: Tensor, z: Tensor) -> None:
    """With other numbers, which are not to stay."""
    numbers = {name: parameter + 0.1 for name, parameter in posterior.named_parameters()}
    torch.func.functional_call(posterior, numbers, (h,), {"noise": z})


def ensemble(posterior: FlowPosterior, h: Tensor, z: Tensor) -> None:
    numbers = {name: torch.stack([value, value + 0.1]) for name, value in posterior.named_parameters()}
    torch.func.vmap(lambda each: torch.func.functional_call(posterior, each, (h,), {"noise": z}).z)(numbers)


EVALUATIONS = [plain, half, mapped, differentiated, called, ensemble]


@pytest.mark.full
@every
@changes
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_evaluation_changes_no_state(family: str, change: Change) -> None:
    """Bit for bit, whoever looks on."""
    other, _ = changed(make(family), change, layers(make(family)))
    assert_state_stays(other.float().eval(), EVALUATIONS)


@every
@pytest.mark.parametrize("change", [weight_norm, lora], ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_evaluation_in_training_mode_changes_no_state(family: str, change: Change) -> None:
    other, _ = changed(make(family), change, layers(make(family)))
    assert_state_stays(other.float().train(), EVALUATIONS)


@pytest.mark.full
@most
def test_an_evaluation_in_training_mode_turns_a_spectral_norm_s_vectors_alone(family: str) -> None:
    """As torch's own layers do."""
    other, _ = changed(make(family), spectral_norm, layers(make(family)))
    assert_state_stays(other.float().train(), EVALUATIONS[:-1], {name for name, _ in other.named_parameters()})


def assert_state_stays(
    posterior: FlowPosterior, evaluations: Sequence[Callable], names: Set[str] | None = None
) -> None:
    h, z = (each.float() for each in inputs())
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in posterior.state_dict().items()}
        for evaluate in evaluations:
            evaluate(posterior, h, z)
            after = posterior.state_dict()
            assert after.keys() == before.keys()
            moved = [name for name in names or before if not torch.equal(after[name], before[name])]
            assert (evaluate.__name__, moved) == (evaluate.__name__, [])


@every
def test_functional_call_has_the_numbers_of_a_parametrization(family: str) -> None:
    other, _ = changed(make(family), lora_parametrization, layers(make(family)))
    h, z = inputs()
    numbers = {name: parameter + 0.1 for name, parameter in other.named_parameters()}
    found = torch.func.functional_call(other, numbers, (h,), {"noise": z})
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(found, other(h, noise=z), rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("use", ["sample", "log_prob"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backward_hooks_are_called_and_obeyed(family: str, use: str) -> None:
    posterior, (h, z) = make(family), inputs()
    names = layers(posterior)
    expected = gradients_of(posterior, use, h, z)
    calls = dict.fromkeys(names, 0)
    for name in names:
        layer = posterior.get_submodule(name)
        layer.register_full_backward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    found = gradients_of(posterior, use, h, z)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert min(calls.values()) >= 1
    last = [name for name in names if name.endswith("layers.1")]
    assert last
    for name in last:  # nothing comes through the last layers to the ones before
        layer = posterior.get_submodule(name)
        layer.register_full_backward_hook(lambda _, grads, __: (torch.zeros_like(grads[0]),))
    found = gradients_of(posterior, use, h, z)
    for (name, _), gradient in zip(posterior.named_parameters(), found, strict=True):
        before_last = name.endswith(("layers.0.weight", "layers.0.bias", "project.weight"))
        assert bool((gradient != 0).any()) != before_last, name


def gradients_of(posterior: FlowPosterior, use: str, h: Tensor, z: Tensor) -> list[Tensor]:
    loss = posterior_loss(posterior, h, z) if use == "sample" else posterior.log_prob(0.9 * z, h).sum()
    return list(torch.autograd.grad(loss, [*posterior.parameters()], allow_unused=True, materialize_grads=True))


@every
def test_a_hook_on_a_network_counts(family: str) -> None:
    """A network whose outputs are scaled is one whose last layer is."""
    posterior, reference = make(family), make(family)
    for name, part in posterior.named_modules():
        if name.endswith(".net"):
            part.register_forward_hook(lambda _, args, result: 0.8 * result)
    with torch.no_grad():
        for name in layers(reference):
            if name.endswith("layers.1"):
                for parameter in reference.get_submodule(name).parameters():
                    parameter.mul_(0.8)
    torch.testing.assert_close(results(posterior), results(reference), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("index", [0, 1])
def test_a_changed_layer_of_a_network_without_context(index: int) -> None:
    """Where z alone is read, in a coupling and in a masked network."""
    for step in (
        Coupling(4, Affine(2), 0, (6,)),
        Autoregressive(4, 0, (6,)),
        flowpost.Inverse(flowpost.Masked(Affine(4), 0, (6,))),
    ):
        posterior = FlowPosterior(0, push(step.double(), Case(seed=3)))
        reference = copy.deepcopy(posterior)
        name = [name for name in layers(posterior) if name.endswith(f"layers.{index}")][0]
        weight, _ = weight_norm(posterior, name)()
        with torch.no_grad():
            reference.get_submodule(name).weight.copy_(weight)  # pyright: ignore
        z = torch.randn(5, 4, dtype=torch.float64)
        found, expected = ([*p(sample_shape=(5,), noise=z)[:2], p.log_prob(z)] for p in (posterior, reference))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [2, 4])
def test_a_network_of_fewer_or_more_layers_than_it_was_made_with(count: int) -> None:
    """A layer that is the identity changes nothing, taken out or put in once more."""
    step = Autoregressive(4, 2, (6, 6), activation=F.relu).double()
    push(step, Case(seed=4))
    between = step.net.stack[1]
    with torch.no_grad():
        between.weight.copy_(torch.eye(6))
        between.bias.zero_()
    changed = copy.deepcopy(step)
    if count == 2:
        del changed.net.layers[1]
    else:
        changed.net.layers.insert(1, copy.deepcopy(between))
    z, context = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for direction in ("forward", "inverse"):
        found = []
        for each in (changed, step):
            image, log_det = getattr(each, direction)(z, context)
            wanted = each.net.stack[0].weight, each.net.stack[-1].bias
            found.append([image, log_det, *torch.autograd.grad(image.square().sum() + log_det.sum(), wanted)])
        torch.testing.assert_close(*found)


HOLDERS: dict[str, Callable[[Bijector], Bijector]] = {
    "chain": lambda step: Chain(Affine(4), step, Reverse(4)),
    "shared": lambda step: Shared(step, Reverse(4)),
    "nested": lambda step: Chain(Affine(4), Shared(Reverse(4), Shared(step))),
    "learned": lambda step: Chain(Reverse(4), Learned(step)),
    "conditioned": lambda step: Chain(Reverse(4), Conditioned(step, 3)),
    "alone": lambda step: step,
    "beside its like": lambda step: Chain(Planar(4), step, Planar(4)),
}
STEPS: dict[str, Callable[[], Bijector]] = {
    "autoregressive": lambda: Autoregressive(4, 3, (6,)),
    "coupling": lambda: Coupling(4, Affine(2), 3, (6,)),
    "planar": lambda: Planar(4),
    "inverse": lambda: flowpost.Inverse(Autoregressive(4, 3, (6,))),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_hook_on_a_step_is_called(kind: str, holder: str) -> None:
    """By whatever holds the step, with the log-det as wide as without one."""
    step = STEPS[kind]()
    posterior = FlowPosterior(FEATURES, HOLDERS[holder](step))
    push(posterior, Case(push=0.2))  # pyright: ignore[reportArgumentType]
    h, noise = torch.randn(40, FEATURES), torch.randn(40, 4)
    expected = posterior(h, noise=noise)
    seen: list[torch.Size] = []
    handle = step.register_forward_hook(lambda _, args, result: seen.append(result[0].shape))
    torch.testing.assert_close(posterior(h, noise=noise)[:2], expected[:2], rtol=2e-7, atol=2e-6)
    assert seen == [(40, 4)]
    handle.remove()
    step.register_forward_hook(lambda _, args, result: (result[0], result[1] + 5))
    torch.testing.assert_close(posterior(h, noise=noise).log_prob, expected.log_prob - 5)
    step.register_forward_pre_hook(lambda _, args: (args[0] * 0, *args[1:]))
    z = posterior(h[:1].expand(40, -1), noise=noise).z
    torch.testing.assert_close(z, z[:1].expand_as(z))  # every noise has become 0


def test_a_backward_hook_on_a_step_is_called() -> None:
    posterior, (h, z) = make("iaf"), inputs()
    step = next(part for part in posterior.modules() if isinstance(part, Autoregressive))
    calls: list[int] = []
    step.register_full_backward_hook(lambda *_: calls.append(1))
    posterior_loss(posterior, h, z).backward()
    assert calls == [1]


USES: dict[str, Callable[[FlowPosterior, Tensor], Tensor]] = {
    "log_prob": lambda posterior, z: posterior.log_prob(z),
    "inverse": lambda posterior, z: posterior.flow.inverse(z)[0],
    "mean": lambda posterior, z: posterior.at().mean,
    "gaussian": lambda posterior, z: posterior.gaussian()[1],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("parameter", ["center", "context"])
def test_a_step_s_own_parameter_is_pruned_also_where_the_step_is_not_called(use: str, parameter: str) -> None:
    """The hook of pruning makes the parameter when the step is called, which an inverse and a closed form are not."""
    act_norm, learned = ActNorm(4), Learned(Affine(4))
    posterior = FlowPosterior(0, Chain(act_norm, learned)).double()
    step = act_norm if parameter == "center" else learned
    prune.custom_from_mask(step, parameter, torch.ones(getattr(step, parameter).shape))
    with torch.no_grad():
        step.get_parameter(f"{parameter}_orig").add_(0.5)
    z = torch.randn(5, 4, dtype=torch.float64)
    found = USES[use](posterior, z)
    posterior(sample_shape=(5,))  # which calls the step
    torch.testing.assert_close(found, USES[use](posterior, z), rtol=0, atol=0)
