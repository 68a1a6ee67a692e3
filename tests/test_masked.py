"""Masked: the papers' formulae written out, what the wrapper promises of any step, and the plain affine gate."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from registry import Case, jacobian, push
from torch import Tensor, nn

from flowpost import Affine, Autoregressive, Bijector, Inverse, Masked, Planar, Shared, Shift, Spline
from flowpost.functional import exp_scale, gate_parameters, softplus_scale
from flowpost.masked import engine
from flowpost.masked.network import MADE, MaskedLinear
from flowpost.numerics.multiplying import product

F64 = torch.float64


def network_by_hand(
    net: MADE, z: list[float], h: list[float], order: Sequence[int], widths: list[int]
) -> list[list[float]]:
    """MADE in loops over units (Germain et al. 2015, eq. 8 to 10), from degrees that are worked out here."""
    dim = len(z)
    place = {variable: k for k, variable in enumerate(order)}
    weights = [layer.weight.tolist() for layer in net.stack]
    biases = [layer.bias.tolist() for layer in net.stack]
    projection = [] if net.project is None else net.project.weight.tolist()
    values, degrees = list(z), [place[i] + 1 for i in range(dim)]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = layer == len(weights) - 1
        units = [place[i % dim] if last else i * dim // widths[layer] for i in range(len(bias))]
        sums = []
        for unit, degree in enumerate(units):
            total = bias[unit]
            for j, value in enumerate(values):
                total += weight[unit][j] * value if degrees[j] <= degree else 0.0
            if layer == 0:
                total += sum(w * x for w, x in zip(projection[unit], h, strict=True)) if projection else 0.0
            sums.append(total if last else math.tanh(total))
        values, degrees = sums, units
    return [values[k * dim : (k + 1) * dim] for k in range(len(values) // dim)]


SIZES = [(1, (3,), 2, [0]), (3, (), 2, [0, 1, 2]), (3, (), 0, [2, 0, 1]), (4, (6,), 0, [3, 2, 1, 0]),
         (4, (5, 9), 3, [1, 3, 0, 2])]  # fmt: skip


@pytest.mark.parametrize(("dim", "hidden", "context_size", "order"), SIZES)
@pytest.mark.parametrize("kind", ["iaf", "maf"])
def test_it_is_the_papers_affine_flow(
    dim: int, hidden: tuple[int, ...], context_size: int, order: list[int], kind: str
) -> None:
    """In loops, in Python's floats.

    IAF ``z' = mu + sigma z`` with log-det ``sum log sigma``, of the noise before it (Kingma et al. 2016, eq. 9, 10);
    MAF ``x_i = u_i exp(alpha_i) + mu_i``, of the x before it (Papamakarios et al. 2017, eq. 3).
    """
    affine = Affine(dim, exp_scale)
    inner = affine if kind == "iaf" else Inverse(affine)
    step = Masked(inner, context_size, hidden, order=order, activation=torch.tanh).double()
    push(step, Case(seed=dim, push=0.3))
    noise, h = torch.randn(dim, dtype=F64), torch.randn(context_size, dtype=F64)
    flow = step if kind == "iaf" else Inverse(step)
    found, log_det = flow(noise, h if context_size else None)
    image, total = [0.0] * dim, 0.0
    for i in order:
        seen = noise.tolist() if kind == "iaf" else image
        mean, raw = network_by_hand(step.net, seen, h.tolist(), order, list(hidden))
        alpha = 4 * math.tanh(raw[i] / 4)
        image[i] = noise[i].item() * math.exp(alpha) + mean[i]
        total += alpha
    torch.testing.assert_close(found, torch.tensor(image, dtype=F64), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(log_det, torch.tensor(total, dtype=F64), rtol=1e-11, atol=1e-11)


def test_the_gated_step_is_a_masked_affine_one() -> None:
    """Eq. 13, 14 of Kingma et al. 2016 against eq. 9, 10: ``sigma = s`` and ``mu = (1 - s) m``."""

    class Gate(Bijector):
        elementwise = True

        def __init__(self, dim: int) -> None:
            super().__init__(dim, 2 * dim)

        def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            assert context is not None
            raw, mean = context.chunk(2, dim=-1)
            logit, mean = gate_parameters(raw, mean)
            s = torch.sigmoid(logit)
            return (1 - s) * mean + s * z, s.log().sum(-1)

        def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
            assert context is not None
            raw, mean = context.chunk(2, dim=-1)
            logit, mean = gate_parameters(raw, mean)
            s = torch.sigmoid(logit)
            return (z - (1 - s) * mean) / s, -s.log().sum(-1)

    gated, order = Autoregressive(5, 2, (7, 9), order=[4, 2, 0, 3, 1]).double(), [4, 2, 0, 3, 1]
    push(gated, Case(seed=1, push=0.3))
    masked = Masked(Gate(5), 2, (7, 9), order=order).double()
    masked.load_state_dict(gated.state_dict())
    z, h = torch.randn(3, 5, dtype=F64), torch.randn(3, 2, dtype=F64)
    torch.testing.assert_close(masked(z, h), gated(z, h), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked.inverse(z, h), gated.inverse(z, h), rtol=1e-9, atol=1e-9)


def test_the_jacobian_is_triangular_whatever_the_weights() -> None:
    step = Masked(Affine(5), 2, (30, 20), order=[2, 0, 4, 1, 3]).double()
    for parameter in step.parameters():
        torch.nn.init.normal_(parameter)
    z = torch.randn(4, 5, dtype=F64, requires_grad=True)
    matrix = jacobian(step(z, torch.randn(4, 2, dtype=F64))[0], z)
    order = step.causal_order()
    ordered = matrix[:, order][:, :, order]
    assert (ordered.triu(1) == 0).all()
    assert (ordered.tril() != 0).sum() == 4 * 15
    assert (ordered.diagonal(dim1=-2, dim2=-1) > 0).all()


class Recording(Affine):
    """An affine step that keeps what its inverse was called with."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls.append((z, preimage))
        return super()._inverse(z, context, preimage)


@pytest.mark.parametrize("plain", [True, False])
def test_the_inverse_asks_for_one_variable_after_the_other_unless_the_preimage_is_known(
    plain: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of plain operations it asks so for known ones too, whose columns it hands on."""
    if plain:
        monkeypatch.setattr(engine, "choose", lambda run, z: None)
    step, order = Masked(Recording(3), 0, (8,), order=[2, 0, 1]).double(), [2, 0, 1]
    push(step, Case(push=0.3))
    assert isinstance(step.step, Recording)
    known = torch.randn(6, 3, dtype=F64)
    image = step(known)[0].detach()
    for given in (known, None):
        step.step.calls.clear()
        torch.testing.assert_close(step.inverse(image, preimage=given)[0], known)
        *one_by_one, (all_asked, all_known) = step.step.calls
        assert torch.equal(all_asked, image)
        assert all_known is not None  # by then it is known
        torch.testing.assert_close(all_known, known, rtol=0, atol=0 if given is known else 1e-12)
        assert len(one_by_one) == (3 if plain or given is None else 0)
        for (asked, column), variable in zip(one_by_one, order, strict=False):
            assert torch.equal(asked, image[:, [variable]])
            assert column is None if given is None else column is not None and torch.equal(column, given[:, [variable]])


def test_an_order_is_loaded_with_the_weights() -> None:
    first, second = (Masked(Affine(4), 2, (9,), order=order).double() for order in ([3, 1, 0, 2], [0, 2, 1, 3]))
    push(first, Case(push=0.3))
    z, h = torch.randn(5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(z, h)[0], first(z, h)[0])
    assert second.causal_order().tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("context_size", [0, 3])
@pytest.mark.parametrize("hidden", [(), (8,)], ids=str)
def test_a_fresh_step_is_the_step_at_its_initial_context(context_size: int, hidden: tuple[int, ...]) -> None:
    class Doubling(Affine):
        def initial_context(self) -> Tensor:
            return torch.arange(2.0 * self.dim)  # loc 0, 1, 2, raw 3, 4, 5

    step = Masked(Doubling(3), context_size, hidden, order=[1, 2, 0]).double()
    z = torch.randn(4, 3, dtype=F64)
    image, log_det = step(z, torch.randn(4, context_size, dtype=F64) if context_size else None)
    scale = softplus_scale(torch.tensor([3.0, 4.0, 5.0], dtype=F64))
    torch.testing.assert_close(image, torch.tensor([0.0, 1.0, 2.0], dtype=F64) + scale * z)
    torch.testing.assert_close(log_det, scale.log().sum().expand(4))


@pytest.mark.parametrize("hidden", [(9, 8), ()], ids=str)
def test_a_rate_slows_what_adam_moves(hidden: tuple[int, ...]) -> None:
    """One step of Adam moves every weight by its rate: the numbers then move ``rate`` times as far."""
    moved = []
    for rate in (1.0, 0.25):
        torch.manual_seed(0)
        step = Masked(Affine(3, exp_scale), 2, hidden, rate=rate).double()
        z, context = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
        torch.testing.assert_close(step(z, context), (z, torch.zeros(50, dtype=torch.float64)), rtol=0, atol=0)
        optimizer = torch.optim.Adam(step.parameters(), 1e-3, eps=1e-30)
        step(z, context)[1].sum().backward()
        optimizer.step()
        moved.append(step.net(z, context)[:, 1])
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-9, atol=0)
    assert moved[0].abs().mean() > 1e-3


@pytest.mark.parametrize("hidden", [(9, 8), ()], ids=str)
@pytest.mark.parametrize("inside", [0, 1])
def test_a_state_from_before_there_was_a_rate_is_the_same_map(hidden: tuple[int, ...], inside: int) -> None:
    def make(rate: float) -> nn.Module:
        step = Masked(Spline(3, bins=3), 2, hidden, rate=rate).double()
        return nn.Sequential(nn.Identity(), step) if inside else step

    old, new, other = make(1.0), make(0.25), make(0.125)
    for parameter in old.parameters():
        nn.init.normal_(parameter)
    z, context = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    before = old.state_dict()
    for name, entry in before._metadata.items():  # pyright: ignore[reportAttributeAccessIssue]
        entry["version"] = 1 if name.endswith("net") else entry["version"]
    kept = {name: value.clone() for name, value in before.items()}
    new.load_state_dict(before)
    assert all(torch.equal(value, kept[name]) for name, value in old.state_dict().items())
    maps = [module[1] if isinstance(module, nn.Sequential) else module for module in (old, new, other)]
    torch.testing.assert_close(maps[1](z, context), maps[0](z, context), rtol=1e-9, atol=1e-9)
    other.load_state_dict(new.state_dict())  # of a network with another rate: that is taken over
    torch.testing.assert_close(maps[2](z, context), maps[0](z, context), rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="output_rate"):
        make(1.0).load_state_dict(new.state_dict())
    with pytest.raises(RuntimeError, match="output_rate"):
        make(0.25).load_state_dict(old.state_dict())
    parameters = {name: value.detach().clone() for name, value in new.named_parameters()}
    new.load_state_dict(parameters, strict=False)  # parameters alone are those of this network
    torch.testing.assert_close(maps[1](z, context), maps[0](z, context), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_rate_is_that_of_the_last_layer_alone_though_another_has_its_parameter(name: str) -> None:
    step = push(Masked(Affine(3, exp_scale), 2, (6, 6), rate=0.3).double(), Case(seed=2, push=0.5))
    assert isinstance(step, Masked)
    first, middle, last = step.net.stack
    tied = nn.Parameter(torch.randn_like(getattr(last, name)))
    for layer in (last, middle if name == "weight" else first):
        setattr(layer, name, tied)
    z, h = torch.randn(20, 3, dtype=F64), torch.randn(20, 2, dtype=F64)
    image, log_det = step(z, h)
    expected = Affine(3, exp_scale).double()(z, step.net(z, h).flatten(-2))
    torch.testing.assert_close((image, log_det), expected, rtol=1e-12, atol=1e-12)
    found = step.inverse(image, h)
    torch.testing.assert_close(found, (z, -log_det), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("rate", "error"), [(0.0, ValueError), (-1.0, ValueError), (math.inf, ValueError), ("1", TypeError)]
)
def test_a_rate_is_a_positive_number(rate: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="^rate: expected a"):
        Masked(Affine(3), rate=rate)


def test_autocast_s_log_det_is_that_of_the_numbers_it_used() -> None:
    """B19: only the network loses digits."""
    step, z, context = draw_masked()
    outputs: list[Tensor] = []
    hook = step.net.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, log_det = step(z, context)
    hook.remove()
    (used,) = outputs
    assert not torch.equal(used, step.net(z, context))
    loc, raw = used.double().unbind(-2)
    scale = torch.exp(4 * torch.tanh(raw / 4))
    torch.testing.assert_close(image.double(), loc + scale * z.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det.double(), scale.log().sum(-1), rtol=1e-6, atol=1e-6)


def draw_masked() -> tuple[Masked, Tensor, Tensor | None]:
    step = Masked(Affine(3, exp_scale), 2, (8,))
    push(step, Case(push=0.3))
    return step, torch.randn(5, 3), torch.randn(5, 2)


def test_a_masked_shift_keeps_volume() -> None:
    step = Masked(Shift(4), 0, (8,)).double()
    push(step, Case(push=1.0))
    z = torch.randn(6, 4, dtype=F64, requires_grad=True)
    image, log_det = step(z)
    assert torch.equal(log_det, torch.zeros(6, dtype=F64))
    assert (image - z).abs().max() > 0.1
    torch.testing.assert_close(torch.linalg.det(jacobian(image, z)), torch.ones(6, dtype=F64))


class Stretched(Affine):
    """An element-wise step with a parameter of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.raw = torch.nn.Parameter(torch.zeros(()))

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = super()._forward(z, context)
        return self.raw.exp() * image, log_det + self.raw * z.shape[-1]

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        preimage, log_det = super()._inverse(z * torch.exp(-self.raw), context, preimage)
        return preimage, log_det - self.raw * z.shape[-1]


def test_a_step_with_a_parameter_of_its_own_learns_in_both_directions() -> None:
    step = Masked(Stretched(3), 0, (8,)).double()
    push(step, Case(push=0.3))
    z = torch.randn(5, 3, dtype=F64)
    image, log_det = step(z)
    back, back_log_det = step.inverse(image.detach())
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(back_log_det, -log_det)
    raw = step.get_parameter("step.raw")
    assert torch.autograd.grad(log_det.sum(), raw)[0] == 15
    (slope,) = torch.autograd.grad(back_log_det.sum(), raw)
    with torch.no_grad():
        sums = []
        for move in (1e-5, -1e-5):
            raw.add_(move)
            sums.append(step.inverse(image)[1].sum())
            raw.sub_(move)
    torch.testing.assert_close(slope, (sums[0] - sums[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_what_it_cannot_wrap() -> None:
    with pytest.raises(ValueError, match=r"^step: expected an element-wise one, got Planar$"):
        Masked(Planar(3))
    blank = Affine(3)
    blank.context_size = 0
    with pytest.raises(ValueError, match=r"^step: expected one that reads a context, got Affine with context_size=0$"):
        Masked(blank)
    with pytest.raises(TypeError, match=r"^step: expected a Bijector, got Linear$"):
        Masked(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_exp_scale_is_an_exponential_softly_bounded() -> None:
    raw = torch.tensor([-1e4, -1e-3, 0.0, 1e-3, 1.0, 1e4], dtype=F64, requires_grad=True)
    scale = exp_scale(raw)
    expected = [math.exp(-4), math.exp(-1e-3), 1.0, math.exp(1e-3), math.exp(4 * math.tanh(0.25)), math.exp(4)]
    torch.testing.assert_close(scale, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=0)
    (slope,) = torch.autograd.grad(scale.log().sum(), raw)
    torch.testing.assert_close(slope, 1 - torch.tanh(raw.detach() / 4) ** 2)
    far = exp_scale(torch.tensor([-20.0, 20.0], dtype=F64, requires_grad=True))
    assert ((far > math.exp(-4)) & (far < math.exp(4))).all()


class Bent(Bijector):
    """``z'_i = z_i + sigmoid(a_i) tanh(z_i) / 2 + b_i``, with a gradient in closed form; its slope depends on z."""

    elementwise = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim)

    def has_pull(self) -> bool:
        return True

    def keep(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        raw, shift = numbers.chunk(2, -1)
        gain, value = 0.5 * torch.sigmoid(raw), torch.tanh(z)
        return z + gain * value + shift, torch.log1p(gain * (1 - value**2)).sum(-1), (gain, value)

    def pull(self, z: Tensor, kept: tuple[Tensor, Tensor], grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor]:
        gain, value = kept
        bend = 1 - value**2
        weight = grad_log_det.unsqueeze(-1) / (1 + gain * bend)
        of_gain = grad * value + weight * bend
        of_z = grad * (1 + gain * bend) - 2 * weight * gain * value * bend
        return of_z, torch.cat([of_gain * gain * (1 - 2 * gain), grad], -1)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return self.keep(z, context)[:2]

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        assert context is not None
        raw, shift = context.chunk(2, -1)
        gain, x = 0.5 * torch.sigmoid(raw), torch.zeros_like(z)
        for _ in range(100):
            x = z - shift - gain * torch.tanh(x)
        return x, -self.keep(x, context)[1]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_closed_gradient_is_taken_in_both_directions(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse's by the implicit function, whose log-det moves with the preimage too."""
    flow = push(Shared(Masked(Bent(4), 3, (8,)), Masked(Bent(4), 3, (6, 6), order=[2, 0, 3, 1])).double(), Case(seed=2))
    z, context = torch.randn(5, 4, dtype=F64).requires_grad_(), torch.randn(5, 3, dtype=F64).requires_grad_()

    def slopes() -> tuple[Tensor, ...]:
        image, log_det = getattr(flow, direction)(z, context)
        weights = torch.linspace(0.5, 1.5, 4, dtype=F64)
        return torch.autograd.grad((weights * image).sum() + (log_det**2).sum(), [z, context, *flow.parameters()])

    found = slopes()
    monkeypatch.setattr(engine, "choose", lambda run, z: None)
    torch.testing.assert_close(found, slopes(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["inverse", "known"])
def test_the_inverse_s_gradient_is_that_of_the_implicit_function(kind: str) -> None:
    """By ``J^-T g`` from the forward's Jacobian, and not by differentiating the sweep."""
    step, _, context = draw_masked()
    step, z = step.double(), torch.randn(1, 3, dtype=F64, requires_grad=True)
    context = None if context is None else context[:1].double()
    image, _ = step(z, context)
    matrix = jacobian(image, z)[0]
    y = image.detach().requires_grad_()
    back, _ = step.inverse(y, context, preimage=z if kind == "known" else None)
    grad = torch.randn(1, 3, dtype=F64)
    (found,) = torch.autograd.grad(back, y, grad)
    torch.testing.assert_close(found[0], torch.linalg.solve(matrix.mT, grad[0]))


def test_masked_linear_equals_the_full_masked_product() -> None:
    for reads, width in [(50, 1), (50, 300), (50, 1100), (600, 700)]:
        units = sorted(torch.randint(0, 41, (width,)).tolist())
        rising = sorted(torch.randint(0, 41, (reads,)).tolist())
        for inputs, groups in [(rising, 1), (rising[::-1], 2), (torch.randint(0, 41, (reads,)).tolist(), 1)]:
            layer = MaskedLinear(inputs, units, groups).double()
            x = torch.randn(2, 3, reads, dtype=torch.float64)
            mask = torch.tensor([[float(d <= e) for d in inputs] for e in units * groups], dtype=torch.float64)
            torch.testing.assert_close(layer(x), x @ (layer.weight * mask).T + layer.bias)


@pytest.mark.parametrize("columns", [1, 2, 15, 16])
def test_a_product_of_few_columns_is_the_product(columns: int) -> None:
    left, right = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, columns, dtype=torch.float64)
    torch.testing.assert_close(product(left, right), left @ right)


@pytest.mark.parametrize(
    "activation",
    [lambda x: F.layer_norm(x, x.shape[-1:]), nn.Softmax(-1), lambda x: x.softmax(0)],
    ids=["layer norm", "softmax", "over the rows"],
)
def test_an_activation_that_mixes_the_units_is_refused(activation: Callable[[Tensor], Tensor]) -> None:
    """Each variable followed those after it: the log-det was off by half a nat, and nothing was said."""
    with pytest.raises(
        ValueError, match=r"^activation: expected an element-wise function, got .*, which mixes the units"
    ):
        Masked(Affine(3), hidden=(8,), activation=activation)


@pytest.mark.parametrize(
    "activation",
    [nn.PReLU(), nn.RReLU(), nn.ReLU(inplace=True), F.gelu, torch.sin, F.relu_],
    ids=["prelu", "rrelu", "relu in place", "gelu", "sin", "relu_"],
)
def test_any_element_wise_activation_is_taken(activation: Callable[[Tensor], Tensor]) -> None:
    Masked(Affine(3), hidden=(8,), activation=activation)(torch.randn(5, 3))
