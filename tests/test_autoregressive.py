"""The gated autoregressive step against its paper's algorithm: its network unit by unit, its order, its passes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from registry import BY_NAME, Case, backward, draw, jacobian, push
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flowpost import Autoregressive, Bijector
from flowpost.functional import gate, gate_inverse, gate_parameters
from flowpost.masked import host
from flowpost.masked.network import MADE, MaskedLinear

Map = Callable[..., tuple[Tensor, Tensor]]


def directions(step: Bijector) -> dict[str, Map]:
    """Both, for points of the domain."""
    return {"forward": step, "inverse": backward(step)}


STEPS = {
    "linear": lambda dim: Autoregressive(dim, 0, ()),
    "1": lambda dim: Autoregressive(dim, 3, (20,)),
    "2": lambda dim: Autoregressive(dim, 0, (20, 30)),
    "3 relu": lambda dim: Autoregressive(dim, 3, (40, 40, 40), activation=F.relu),
    "blocks": lambda dim: Autoregressive(dim, 3, (300, 700)),
    "order": lambda dim: Autoregressive(dim, 3, (20,), order=torch.randperm(dim).tolist()),
}


def xavier(module: nn.Module) -> None:
    """An initialization that knows nothing of masks."""
    for parameter in module.parameters(recurse=False):
        nn.init.xavier_normal_(parameter) if parameter.ndim > 1 and parameter.numel() else nn.init.normal_(parameter)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dim", [1, 2, 5, 20])
@pytest.mark.parametrize("change", ["xavier", "decay", "push"])
def test_the_jacobian_is_triangular_in_the_declared_order(name: str, dim: int, change: str) -> None:
    """B10: exact zeros above the diagonal, a positive diagonal, and no dependence missing below it."""
    step = STEPS[name](dim).double()
    if change != "push":
        step.net.apply(xavier)
    if change == "decay":  # what an optimizer's step does to every entry, masked or not
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.sub_(0.1 * parameter.sign() + 0.05)
    if change == "push":  # less in the wide network, whose gates would saturate: slopes that round to 0
        push(step, Case(push=0.05 if name == "blocks" else 0.3))
    order = torch.arange(dim) if step.order is None else step.order
    context = torch.randn(6, step.context_size, dtype=torch.float64) if step.context_size else None
    for function in directions(step).values():
        z = torch.randn(6, dim, dtype=torch.float64, requires_grad=True)
        matrix = jacobian(function(z, context)[0], z)[:, order][:, :, order]
        assert (matrix.triu(1) == 0).all()
        assert (matrix.diagonal(dim1=-2, dim2=-1) > 0).all()
        if "relu" not in name:  # whose units may all be off
            below = torch.ones(dim, dim).tril(-1).bool()
            assert (matrix[:, below] != 0).any(0).all()


def test_weights_that_nothing_may_read_get_no_gradient() -> None:
    """The other side of B10: an optimizer's noise cannot come in through the masked entries."""
    step = Autoregressive(6, 2, (200, 300)).double()
    step.net.apply(xavier)
    image, log_det = step(torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64))
    (image.sum() + log_det.sum()).backward()
    for layer in step.net.layers:
        assert isinstance(layer, MaskedLinear)
        gradient = layer.weight.grad
        assert gradient is not None
        mask = layer.staircase.mask.on(gradient).bool()
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).all()


@pytest.mark.parametrize("hidden", [(), (7,), (300,)], ids=str)
def test_the_first_variable_s_gate_depends_on_the_context(hidden: Sequence[int]) -> None:
    step = Autoregressive(4, 3, hidden).double()
    step.net.apply(xavier)
    context = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    image, _ = step(torch.randn(1, 4, dtype=torch.float64), context)
    (gradient,) = torch.autograd.grad(image[0, 0], context)
    assert (gradient != 0).all()


class Flops(TorchDispatchMode):
    """Counts the arithmetic of matrix products; torch's own counter hooks every module, and a hooked one is called."""

    total = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if func._overloadpacket is torch.ops.aten.addmm_:
            self.total += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_network_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """B24: one pass forward, no more arithmetic back, and one projection of the context for any number of samples.

    Where the sizes of the sums cannot be read, as on a device, the way back has one more pass.
    """
    step = Autoregressive(5, 3, (10, 10), activation=F.relu)
    z, context = torch.randn(7, 4, 5), torch.randn(4, 3)
    network = 2 * 28 * sum(layer.weight.numel() for layer in step.net.stack)
    project = 2 * 4 * 3 * 10

    def flops(function: Map) -> int:
        with Flops() as counter:
            function(z, context)
        return counter.total

    assert flops(step) == network + project
    assert flops(lambda z, context: step.inverse(z, context, preimage=z)) == network + project
    assert network + project < flops(step.inverse) <= 2 * (network + project)
    monkeypatch.setattr(host, "on_host", lambda _: True)
    assert project < flops(step.inverse) <= network + project


def test_a_fresh_autoregressive_step_scales_by_its_gate() -> None:
    for bias in (2.0, 0.5):
        step = Autoregressive(4, 3, (8,), forget_bias=bias).double()
        z = torch.randn(5, 4, dtype=torch.float64)
        image, log_det = step(z, step.initial_context().double())
        scale = 1 / (1 + math.exp(-bias))
        torch.testing.assert_close(image, scale * z, rtol=0, atol=1e-14)
        torch.testing.assert_close(log_det, torch.full((5,), 4 * math.log(scale), dtype=torch.float64))


def test_autocast_s_log_det_is_that_of_the_gate_it_used() -> None:
    """B19: the network may run in bf16, what is made of its outputs may not."""
    step, z, context = draw(BY_NAME["autoregressive_2_context"], Case(3, seed=6), dtype=torch.float32)
    assert isinstance(step, Autoregressive)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, log_det = step(z, context)
        raw, mean = step.net(z, context).float().unbind(-2)
    assert raw.dtype == torch.float32
    expected_image, expected_log_det = gate(z, *gate_parameters(raw, mean))
    expected = expected_image, expected_log_det.float()
    torch.testing.assert_close((image, log_det), expected, rtol=0, atol=1e-5)
    assert not torch.equal(log_det, step(z, context)[1])  # bf16 was in use


def naive_made(net: MADE, z: Tensor, context: Tensor | None, order: Sequence[int]) -> Tensor:
    """Germain et al. (2015) for one example, unit by unit, with masks of its own over the full weights.

    Unit u of a layer of n has seen the first floor(u dim / n) variables of the order; the outputs for a variable those
    before it. They come in the variables' own order, as rows.
    """
    place = {variable: index for index, variable in enumerate(order)}
    seen = [place[variable] + 1 for variable in range(net.dim)]
    values = [float(v) for v in z]
    offsets = [] if net.project is None or context is None else (net.project.weight @ context).detach().tolist()
    for index, layer in enumerate(net.layers):
        assert isinstance(layer, MaskedLinear)
        weight, bias = layer.weight.tolist(), layer.bias.tolist()
        count, last = len(bias), index == len(net.layers) - 1
        allowed = [place[u % net.dim] if last else math.floor(u * net.dim / count) for u in range(count)]
        sums = []
        for u in range(count):
            total = bias[u] + (offsets[u] if index == 0 and offsets else 0.0)
            for v, value in enumerate(values):
                if seen[v] <= allowed[u]:
                    total += weight[u][v] * value
            sums.append(total)
        values = sums if last else [net.activation(torch.tensor(s, dtype=torch.float64)).item() for s in sums]
        seen = allowed
    return torch.tensor(values, dtype=torch.float64).view(net.outputs, net.dim).T


@pytest.mark.parametrize(("dim", "hidden", "context_size"), [(1, (3,), 2), (3, (), 2), (3, (), 0), (4, (6,), 0),
    (4, (5, 9), 2), (3, (2,), 1), (5, (7, 3, 8), 2), (2, (260,), 1)])  # fmt: skip
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_autoregressive_gate_is_the_paper_s(
    dim: int,
    hidden: Sequence[int],
    context_size: int,
    shuffled: bool,  # noqa: FBT001
) -> None:
    """Kingma et al. (2016), algorithm 1: m, s = net(z, h); s = sigmoid(s); z = s z + (1 - s) m; log_det = sum log s."""
    order = torch.randperm(dim).tolist() if shuffled else None
    step = Autoregressive(dim, context_size, hidden, order=order).double()
    push(step, Case(seed=1, push=0.3))
    z = torch.randn(3, dim, dtype=torch.float64)
    context = torch.randn(3, context_size, dtype=torch.float64) if context_size else None
    image, log_det = step(z, context)
    image, log_det = image.detach(), log_det.detach()
    for row in range(3):
        turn = order or list(range(dim))
        numbers = naive_made(step.net, z[row], None if context is None else context[row], turn)
        total = 0.0
        for variable in range(dim):
            raw, mean = numbers[variable].tolist()
            s = 1 / (1 + math.exp(-(2 + 4 * math.tanh(raw / 4))))
            expected = s * float(z[row, variable]) + (1 - s) * 1e3 * math.tanh(mean / 1e3)
            assert float(image[row, variable]) == pytest.approx(expected, rel=1e-11, abs=1e-11)
            total += math.log(s)
        assert float(log_det[row]) == pytest.approx(total, rel=1e-11, abs=1e-11)


def test_gate_inverse_undoes_gate_for_given_numbers() -> None:
    z, raw, mean = (3 * torch.randn(7, 4, dtype=torch.float64) for _ in range(3))
    logit, mean = gate_parameters(raw, mean)
    image, log_det = gate(z, logit, mean)
    s = torch.sigmoid(logit)
    torch.testing.assert_close(image, s * z + (1 - s) * mean)
    torch.testing.assert_close(log_det, s.log().sum(-1))
    back, log_det_back = gate_inverse(image, logit, mean)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_det_back, -log_det)


def test_gate_parameters_are_bounded_softly() -> None:
    raw = torch.tensor([0.0, 1e-3, 1e6, -1e6], dtype=torch.float64, requires_grad=True)
    logit, mean = gate_parameters(raw, raw)
    torch.testing.assert_close(logit, torch.tensor([2.0, 2.001, 6.0, -2.0], dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(mean, torch.tensor([0.0, 1e-3, 1e3, -1e3], dtype=torch.float64), rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(logit.sum(), raw)
    assert slope[0] == 1
