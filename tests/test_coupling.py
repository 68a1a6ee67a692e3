"""Coupling: the papers' formulae written out, any step, any network, and where nothing passes."""

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from registry import Case, jacobian, push
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import flowpost
from flowpost import Affine, Coupling, Planar, Reverse, Shift, UnitLowerTriangular
from flowpost.functional import exp_scale, planar

F64 = torch.float64


def perceptron_by_hand(step: Coupling, passed: list[float], h: list[float]) -> list[float]:
    """The conditioner in loops."""
    values = passed + h
    layers = [(layer.weight.tolist(), layer.bias.tolist()) for layer in step.net.layers]  # pyright: ignore
    for k, (weight, bias) in enumerate(layers):
        values = [b + sum(w * x for w, x in zip(row, values, strict=True)) for row, b in zip(weight, bias, strict=True)]
        values = values if k == len(layers) - 1 else [math.tanh(x) for x in values]
    return values


SIZES = [(2, 1, 0, [0, 1]), (5, 3, 2, [0, 1, 2, 3, 4]), (5, 1, 2, [3, 0, 4, 1, 2]), (3, 3, 2, [2, 0, 1])]


@pytest.mark.parametrize(("dim", "moving", "context_size", "order"), SIZES)
@pytest.mark.parametrize("hidden", [(), (7, 4)], ids=str)
@pytest.mark.parametrize("kind", ["nice", "realnvp"])
def test_it_is_the_papers(
    dim: int, moving: int, context_size: int, order: list[int], hidden: tuple[int, ...], kind: str
) -> None:
    """NICE, eq. 9: ``y_2 = x_2 + m(x_1)``, log-det 0.

    RealNVP, eq. 5, 6: ``y_2 = x_2 exp(s(x_1)) + t(x_1)``, log-det sum s.
    """
    inner = Shift(moving) if kind == "nice" else Affine(moving, exp_scale)
    step = Coupling(dim, inner, context_size, hidden, order=order, activation=torch.tanh).double()
    push(step, Case(seed=dim, push=0.3))
    z, h = torch.randn(dim, dtype=F64), torch.randn(context_size, dtype=F64)
    found, log_det = step(z, h if context_size else None)
    first, second = order[: dim - moving], order[dim - moving :]
    numbers = perceptron_by_hand(step, [z[i].item() for i in first], h.tolist())
    expected, total = z.tolist(), 0.0
    for k, i in enumerate(second):
        s = 4 * math.tanh(numbers[moving + k] / 4) if kind == "realnvp" else 0.0
        expected[i] = z[i].item() * math.exp(s) + numbers[k]
        total += s
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(log_det, torch.tensor(total, dtype=F64), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [None, [4, 2, 0, 3, 1]])
def test_what_passes_passes_to_the_bit(order: list[int] | None, dtype: torch.dtype) -> None:
    step = Coupling(5, Affine(3), 2, (8,), order=order).to(dtype)
    push(step, Case(push=1.0))
    z, h = 9 * torch.randn(20, 5, dtype=dtype), torch.randn(20, 2, dtype=dtype)
    passing = (order or list(range(5)))[:2]
    for function in (step, step.inverse):
        image, _ = function(z, h)
        assert torch.equal(image[:, passing], z[:, passing])
        moved = [i for i in range(5) if i not in passing]
        assert (image[:, moved] != z[:, moved]).all()


def test_nice_keeps_volume() -> None:
    step = Coupling(5, Shift(3), 0, (8,)).double()
    push(step, Case(push=1.0))
    z = torch.randn(6, 5, dtype=F64, requires_grad=True)
    image, log_det = step(z)
    assert torch.equal(log_det, torch.zeros(6, dtype=F64))
    assert (image - z).abs().max() > 0.1
    torch.testing.assert_close(torch.linalg.det(jacobian(image, z)), torch.ones(6, dtype=F64))


def test_any_step_may_move() -> None:
    """A planar map of three variables, its numbers a function of the two others."""
    step = Coupling(5, Planar(3), 0, (8,)).double()
    push(step, Case(push=0.5))
    z = torch.randn(6, 5, dtype=F64)
    image, log_det = step(z)
    u, w, b = step.net(z[:, :2], None).split([3, 3, 1], dim=-1)
    expected, expected_log_det = planar(z[:, 2:], u, w, b)
    torch.testing.assert_close(image, torch.cat([z[:, :2], expected], dim=-1))
    torch.testing.assert_close(log_det, expected_log_det)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "normalized": lambda n, m: nn.Sequential(nn.Linear(n, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, m)),
    "attention": lambda n, m: nn.Sequential(
        nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        nn.Flatten(-2), nn.Linear(4 * n, m),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_starts_at_the_identity_and_learns(name: str) -> None:
    step = Coupling(4, Affine(2), 3, network=NETWORKS[name])
    z, h = torch.randn(7, 4), torch.randn(7, 3)
    image, log_det = step(z, h)
    torch.testing.assert_close(image, z)
    torch.testing.assert_close(log_det, torch.zeros(7))
    optimizer = torch.optim.Adam(step.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (step(z, h)[0] - 2 * z - z.roll(1, -1)).square()[:, 2:].mean().backward()
        optimizer.step()
    image, log_det = step(z, h)
    assert (image - 2 * z - z.roll(1, -1)).square()[:, 2:].mean() < 0.5 * (z + z.roll(1, -1)).square()[:, 2:].mean()
    back, back_log_det = step.inverse(image, h)
    torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back_log_det, -log_det)


def test_a_network_reads_what_passes_and_then_h_for_every_sample() -> None:
    seen: list[Tensor] = []

    class Reader(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    step = Coupling(3, Affine(2), 2, network=Reader, order=[1, 0, 2])
    z, h = torch.randn(6, 4, 3), torch.randn(4, 2)
    step(z, h)
    assert torch.equal(seen[0], torch.cat([z[..., [1]], h.expand(6, 4, 2)], dim=-1).flatten(0, 1))


def test_samples_that_share_h_project_it_once() -> None:
    step = Coupling(3, Affine(2), 500, (40,))
    z, h = torch.randn(100, 4, 3), torch.randn(4, 500)
    with FlopCounterMode(display=False) as counter:
        step(z, h)
    outputs = 4
    assert counter.get_total_flops() == 2 * (400 * 1 * 40 + 4 * 500 * 40 + 400 * 40 * outputs)


def test_where_nothing_passes_the_step_follows_h_or_is_learned() -> None:
    z = torch.randn(6, 1, dtype=F64)
    conditioned = Coupling(1, Affine(1), 2, (8,)).double()
    push(conditioned, Case(push=0.3))
    h = torch.randn(6, 2, dtype=F64)
    loc, raw = conditioned.net(z[:, :0], h).unbind(-1)
    torch.testing.assert_close(conditioned(z, h), Affine(1)(z, torch.stack([loc, raw], -1)))
    assert (loc[:-1] != loc[1:]).all()
    learned = Coupling(1, Affine(1)).double()
    assert [parameter.shape for parameter in learned.parameters()] == [(2,)]
    push(learned, Case(push=0.3))
    torch.testing.assert_close(learned(z), Affine(1)(z, next(learned.parameters())))


def test_autocast_s_log_det_is_that_of_the_numbers_it_used() -> None:
    """B19: only the network loses digits."""
    step = Coupling(4, Affine(2, exp_scale), 2, (8,))
    push(step, Case(push=0.3))
    z, h, outputs = torch.randn(5, 4), torch.randn(5, 2), []
    hook = step.net.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, log_det = step(z, h)
    hook.remove()
    (used,) = outputs
    assert not torch.equal(used, step.net(z[:, :2], h))
    loc, raw = used.double().chunk(2, dim=-1)
    scale = torch.exp(4 * torch.tanh(raw / 4))
    torch.testing.assert_close(image[:, 2:].double(), loc + scale * z[:, 2:].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det.double(), scale.log().sum(-1), rtol=1e-6, atol=1e-6)


def test_an_order_is_loaded_with_the_weights() -> None:
    first, second = (Coupling(4, Affine(2), 2, (9,), order=order).double() for order in ([3, 1, 0, 2], [0, 2, 1, 3]))
    push(first, Case(push=0.3))
    z, h = torch.randn(5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(z, h)[0], first(z, h)[0])


@pytest.mark.parametrize("order", [None, [4, 2, 0, 3, 1]])
def test_its_jacobian_is_triangular_where_the_step_s_is(order: list[int] | None) -> None:
    step = Coupling(5, UnitLowerTriangular(3), 0, (8,), order=order).double()
    push(step, Case(push=0.5))
    z = torch.randn(4, 5, dtype=F64, requires_grad=True)
    causal = step.causal_order()
    assert causal is not None
    assert causal.tolist() == (order or list(range(5)))
    ordered = jacobian(step(z)[0], z)[:, causal][:, :, causal]
    assert (ordered.triu(1) == 0).all()
    assert (ordered[:, 3:, :2] != 0).all()  # the map's first row reads no number
    assert Coupling(5, Planar(3)).causal_order() is None


def test_what_it_cannot_be_built_of() -> None:
    positive = Affine(2)
    positive.domain = (0.0, math.inf)
    for build, kind, message in (
        (
            lambda: Coupling(3, positive),
            ValueError,
            r"^step: expected one of the real line, got Affine from \(0\.0, inf\)$",
        ),
        (lambda: Coupling(3, Affine(4)), ValueError, r"^step: expected one of at most dim=3 variables, got dim=4$"),
        (
            lambda: Coupling(3, Reverse(2)),
            ValueError,
            r"^step: expected one that reads a context, got Reverse with context_size=0$",
        ),
        (lambda: Coupling(3, nn.Linear(2, 2)), TypeError, r"^step: expected a Bijector, got Linear$"),  # pyright: ignore
        (lambda: Coupling(0, Affine(1)), ValueError, r"^dim: expected an int >= 1, got 0$"),
        (lambda: Coupling(3, Affine(1), order=[0, 1]), ValueError, r"^order: expected a permutation of 0\.\.2"),
        (lambda: Coupling(3, Affine(1), 0, (0,)), ValueError, r"^hidden: expected an int >= 1, got 0$"),
    ):
        with pytest.raises(kind, match=message):
            build()


def _normed(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.Linear(16, outputs))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_samples_of_examples_for_rows(training: bool) -> None:  # noqa: FBT001
    """It took 16 examples for its 16 channels, and so others' statistics, without a word."""
    step = flowpost.testing.push(Coupling(4, Affine(2), network=_normed), 1.0, 0)
    norm = cast(nn.BatchNorm1d, step.get_submodule("net.network.1"))
    norm.get_buffer("running_mean").normal_()
    norm.get_buffer("running_var").uniform_(0.5, 2.0)
    z = torch.randn(3, 16, 4)
    image, log_det = step.train(training)(z)
    rows, of_rows = step(z.flatten(0, 1))
    torch.testing.assert_close(image, rows.view(3, 16, 4))
    torch.testing.assert_close(log_det, of_rows.view(3, 16))


class Odd(nn.Module):
    """A network whose outputs go wrong at the end."""

    def __init__(self, inputs: int, outputs: int, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(inputs, outputs), end

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.layer(z))


@pytest.mark.parametrize("end", [lambda out: out[..., :1], lambda out: out.unsqueeze(-2), lambda out: out.mean(0)])
def test_a_network_s_outputs_are_not_broadcast(end: Callable) -> None:
    """An axis more mixed each row with all others."""
    step = Coupling(4, Affine(2), network=lambda inputs, outputs: Odd(inputs, outputs, end))
    with pytest.raises(
        ValueError, match=r"^network: expected a row of outputs for each of inputs, \(5, 4\), got shape"
    ):
        step(torch.randn(5, 4))


def test_a_network_that_changes_its_input_in_place_is_refused() -> None:
    """It moved what passes, and the caller's z too, and the log-det said nothing of it."""
    network = lambda inputs, outputs: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(inputs, outputs))  # noqa: E731
    with pytest.raises(ValueError, match="^network: expected its input left as it is"):
        Coupling(4, Affine(2), network=network)(torch.randn(5, 4))
